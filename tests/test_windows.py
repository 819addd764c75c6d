"""Clips of more frames than the net sees at once: what the windows are, and that nothing ever holds two of them."""
import json
from dataclasses import replace

import pytest
import test_control
import tiny
import torch

from tinytav import editing, memory, pipeline, windows
from tinytav.control import Control
from tinytav.errors import InputError
from tinytav.files.runs import Run
from tinytav.inflation import inflate
from tinytav.noise import NOISES
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.tuning import Tuner
from tinytav.weights import load


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint for 3 frames and a clip of 6."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_folder(place / "w")
    tiny.write_clip(place / "clip.mp4")
    return place


@pytest.fixture(scope="module")
def sd(place):
    return load(place / "w")


def begin(sd, place, out, **settings):
    return editing.begin(sd, place / "clip.mp4", "a man", out=out, **settings)


@pytest.fixture(scope="module")
def finished(sd, place):
    """A finished run of 6 frames, by a net of 3."""
    session = begin(sd, place, place / "runs", frames=6, steps=3)
    pipeline.last(session.tune())
    session.finish()
    return session


def setting(frames=6):
    """A net of 3 frames, latents of a clip, and two contexts."""
    generator = torch.Generator().manual_seed(0)
    net = tiny.filled(inflate(tiny.filled(UNet(UNetConfig.from_json(tiny.UNET))), 3))
    x = torch.randn(1, 4, frames, 8, 8, generator=generator)
    return net, x, torch.randn(2, 7, 24, generator=generator).split(1)


# ---- The windows ---------------------------------------------------------------------------------

def test_windows_of_eight_frames_by_hand():
    assert windows.places(9, 8) == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7, 8]]
    assert [place[1] for place in windows.places(24, 8)] == [1, 4, 7, 10, 13, 16, 17]
    assert [place[1] for place in windows.places(22, 8)] == [1, 4, 7, 10, 13, 15]
    for count in (1, 7, 8):
        assert windows.places(count, 8) == [slice(None)]


@pytest.mark.parametrize("window", [3, 4, 5, 8, 24])
def test_windows_begin_with_the_first_frame_overlap_and_cover_the_clip(window):
    for count in (*range(window + 1, window + 30), 200):
        places = windows.places(count, window)
        assert {frame for place in places for frame in place} == set(range(count))
        assert len({tuple(place) for place in places}) == len(places)
        for place in places:
            assert len(place) == window and place[0] == 0
            assert place[1:] == list(range(place[1], place[1] + window - 1))
        assert places[0][1] == 1 and places[-1][-1] == count - 1
        assert all(0 < after[1] - before[1] <= (window - 1) // 2 for before, after in zip(places, places[1:]))


@torch.no_grad()
def test_a_prediction_is_the_mean_of_the_windows_in_which_a_frame_is():
    net, x, (context, _) = setting()
    t = torch.tensor([500])
    a, b, c, d = (net(x[:, :, [0, i, i + 1]], t, context)[0].unbind(1) for i in (1, 2, 3, 4))
    expected = [(a[0] + b[0] + c[0] + d[0]) / 4, a[1], (a[2] + b[1]) / 2, (b[2] + c[1]) / 2, (c[2] + d[1]) / 2, d[2]]
    found = pipeline.predict(net, x, 500, context)
    torch.testing.assert_close(found[0], torch.stack(expected, dim=1), atol=1e-6, rtol=1e-6)
    both = pipeline.guided(net, x, 500, context, 0 * context, 3.)
    empty = pipeline.predict(net, x, 500, 0 * context)
    torch.testing.assert_close(both, empty + 3 * (found - empty), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_clip_that_fits_is_predicted_as_ever_to_the_last_bit():
    net, x, (context, _) = setting(frames=3)
    assert torch.equal(pipeline.predict(net, x, 500, context), net(x, torch.tensor([500]), context))
    with pytest.raises(InputError, match="for clips of 3 frames, and the clip has 2"):
        pipeline.predict(net, x[:, :, :2], 500, context)


@torch.no_grad()
def test_each_window_is_controlled_by_its_own_hints():
    net, x, (context, _) = setting(frames=4)
    hints, model, t = torch.rand(4, 3, 16, 16), test_control.controlnet(), torch.tensor([500])
    found = pipeline.predict(net, x, 500, context, Control(model, hints))
    first, second = ([0, 1, 2], [0, 2, 3])
    parts = []
    for place in (first, second):
        part = x[:, :, place]
        parts.append(net(part, t, context, Control(model, hints[place]).residuals(part, t, context)))
    torch.testing.assert_close(found[:, :, 1], parts[0][:, :, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, 2], (parts[0][:, :, 2] + parts[1][:, :, 1]) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, 3], parts[1][:, :, 2], atol=1e-5, rtol=1e-5)


# ---- Tuning --------------------------------------------------------------------------------------

def test_the_window_of_a_step_is_a_function_of_seed_and_step_and_all_come():
    places = windows.places(32, 8)
    drawn = [windows.drawn(places, 33, k) for k in range(80)]
    torch.randn(3)
    assert drawn == [windows.drawn(places, 33, k) for k in range(80)]
    assert drawn != [windows.drawn(places, 34, k) for k in range(80)]
    assert {tuple(place) for place in drawn} == {tuple(place) for place in places}


def test_a_step_shows_the_net_the_drawn_window_of_the_latents():
    """The latents of each frame are its number, and the noise is the same at every step."""
    net, x, (context, _) = setting()
    numbers = torch.arange(6.).view(1, 1, 6, 1, 1).expand_as(x)
    tuner, seen = Tuner(net, Schedule(), numbers, 0 * x, context, lr=0., seed=7), []

    def loss(net, schedule, x0, noise, t, context):
        seen.append(x0[0, 0, :, 0, 0].tolist())
        assert noise.shape == x0.shape == (1, 4, 3, 8, 8)
        return next(iter(tuner.parameters.values())).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinytav.tuning.denoising_loss", loss)
        pipeline.last(tuner.run(12))
    assert seen == [windows.drawn(windows.places(6, 3), 7, k) for k in range(12)]


def test_a_run_in_windows_that_is_stopped_resumes_to_the_same_bits(sd, place, tmp_path):
    whole, stopped = (begin(sd, place, tmp_path, frames=6, steps=6) for _ in range(2))
    pipeline.last(whole.tune())
    for step, _ in stopped.tune():
        if step == 3:
            stopped.save()
            break
    stopped.run.close()
    again = editing.resume(sd, Run.locked(stopped.run.path))
    assert again.net.frames == 3 and again.shape[2] == 6
    assert [step for step, _ in again.tune()] == [4, 5, 6] and again.tuner.losses == whole.tuner.losses
    for name, p in whole.net.tuned().items():
        assert torch.equal(p, again.net.tuned()[name]), name


# ---- A run ---------------------------------------------------------------------------------------

def test_more_frames_than_the_weights_own_are_seen_in_windows_of_so_many(sd, place, tmp_path):
    for settings, window in ((dict(frames=6), 3), (dict(frames=6, window=4), 4), (dict(frames=3), None),
                             (dict(frames=6, window=6), None), (dict(window=5), None), ({}, None)):
        session = begin(sd, place, tmp_path, **settings)
        frames = settings.get("frames", 3)
        assert Run.open(session.run.path).settings.window == window and session.shape[2] == frames, settings
        assert session.net.frames == (window or frames), settings
    assert editing.untuned(sd, 6).net.frames == 3 and editing.untuned(sd, 2).net.frames == 2
    of_one_frame = replace(sd, defaults=replace(sd.defaults, frames=1))
    assert editing.untuned(of_one_frame).net.frames == 1 and editing.untuned(of_one_frame, 6).net.frames == 3


def test_a_window_that_holds_the_clip_changes_no_bit(sd, place, tmp_path):
    made = []
    for settings in ({}, dict(frames=3, window=3), dict(window=5)):
        session = begin(sd, place, tmp_path, steps=3, **settings)
        pipeline.last(session.tune())
        made.append((session.tuner.losses, session.make_noise().x, session.edit("a dog").frames))
    for losses, noise, edit in made[1:]:
        assert losses == made[0][0] and torch.equal(noise, made[0][1]) and torch.equal(edit, made[0][2])


@pytest.mark.parametrize("settings, words", [
    (dict(frames=4, window=5), "The window of 5 frames is longer than the clip of 4"),
    (dict(frames=4, window=2), "A window of 2 of 4 frames is not possible: use one from 3")])
def test_a_window_that_cannot_be_is_refused_and_leaves_no_run(sd, place, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        begin(sd, place, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NOISES)
def test_the_net_never_sees_more_frames_than_a_window(sd, place, finished, tmp_path, name):
    session, seen = editing.open_run(sd, finished.run), []
    session.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].shape[:3]))
    edit = session.edit("a dog", session.make_noise(name, steps=3, seed=7), out=tmp_path)
    assert edit.frames.shape[0] == 6 and seen and all(shape[2] == 3 for shape in seen)
    assert max(shape[0] for shape in seen) <= 2                             # the two halves of guidance
    record = json.loads(edit.file.with_suffix(".sample.json").read_text())["settings"]
    assert record["frames"] == 6


def test_tuning_never_shows_the_net_more_frames_than_a_window(sd, place, tmp_path):
    session, seen = begin(sd, place, tmp_path, frames=6, steps=3), []
    session.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].shape))
    pipeline.last(session.tune())
    assert [shape[:3] for shape in seen] == [(1, 4, 3)] * 3
    assert memory.pixel_bytes(session.net, session.shape) == memory.pixel_bytes(session.net, session.shape[:2] + (
        3, *session.shape[3:]))


def test_a_run_opens_with_its_window_and_draws_longer_clips_in_windows(sd, place, finished):
    assert editing.open_run(sd, finished.run).net.frames == 3
    longer = editing.open_run(sd, finished.run, frames=9)
    assert longer.net.frames == 3 and longer.make_noise("random").x.shape[2] == 9
    assert editing.open_run(sd, finished.run, frames=2).net.frames == 2


def test_a_run_made_before_there_were_windows_is_seen_whole(sd, place, tmp_path):
    session = begin(sd, place, tmp_path, frames=5, window=5, steps=1)
    file = session.run.path / "run.json"
    settings = json.loads(file.read_text())
    del settings["window"]
    tiny.save_json(file, settings)
    session.run.close()
    again = editing.resume(sd, Run.locked(session.run.path))
    assert again.net.frames == 5
    pipeline.last(again.tune())
    again.finish()
    assert editing.open_run(sd, session.run.path).net.frames == 5
    assert editing.open_run(sd, session.run.path, frames=6).net.frames == 5


@pytest.mark.parametrize("window", [0, 2, 3, 4, "3"])
def test_a_window_in_run_json_that_cannot_be_is_refused(sd, place, tmp_path, window):
    file = begin(sd, place, tmp_path).run.path / "run.json"
    tiny.save_json(file, json.loads(file.read_text()) | dict(window=window))
    with pytest.raises(InputError, match="window"):
        Run.open(file.parent)
