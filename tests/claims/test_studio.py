"""One clip's way through a variant: an edit moves towards its prompt, and each setting does what it says."""
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinytav import edit_friendly, pipeline, windows
from tinytav.attention_maps import WordMaps, watched, word_positions
from tinytav.claims import studies
from tinytav.claims.clips import KnownClip, KnownEdit, longer, make_clip, said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.claims.studio import ForSteps, Net, Studio, Variant
from tinytav.inflation import ClipCrossAttention
from tinytav.keep import FirstFrame, Mask, WordMask
from tinytav.measure import metrics
from tinytav.measure.metrics import psnr, textual_alignment
from tinytav.toy import world
from tinytav.toy.examples import CLIPS, MOTION
from tinytav.weights import load

SCENE = CLIPS["skiing"]
TOY = Path(__file__).parents[2] / "weights/toy"
EDITS = [KnownEdit("subject", replace(SCENE, subject="panda")), KnownEdit("place", replace(SCENE, place="beach"))]
CLIP = KnownClip(SCENE, MOTION, EDITS, make_clip("test", 0).motion)
UNTUNED = Net(tuned=None)


@pytest.fixture(scope="module")
def settings():
    return vars(load(TOY).defaults) | dict(steps=20, ddim_steps=10)


@pytest.fixture(scope="module")
def studio(settings):
    return Studio(TOY, CLIP, settings, captions="full", frames=4)


@pytest.fixture(scope="module")
def quick(settings):
    """One edit, of the place, two frames, two steps of everything."""
    return Studio(TOY, CLIP._replace(edits=EDITS[1:]), settings | dict(steps=2, ddim_steps=2), frames=2)


@pytest.fixture(scope="module")
def net(quick):
    """The untuned net."""
    return quick.tuned_net(UNTUNED)


def test_references_are_what_their_names_say(quick):
    source, true, still, other = map(quick.reference, ("source", "true edit", "still", "other motion"))
    wanted, elsewhere = (judge.draw(EDITS[1].scene) for judge in (quick.judge, Judge(CLIP.other, 2)))
    for made, drawn in ((source, quick.source), (true, wanted), (other, elsewhere)):
        assert psnr(made[0], drawn) > 20 and not torch.equal(made[0], drawn)    # all have been through the VAE
    assert torch.equal(still[:, 0], true[:, 1]) and torch.equal(still[:, 1], true[:, 1])


def test_the_true_edit_succeeds_and_neither_the_source_nor_a_still_copy_does(quick):
    true, source, still = (quick.score(quick.reference(name))[0] for name in ("true edit", "source", "still"))
    assert true["success"] and true["edited"] > 0.8 and true["kept"] > 0.8 and true["moves"] == 1
    assert not source["success"] and source["edited"] < 0.2 and source["kept"] > 0.8
    assert not still["success"] and still["moves"] == 0 and still["edited"] > 0.8


def test_an_edit_succeeds_if_all_that_is_needed_is_right_in_most_frames(quick, monkeypatch):
    all_right = dict.fromkeys((*world.ATTRIBUTES, *MOTIONS, "moves"), 1.)
    wrong = [name for name in all_right if not answered(quick, all_right | {name: 0.5}, monkeypatch)["success"]]
    assert set(wrong) == {"place", *MOTIONS, "moves"}
    assert answered(quick, all_right | dict(hat=0.625, x=0.625), monkeypatch)["success"]


def test_kept_and_motion_are_means_of_what_the_judge_says(quick, monkeypatch):
    shares = {name: i / 8 for i, name in enumerate(world.ATTRIBUTES)} | dict(phase=0.25, x=0.5, camera=1., moves=1.)
    score = answered(quick, shares, monkeypatch)
    assert score["kept"] == pytest.approx(sum(i / 8 for i in (0, 1, 2, 3, 5, 6)) / 6)          # place is edited
    assert score["edited"] == 0.5 and score["motion"] == pytest.approx(1.75 / 3)


def answered(studio, shares, monkeypatch):
    """The scores of an edit of which the judge says `shares`."""
    monkeypatch.setattr(studio.judge, "answers", lambda x, scene, said: shares)
    return studio.score(studio.source[None])[0]


def test_an_edit_moves_towards_its_prompt_and_keeps_the_motion(studio):
    source, scores = studio.eye.images(studio.source), studio.score(studio.edit(Variant()))
    for after, text in zip(scores, studio.texts):
        assert after["edited"] > 0.6 and after["kept"] > 0.8
        assert after["text"] > textual_alignment(source, text) + 5
    for part in MOTIONS:                                                    # guessing gives 0.25 and 0.33
        assert sum(after[part] for after in scores) / len(scores) >= 0.6, part


@pytest.mark.slow
def test_in_bf16_the_toys_edits_are_as_right_as_in_float32(settings):
    """The whole method in bf16: no score of the judge falls by more than one frame in eight, and frames are near."""
    studio, half = (Studio(TOY, CLIP, settings, "full", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    edited, again = (each.edit(Variant()) for each in (studio, half))
    assert psnr(again.flatten(0, 1), edited.flatten(0, 1)) > 25
    for full, score in zip(studio.score(edited), studio.score(again)):
        for question in ("edited", "kept", *MOTIONS):
            assert score[question] >= full[question] - 0.13, question


def test_captions_name_the_gist_and_what_is_edited_or_everything(quick):
    assert said("user") == ("subject", "activity", "place")
    assert said("user", ("hat",)) == ("subject", "hat", "activity", "place")
    assert said("full") == tuple(world.ATTRIBUTES)
    assert quick.prompts == ["a man is skiing on the beach"]


def test_edits_change_one_attribute_and_a_third_are_held_out():
    clips = [make_clip("test", i) for i in range(12)]
    for i, clip in enumerate(clips):
        for edit in clip.edits:
            changed = [name for name in world.ATTRIBUTES if getattr(edit.scene, name) != getattr(clip.scene, name)]
            assert changed == [edit.name] and edit.scene.look == clip.scene.look
        assert [world.is_held_out(edit.scene) for edit in clip.edits[:2]] == [i % 3 == 2] * 2
        assert abs(clip.motion.drift) == 0.16 and clip.other == make_clip("test", i + 1).motion
    kinds = Counter(edit.name for clip in clips for edit in clip.edits)
    assert kinds == dict(subject=12, place=12, clothes=6, hat=6, time=6, style=6)


def test_a_net_is_tuned_as_its_fields_say(quick, monkeypatch):
    made = []

    def tune(tuner, steps):                     # makes no step
        made.append((tuner.net.attention, tuner.net.norm, len(tuner.parameters), tuner.optimizer.param_groups[0]["lr"],
                     tuner.seed, steps))
        return []

    monkeypatch.setattr("tinytav.tuning.Tuner.run", tune)
    for kind in (Net(), Net("all", "first", "frame", rate=1 / 3)):
        Studio.tuned_net(quick, kind)
    everything = len(dict(quick.sd.unet.named_parameters())) + 7 * 7            # T-Attn: 7 tensors in each of 7 blocks
    assert made == [("sparse-causal", "clip", 49, quick.settings["lr"], 33, 2),
                    ("first", "frame", everything, pytest.approx(quick.settings["lr"] / 3), 33, 2)]
    assert quick.tuned_net(UNTUNED).attention == "sparse-causal" and len(made) == 2


def test_a_net_sees_a_long_clip_in_the_windows_on_which_it_is_tuned(settings, monkeypatch):
    clip, made = longer(CLIP._replace(edits=EDITS[1:]), 32), []
    long = Studio(TOY, clip, settings | dict(ddim_steps=1), frames=32)
    monkeypatch.setattr("tinytav.tuning.Tuner.run", lambda tuner, steps: made.append(tuner) or [])
    net = Studio.tuned_net(long, Net())
    [tuner] = made
    assert net is tuner.net and net.frames == 8 and tuner.places == windows.places(32, 8)


def test_a_longer_clip_moves_as_fast_and_drifts_as_far():
    clip = make_clip("long", 0)
    long, short = (world.views(each.motion, count) for each, count in ((longer(clip, 32), 32), (clip, 8)))
    for a, b in zip(long, short):
        assert a.camera == pytest.approx(b.camera) and a.phase == pytest.approx(b.phase)
    assert long[16].x == pytest.approx(short[4].x) and long[16].size == pytest.approx(short[4].size)
    assert longer(clip, 8) == clip and longer(clip, 32).edits == clip.edits


# ---- noise ---------------------------------------------------------------------------------------

def test_each_kind_of_noise_is_what_its_name_says(quick, net):
    inverted = quick.noise("inverted", net).x
    walk = pipeline.invert(net, quick.sd.schedule, quick.encoded.mean, quick.encoded.empty, 2)
    torch.testing.assert_close(inverted, pipeline.last(walk))
    random = quick.noise("random", net).x
    torch.testing.assert_close(random, pipeline.gaussian(inverted.shape, 33))


# ---- sampling ------------------------------------------------------------------------------------

def test_sampling_is_given_the_noise_the_prompts_and_the_guidance(quick, net):
    noise, wanted = quick.noise("inverted", net), quick.sd.encode_prompts(["a man is skiing on the beach"])
    empty, guidance = quick.sd.encode_prompts([""]), quick.settings["guidance"]
    walk = pipeline.sample(net, quick.sd.schedule, noise.x, wanted, empty, 2, guidance)
    torch.testing.assert_close(quick.sample(net, noise, Variant()), pipeline.last(walk))


def test_edit_friendly_noise_takes_its_own_way(quick, net):
    clip = quick.encoded
    inverted = list(edit_friendly.invert(net, quick.sd.schedule, clip.mean, clip.context, 2, 33))
    latents = pipeline.last(edit_friendly.sample(net, quick.sd.schedule, inverted, quick.wanted, clip.empty, 3.))
    friendly = quick.edit(Variant(UNTUNED, "edit-friendly"))
    torch.testing.assert_close(friendly, quick.decode(latents))


def test_what_is_kept_is_the_drawn_mask_the_edited_words_own_or_the_true_first_frame(quick, net):
    two = Studio(TOY, CLIP, quick.settings, frames=2)           # each of its edits has its own mask, word and frame
    noise, drawn, clip = quick.noise("inverted", net), quick.judge.draw(EDITS[1].scene), quick.encoded
    pixels = (drawn != quick.source).any(1)
    cells = pixels.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).any(4).any(2)            # a latent is 8 x 8 pixels
    first = FirstFrame(quick.encode(drawn[:1]))

    def kept(*keeps):
        return pipeline.last(noise.sample(net, quick.sd.schedule, quick.wanted, clip.empty, 3., keeps=keeps))
    true = kept(Mask(clip.mean, cells))
    maps = WordMaps(2, word_positions(quick.sd.tokenizer, *quick.prompts, "beach"), *clip.mean.shape[3:])
    with watched(net, ClipCrossAttention, maps):
        word = kept(WordMask(clip.mean, maps))
    both = kept(Mask(clip.mean, cells), first)
    for variant, wanted in ((Variant(mask="true"), true), (Variant(mask="word"), word), (Variant(first=1), kept(first)),
                            (Variant(mask="true", first=1), both)):
        torch.testing.assert_close(quick.sample(net, noise, variant), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(two.sample(net, noise, variant)[1:], wanted, atol=1e-4, rtol=1e-4)
    assert 0 < cells.float().mean() < 1 and not torch.equal(true, word)
    pasted = torch.where(pixels[:, None], quick.decode(true)[0], quick.decode(clip.mean)[0])
    torch.testing.assert_close(quick.edit(Variant(UNTUNED, mask="true"))[0], pasted, atol=1e-3, rtol=1e-3)
    given = quick.edit(Variant(UNTUNED, mask="true", first=1))[0, 0]                    # whole, also outside the mask
    torch.testing.assert_close(given, quick.decode(both)[0, 0], atol=1e-3, rtol=1e-3)


def test_a_first_frame_may_be_held_in_the_first_half_of_the_steps(quick, net):
    noise, held = quick.noise("inverted", net), []
    keep = ForSteps(lambda x, noised: held.append(len(held)) or x, 1)
    pipeline.last(noise.sample(net, quick.sd.schedule, quick.wanted, quick.encoded.empty, 3., keeps=[keep]))
    assert held == [0, 1]                                       # before the first of two steps, and after it
    always, half, never = (quick.sample(net, noise, Variant(first=share)) for share in (1, 0.5, 0))
    assert not torch.equal(half, always) and not torch.equal(half, never)


def test_outside_is_where_the_true_edit_is_the_source(quick):
    [changed] = quick.changed()
    x = quick.source + torch.where(changed[:, None], 0.2, 0.02)         # a tenth and a hundredth of the range
    [score] = quick.score(x[None])
    assert score["outside"] == pytest.approx(40, abs=1e-3) and 0.1 < changed.float().mean() < 0.9
    nearly = torch.ones_like(changed)
    nearly[:, :3] = False                                               # 2 % of the rows
    assert math.isnan(quick.outside(x, nearly)) and not math.isnan(metrics.psnr_outside(x, quick.source, nearly))


def test_strength_is_a_share_of_what_tuning_changed(quick):
    for kind in (Net(), Net(tuned="all")):
        before, tuned = (dict(each(kind).named_parameters()) for each in (quick.untuned_net, quick.tuned_net))
        for strength in (0, 0.5, 1, 2):
            for name, p in quick.net(kind, strength).named_parameters():
                torch.testing.assert_close(p, before[name] + strength * (tuned[name] - before[name]))
    assert not torch.equal(*(quick.edit(Variant(strength=strength)) for strength in (1, 5)))


def test_each_row_of_the_studies_makes_something_of_its_own(quick):
    """By the untuned net, so that neither tuning nor attention differ: rows that differ in noise or sampling alone."""
    rows = studies.KEPT | {"no inversion": studies.TRIAL["no inversion"]}
    made = {name: quick.edit(row._replace(net=UNTUNED)) for name, row in rows.items()}
    names = list(made)
    for i, name in enumerate(names):
        assert made[name].shape == (1, *quick.source.shape) and made[name].isfinite().all()
        assert not any(torch.equal(made[name], made[other]) for other in names[:i]), name
