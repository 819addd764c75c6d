"""Files are whole or not there."""
import pytest

from tinytav.files.atomic import replace, replace_text


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
