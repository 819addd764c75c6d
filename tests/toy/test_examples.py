"""The example clips, and the moving picture of a run: source and edits in step, each below its prompt."""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tinytav.files import frames, records
from tinytav.toy import examples
from tinytav.toy.examples import COLUMN, LABEL, ROW, SIDE

TOY = Path(__file__).parents[2] / "weights/toy"


def test_the_world_is_drawn_as_in_the_clips_that_were_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples", "--out", str(tmp_path)])
    examples.main()
    assert f'{tmp_path / "skiing"}.mp4: a man wearing red clothes' in capsys.readouterr().out
    names = [*examples.CLIPS, *(f"controlnet/{name}" for name in examples.HINTS)]
    for name in names:
        new, old = (frames.read(folder / f"{name}.mp4", 128, 128, 8).x for folder in (tmp_path, TOY))
        assert (new - old).abs().amax() < 0.6, name         # encoders differ


def test_words_that_the_source_does_not_have_are_red():
    same, other = (examples.label(prompt, "a man").astype(int) for prompt in ("a man,", "a fox,"))
    assert same.shape == (LABEL, SIDE, 3)
    assert (same[..., 0] == same[..., 1]).all() and same.min() < 100          # black letters on white
    red = (other[..., 0] - other[..., 1]) > 100
    assert red.any() and np.array_equal(same[:, :10], other[:, :10])          # "a" is in both
    assert not red[:, :10].any()


def test_each_clip_plays_below_its_own_prompt(tmp_path):
    """The source darkens over time, and the edits, each of one colour, keep their order."""
    ramp = torch.linspace(1, -1, 8).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    frames.write_mp4(tmp_path / "source.mp4", ramp, 8)
    for i, grey in enumerate((-0.6, -0.2, 0.2, 0.6)):
        frames.write_mp4(tmp_path / f"{i}.mp4", torch.full((8, 3, 32, 32), grey), 8)
        records.write_record(tmp_path, f"{i}", f"prompt {i}", {}, [])
    run = SimpleNamespace(path=tmp_path, settings=SimpleNamespace(prompt="a man"))
    examples.write_edits(run, tmp_path / "edits.gif")
    gif = Image.open(tmp_path / "edits.gif")
    assert gif.n_frames == 8 and gif.info["loop"] == 0 and gif.info["duration"] == 120 and gif.width <= 830
    letters = np.asarray(gif.convert("L")) < 128
    for i, prompt in enumerate(["source: a man", *(f"prompt {i}" for i in range(4))]):
        expected = np.asarray(Image.fromarray(examples.label(prompt, "source: a man")).convert("L")) < 128
        top, left = i // 4 * ROW, i % 4 * COLUMN
        assert (letters[top:top + LABEL, left:left + SIDE] == expected).mean() > 0.998
    for k in range(8):
        gif.seek(k)
        picture = np.asarray(gif.convert("L"), dtype=int)
        seen = [picture[i // 4 * ROW + LABEL + SIDE // 2, i % 4 * COLUMN + SIDE // 2] for i in range(5)]
        assert seen == pytest.approx([255 - 255 * k / 7, 51, 102, 153, 204], abs=4)
