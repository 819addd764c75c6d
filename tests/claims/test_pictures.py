"""The charts, checked by their pixels: order, places and names."""
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from tinytav.claims import pictures, tables

TOY = Path(__file__).parents[2] / "weights/toy"
DOT, BAR, GRID, WHITE = *map(ImageColor.getrgb, (pictures.DOT, pictures.BAR, pictures.GRID)), (255, 255, 255)


def at(picture, panel, row, share):
    """The chart's colour in the middle of a row, at a share of a panel's axis."""
    x, y = pictures.position(panel, share), pictures.TOP + pictures.ROW * row + pictures.ROW // 2
    return picture.getpixel((round(x), y))


def ink(picture, box):
    """A part of a picture as an array of dark pixels."""
    return np.asarray(picture.convert("L").crop(box)) < 128


def test_the_chart_puts_bars_and_dots_where_the_shares_are(tmp_path):
    found = {"a": dict(success=(0.5, 0.25, 0.75), motion=(0.2, 0.1, 0.3)),
             "b": dict(success=(1., 1., 1.), motion=(0.9, 0.8, 1.))}
    pictures.chart(tmp_path / "chart.png", found)
    picture = Image.open(tmp_path / "chart.png")
    assert [at(picture, 0, 0, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)] == [WHITE, BAR, DOT, BAR, WHITE]
    assert [at(picture, 1, 0, share) for share in (0.03, 0.12, 0.2, 0.28, 0.9)] == [WHITE, BAR, DOT, BAR, WHITE]
    assert at(picture, 0, 1, 1) == DOT and at(picture, 0, 1, 0.9) == WHITE
    assert at(picture, 1, 1, 0.9) == DOT and at(picture, 1, 1, 0.2) == WHITE
    assert picture.height == pictures.TOP + 2 * pictures.ROW + 10


def test_every_panel_of_the_chart_goes_from_0_to_100_per_cent(tmp_path):
    high = (0.95, 0.9, 1.)
    pictures.chart(tmp_path / "chart.png", {"a": dict(success=high, agreement=high)})
    picture = Image.open(tmp_path / "chart.png")
    for panel in (0, 1):
        grey = [round(pictures.position(panel, share)) for share in (0, 0.5, 1)]
        assert [picture.getpixel((x, pictures.TOP - 3)) for x in grey] == [GRID] * 3
        assert at(picture, panel, 0, 0.95) == DOT and at(picture, panel, 0, 0.5) == GRID


def test_each_row_and_panel_of_the_chart_has_its_own_name(tmp_path):
    """A chart of the same values under other names differs where the name stands, and nowhere else."""
    share = (0.5, 0.4, 0.6)
    for name, rows, panels in (("1", "ab", "cd"), ("2", "ac", "cd"), ("3", "ab", "ce")):
        pictures.chart(tmp_path / f"{name}.png", {row: dict.fromkeys(panels, share) for row in rows})
    first, row, panel = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).astype(int) for name in "123")
    ys, xs = np.nonzero(first != row)
    assert ys.min() >= pictures.TOP + pictures.ROW and ys.max() < pictures.TOP + 2 * pictures.ROW
    assert xs.max() < pictures.LABELS
    ys, xs = np.nonzero(first != panel)
    assert ys.max() < pictures.TOP - 30 and xs.min() >= pictures.position(1, 0)


def test_the_shipped_chart_is_that_of_the_shipped_scores():
    """Each dot stands where the mean of its row and panel is, the most successful row first, beside the names."""
    found = tables.shares(json.loads((Path(tables.__file__).parent / "scores.json").read_text())["scores"], "trial")
    picture = Image.open(TOY / "chart.png")
    assert not ink(picture, (pictures.LABELS - 12, pictures.TOP, pictures.LABELS - 8, picture.height)).any()
    assert picture.height == pictures.TOP + pictures.ROW * len(found) + 10
    for j, shares in enumerate(found.values()):
        for i, (mean, _, _) in enumerate(shares.values()):
            assert at(picture, i, j, mean) == DOT
    successes = [shares["success"][0] for shares in found.values()]
    assert successes == sorted(successes, reverse=True) and next(iter(found)) == "full method"


def test_the_frontier_has_a_numbered_dot_where_two_shares_meet(tmp_path):
    found = {"a": dict(kept=(0.8, 0, 1), right=(0.9, 0, 1)), "b": dict(kept=(0.92, 0, 1), right=(0.71, 0, 1))}
    pictures.frontier(tmp_path / "x.png", found)
    picture = Image.open(tmp_path / "x.png")
    blue = np.argwhere((np.asarray(picture) == BAR).all(-1))[:, ::-1]
    for mean in ((0.8, 0.9), (0.92, 0.71)):
        near = np.abs(blue - pictures.place(*mean, 0.7)).max(1) < 12
        assert near.sum() > 150                     # the dot without its number
        blue = blue[~near]
    assert len(blue) == 0                           # and nowhere else
    assert pictures.place(0.7, 0.7, 0.7) == (pictures.LEFT, pictures.TOP + pictures.SIDE)
    names = ink(picture, (pictures.LEFT + pictures.SIDE + 30, pictures.TOP, picture.width, picture.height))
    assert names[:pictures.LINE].any() and names[pictures.LINE:2 * pictures.LINE].any()
    assert not names[2 * pictures.LINE:].any()
