"""The judge is to be believed: true edits pass, wrong ones fail, and motion that is not there scores as chance does."""
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from tinytav import pipeline
from tinytav.claims.clips import make_clip, said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.files.frames import to_tensor
from tinytav.measure.metrics import psnr
from tinytav.stable_diffusion.checkpoint import build, read_component
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.toy import draw, world

ATTRIBUTES = world.ATTRIBUTES
CLIPS = [make_clip("judge", i) for i in range(3)]


@pytest.fixture(scope="module")
def vae():
    return build(VAE, *read_component(Path(__file__).parents[2] / "weights/toy/vae", VAEConfig))


@pytest.fixture(scope="module")
def blur(vae):
    """Sends frames through the VAE, as all that is judged has been."""
    return lambda x: pipeline.decode(vae, pipeline.encode(vae, x)[0])


@pytest.fixture(scope="module")
def judges():
    return [Judge(clip.motion, frames=4) for clip in CLIPS]


def mean(shares, name):
    return sum(share[name] for share in shares) / len(shares)


def judged(judges, blur, change):
    """answers() for every clip when its views are replaced by change(views)."""
    found = []
    for judge, clip in zip(judges, CLIPS):
        pictures = to_tensor(np.stack([draw.render(clip.scene, view) for view in change(judge.views)]))
        found.append(judge.answers(blur(pictures), clip.scene))
    return found


def test_the_truth_scores_full_marks_whatever_the_look(judges, blur):
    for judge, clip in zip(judges, CLIPS):
        other = replace(clip.scene, look=world.random_scene(Random(1)).look)
        if other.activity == "running":     # has no gear, so its colour cannot be told
            other = replace(other, look=replace(other.look, gear=0))
        true = blur(judge.draw(other))
        shares = judge.answers(true, clip.scene)        # asked with another look than it has
        assert all(shares[name] == 1 for name in (*ATTRIBUTES, *MOTIONS)), shares
        assert shares["look"] >= 0.75 and shares["agreement"] >= 0.9, shares
        assert judge.unsaid(true, clip.scene)[0] == other
        assert shares["psnr"] == pytest.approx(psnr(true, judge.draw(other))) and shares["psnr"] > 20      # in its look


@pytest.mark.parametrize("i, name", [(0, "subject"), (1, "clothes"), (2, "place")])
def test_a_wrong_edit_is_called_wrong_and_most_of_the_rest_right(judges, blur, i, name):
    judge, clip = judges[i], CLIPS[i]
    wrong = replace(clip.scene, **{name: ATTRIBUTES[name][ATTRIBUTES[name].index(getattr(clip.scene, name)) - 1]})
    shares = judge.answers(blur(judge.draw(wrong)), clip.scene)
    assert shares[name] <= 0.25 and shares["x"] > 0.5
    assert sum(shares[other] for other in ATTRIBUTES if other != name) >= 4        # of six


def test_motion_that_is_not_there_scores_as_chance_does(judges, blur):
    frozen = judged(judges, blur, lambda views: [replace(view, phase=views[0].phase) for view in views])
    back, shuffled = (
        judged(judges, blur, lambda views: [replace(view, phase=views[i].phase) for view, i in zip(views, order)])
        for order in ((3, 2, 1, 0), (2, 0, 3, 1)))
    for shares in (frozen, back, shuffled):
        assert mean(shares, "phase") < 0.45 and mean(shares, "x") > 0.9 and mean(shares, "camera") > 0.8
    still = judged(judges, blur, lambda views: [replace(view, x=views[0].x) for view in views])
    assert mean(still, "x") < 0.55
    still = judged(judges, blur, lambda views: [replace(view, camera=views[0].camera) for view in views])
    assert mean(still, "camera") < 0.6 and mean(still, "x") > 0.9


def test_whichever_frame_is_held_still_the_clip_does_not_move(judges, blur):
    judge, clip = judges[0], CLIPS[0]
    true = blur(judge.draw(clip.scene))
    assert judge.answers(true, clip.scene)["moves"] == 1
    for i in range(len(true)):
        still = (true[i:i + 1] + 0.05 * torch.randn(1, *true.shape[1:])).expand_as(true)
        assert judge.answers(still, clip.scene)["moves"] == 0
    with pytest.raises(ValueError, match="not finite"):
        judge.answers(true / 0, clip.scene)


def test_look_agreement_tells_a_clip_of_many_looks(judges):
    judge, clip = judges[0], CLIPS[0]
    looks = [replace(clip.scene, look=world.Look(gear=i % 3, prop=i % 2)) for i in range(len(judge.views))]
    x = torch.cat([judge.draw(scene)[i:i + 1] for i, scene in enumerate(looks)])
    assert judge.answers(x, clip.scene)["look"] <= 0.5


def test_agreement_is_about_what_the_caption_leaves_open(judges, blur):
    """A clip whose clothes change from frame to frame: agreement falls only if the caption is silent about them."""
    judge, clip = judges[0], CLIPS[0]
    colours = ATTRIBUTES["clothes"]
    changing = [replace(clip.scene, clothes=colours[i % 4]) for i in range(len(judge.views))]
    x = blur(torch.cat([judge.draw(scene)[i:i + 1] for i, scene in enumerate(changing)]))
    silent, named = judge.answers(x, clip.scene, said("user")), judge.answers(x, clip.scene)
    others = 3 + len(world.LOOKS)                       # hat, time and style, and the look
    assert silent["agreement"] == pytest.approx((0.25 + others) / (1 + others), abs=0.03)
    assert named["agreement"] > 0.95


def test_agreement_does_not_ask_whether_the_value_is_the_sources(judges, blur):
    """The whole clip in other clothes than the source's: it agrees with itself, but what is unsaid was not kept."""
    judge, clip = judges[0], CLIPS[0]
    colours = ATTRIBUTES["clothes"]
    other = replace(clip.scene, clothes=colours[colours.index(clip.scene.clothes) - 1])
    shares = judge.answers(blur(judge.draw(other)), clip.scene, said("user"))
    assert shares["agreement"] > 0.95 and shares["clothes"] == 0
