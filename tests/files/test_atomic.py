"""Files are whole or not there."""
import pytest

from tinytav.files.atomic import clear, replace, replace_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(file):
        open(file, "w").write("half")
        raise OSError("No space left on device")
    with pytest.raises(OSError):
        replace(tmp_path / "a", fail)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_write_replaces_the_old_file(tmp_path):
    replace_text(tmp_path / "a", "old")
    replace_text(tmp_path / "a", "new \u00e9")
    assert [p.read_text(encoding="utf-8") for p in tmp_path.iterdir()] == ["new \u00e9"]


def test_what_a_library_leaves_beside_its_file_goes_too(tmp_path):
    def write(file):
        open(file, "w").write("new")
        open(file + ".tmp123", "w").write("half")
    replace(tmp_path / "a", write)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".tuned.safetensors.77.part").mkdir()
    (tmp_path / ".tuned.safetensors.77.part/.tmpX").write_bytes(b"half")
    (tmp_path / "keep").write_text("x")
    clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]
