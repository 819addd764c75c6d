"""A run's folder: names, settings, and what is refused."""
import json
import os
from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from tinytav.errors import InputError
from tinytav.files import runs
from tinytav.files.runs import Run, Settings

SETTINGS = dict(clip="clip.mp4", prompt="a man", weights="w", fingerprint="0", frames=3, fps="8", size=64, norm="clip",
                attention="sparse-causal", steps=1, lr=1e-3, seed=33, ddim_steps=2, guidance=2., precision="fp32")


def test_settings_survive_the_disk(tmp_path):
    settings = Settings.from_json(SETTINGS | dict(indices=list(range(0, 600, 2)), total=600, versions=dict(torch="2"),
                                                  vae="v", embedding=["a", "b"]))
    Run(tmp_path, settings).save()
    assert Run.open(tmp_path).settings == settings
    assert settings.source() == dict(weights="w", tokenizer=None, prediction=None, vae="v", embedding=("a", "b"))


@pytest.mark.parametrize("fps", ["8", "30000/1001", "1298160000/1078416239"])
def test_every_frame_rate_of_a_video_can_be_stored(fps):
    """Phones write variable rates with a clock of 90,000 ticks, whose means are large fractions."""
    assert Fraction(Settings.from_json(SETTINGS | dict(fps=fps)).fps) == Fraction(fps)


def test_what_a_run_could_not_read_again_is_refused_before_it_is_made():
    with pytest.raises(InputError, match="frames = 2000000"):
        Settings.from_json(SETTINGS | dict(frames=2_000_000))
    with pytest.raises(InputError, match="prompt is missing"):
        Settings.from_json({name: value for name, value in SETTINGS.items() if name != "prompt"})


def create(folder, fill=Run.save):
    return Run.create(folder / "clip", Settings.from_json(SETTINGS), fill)


def test_a_new_run_takes_the_next_free_name(tmp_path):
    for name in ("clip", "clip-2", "clip-3"):
        assert create(tmp_path).path.name == name


def test_a_new_run_is_hidden_until_its_files_are_there_and_a_failure_leaves_none(tmp_path):
    def look(run):
        run.save()
        assert not (tmp_path / "clip").exists() and Run.open(run.path).settings == run.settings

    def fail(run):
        run.save()
        raise OSError("No space left on device")
    assert [file.name for file in create(tmp_path, look).path.iterdir()] == ["run.json"]
    with pytest.raises(OSError):
        create(tmp_path, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_what_a_killed_process_left_of_a_new_run_is_removed_and_nothing_else(tmp_path):
    killed, alive, foreign = (tmp_path / f".{name}.abc.part" for name in ("killed", "alive", "foreign"))
    for folder in (killed, alive, foreign):
        folder.mkdir()
    for folder in (killed, alive):
        (folder / "source.mp4").write_bytes(b"x")
    (killed / ".clip.safetensors.7.part").mkdir()
    (foreign / "notes.txt").write_text("mine")
    at_work = Run(alive, None)
    at_work.lock()
    create(tmp_path)
    at_work.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".alive.abc.part", ".foreign.abc.part", "clip"]


def test_the_newest_run_is_the_one_that_was_finished_last_whatever_its_name(tmp_path):
    for name, finished in (("a", 5.), ("b", 9.), ("c", 7.), ("d", 0)):
        (tmp_path / name).mkdir()
        Run(tmp_path / name, Settings.from_json(SETTINGS | dict(finished=finished))).save()
    assert Run.newest(tmp_path).path.name == "b"


def test_where_no_run_is_finished_none_is_the_newest(tmp_path):
    (tmp_path / "d").mkdir()
    Run(tmp_path / "d", Settings.from_json(SETTINGS)).save()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=f"No finished run in {folder}: tune on a clip with train.py first"):
            Run.newest(folder)


def test_others_may_read_what_is_written_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        run = create(tmp_path)
        run.write("tuned", dict(x=torch.zeros(2)))
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (run.path, run.path / "tuned.safetensors")]
    assert modes == [0o750, 0o640]


def test_a_lock_is_given_back(tmp_path):
    run, other = create(tmp_path), Run.open(tmp_path / "clip")
    with pytest.raises(InputError, match="Another process"):
        other.lock()
    run.close()
    other.lock()
    other.close()


def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        create(tmp_path / "out")


@pytest.mark.parametrize("text, name", [
    ("A panda, skiing!", "a-panda-skiing"), ("../../etc", "etc"), ("...", "empty"), ("a" * 99, "a" * 60),
    ("\U00020000" * 40, "\U00020000" * 25)])
def test_a_prompts_file_name_fits_every_disk(text, name):
    assert runs.slug(text) == name and len(name.encode()) <= 100


@pytest.mark.parametrize("tensor", [
    torch.zeros(2, dtype=torch.int64), torch.zeros(2).half(), torch.tensor([float("nan")])])
def test_tensors_of_other_kinds_are_refused(tmp_path, tensor):
    run = Run(tmp_path, Settings.from_json(SETTINGS))
    save_file({"noise": tensor}, tmp_path / "inversion.safetensors")
    with pytest.raises(InputError, match="does not fit this run"):
        run.read("inversion")


def test_run_json_is_what_settings_say(tmp_path):
    settings = Settings.from_json(SETTINGS)
    Run(tmp_path, settings).save()
    assert json.loads((tmp_path / "run.json").read_text()) == asdict(settings)
