"""What an edit starts from: four kinds of noise. Each kind knows how it is made, how it is sampled, and whether it
needs a clip.

The paper begins with the clip's own noise, found by DDIM inversion (section 3.3). The other kinds stand beside it.
"""
from dataclasses import dataclass

import torch

from tinytav import edit_friendly, pipeline
from tinytav.errors import InputError


@dataclass
class Noise:
    """Base of the kinds. `steps`: of sampling. `x`: what `make` found or drew."""
    steps: int
    seed: int = 33
    x: object = None

    name = ""                   # as --noise and a sample's record call it
    needs_clip = False          # made from a clip, so frames and size must be the clip's
    seeded = True               # does the seed change it?

    @property
    def count(self):
        """How many steps `sample` makes."""
        return self.steps

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        """Fills `x` for latents of `shape` (1, 4, f, h, w); clip: an editing.Clip, or None. Returns self."""
        raise NotImplementedError

    def sample(self, net, schedule, context, empty, guidance, control=None):
        """Yields latents (b, 4, f, h, w), cleaner after each step. The arguments are those of pipeline.sample."""
        return pipeline.sample(net, schedule, self.x, context, empty, self.steps, guidance, control)


class Inverted(Noise):
    """The noise that DDIM inversion finds for the clip without text (section 3.3). `x`: x_T (1, 4, f, h, w)."""
    name, needs_clip, seeded = "inverted", True, False

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        walk = pipeline.invert(net, schedule, clip.mean, clip.empty, self.steps)
        self.x = pipeline.last(progress(walk, self.steps, "inverting"))
        refuse_what_is_not_finite(self.x)
        return self


class EditFriendly(Noise):
    """Noise of every step, which gives the clip back under its own caption (edit_friendly.py). `x`: a list of Steps."""
    name, needs_clip = "edit-friendly", True

    @property
    def count(self):
        return edit_friendly.count(self.steps)

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        walk = edit_friendly.invert(net, schedule, clip.mean, clip.context, self.steps, self.seed)
        self.x = list(progress(walk, self.count, "inverting"))
        refuse_what_is_not_finite(*(step.noise for step in self.x))
        return self

    def sample(self, net, schedule, context, empty, guidance, control=None):
        return edit_friendly.sample(net, schedule, self.x, context, empty, guidance, control)


class Random(Noise):
    """White noise, another in each frame: new motion."""
    name = "random"

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        self.x = pipeline.gaussian(shape, self.seed).to(net.conv_in.weight.device)
        return self


class Shared(Noise):
    """White noise that all frames share."""
    name = "shared"

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        b, c, frames, h, w = shape
        one = pipeline.gaussian((b, c, 1, h, w), self.seed).to(net.conv_in.weight.device)
        self.x = one.repeat(1, 1, frames, 1, 1)
        return self


NOISES = {kind.name: kind for kind in (Inverted, EditFriendly, Random, Shared)}


def refuse_what_is_not_finite(*tensors):
    if not all(torch.isfinite(x).all() for x in tensors):
        raise InputError("The net inverts the clip to values that are not finite: tune again with a smaller --lr, or "
                         "use --precision fp32.")
