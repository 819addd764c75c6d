"""Writes the example clips and the ControlNet's hints, or the moving picture of a run: python -m tinytav examples."""
import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinytav.files import frames, records
from tinytav.files.runs import Run
from tinytav.toy import draw, skeleton, world
from tinytav.toy.world import Look, Motion, Scene, View

MOTION = Motion(View(camera=0.1, x=0.42, size=1.05, phase=0.0), travel=0.8, drift=0.16, growth=0.0, cycles=0.9)
# Of the hints: the figure drifts the other way, and its limbs begin half a cycle later.
OTHER_MOTION = Motion(View(camera=0.1, x=0.58, size=1.05, phase=0.5), travel=0.8, drift=-0.16, growth=0.0, cycles=0.9)
HINTS = ("skiing", "running")       # activities; the clips lie beside the ControlNet
CLIPS = {
    "skiing": Scene("man", "red", "no hat", "skiing", "snow", "day", "plain"),
    "surfing": Scene("woman", "yellow", "no hat", "surfing", "beach", "sunset", "plain", Look(fur=1, gear=1)),
    "running": Scene("fox", "blue", "no hat", "running", "grass", "day", "comic", Look(prop=1)),
    "skateboarding": Scene("robot", "green", "cowboy hat", "skateboarding", "street", "night", "plain", Look(sky=1)),
}
COUNT, FPS = 8, 8                   # frames of a clip, and how many are shown a second
# Of the moving picture, in pixels: a frame's side, the height of its label, and the space between two of them.
SIDE, LABEL, GAP = 200, 44, 8
COLUMNS, COLUMN, ROW = 4, SIDE + GAP, LABEL + SIDE + GAP


def label(prompt, caption):
    """A prompt as a picture (LABEL, SIDE, 3). Words that the source's caption does not have are red."""
    picture, font = Image.new("RGB", (SIDE, LABEL), "white"), ImageFont.load_default(15)
    for row, line in enumerate(textwrap.wrap(prompt, 28)):
        x = 0
        for word in line.split():
            colour = "black" if word.strip(",") in caption.split() else "#c1121f"
            ImageDraw.Draw(picture).text((x, 2 + 19 * row), word, colour, font)
            x += font.getlength(word + " ")
    return np.asarray(picture)


def write_edits(run, path):
    """The source and all edits of a runs.Run -> a GIF that plays them in step, each below its prompt."""
    caption = run.settings.prompt
    samples = [(name, details["prompt"]) for name, details in records.read_samples(run.path)]
    samples[0] = samples[0][0], f"source: {caption}"
    rows = -(-len(samples) // COLUMNS)
    whole = np.full((COUNT, rows * ROW - GAP, COLUMNS * COLUMN - GAP, 3), 255, np.uint8)
    for i, (name, prompt) in enumerate(samples):
        top, left = i // COLUMNS * ROW, i % COLUMNS * COLUMN
        whole[:, top:top + LABEL, left:left + SIDE] = label(prompt, f"source: {caption}")
        clip = frames.read(run.path / name, SIDE, SIDE, COUNT).x
        whole[:, top + LABEL:top + LABEL + SIDE, left:left + SIDE] = frames.to_uint8(clip)
    # k-means chooses better among GIF's 256 colours than Pillow's default does.
    first, *rest = [Image.fromarray(picture).quantize(kmeans=4) for picture in whole]
    first.save(path, save_all=True, append_images=rest, loop=0, duration=1000 / FPS)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("weights/toy"), help="where to write (default: weights/toy)")
    p.add_argument("--edits", metavar="RUN", help="write edits.gif of this run instead of the clips")
    args = p.parse_args()
    if args.edits:
        write_edits(Run.open(args.edits), args.out / "edits.gif")
        return
    clips = {}
    for name, scene in CLIPS.items():
        clips[name] = world.caption(scene), np.stack([draw.render(scene, view) for view in world.views(MOTION, COUNT)])
    for name in HINTS:
        clips[f"controlnet/{name}"] = f"stick figures, {name}", skeleton.clip(name, OTHER_MOTION, COUNT, draw.SIZE)
    (args.out / "controlnet").mkdir(parents=True, exist_ok=True)
    for name, (words, pictures) in clips.items():
        # Shown at 256 pixels, because H.264 halves the resolution of colours.
        frames.write_mp4(args.out / f"{name}.mp4", frames.to_tensor(pictures), FPS, crf=10)
        print(f"{args.out / name}.mp4: {words}")
