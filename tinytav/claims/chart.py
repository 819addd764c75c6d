"""Draws a chart of shares with their intervals: one panel a score, one row a variant."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinytav.files import frames

ROW, TOP = 22, 46                       # pixels: of a row, and above the first
LABELS, PANEL, GAP = 250, 165, 44       # pixels: of the names, of a panel's width, between panels
GRID, BAR, DOT = "#dddddd", "#7da7d9", "#1f4e8c"
TICKS = (0, 50, 100)                    # per cent
UPPER_TICKS = (50, 75, 100)             # of a panel in which nothing is below 50 per cent


def write(path, found):
    """found: {row: {panel: (mean, low, high)}}, shares from 0 to 1 -> PNG."""
    panels = list(next(iter(found.values())))
    size = LABELS + len(panels) * (PANEL + GAP), TOP + ROW * len(found) + 10
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for j, name in enumerate(found):
        draw.text((8, TOP + j * ROW + 3), name, "black", font)
    for i, panel in enumerate(panels):
        left, ticks = LABELS + i * (PANEL + GAP), ticks_of([shares[panel] for shares in found.values()])
        axis(draw, font, left, panel, len(found), ticks)
        for j, shares in enumerate(found.values()):
            mark(draw, left, TOP + j * ROW + ROW // 2, ticks, *shares[panel])
    frames.write_picture(path, np.asarray(image))


def ticks_of(intervals):
    """The ticks of a panel, in per cent: its axis begins at the first of them."""
    lowest = 100 * min(low for _, low, _ in intervals)
    return UPPER_TICKS if lowest >= UPPER_TICKS[0] else TICKS


def position(left, ticks, percent):
    """Where on the picture a percentage is, in pixels from the left."""
    return left + PANEL * (percent - ticks[0]) / (ticks[-1] - ticks[0])


def axis(draw, font, left, title, rows, ticks):
    """A panel's title, its ticks and its grid."""
    draw.text((left, 4), title, "black", font)
    for tick in ticks:
        x = position(left, ticks, tick)
        draw.line([x, TOP - 4, x, TOP + rows * ROW], GRID)
        draw.text((x, TOP - 22), f"{tick} %" if tick == ticks[-1] else str(tick), "#777777", font, anchor="ma")


def mark(draw, left, y, ticks, mean, low, high):
    """A bar over the interval, and a dot at the mean."""
    x_mean, x_low, x_high = (position(left, ticks, 100 * share) for share in (mean, low, high))
    draw.rectangle([x_low, y - 4, x_high, y + 4], BAR)
    draw.ellipse([x_mean - 4, y - 4, x_mean + 4, y + 4], DOT)
