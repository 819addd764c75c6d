"""Pictures of results: a chart of shares with their intervals, and dots where two shares meet."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinytav.files import frames

ROW, TOP = 40, 72                       # pixels: of the chart's rows, and above the first
LABELS, PANEL, GAP = 400, 140, 56       # pixels: of the names, of a panel's width, between panels
TICKS = (0, 50, 100)                    # per cent, the axis of every panel
LEFT, SIDE, LINE = 60, 560, 26           # pixels of the frontier: beside its square, of its side, of a name's line
GRID, BAR, DOT = "#dddddd", "#7da7d9", "#1f4e8c"


def chart(path, found):
    """{row: {panel: (mean, low, high)}}, shares from 0 to 1 -> PNG: a bar over the interval, a dot at the mean."""
    panels = list(next(iter(found.values())))
    size = LABELS + len(panels) * (PANEL + GAP), TOP + ROW * len(found) + 10
    image = Image.new("RGB", size, "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(25), ImageFont.load_default(19)
    for i, panel in enumerate(panels):
        draw.text((position(i, 0), 4), panel, "black", font)
        for tick in TICKS:
            x = position(i, tick / 100)
            draw.line([x, TOP - 4, x, TOP + len(found) * ROW], GRID)
            draw.text((x, TOP - 30), f"{tick} %" if tick == TICKS[-1] else str(tick), "#666666", small, anchor="ma")
    for j, (name, shares) in enumerate(found.items()):
        y = TOP + j * ROW + ROW // 2
        draw.text((8, y), name, "black", font, anchor="lm")
        for i, panel in enumerate(panels):
            mean, low, high = (position(i, share) for share in shares[panel])
            draw.rectangle([low, y - 7, high, y + 7], BAR)
            draw.ellipse([mean - 7, y - 7, mean + 7, y + 7], DOT)
    frames.write_picture(path, np.asarray(image))


def position(panel, share):
    """Where on the chart a share is in a panel, in pixels from the left."""
    return LABELS + panel * (PANEL + GAP) + PANEL * share


def frontier(path, found):
    """{row: {x: (mean, low, high), y: ...}}, shares -> PNG: a numbered dot a row at its two means, and the names."""
    x, y = next(iter(found.values()))
    means = [tuple(share[0] for share in shares.values()) for shares in found.values()]
    low = int(20 * min(map(min, means))) / 20               # both axes go from here to 1
    image = Image.new("RGB", (LEFT + SIDE + 620, TOP + max(SIDE + 70, LINE * len(found))), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(18), ImageFont.load_default(15)
    draw.text((8, 6), f"{y}, %", "black", font)
    draw.text((LEFT + SIDE / 2, TOP + SIDE + 34), f"{x}, %", "black", font, anchor="ma")
    for tick in np.arange(low, 1.001, 0.05):
        across, down = place(tick, tick, low)
        draw.line([across, TOP, across, TOP + SIDE], GRID)
        draw.line([LEFT, down, LEFT + SIDE, down], GRID)
        draw.text((across, TOP + SIDE + 8), f"{100 * tick:.0f}", "#666666", small, anchor="ma")
        draw.text((LEFT - 8, down), f"{100 * tick:.0f}", "#666666", small, anchor="rm")
    for number, (name, mean) in enumerate(zip(found, means), 1):
        draw.circle(place(*mean, low), 11, BAR)
        draw.text(place(*mean, low), str(number), "black", small, anchor="mm")
        draw.text((LEFT + SIDE + 40, TOP + LINE * (number - 1)), f"{number}  {name}", "black", font)
    frames.write_picture(path, np.asarray(image))


def place(x, y, low):
    """Where on the frontier's picture two shares meet, in pixels."""
    return LEFT + SIDE * (x - low) / (1 - low), TOP + SIDE - SIDE * (y - low) / (1 - low)
