"""The life of a run, as scripts and notebooks use it: begin, tune, finish, edit."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import tinytav
from tinytav import editing, pipeline
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.runs import Run
from tinytav.noise import NOISES
from tinytav.weights import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and a clip."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_folder(place / "w")
    tiny.write_clip(place / "clip.mp4")
    return place


@pytest.fixture(scope="module")
def sd(place):
    return load(place / "w")


@pytest.fixture(scope="module")
def finished(sd, place):
    """A session with a finished run."""
    session = editing.begin(sd, place / "clip.mp4", "a man is skiing", out=place / "runs", steps=2)
    pipeline.last(session.tune())
    session.finish()
    return session


def begin(sd, place, tmp_path, prompt="a man", **settings):
    return editing.begin(sd, place / "clip.mp4", prompt, out=tmp_path, **settings)


# ---- Begin ---------------------------------------------------------------------------------------

def test_a_clip_is_encoded_once_with_its_caption(sd, place, tmp_path):
    session = begin(sd, place, tmp_path, "a man is skiing", stride=1)
    clip, settings = session.clip, session.run.settings
    assert clip.mean.shape == clip.std.shape == session.shape == (1, 4, 3, 16, 19)          # 32 x 38 of 40 x 48 pixels
    assert settings.indices == (0, 1, 2) and settings.total == 6 and settings.fps == "12"
    assert torch.equal(torch.cat([clip.context, clip.empty]), sd.encode_prompts(["a man is skiing", ""]))
    mean, std = session.run.latents()
    assert torch.equal(mean, clip.mean) and torch.equal(std, clip.std)


@pytest.mark.parametrize("setting, value", [
    ("size", 16), ("frames", 2), ("start", 1), ("stride", 2), ("steps", 9), ("lr", 0.), ("ddim_steps", 4),
    ("guidance", 0.), ("attention", "full"), ("norm", "frame"), ("seed", 7), ("preview", "a dog")])
def test_every_setting_is_recorded_and_nothing_is_a_number_too(sd, place, tmp_path, setting, value):
    settings = begin(sd, place, tmp_path, **{setting: value}).run.settings
    usual = begin(sd, place, tmp_path).run.settings
    assert getattr(settings, setting) == value != getattr(usual, setting)


def test_settings_change_what_they_name(sd, place, tmp_path):
    usual, later = begin(sd, place, tmp_path, frames=3), begin(sd, place, tmp_path, frames=3, start=3)
    source = frames.read(place / "clip.mp4", 32, 2, 6).x
    assert torch.equal(later.clip.mean, pipeline.encode(sd.vae, source[3:])[0])
    assert not torch.equal(later.clip.mean, usual.clip.mean)
    other = begin(sd, place, tmp_path, frames=3, seed=7, norm="frame", attention="spatial").net
    assert (other.norm, other.attention) == ("frame", "spatial") and (usual.net.norm, usual.net.attention) == (
        "clip", "sparse-causal")
    name = next(name for name in other.tuned() if name.endswith("attn_temp.to_q.weight"))
    assert not torch.equal(other.tuned()[name], usual.net.tuned()[name])


def test_the_seed_and_the_learning_rate_change_the_tuning(sd, place, tmp_path):
    losses = {}
    for name, settings in dict(usual={}, again={}, seed=dict(seed=7), lr=dict(lr=0.)).items():
        session = begin(sd, place, tmp_path, steps=2, **settings)
        losses[name] = [loss for _, loss in session.tune()]
    assert losses["usual"] == losses["again"] != losses["seed"]
    assert losses["lr"][0] == losses["usual"][0] and losses["lr"][1] != losses["usual"][1]


def test_latents_that_are_not_finite_are_refused_and_leave_no_run(place, tmp_path):
    sd = load(place / "w")
    sd.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        begin(sd, place, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_caption_is_refused(sd, place, tmp_path):
    with pytest.raises(InputError, match="The prompt is empty"):
        begin(sd, place, tmp_path, " ")


def test_a_folder_that_is_there_is_never_written_into(sd, place, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        editing.begin(sd, place / "clip.mp4", "a man", folder=tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_new_net_leaves_the_callers_random_numbers_alone(sd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    editing.new_net(sd, 3, seed=7)
    assert torch.equal(torch.rand(3), expected)


# ---- Tune and finish -----------------------------------------------------------------------------

def test_resuming_equals_not_having_stopped(sd, place, tmp_path):
    whole = begin(sd, place, tmp_path, steps=6)
    pipeline.last(whole.tune())
    stopped = begin(sd, place, tmp_path, steps=6)
    for step, _ in stopped.tune():
        if step == 3:
            stopped.save()
            break
    stopped.run.close()
    again = editing.resume(sd, Run.locked(stopped.run.path))
    assert [step for step, _ in again.tune()] == [4, 5, 6] and again.tuner.losses == whole.tuner.losses
    for name, p in whole.net.tuned().items():
        assert torch.equal(p, again.net.tuned()[name]), name


def test_the_state_is_saved_at_the_end_and_finishing_leaves_what_sampling_needs(sd, place, tmp_path):
    session = begin(sd, place, tmp_path, steps=4)
    assert session.quarters == {1, 2, 3, 4}
    pipeline.last(session.tune())
    assert session.run.read("state")["losses"].tolist() == session.tuner.losses
    session.finish()
    run = Run.open(session.run.path)
    assert run.finished and not run.has("state")
    tuned = run.read("tuned")
    assert all(torch.equal(p, tuned[name]) for name, p in session.net.tuned().items())
    assert torch.equal(run.read("inversion")["noise"], session.make_noise("inverted").x)
    with pytest.raises(InputError, match="is finished"):
        editing.resume(sd, run)


def test_two_processes_do_not_tune_one_run(sd, place, tmp_path):
    session = begin(sd, place, tmp_path)
    with pytest.raises(InputError, match="Another process is at work"):
        Run.locked(session.run.path)
    session.run.close()
    Run.locked(session.run.path).close()


# ---- Edit ----------------------------------------------------------------------------------------

def test_an_edit_is_its_frames_its_files_and_its_record(finished, tmp_path):
    edit = finished.edit("a panda is skiing", guidance=3., negative="a man", out=tmp_path)
    assert edit.frames.shape == (3, 3, 32, 38) and edit.frames.abs().max() <= 1
    assert edit.file == tmp_path / "a-panda-is-skiing.mp4" and edit.page.is_file()
    shown = np.stack(frames.pictures(edit.file)).astype(int)
    assert np.abs(shown - frames.enlarged(edit.frames)).mean() < 8                      # what H.264 loses
    record = json.loads((tmp_path / "a-panda-is-skiing.sample.json").read_text())
    assert record["prompt"] == "a panda is skiing"
    assert record["settings"] == dict(ddim_steps=3, guidance=3., noise="inverted", negative="a man", frames=3, size=32,
                                      attention="sparse-causal", precision="fp32", weights=finished.sd.fingerprint)
    again = finished.edit("a panda is skiing", guidance=3., negative="a man", out=tmp_path)
    assert again.file.name == "a-panda-is-skiing-2.mp4" and torch.equal(again.frames, edit.frames)


def test_an_edit_is_inversion_and_guided_sampling(finished, tmp_path):
    sd, net, clip = finished.sd, finished.net, finished.clip
    noise = pipeline.last(pipeline.invert(net, sd.schedule, clip.mean, clip.empty, 2))
    context, away = sd.encode_prompts(["a panda", "a man"]).split(1)
    latents = pipeline.last(pipeline.sample(net, sd.schedule, noise, context, away, 2, 5.))
    edit = finished.edit("a panda", finished.make_noise(steps=2), 5., negative="a man", out=tmp_path)
    assert torch.equal(edit.frames, pipeline.decode(sd.vae, latents))


def test_the_saved_inversion_is_used_where_it_fits(finished, sd):
    calls = []

    def progress(steps, total, name):
        calls.append((total, name))
        return steps
    saved = finished.make_noise("inverted", progress=progress)
    assert calls == [] and torch.equal(saved.x, finished.run.read("inversion")["noise"])
    finished.make_noise("inverted", steps=2, progress=progress)
    other = editing.open_run(sd, finished.run, attention="full")
    assert not torch.equal(other.make_noise("inverted", progress=progress).x, saved.x)
    assert calls == [(2, "inverting"), (3, "inverting")]


def test_strength_scales_the_tuning_and_inverts_anew(finished, sd, tmp_path):
    before = editing.new_net(sd, 3, seed=finished.run.settings.seed).tuned()
    calls = []
    for strength in (0, 0.5, 1, 2):
        session = editing.open_run(sd, finished.run, strength=strength)
        for name, p in session.net.tuned().items():
            wanted = before[name] + strength * (finished.net.get_parameter(name) - before[name])
            torch.testing.assert_close(p, wanted)
        noise = session.make_noise(progress=lambda steps, total, name: calls.append(strength) or steps)
        edit = session.edit("a dog", noise, out=tmp_path / str(strength))
        assert torch.equal(edit.frames, finished.edit("a dog", out=tmp_path).frames) == (strength == 1)
        record = json.loads((tmp_path / f"{strength}/a-dog.sample.json").read_text())
        assert record["settings"].get("strength") == (None if strength == 1 else strength)
        assert (f"--strength {strength}" in record["command"]) == (strength != 1)
    assert calls == [0, 0.5, 2]             # at 1 the saved inversion holds
    with pytest.raises(InputError, match="smaller --strength"):
        editing.open_run(sd, finished.run, strength=1e39)


@pytest.mark.parametrize("name", NOISES)
def test_each_noise_knows_how_it_is_made_and_sampled(finished, tmp_path, name):
    noise = finished.make_noise(name, steps=5, seed=7)
    again, other = finished.make_noise(name, steps=5, seed=7), finished.make_noise(name, steps=5, seed=8)
    first, second, third = (finished.edit("a dog", one, out=tmp_path).frames for one in (noise, again, other))
    assert torch.equal(first, second) and torch.equal(first, third) == (not noise.seeded)
    record = json.loads((tmp_path / f"{finished.file_name('a dog', noise, None)}.sample.json").read_text())["settings"]
    assert record["noise"] == name and record.get("seed") == (7 if noise.seeded else None)


def test_random_noise_differs_between_frames_and_shared_noise_does_not(finished):
    x = finished.make_noise("random").x
    assert x.shape == finished.shape and not torch.equal(x[:, :, 0], x[:, :, 1])
    x = finished.make_noise("shared").x
    assert x.shape == finished.shape and torch.equal(x[:, :, 0], x[:, :, 1])


def test_noise_of_a_clip_needs_the_clips_size_and_frames(sd, finished):
    for session in (editing.untuned(sd, 2), editing.open_run(sd, finished.run, frames=2)):
        assert session.make_noise("random").x.shape[2] == 2
        with pytest.raises(InputError, match="is made from a run's clip"):
            session.make_noise("inverted")


def test_noise_that_is_not_finite_is_refused(sd, finished):
    session = editing.open_run(sd, finished.run)
    session.clip.mean.fill_(float("inf"))
    for name in ("edit-friendly", "inverted"):
        with pytest.raises(InputError, match="not finite"):
            session.make_noise(name, steps=2)


def test_frames_that_are_not_finite_are_refused(place, tmp_path):
    """The VAE's decoder may overflow where the latents do not."""
    sd = load(place / "w")
    sd.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        editing.untuned(sd).edit("a panda", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_sees_every_step(finished, tmp_path):
    seen = []

    def progress(steps, total, name):
        for i, step in enumerate(steps, 1):
            seen.append((name, i, total))
            yield step
    noise = finished.make_noise("edit-friendly", steps=5, progress=progress)
    finished.edit("a panda", noise, out=tmp_path, progress=progress)
    assert seen == [*(("inverting", i, 3) for i in (1, 2, 3)), *(("a panda", i, 3) for i in (1, 2, 3))]


def test_the_untuned_net_draws_squares_from_the_weights_alone(sd, tmp_path):
    session = editing.untuned(sd, frames=1, size=16, attention="full")
    edit = session.edit("a panda", out=tmp_path)
    assert edit.frames.shape == (1, 3, 16, 16) and edit.file == tmp_path / "a-panda.png"
    command = json.loads((tmp_path / "a-panda.sample.json").read_text())["command"]
    for words in ("--weights", "--attention full", "--frames 1", "--size 16", "--seed 33", "--noise random",
                  "--steps 3"):
        assert words in command
    with pytest.raises(InputError, match="size 1 "):
        editing.untuned(sd, size=1)


def test_the_lines_that_readme_prints_make_an_edited_clip(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    code = next(block for block in blocks if "tinytav.begin" in block)
    folder = tiny.write_folder(tmp_path / "weights/toy")
    tiny.write_clip(folder / "skiing.mp4")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    written = tmp_path / "runs/skiing/a-panda-is-skiing-on-the-snow.mp4"
    assert names["edit"].file.resolve() == written and len(tinytav.files.frames.pictures(written)) == 3
