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
    """Base of the kinds. `steps`: of sampling. `x`: what `make` found or drew.

    `way`: {timestep: the clip's latents there}; 0 is the clip itself. `make` fills it in. Inverted noise does so only
    where it is given the beginning, {0: ...}, because all of it is as large as the noise times the steps.
    """
    steps: int
    seed: int = 33
    x: object = None
    way: dict | None = None

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

    def sample(self, net, schedule, context, empty, guidance, control=None, keeps=()):
        """Yields latents (b, 4, f, h, w), cleaner after each step. keeps: what is held, objects of keep.py.

        The other arguments are those of pipeline.sample.
        """
        x = self.x.expand(len(context), -1, -1, -1, -1)
        return pipeline.sample(net, schedule, x, context, empty, self.steps, guidance, control,
                               self.holding(schedule, keeps))

    def holding(self, schedule, keeps):
        """`keeps`, one after the other, as the one function that pipeline.sample takes."""
        def hold(x, t):
            for keep in keeps:
                x = keep(x, lambda latents: latents if t <= 0 else self.noised(schedule, latents, t))
            return x
        return hold

    def noised(self, schedule, latents, t):
        """Latents (b, 4, n, h, w), which stand for the clip's first n frames, with this noise at timestep t."""
        return schedule.add_noise(latents, self.x[:, :, :latents.shape[2]], t)


class OfClip(Noise):
    """Base of the kinds that are made from a clip. The noise that the clip has at t is added to other latents, too."""
    needs_clip = True

    def noised(self, schedule, latents, t):
        if self.way is None:
            raise InputError("This noise does not know its way from the clip: make it with make_noise(way=True).")
        clean, noisy = (self.way[at][:, :, :latents.shape[2]] for at in (0, t))
        return noisy + schedule.abar(t).sqrt() * (latents - clean)


class Inverted(OfClip):
    """The noise that DDIM inversion finds for the clip without text (section 3.3). `x`: x_T (1, 4, f, h, w)."""
    name, seeded = "inverted", False

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        walk = progress(pipeline.invert(net, schedule, clip.mean, clip.empty, self.steps), self.steps, "inverting")
        for (t, _), x in zip(reversed(schedule.pairs(self.steps)), walk, strict=True):
            self.x = x
            if self.way is not None:
                self.way[t] = x
        refuse_what_is_not_finite(self.x)
        return self


class EditFriendly(OfClip):
    """Noise of every step, which gives the clip back under its own caption (edit_friendly.py). `x`: a list of Steps."""
    name = "edit-friendly"

    @property
    def count(self):
        return edit_friendly.count(self.steps)

    def make(self, net, schedule, shape, clip=None, progress=pipeline.no_progress):
        walk = edit_friendly.invert(net, schedule, clip.mean, clip.context, self.steps, self.seed)
        self.x = list(progress(walk, self.count, "inverting"))
        self.way = {step.t: step.x for step in self.x} | {0: clip.mean}
        refuse_what_is_not_finite(*(step.noise for step in self.x))
        return self

    def sample(self, net, schedule, context, empty, guidance, control=None, keeps=()):
        return edit_friendly.sample(net, schedule, self.x, context, empty, guidance, control,
                                    self.holding(schedule, keeps))


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
