"""The judge is to be believed: true edits pass, wrong ones fail, and motion that is not there scores as chance does."""
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from tinytav.claims.experiment import make_clip
from tinytav.claims.judge import MOTIONS, Judge, pixels
from tinytav.stable_diffusion.checkpoint import build, read_component
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.toy import draw, world

ATTRIBUTES = world.ATTRIBUTES
CLIPS = [make_clip("judge", i) for i in range(3)]


@pytest.fixture(scope="module")
def judges():
    vae = build(VAE, *read_component(Path(__file__).parents[2] / "weights/toy/vae", VAEConfig))
    return [Judge(vae, clip.motion) for clip in CLIPS]


def mean(shares, name):
    return sum(share[name] for share in shares) / len(shares)


def judged(judges, change):
    """answers() for every clip when its views are replaced by change(views)."""
    return [judge.answers(judge.vae_trip(pixels([draw.render(clip.scene, view) for view in change(judge.views)])), clip.scene)
            for judge, clip in zip(judges, CLIPS)]


def test_the_truth_scores_full_marks_whatever_the_look(judges):
    for judge, clip in zip(judges, CLIPS):
        other = replace(clip.scene, look=world.random_scene(Random(1)).look)
        if other.activity == "running":     # has no gear, so its colour cannot be told
            other = replace(other, look=replace(other.look, gear=0))
        shares = judge.answers(judge.draw(other)[1], clip.scene)        # asked with another look than it has
        assert all(shares[name] >= 0.875 for name in (*ATTRIBUTES, *MOTIONS, "look")), shares
        assert judge.look(judge.draw(other)[1], clip.scene) == (other, 1)
        assert shares["psnr"] > 20


@pytest.mark.parametrize("i, name", [(0, "subject"), (1, "clothes"), (2, "place")])
def test_a_wrong_edit_is_called_wrong_and_most_of_the_rest_right(judges, i, name):
    judge, clip = judges[i], CLIPS[i]
    wrong = replace(clip.scene, **{name: ATTRIBUTES[name][ATTRIBUTES[name].index(getattr(clip.scene, name)) - 1]})
    shares = judge.answers(judge.draw(wrong)[1], clip.scene)
    assert shares[name] <= 0.25 and shares["x"] > 0.5
    assert sum(shares[other] for other in ATTRIBUTES if other != name) >= 4        # of six


def test_motion_that_is_not_there_scores_as_chance_does(judges):
    frozen = judged(judges, lambda views: [replace(view, phase=views[0].phase) for view in views])
    back = judged(judges, lambda views: [replace(view, phase=other.phase) for view, other in zip(views, views[::-1])])
    order = [3, 6, 1, 7, 4, 0, 2, 5]
    shuffled = judged(judges, lambda views: [replace(view, phase=views[i].phase) for view, i in zip(views, order)])
    for shares in (frozen, back, shuffled):
        assert mean(shares, "phase") < 0.45 and mean(shares, "x") > 0.9 and mean(shares, "camera") > 0.8
    still = judged(judges, lambda views: [replace(view, x=views[0].x) for view in views])
    assert mean(still, "x") < 0.55
    still = judged(judges, lambda views: [replace(view, camera=views[0].camera) for view in views])
    assert mean(still, "camera") < 0.6 and mean(still, "x") > 0.9


@pytest.mark.slow
def test_whichever_frame_is_held_still_the_clip_does_not_move(judges):
    judge, clip = judges[0], CLIPS[0]
    true = judge.draw(clip.scene)[1]
    assert judge.answers(true, clip.scene)["moves"] == 1
    for i in range(len(true)):
        still = (true[i:i + 1] + 0.05 * torch.randn(1, *true.shape[1:])).expand_as(true)
        assert judge.answers(still, clip.scene)["moves"] == 0
    with pytest.raises(ValueError, match="not finite"):
        judge.answers(true / 0, clip.scene)


def test_look_agreement_tells_a_clip_of_many_looks(judges):
    judge, clip = judges[0], CLIPS[0]
    looks = [replace(clip.scene, look=world.Look(gear=i % 3, prop=i % 2)) for i in range(len(judge.views))]
    x = torch.cat([judge.draw(scene)[1][i:i + 1] for i, scene in enumerate(looks)])
    assert judge.look(x, clip.scene)[1] <= 0.5


def test_edits_change_one_attribute_and_a_third_are_held_out():
    for i in range(12):
        clip = make_clip("test", i)
        for edit in clip.edits:
            assert [name for name in ATTRIBUTES if getattr(edit.scene, name) != getattr(clip.scene, name)] == [edit.name]
            assert edit.scene.look == clip.scene.look
        assert [world.is_held_out(edit.scene) for edit in clip.edits[:2]] == [i % 3 == 2] * 2
        assert abs(clip.motion.drift) == 0.16
    kinds = [edit.name for i in range(12) for edit in make_clip("test", i).edits]
    assert {name: kinds.count(name) for name in set(kinds)} == dict(subject=12, place=12, clothes=6, hat=6, time=6, style=6)
