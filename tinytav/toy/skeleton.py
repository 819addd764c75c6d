"""The figure's pose as a stick figure: the hint that the toy's ControlNet understands, as OpenPose draws them.

It shows the joints and nothing else: neither subject, clothes, gear nor place. Each limb has a colour of its own. Of
two limbs the near one is the brighter.
"""
import numpy as np
import torch
from PIL import Image, ImageDraw

from tinytav.toy.draw import OVERSAMPLING, Brush, Point, pose, standing
from tinytav.toy.shapes import BLACK, WHITE
from tinytav.toy.world import Motion, View, views

WIDTH, JOINT = 1.6, 1.4     # of a stick, and the radius of a joint, in units at size 1
SPINE, HEAD = (60, 200, 60), (230, 230, 60)
# The far limb comes first, as in a Pose.
ARMS = ((130, 30, 20), (255, 90, 60))
LEGS = ((20, 40, 140), (70, 130, 255))


def stick(b: Brush, colour, *points: Point) -> None:
    """Sticks from joint to joint."""
    b.line(colour, WIDTH, *points)
    for x, y in points:
        b.dot(colour, x, y, JOINT)


def skeleton(activity: str, view: View, size: int) -> np.ndarray:
    """The stick figure of an activity seen from a view, on black: (size, size, 3) uint8, `size` pixels a side."""
    image = Image.new("RGB", (size * OVERSAMPLING, size * OVERSAMPLING), BLACK)
    b = standing(Brush(ImageDraw.Draw(image), image.width / 64, 0, BLACK), activity, view)
    joints = pose(activity, view.phase)
    for i in (0, 1):
        stick(b, LEGS[i], *joints.leg(i))
        stick(b, ARMS[i], *joints.arm(i))
    shoulder, *_ = joints.arm(0)
    stick(b, SPINE, joints.hip, shoulder)
    stick(b, HEAD, shoulder, joints.head)
    b.dot(WHITE, *joints.head, 2 * JOINT)
    return np.asarray(image.reduce(OVERSAMPLING))


def hint(pictures: np.ndarray) -> torch.Tensor:
    """Stick figures (n, size, size, 3) uint8 -> what a ControlNet takes, (n, 3, size, size) in [0, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 255


def clip(activity: str, motion: Motion, frames: int, size: int) -> np.ndarray:
    """The stick figures of a moving picture: (frames, size, size, 3) uint8."""
    return np.stack([skeleton(activity, view, size) for view in views(motion, frames)])
