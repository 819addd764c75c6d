"""Writes the example clips: python -m tinytav examples."""
import argparse
from pathlib import Path

import numpy as np

from tinytav.files import frames
from tinytav.toy import draw, world
from tinytav.toy.world import Look, Motion, Scene, View

MOTION = Motion(View(camera=0.1, x=0.42, size=1.05, phase=0.0), travel=0.8, drift=0.16, growth=0.0, cycles=0.9)
CLIPS = {
    "skiing": Scene("man", "red", "no hat", "skiing", "snow", "day", "plain"),
    "surfing": Scene("woman", "yellow", "no hat", "surfing", "beach", "sunset", "plain", Look(fur=1, gear=1)),
    "running": Scene("fox", "blue", "no hat", "running", "grass", "day", "comic", Look(prop=1)),
    "skateboarding": Scene("robot", "green", "cowboy hat", "skateboarding", "street", "night", "plain", Look(sky=1)),
}
COUNT, FPS = 8, 8                   # frames of a clip, and how many are shown a second


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("weights/toy"), help="where to write (default: weights/toy)")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, scene in CLIPS.items():
        pictures = np.stack([draw.render(scene, view) for view in world.views(MOTION, COUNT)])
        # Shown at 256 pixels, because H.264 halves the resolution of colours.
        frames.write_mp4(args.out / f"{name}.mp4", frames.to_tensor(pictures), FPS, crf=10)
        print(f"{args.out / name}.mp4: {world.caption(scene)}")
