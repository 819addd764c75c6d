"""What all tests share."""
import shutil
import signal

import pytest
import tiny
from hardening.warm import warm
from workers import pytest_runtestloop  # noqa: F401

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores Ctrl-C


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with tiny weights w, the clip clip.mp4, and runs/clip, tuned on it. It belongs to all tests."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.write_folder(folder / "w")
    tiny.write_clip(folder / "clip.mp4")
    done = warm()(folder, "train.py", "clip.mp4", "a man is skiing", "--weights", "w")
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A copy of `finished` for the tests of one file."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("place"), dirs_exist_ok=True)
