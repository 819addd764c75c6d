"""Writes the example clips that lie in weights/toy, and the ControlNet's hints: python -m tinytav examples."""
import argparse
from pathlib import Path

from tinytav.files import frames
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


def write(folder, name, scene, count=8):
    """8 frames, enlarged to 256 pixels and hardly compressed, because H.264 halves the resolution of colour."""
    x = frames.to_tensor(draw.clip(scene, MOTION, count))
    frames.write_mp4(folder / f"{name}.mp4", x, fps=8, crf=10)


def write_hint(folder, activity, count=8):
    """The stick figures of an activity in the other motion, of the same size as the clips."""
    size = draw.render(CLIPS[activity], OTHER_MOTION.start).shape[0]
    x = frames.to_tensor(skeleton.clip(activity, OTHER_MOTION, count, size))
    frames.write_mp4(folder / f"{activity}.mp4", x, fps=8, crf=10)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("weights/toy"))
    args = p.parse_args()
    for name, scene in CLIPS.items():
        write(args.out, name, scene)
        print(f"{args.out / name}.mp4: {world.caption(scene)}")
    beside = args.out / "controlnet"
    beside.mkdir(exist_ok=True)
    for activity in HINTS:
        write_hint(beside, activity)
        print(f"{beside / activity}.mp4: stick figures, {activity}")
