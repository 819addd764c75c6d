"""Ways to begin and to sample that are not in the paper. They were tried and are no options.

They work on latents (1, 4, f, h, w) of one clip, and take contexts (b, m, d) as pipeline.py does.
"""
from dataclasses import asdict

import torch
from torch.nn import functional as F

from tinytav import pipeline, windows
from tinytav.inflation import ClipCrossAttention
from tinytav.measure.attention import WordMaps, watched
from tinytav.stable_diffusion.ddim import Schedule, move

ROUNDS = 3              # of fixed-point inversion, for each step
THRESHOLD = 0.3         # of blending, as a part of the largest attention (Prompt-to-Prompt's LocalBlend)


class Trailing(Schedule):
    """Timesteps from the noisiest one on: (999, 899), ..., (99, -1) for 10 steps. Lin et al., arXiv 2305.08891."""

    def pairs(self, steps):
        ends = [round(self.num_train_timesteps * i / steps) - 1 for i in reversed(range(steps + 1))]
        return list(zip(ends, ends[1:]))


def trailing(schedule):
    """The same diffusion process, walked at trailing timesteps in both directions."""
    return Trailing(**asdict(schedule))


class Windows:
    """A net of a few frames as one of `frames`, by windows that are not windows.py's. It goes where a VideoUNet goes.

    kind: "not averaged", where windows follow each other and each frame is predicted by one of them; or "no first
    frame", where a window is consecutive frames alone.
    """

    def __init__(self, net, frames, kind):
        self.net, self.frames, self.attention, self.averaged = net, frames, net.attention, kind != "not averaged"
        length = net.frames - (not self.averaged)
        stride = (net.frames - 1) // 2 if self.averaged else length
        starts = [*range(not self.averaged, frames - length, stride), frames - length]
        anchor = [] if self.averaged else [0]
        self.places = [anchor + list(range(start, start + length)) for start in starts]

    def parameters(self):
        return self.net.parameters()

    def __call__(self, x, t, context, residuals=None):
        if self.averaged:
            return windows.average(lambda part, place: self.net(part, t, context), x, self.places)
        output = torch.empty_like(x)
        for place in reversed(self.places):             # where two windows hold a frame, the earlier one predicts it
            output[:, :, place] = self.net(x[:, :, place], t, context).to(x.dtype)
        return output


@torch.no_grad()
def fixed_point(net, schedule, latents, context, steps):
    """DDIM inversion that sampling without guidance takes back almost exactly: yields latents as pipeline.invert does.

    Sampling predicts the noise at the noisier end of a step. Plain inversion predicts it from the cleaner end's
    latents. Here the noisier end is found by iteration, x = move(start, eps(x)): Pan et al., arXiv 2309.04907.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):
        start = x
        for _ in range(ROUNDS):
            output = pipeline.predict(net, x, t, context)
            eps = schedule.epsilon(output, x, schedule.abar(t))
            x = move(start, eps, schedule.abar(t_next), schedule.abar(t))
        yield x


@torch.no_grad()
def blended(net, schedule, trajectory, context, empty, positions, guidance):
    """One edit (1, 4, f, h, w) that keeps the inverted clip wherever the edited words draw no attention.

    trajectory: the clip's latents and those of each step of its inversion. positions: of the edited words. After each
    step the latents outside the words' mask are those of the trajectory. The mask is where their cross-attention,
    averaged over the steps so far, exceeds a part of its maximum: LocalBlend of Hertz et al., arXiv 2208.01626.
    """
    *before, x = trajectory
    maps = WordMaps(net.frames, positions, *x.shape[3:])
    with watched(net, ClipCrossAttention, maps):
        for t, t_next in schedule.pairs(len(before)):
            output = pipeline.guided(net, x, t, context, empty, guidance)
            eps = schedule.epsilon(output, x, schedule.abar(t))
            x = move(x, eps, schedule.abar(t), schedule.abar(t_next))
            x = torch.where(mask(maps.mean.value()), x, before.pop())
    return x


def mask(maps):
    """Maps (f, h, w) -> where they are large, and one latent around: (f, h, w) bool."""
    large = (maps / maps.amax((1, 2), keepdim=True) > THRESHOLD).float()
    return F.max_pool2d(large, 3, stride=1, padding=1).bool()
