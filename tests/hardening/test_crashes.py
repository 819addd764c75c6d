"""Crashes, the quick part: some moments of each kind, full disks, closed folders, and two processes."""
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hardening import broken, crashes
from hardening.warm import ROOT, Touches, Warm
from PIL import Image
from safetensors.torch import load_file, save_file

from tinytav.errors import InputError
from tinytav.files import runs
from tinytav.files.atomic import replace

NEW = {"new": torch.ones(50_000)}        # made here: torch's threads are gone in a fork, which would wait for them
COMMANDS = [broken.train("clip.mp4"), ["train.py", "--resume", "runs/half"], broken.sample_run()]
WRITERS = {"text": lambda file: Path(file).write_text("new" * 100_000),
           "tensors": lambda file: save_file(NEW, file),
           "picture": lambda file: Image.new("RGB", (300, 300), "red").save(file, "PNG")}


@pytest.mark.parametrize("kind", WRITERS)
def test_killed_at_any_moment_of_writing_a_file_is_the_old_one_or_the_new_one(tmp_path, kind):
    """Every moment, one after the other, until the process lives to the end."""
    path, old = tmp_path / "file", b"old" * 70_000
    replace(path, WRITERS[kind])
    new = path.read_bytes()
    for moment in itertools.count(1):
        path.write_bytes(old)
        if not (pid := os.fork()):
            gc.disable()            # a decoder of another test waits for its threads, which a fork lacks
            try:
                sys.setprofile(Touches((signal.SIGKILL, moment, 0), os.open(os.devnull, os.O_WRONLY)))
                replace(path, WRITERS[kind])
            finally:
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert path.read_bytes() in (old, new), f"torn at moment {moment}"
        if ended == 0:
            break
    assert moment > 4 and path.read_bytes() == new


def test_ended_at_random_moments_both_commands_leave_whole_files_and_go_on(warm, tmp_path):
    (tmp_path / "stock").mkdir()
    times, failures = crashes.stock(tmp_path / "stock", warm), []
    crashes.many(warm, tmp_path / "stock", times, range(1000, 1002), failures.append)
    assert not failures


@pytest.mark.parametrize("command", [[ROOT / "train.py", "clip.mp4", "a man"], [ROOT / "sample.py", "--prompt", "a"],
                                     ["-m", "tinytav", "metrics", "runs/done"]])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(place, command):
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=place, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error, error


def test_the_harness_sees_a_torn_file(tmp_path):
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.csv").write_text("step,loss\n1,0.5\n")
        save_file({"step": torch.tensor(1), "losses": torch.zeros(1)}, tmp_path / name / "state.safetensors")
    assert crashes.torn(tmp_path / "run", tmp_path / "whole") == ""
    (tmp_path / "run/loss.csv").write_text("step,loss\n1,0.")
    assert "loss.csv is torn" in crashes.torn(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "run/loss.csv").unlink()
    data = (tmp_path / "run/state.safetensors").read_bytes()
    (tmp_path / "run/state.safetensors").write_bytes(data[:-1])
    assert "state.safetensors is torn" in crashes.torn(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("size", [3000, 20_000, 60_000])
def test_a_full_disk_is_a_sentence_and_tears_nothing(warm, place, size):
    before = {file: file.read_bytes() for file in (place / "runs").rglob("*") if file.is_file()}
    for argv in COMMANDS:
        answer = warm(place, *argv, file_size=size)
        assert answer.status == 2 and "error: " in answer.err or size == 60_000 and answer.status == 0
        assert "Traceback" not in answer.err
    assert not list((place / "out").glob("*")) or (place / "out/clip/run.json").exists()
    kept = {file: data for file, data in before.items() if file.name not in ("loss.csv", "index.html")}
    assert all(file.read_bytes() == data for file, data in kept.items())
    assert all(file.read_text().endswith("</html>\n") for file in (place / "runs").rglob("index.html"))
    assert not list(place.rglob("*.part"))
    assert warm(place, "train.py", "--resume", "runs/half").status == 0


@pytest.mark.skipif(os.getuid() != 0 or not all(folder.stat().st_mode & 1 for folder in ROOT.parents),
                    reason="only root can become someone who may not write, and only where others may enter")
def test_a_folder_without_write_permission_is_a_sentence(warm, place):
    with tempfile.TemporaryDirectory() as folder:           # pytest's own folder is closed to others
        os.chmod(folder, 0o755)
        there = Path(folder) / "place"
        shutil.copytree(place, there)
        for file in there.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        for argv in COMMANDS:
            answer = warm(there, *argv, user=65534)
            assert answer.status == 2 and "ermission denied" in answer.err and "Traceback" not in answer.err


def test_two_train_py_on_one_run_are_one_too_many(warm, place):
    """The second is refused while the first holds the folder, and not after it was killed."""
    code = """if True:
        import sys, time
        from tinytav.files.runs import Run
        run = Run.locked(sys.argv[1])
        print("held", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", code, place / "runs/half"], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = {file: file.read_bytes() for file in (place / "runs/half").iterdir()}
    answer = warm(place, "train.py", "--resume", "runs/half")
    assert answer.status == 2 and "Another process is at work in runs/half" in answer.err
    assert before == {file: file.read_bytes() for file in (place / "runs/half").iterdir()}
    holder.kill(), holder.wait()
    assert warm(place, "train.py", "--resume", "runs/half").status == 0


def test_a_run_being_tuned_cannot_be_resumed(place):
    settings = runs.Run.open(place / "runs/half").settings
    run = runs.Run.create(place / "out/clip", settings, runs.Run.save)
    with pytest.raises(InputError, match="Another process is at work"):
        runs.Run.locked(run.path)
    run.close()
    runs.Run.locked(run.path).close()


def test_two_train_py_begun_at_once_make_two_runs(warm, place):
    other, answers = Warm(), []
    train = lambda warm: answers.append(warm(place, *broken.train("clip.mp4")))
    threads = [threading.Thread(target=train, args=[one]) for one in (warm, other)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    other.close()
    assert [answer.status for answer in answers] == [0, 0]
    assert {run.name for run in (place / "out").iterdir()} == {"clip", "clip-2"}


def test_a_dangling_link_is_not_taken_for_a_free_name(tmp_path):
    (tmp_path / "clip").symlink_to("nowhere")
    assert runs.new_name(tmp_path, "clip") == "clip-2"


def test_resuming_clears_away_what_a_killed_process_left(warm, place):
    left = place / "runs/half/.state.safetensors.1.part"
    left.mkdir()
    (left / ".tmpaB12").write_bytes(b"half")                # safetensors' own temporary file
    assert warm(place, "train.py", "--resume", "runs/half").status == 0
    assert not list((place / "runs/half").glob(".*"))
    (place / "runs/half/state.safetensors").write_bytes(b"left between the last two lines")
    assert "is finished" in warm(place, "train.py", "--resume", "runs/half").err
    assert not (place / "runs/half/state.safetensors").exists()


def test_two_processes_never_write_into_one_temporary_file(tmp_path):
    seen = []
    replace(tmp_path / "a", lambda file: (seen.append(file), Path(file).write_text("x")))
    assert str(os.getpid()) in seen[0]


def test_a_learning_rate_that_breaks_the_net_keeps_the_state(warm, place):
    answer = warm(place, *broken.train("clip.mp4"), "--lr", "1e9")
    assert answer.status == 2 and "at step 2" in answer.err and "--lr" in answer.err
    assert (place / "out/clip/state.safetensors").exists()


def test_a_clip_whose_latents_are_not_finite_makes_no_run(warm, place):
    file = place / "w/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("encoder.conv_out.weight", "quant_conv.weight"):
        tensors[name] = tensors[name] * 1e30
    save_file(tensors, file)
    answer = warm(place, *broken.train("clip.mp4"))
    assert answer.status == 2 and "latents that are not finite" in answer.err and not (place / "out").exists()
