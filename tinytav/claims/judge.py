"""Says what a clip shows, by comparing it with drawings: nothing in it is learned but the blur of the VAE.

The true answer to an edit is known: the edited scene along the source's motion. Each question is put by drawing
alternatives that differ in one thing, all else true, and finding for every frame the nearest. All drawings pass through
the VAE first, so that its blur favours none.
"""
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from tinytav.files import frames
from tinytav.measure.metrics import psnr
from tinytav.stable_diffusion.precision import autocast
from tinytav.toy import draw, world

# Alternatives to a view, by what they add to one part of it: quarters of the limbs' cycle and of the way to the next
# prop, and steps to either side. The first is the truth.
MOTIONS = {"phase": (0, 0.25, 0.5, 0.75), "x": (0, -0.08, 0.08), "camera": (0, 0.25, 0.5, 0.75)}


def pixels(pictures):
    """A list of pictures (h, w, 3) uint8 -> (n, 3, h, w) float32 in [-1, 1]."""
    return frames.to_tensor(np.stack(pictures))


class Judge:
    """For clips of one motion: `views`, one a frame. `vae` blurs the drawings as it blurs what it is to judge."""

    def __init__(self, vae, motion, frames=8):
        self.vae, self.views = vae, world.views(motion, frames)
        self.draw = lru_cache(maxsize=300)(self._draw)       # 1 GB

    def _draw(self, scene, part="phase", offset=0):
        """The scene with `offset` added to one part of every view: clean and through the VAE, (f, 3, h, w) each."""
        views = [replace(view, **{part: getattr(view, part) + offset}) for view in self.views]
        clean = pixels([draw.render(scene, view) for view in views])
        return clean, self.vae_trip(clean)

    @torch.no_grad()
    def vae_trip(self, x):
        with autocast(self.vae):
            return self.vae.decode(self.vae.encode(x)[0]).float().clamp(-1, 1)

    def nearest(self, x, alternatives):
        """For each frame of x (f, 3, h, w) the index of the nearest drawing.

        Squared distance over the pixels that differ between any two of the clean drawings: where they agree, what x
        shows says nothing about the question.
        """
        clean, blurred = (torch.stack(z) for z in zip(*alternatives))                       # (a, f, 3, h, w)
        asked = (clean.amax(0) > clean.amin(0)).any(1, keepdim=True)                        # (f, 1, h, w)
        return ((blurred - x).square() * asked).sum((2, 3, 4)).argmin(0).tolist()

    def look(self, x, scene):
        """The scene with the look that most frames show, and the share of frames that show it.

        Each part of the look is asked for by itself, and all once more with the others as most frames showed them.
        """
        for _ in range(2):
            parts = [self.nearest(x, [self.draw(replace(scene, look=replace(scene.look, **{part: i}))) for i in range(n)])
                     for part, n in world.LOOKS.items()]
            (most, count), = Counter(zip(*parts)).most_common(1)
            scene = replace(scene, look=world.Look(*most))
        return scene, count / len(x)

    def answers(self, x, scene):
        """Clip x (f, 3, h, w), asked whether it is this scene in this motion: {question: share of frames}.

        Each attribute and each part of the motion is right in a frame if no alternative is nearer; unsaid parts of the
        scene are taken to be as most frames show them, and limbs are asked for where the figure should be. "look" is
        look()'s agreement; "moves" is 1 if none of the true clip's frames, held still, is nearer to the clip than it.
        """
        if not x.isfinite().all():
            raise ValueError("A clip that is not finite shows nothing.")    # every comparison with NaN would choose the truth
        scene, agreement = self.look(x, scene)
        true = self.draw(scene)[1]
        still = (true[:, None] - x).square().sum((1, 2, 3, 4)).min()
        shares = {"look": agreement, "moves": float((true - x).square().sum() < still)}
        for name, values in world.ATTRIBUTES.items():
            found = self.nearest(x, [self.draw(replace(scene, **{name: value})) for value in values])
            shares[name] = found.count(values.index(getattr(scene, name))) / len(x)
        for part, offsets in MOTIONS.items():
            shares[part] = self.nearest(x, [self.draw(scene, part, offset) for offset in offsets]).count(0) / len(x)
        return shares | {"psnr": psnr(x, self.draw(scene)[0])}

