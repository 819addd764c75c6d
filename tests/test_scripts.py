"""The two commands as a user runs them, on a tiny checkpoint of filled weights."""
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hardening.warm import warm
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinytav import editing, pipeline
from tinytav.files import frames
from tinytav.files.runs import Run
from tinytav.weights import default_path, load

ROOT = Path(__file__).parents[1]


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def call(cwd, script, *args, status=0):
    """Runs a script in a fork of one interpreter that has imported torch: as a process of its own, but at once."""
    done = warm()(cwd, script, *args, limit=300)
    assert done.status == status, done.out + done.err
    return done


def test_a_run_saves_what_it_changed_and_all_it_needs(place):
    run = place / "runs/clip"
    assert {p.name for p in run.iterdir()} >= {"run.json", "clip.safetensors", "tuned.safetensors",
                                              "inversion.safetensors", "source.mp4", "loss.csv"}
    assert not (run / "state.safetensors").exists()
    settings = json.loads((run / "run.json").read_text())
    assert settings["prompt"] == "a man is skiing" and settings["indices"] == [0, 2, 4] and settings["fps"] == "6"
    assert all(any(part in name for part in ("attn1.to_q", "attn2.to_q", "attn_temp"))
               for name in load_file(run / "tuned.safetensors"))
    assert len((run / "loss.csv").read_text().splitlines()) == 1 + settings["steps"]


def test_sampling_several_prompts_writes_a_clip_a_gif_and_a_strip_each(place):
    call(place, "sample.py", "--prompt", "a panda is skiing", "../../etc/x", "", "--out", "out")
    stems = ("a-panda-is-skiing", "etc-x", "empty")
    ends = (".mp4", ".gif", ".png", ".sample.json")
    expected = {f"{stem}{end}" for stem in stems for end in ends} | {"index.html"}
    assert {p.name for p in (place / "out").iterdir()} == expected
    call(place, "sample.py", "--prompt", "a panda is skiing", "--out", "out")
    assert (place / "out/a-panda-is-skiing-2.mp4").exists()                 # nothing is overwritten
    assert (place / "out/a-panda-is-skiing-2.mp4").read_bytes() == (place / "out/a-panda-is-skiing.mp4").read_bytes()


def test_the_page_is_kept_up_to_date_and_named_last(place, tmp_path):
    shutil.copytree(place / "w", tmp_path / "w")
    shutil.copy(place / "clip.mp4", tmp_path)
    page = tmp_path / "runs/clip/index.html"
    done = call(tmp_path, "train.py", "clip.mp4", "a man is skiing", "--weights", "w")
    assert done.out.splitlines()[-1] == "page: runs/clip/index.html" and "finished" in page.read_text()
    done = call(tmp_path, "sample.py", "--prompt", "a <b>panda</b>", "--guidance", "3")
    assert done.out.splitlines()[-1] == "page: runs/clip/index.html"
    assert "a &lt;b&gt;panda&lt;/b&gt;" in page.read_text() and 'src="a-b-panda-b.mp4"' in page.read_text()
    first = (tmp_path / "runs/clip/a-b-panda-b.mp4").read_bytes()
    told = json.loads((tmp_path / "runs/clip/a-b-panda-b.sample.json").read_text())
    assert told["prompt"] == "a <b>panda</b>" and told["settings"]["guidance"] == 3
    python, script, *words = shlex.split(told["command"])                   # the command that repeats it does
    assert (python, script) == ("python", "sample.py")
    call(tmp_path, script, *words)
    assert (tmp_path / "runs/clip/a-b-panda-b-2.mp4").read_bytes() == first
    command = re.search(r"<pre>(python train.py clip.mp4 .*?)</pre>", page.read_text())[1]
    python, script, *words = shlex.split(html.unescape(command))
    call(tmp_path, script, *words)
    first, second = (tmp_path / f"runs/{run}/tuned.safetensors" for run in ("clip", "clip-2"))
    assert second.read_bytes() == first.read_bytes()


def record_of(folder, name):
    return json.loads((folder / f"{name}.sample.json").read_text())["settings"]


def test_each_option_of_train_decides_what_it_names(place):
    flags = dict(size=16, frames=2, start=1, stride=2, steps=5, lr=0., attention="full", norm="frame", seed=7,
                 preview="a dog", precision="bf16")
    call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--out", "told",
         *(word for name, value in flags.items() for word in (f"--{name}", value)))
    settings = Run.open(place / "told/clip").settings
    usual = Run.open(place / "runs/clip").settings
    for name, value in flags.items():
        assert getattr(settings, name) == value != getattr(usual, name), name
    assert settings.indices == (1, 3) and len(load_file(place / "told/clip/clip.safetensors")["mean"][0, 0]) == 2
    losses = (place / "told/clip/loss.csv").read_text().splitlines()
    assert len(losses) == 1 + 5


def test_more_frames_than_the_weights_own_are_tuned_and_sampled_in_windows(place):
    told = "windows: the net sees {} of the 6 frames at a time, in {} windows, whose results are averaged.\n"
    for out, flags, window, count in (
            ("long", [], 3, 4), ("wider", ["--window", 4], 4, 3), ("once", ["--window", 6], None, 1)):
        trained = call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--frames", 6, "--out", out,
                       *flags)
        sampled = call(place, "sample.py", "--run", f"{out}/clip", "--prompt", "a dog")
        for done in (trained, sampled):
            assert told.format(window, count) in done.out if window else "windows:" not in done.out
        assert Run.open(place / out / "clip").settings.window == window
        assert len(frames.pictures(place / out / "clip/a-dog.mp4")) == 6
    tuned = [load_file(place / f"{out}/clip/tuned.safetensors") for out in ("long", "wider", "once")]
    for a, b in zip(tuned, tuned[1:]):
        assert not all(torch.equal(a[name], b[name]) for name in a)
    again = re.search(r"<pre>python (train.py .*?)</pre>", (place / "wider/clip/index.html").read_text())[1]
    script, *words = shlex.split(html.unescape(again))
    assert "--frames 6 --window 4" in again
    call(place, script, *words)
    first, second = (place / f"wider/{run}/tuned.safetensors" for run in ("clip", "clip-2"))
    assert second.read_bytes() == first.read_bytes()


def test_each_option_of_sample_decides_what_it_names(place):
    run = ["sample.py", "--run", "runs/clip", "--prompt", "a dog", "--out", "options"]
    call(place, *run)
    usual = dict(ddim_steps=3, guidance=2., noise="inverted", attention="sparse-causal", frames=3, size=32,
                 precision="fp32")
    assert record_of(place / "options", "a-dog").items() >= usual.items()
    first = np.asarray(Image.open(place / "options/a-dog.png"))
    changes = [("--steps", 2, dict(ddim_steps=2)), ("--guidance", 0, dict(guidance=0.)),
               ("--attention", "full", dict(attention="full")), ("--negative", "a man", dict(negative="a man")),
               ("--precision", "bf16", dict(precision="bf16")), ("--strength", 0.5, dict(strength=0.5))]
    for number, (flag, value, expected) in enumerate(changes, 2):
        call(place, *run, flag, value)
        assert record_of(place / "options", f"a-dog-{number}").items() >= (usual | expected).items()
        assert not np.array_equal(np.asarray(Image.open(place / f"options/a-dog-{number}.png")), first), flag
    call(place, *run, "--noise", "random", "--seed", 5, "--frames", 2, "--size", 16)
    told = record_of(place / "options", "a-dog-random")
    assert told.items() >= dict(noise="random", seed=5, frames=2, size=16).items()


def test_guidance_zero_samples_without_the_prompt(place):
    call(place, "sample.py", "--run", "runs/clip", "--prompt", "a dog", "a cat", "--guidance", 0, "--out", "unguided")
    assert (place / "unguided/a-dog.gif").read_bytes() == (place / "unguided/a-cat.gif").read_bytes()


def test_the_command_of_an_untuned_sample_makes_it_again_whatever_the_defaults_are(place):
    flags = ["--frames", 2, "--size", 16, "--seed", 5, "--attention", "full", "--steps", 2, "--guidance", 3]
    call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--out", "untuned", *flags)
    told = json.loads((place / "untuned/a-dog.sample.json").read_text())
    _, script, *words = shlex.split(told["command"])
    call(place, script, *words)
    again = json.loads((place / "untuned/a-dog-2.sample.json").read_text())
    assert again["settings"] == told["settings"] and told["settings"]["attention"] == "full"
    assert (place / "untuned/a-dog.mp4").read_bytes() == (place / "untuned/a-dog-2.mp4").read_bytes()
    flags = [*flags, "--attention", "spatial"]
    call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--out", "untuned", *flags)
    assert (place / "untuned/a-dog.gif").read_bytes() != (place / "untuned/a-dog-3.gif").read_bytes()


def test_the_last_preview_is_the_edit_that_sampling_makes(place):
    """It is inverted without text, as every edit is."""
    call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--preview", "a dog", "--out", "previewed")
    call(place, "sample.py", "--run", "previewed/clip", "--prompt", "a dog")
    folder = place / "previewed/clip"
    assert (folder / "preview-6.gif").read_bytes() == (folder / "a-dog.gif").read_bytes()
    assert (folder / "preview-3.gif").read_bytes() != (folder / "preview-6.gif").read_bytes()


def test_names_with_spaces_and_escape_sequences_are_quoted_and_shown_harmless(place):
    shutil.copy(place / "clip.mp4", place / "c\x1b[31m d.mp4")
    done = call(place, "train.py", "c\x1b[31m d.mp4", "a \x1b]0;x\x07man", "--weights", "w", "--out", "my runs",
                "--steps", 1)
    assert "\x1b" not in done.out + done.err.replace("\x1b[A", "") and "python sample.py --run 'my runs/" in done.out
    done = call(place, "sample.py", "--run", "my runs/c-31m-d", "--prompt", "a \x1b[2Jdog")
    assert "\x1b" not in done.out + done.err.replace("\x1b[A", "")


def test_without_a_folder_of_weights_those_beside_the_package_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_path() == ROOT / "weights/toy"
    (tmp_path / "weights").mkdir()
    assert default_path() == ROOT / "weights/toy"
    (tmp_path / "weights/toy").mkdir()
    assert default_path() == Path("weights/toy")


def test_an_empty_clip_is_no_clip(place):
    assert "A clip and its caption are needed" in call(place, "train.py", "", "a man", "--weights", "w", status=2).err


def test_an_empty_folder_for_results_is_runs(place, tmp_path):
    call(tmp_path, "train.py", place / "clip.mp4", "a man", "--weights", place / "w", "--steps", 1, "--out", "")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["clip"]


def test_closed_and_broken_outputs_end_without_a_traceback(place):
    line = shlex.join(command("sample.py", "--run", "runs/clip", "--prompt", "a dog", "--steps", 1, "--out", "closed"))
    for redirection in (">&- 2>&-", "| head -0"):
        done = subprocess.run(["bash", "-c", f"{line} {redirection}"], cwd=place, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
        assert done.returncode == 0 and (place / "closed/a-dog.mp4").is_file()          # bash says how `head` ended


def test_a_prompt_named_like_a_file_of_the_run_takes_no_files_place(place):
    before = (place / "runs/clip/run.json").read_bytes()
    call(place, "sample.py", "--prompt", "run", "index", "metrics", "--run", "runs/clip")
    assert (place / "runs/clip/run.json").read_bytes() == before
    assert {"run.mp4", "index.mp4", "metrics.mp4"} <= {file.name for file in (place / "runs/clip").iterdir()}


def test_steps_other_than_the_runs_are_inverted_anew(place):
    done = call(place, "sample.py", "--prompt", "a dog", "--steps", 2, "--out", "steps")
    assert "inverting" in done.err
    assert "inverting" not in call(place, "sample.py", "--prompt", "a dog", "--out", "steps").err


def test_what_is_inverted_is_the_mean_of_the_clips_latents_by_the_tuned_net(place):
    run, sd = Run.open(place / "runs/clip"), load(place / "w")
    net = editing.open_run(sd, run).net
    mean, _ = run.latents()
    noise = pipeline.last(pipeline.invert(net, sd.schedule, mean, sd.encode_prompts([""]), run.settings.ddim_steps))
    torch.testing.assert_close(run.read("inversion")["noise"], noise, atol=1e-5, rtol=1e-5)


def test_edit_friendly_noise_comes_from_the_clip_its_caption_and_the_seed(place):
    for out, seed in (("friendly", 33), ("friendly", 34), ("plain", None)):
        flags = ["--noise", "edit-friendly"] + (["--seed", seed] if seed else [])
        call(place, "sample.py", "--prompt", "a dog", "--out", out, *flags)
    first, second, default = (place / f"{name}.gif" for name in (
        "friendly/a-dog-edit-friendly", "friendly/a-dog-edit-friendly-2", "plain/a-dog-edit-friendly"))
    assert first.read_bytes() == default.read_bytes() != second.read_bytes()
    run, sd = Run.open(place / "runs/clip"), load(place / "w")
    session = editing.open_run(sd, run)
    x = editing.sample_clip(sd, session.net, session.make_noise("edit-friendly"), "a dog", run.settings.guidance)
    frames.write_strip(place / "plain/expected.png", x[frames.strip_columns(len(x))])
    strip, expected = (np.asarray(Image.open(place / f"plain/{name}.png"), int)
                       for name in ("a-dog-edit-friendly", "expected"))
    assert abs(strip[-len(expected):] - expected).max() <= 1            # this process may have other threads


def test_without_inversion_other_lengths_and_sizes_can_be_drawn(place):
    call(place, "sample.py", "--prompt", "a dog", "--noise", "random", "--frames", 5, "--size", 16, "--out", "free")
    assert frames.read(place / "free/a-dog-random.mp4", 16, 4, 5).x.shape == (5, 3, 16, 16)
    call(place, "sample.py", "--prompt", "a dog", "--frames", 5, status=2)


def test_zero_shot_and_plain_text_to_image(place):
    call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--frames", 3, "--out", "zero")
    call(place, "sample.py", "--weights", "w", "--prompt", "a cat", "--frames", 1, "--out", "zero")
    assert {p.name for p in (place / "zero").iterdir()} >= {"a-dog.mp4", "a-dog.gif", "a-dog.png", "a-cat.png"}
    assert not (place / "zero/a-cat.mp4").exists()


def test_same_seed_same_bits_with_or_without_previews(place):
    call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--preview", "a dog", "--out", "again")
    for name in ("tuned", "inversion"):
        first, second = (load_file(place / f"{run}/clip/{name}.safetensors") for run in ("runs", "again"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((place / "again/clip").glob("preview-*.gif"))) == 4


@pytest.fixture(scope="module")
def long(place):
    """A run of many steps that nothing stopped: its arguments and its folder."""
    args = "clip.mp4", "a man is skiing", "--weights", "w", "--steps", 60
    call(place, "train.py", *args, "--out", "whole")
    return args, place / "whole/clip"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_resumes_to_the_same_bits(place, long, number):
    (args, whole), out = long, f"stopped{number}"
    process = subprocess.Popen(command("train.py", *args, "--out", out), cwd=place, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = place / out / "clip/state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert f"--resume {out}/clip" in output
    assert 0 < len(load_file(state)["losses"]) < 60
    call(place, "train.py", "--resume", f"{out}/clip")
    assert not state.exists()
    for name in ("tuned.safetensors", "inversion.safetensors", "loss.csv"):
        assert (place / out / "clip" / name).read_bytes() == (whole / name).read_bytes()
    call(place, "train.py", "--resume", f"{out}/clip", status=2)            # it is finished


def test_ctrl_c_stops_the_inversion_after_tuning_too(place):
    shutil.copytree(place / "w", place / "inverting")
    tiny.save_json(place / "inverting/defaults.json", tiny.DEFAULTS | {"ddim_steps": 300})
    train = command("train.py", "clip.mp4", "a man", "--weights", "inverting", "--out", "late")
    process = subprocess.Popen(train, cwd=place, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (place / "late/clip/tuned.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate(timeout=60)[1] and process.returncode == 130
    call(place, "train.py", "--resume", "late/clip")
    assert (place / "late/clip/inversion.safetensors").exists()


def test_a_preview_comes_after_its_step_is_saved_and_ctrl_c_ends_it(place):
    """900 DDIM steps make the preview long. The signal comes while it runs: it ends at once, and no step is lost."""
    shutil.copytree(place / "w", place / "slow")
    tiny.save_json(place / "slow/defaults.json", tiny.DEFAULTS | {"ddim_steps": 900, "steps": 8})
    train = command("train.py", "clip.mp4", "a man", "--weights", "slow", "--out", "seen", "--preview", "x")
    process = subprocess.Popen(train, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = place / "seen/clip/state.safetensors"

    def steps_saved():
        try:
            return len(load_file(state)["losses"])
        except (OSError, SafetensorError):
            return 0
    while steps_saved() < 2 and process.poll() is None:                 # the first preview comes after step 2
        time.sleep(0.005)
    time.sleep(0.3)                                                     # now it is at work
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume seen/clip" in output
    assert steps_saved() == 2 and not list((place / "seen/clip").glob("preview-*"))


@pytest.mark.parametrize("script, args, message", [
    ("train.py", ["clip.mp4", "  "], "prompt is empty"), ("train.py", ["none.mp4", "a man"], "No such file: none.mp4"),
    ("train.py", ["clip.mp4"], "a caption|caption are needed"), ("train.py", ["w", "a man"], "0 frames"),
    ("train.py", ["clip.mp4", "a man", "--frames", "7"], "there are only 6, not 7"),
    ("train.py", ["clip.mp4", "a man", "--size", "-8"], "not from 8"),
    ("train.py", ["clip.mp4", "a man", "--lr", "nan"], "not from 0"),
    ("train.py", ["clip.mp4", "a man", "--lr", "inf"], "not from 0"),
    ("train.py", ["clip.mp4", "a man", "--tokenizer", "no/such"], "No vocab.json in no/such"),
    ("train.py", ["clip.mp4", "a man", "--device", "toaster"], "toaster cannot be used"),
    ("train.py", ["--resume", "w"], "w is not a run"), ("train.py", ["--resume", "runs/clip"], "is finished"),
    ("sample.py", ["--prompt", "a dog", "--run", "nowhere"], "nowhere is not a run"),
    ("train.py", ["clip.mp4", "a man", "--device", "meta"], "meta cannot be used"),
    ("sample.py", ["--prompt", "a dog", "--seed", "3"], "nothing random"),
    ("sample.py", ["--prompt", "a dog", "--strength", "-1"], "not from 0"),
    ("sample.py", ["--prompt", "a dog", "--strength", "1e39"], "use a smaller --strength"),
    ("sample.py", ["--prompt", "a dog", "--weights", "w", "--strength", "2"], "needs the tuning of a run"),
    ("sample.py", ["--prompt", "a dog", "--steps", "1000"], "not from 1 to 999")])
def test_errors_are_sentences_and_leave_nothing(place, script, args, message):
    weights = [] if script == "sample.py" or "--resume" in args else ["--weights", "w", "--out", "bad"]
    before = sorted(place.rglob("*"))
    done = call(place, script, *args, *weights, status=2)
    assert any(part in done.err for part in message.split("|")) and "Traceback" not in done.err
    assert sorted(place.rglob("*")) == before


def test_weights_that_are_absent_or_other_than_the_runs_are_refused(place):
    assert "No weights at none" in call(place, "train.py", "clip.mp4", "x", "--weights", "none", status=2).err
    other = tiny.write_folder(place / "other", dtype=torch.float16)
    done = call(place, "sample.py", "--prompt", "x", "--run", "runs/clip", "--weights", other, status=2)
    assert "made with other weights" in done.err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_tuned_tensors_stay_float32(place, precision):
    """What half precision does to an edit is compared on the toy, in claims/test_studio.py."""
    flags = ["--precision", precision, "--out", precision]
    call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "w", *flags)
    assert all(z.dtype is torch.float32 for z in load_file(place / precision / "clip/tuned.safetensors").values())
    assert json.loads((place / precision / "clip/run.json").read_text())["precision"] == precision
    call(place, "sample.py", "--run", f"{precision}/clip", "--prompt", "x", "--precision", precision)


def test_a_resumed_run_keeps_its_settings(place):
    (place / "kept").mkdir()
    settings = json.loads((place / "runs/clip/run.json").read_text())
    (place / "kept/run.json").write_text(json.dumps(settings | {"finished": 0}))
    done = call(place, "train.py", "--resume", "kept", "--lr", "1e-4", "--seed", "33", status=2)
    assert "leave out --lr, --seed" in done.err


def test_a_run_is_not_overwritten_by_a_second_one_nor_its_files_by_a_prompt(place):
    source = (place / "runs/clip/source.mp4").read_bytes()
    call(place, "sample.py", "--prompt", "source", "--run", "runs/clip")
    assert (place / "runs/clip/source.mp4").read_bytes() == source and (place / "runs/clip/source-2.mp4").exists()
    two = ["--weights", "w", "--out", "two"]
    call(place, "train.py", "clip.mp4", "a dog", *two, "--attention", "full", "--norm", "frame")
    call(place, "train.py", "clip.mp4", "a cat", *two, "--attention", "causal")
    assert json.loads((place / "two/clip-2/run.json").read_text())["prompt"] == "a cat"
    done = call(place, "sample.py", "--run", "two/clip-2", "--prompt", "a dog", "--attention", "full")
    assert "inverting" in done.err


def edited(place, name, **changes):
    """A copy of the finished run with other settings."""
    shutil.copytree(place / "runs/clip", place / name)
    settings = json.loads((place / "runs/clip/run.json").read_text()) | changes
    (place / name / "run.json").write_text(json.dumps(settings))
    return name


@pytest.mark.parametrize("changes, message", [
    (dict(frames=4), "does not hold the 4 frames"),
    (dict(fps="abc"), "fps = 'abc' is not a number"), (dict(fps="0"), "fps = '0'"),
    (dict(precision="fp8"), "precision = 'fp8' is not implemented; only 'fp32' or"),
    (dict(finished="yes"), "finished = 'yes' is not a number"),
    (dict(seed=None), "seed = None is not an integer"), (dict(seed=2 ** 40), "seed = 1099511627776 must be from 0"),
    (dict(frames=-3), "frames = -3 must be above 0"), (dict(attention="sideways"), "sideways")])
def test_a_run_json_edited_by_hand_is_refused_by_name(place, changes, message):
    run = edited(place, f"edited{abs(hash(str(changes)))}", **changes)
    done = call(place, "sample.py", "--run", run, "--prompt", "x", "--noise", "random", status=2)
    assert message in done.err and "Traceback" not in done.err


def test_a_bad_neighbour_does_not_hide_the_newest_run(place, tmp_path):
    shutil.copytree(place / "runs/clip", tmp_path / "runs/good")
    shutil.copytree(place / "w", tmp_path / "w")
    tiny.save_json(tmp_path / "runs/bad/run.json", {})
    done = call(tmp_path, "sample.py", "--prompt", "x")
    assert "run: runs/good" in done.out and "passed over: runs/bad/run.json" in done.err


def test_an_unfinished_run_is_not_sampled_but_resumed(place):
    run = edited(place, "unfinished", finished=0)
    for name in ("tuned", "inversion"):
        (place / run / f"{name}.safetensors").unlink()
    assert "train.py --resume unfinished" in call(place, "sample.py", "--run", run, "--prompt", "x", status=2).err
    torch_file = {"scale": torch.tensor(1.), "losses": torch.zeros(1)}
    save_file(torch_file, place / run / "state.safetensors")
    assert "does not fit" in call(place, "train.py", "--resume", run, status=2).err


def test_another_prediction_than_the_runs_is_refused(place):
    done = call(place, "sample.py", "--run", "runs/clip", "--prompt", "x", "--prediction", "v", status=2)
    assert "made with other weights" in done.err


def test_weights_of_a_small_world_warn_once_of_what_they_cannot_draw(place):
    world = tiny.write_folder(place / "world")
    (world / "knows.txt").write_text("a man who is skiing\n")
    tiny.write_clip(world / "clip.mp4")
    done = call(place, "train.py", "world/clip.mp4", "a man is skiing", "--weights", "world", "--out", "small")
    assert "warning" not in done.err
    done = call(place, "sample.py", "--run", "small/clip", "--prompt", "a dragon is skiing")
    assert done.err.count("warning: world may not know 'dragon': it draws a man who is skiing") == 1
    done = call(place, "train.py", "clip.mp4", "a man is skiing", "--weights", "world", "--out", "small")
    assert "may not know clip.mp4" in done.err


def test_help_fits_one_screen():
    for script in ("train.py", "sample.py"):
        done = subprocess.run(command(script, "--help"), capture_output=True, text=True,
                              env=os.environ | {"COLUMNS": "100"})
        assert 20 < len(done.stdout.splitlines()) <= 58
