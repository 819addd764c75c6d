"""Says what a clip shows, by comparing it with drawings. Nothing in it is learned.

The true answer to an edit is known: the edited scene along the source's motion. Each question is asked by drawing
alternatives that differ in one thing, all else true. For every frame the nearest drawing is the answer. What is judged
has been blurred by the VAE. That hardly changes which drawing is nearest, as tests/claims/test_judge.py shows.
"""
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from tinytav.measure.metrics import psnr
from tinytav.toy import draw, world

# Alternatives to a view, by what they add to one part of it: quarters of the limbs' cycle and of the way to the next
# prop, and steps to either side. The first is the truth.
MOTIONS = {"phase": (0, 0.25, 0.5, 0.75), "x": (0, -0.08, 0.08), "camera": (0, 0.25, 0.5, 0.75)}
ALL = tuple(world.ATTRIBUTES)


def majority(values):
    """The most frequent value, and the share of the values that are equal to it."""
    (value, count), = Counter(values).most_common(1)
    return value, count / len(values)


class Judge:
    """For clips of one motion: `views`, one a frame."""

    def __init__(self, motion, frames=8):
        self.views = world.views(motion, frames)
        self.pictures = lru_cache(maxsize=12000 // frames)(self._pictures)     # 0.6 GB

    def _pictures(self, scene, part, offset):
        """The scene with `offset` added to one part of every view: (f, 3, h, w) uint8."""
        views = [replace(view, **{part: getattr(view, part) + offset}) for view in self.views]
        return torch.tensor(np.stack([draw.render(scene, view) for view in views])).permute(0, 3, 1, 2)

    def draw(self, scene, part="phase", offset=0):
        """The scene in this motion, with `offset` added to one part of every view: (f, 3, h, w) in [-1, 1]."""
        return self.pictures(scene, part, offset) / 127.5 - 1

    def nearest(self, x, alternatives):
        """For each frame of x (f, 3, h, w) the index of the nearest drawing, by squared distance."""
        return torch.stack([(drawn - x).square().sum((1, 2, 3)) for drawn in alternatives]).argmin(0).tolist()

    def attribute(self, x, scene, name):
        """Which value of an attribute, or of a part of the look, each frame shows, all else as in the scene."""
        if name in world.LOOKS:
            looks = [replace(scene.look, **{name: i}) for i in range(world.LOOKS[name])]
            return self.nearest(x, [self.draw(replace(scene, look=look)) for look in looks])
        values = world.ATTRIBUTES[name]
        found = self.nearest(x, [self.draw(replace(scene, **{name: value})) for value in values])
        return [values[i] for i in found]

    def unsaid(self, x, scene, said=ALL):
        """What the frames show of all that the caption leaves open: the look, and the attributes not in `said`.

        Returns the scene with what most frames show, and {attribute or part of the look: one value a frame}. Everything
        is asked for twice, the second time with the rest as most frames showed it the first time.
        """
        for _ in range(2):
            shown = {name: self.attribute(x, scene, name) for name in ALL if name not in said}
            parts = {part: self.attribute(x, scene, part) for part in world.LOOKS}
            look, _ = majority(list(zip(*parts.values())))
            usual = {name: majority(values)[0] for name, values in shown.items()}
            scene = replace(scene, look=world.Look(*look), **usual)
        return scene, shown | parts

    def answers(self, x, scene, said=ALL):
        """Clip x (f, 3, h, w), asked whether it is this scene in this motion: {question: share of frames}.

        said: the attributes that the caption names. Each attribute and each part of the motion is right in a frame if
        no alternative is nearer. All that is unsaid is taken to be as most frames show it while the other questions are
        asked. Raises ValueError for a clip that is not finite.

        "look": the share of frames with the most frequent look. "agreement": the same of each unsaid attribute and each
        part of the look by itself, the mean over them. Neither asks whether the value is the source's. "moves" is 1 if
        none of the true clip's frames, held still, is nearer to the clip than the true clip.
        """
        if not x.isfinite().all():          # every comparison with NaN would choose the truth
            raise ValueError("A clip that is not finite shows nothing.")
        wanted = scene
        scene, shown = self.unsaid(x, wanted, said)
        true = self.draw(scene)
        still = (true[:, None] - x).square().sum((1, 2, 3, 4)).min()
        looks = list(zip(*(shown[part] for part in world.LOOKS)))
        shares = {"look": majority(looks)[1], "moves": float((true - x).square().sum() < still),
                  "agreement": float(np.mean([majority(values)[1] for values in shown.values()]))}
        for name in ALL:
            shares[name] = self.attribute(x, scene, name).count(getattr(wanted, name)) / len(x)
        for part, offsets in MOTIONS.items():
            shares[part] = self.nearest(x, [self.draw(scene, part, offset) for offset in offsets]).count(0) / len(x)
        return shares | {"psnr": psnr(x, self.draw(replace(wanted, look=scene.look)))}
