"""The example clips."""
import sys
from pathlib import Path

from tinytav.files import frames
from tinytav.toy import examples

TOY = Path(__file__).parents[2] / "weights/toy"


def test_the_world_is_drawn_as_in_the_clips_that_were_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples", "--out", str(tmp_path)])
    examples.main()
    assert f'{tmp_path / "skiing"}.mp4: a man wearing red clothes' in capsys.readouterr().out
    for name in examples.CLIPS:
        new, old = (frames.read(folder / f"{name}.mp4", 128, 128, 8).x for folder in (tmp_path, TOY))
        assert (new - old).abs().amax() < 0.6, name         # encoders differ
