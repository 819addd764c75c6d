"""Edit-friendly noise: another way from a clip to the noise of its edits. It is not in the paper.

DDIM inversion finds one noise, x_T, and DDIM sampling adds none to it. DDPM sampling adds noise at every step. The
noise of each step can be chosen so that sampling under the clip's own caption, at guidance 1, gives the clip back.
Sampling an edited prompt with the same noise makes an edit. Huberman-Spiegelglas et al., arXiv 2304.06140.
"""
from typing import NamedTuple

import torch

from tinytav import pipeline

SKIPPED = 0.36      # of the steps: the noisiest, which would change the layout (section 5: 36 of 100)


class Step(NamedTuple):
    t: int
    t_next: int
    x: torch.Tensor         # the noisy clip at t, (1, 4, f, h, w)
    noise: torch.Tensor     # what the step to t_next adds, of the same shape and, roughly, of unit variance


def count(steps):
    """How many of the steps are made."""
    return steps - round(SKIPPED * steps)


@torch.no_grad()
def invert(net, schedule, latents, own, steps=50, seed=33):
    """Yields the Steps from the noisiest one on, without the skipped ones. Algorithm 1.

    latents (1, 4, f, h, w): the clip's. own (1, m, d): the context of its caption. The clip is noised for every
    timestep independently, from the seed.
    """
    pairs = schedule.pairs(steps)

    def noised(i):
        if i == steps:
            return latents
        white = pipeline.gaussian(latents.shape, 1000 * seed + i).to(latents.device)
        return schedule.add_noise(latents, white, pairs[i][0])

    first = steps - count(steps)
    x = noised(first)
    for i in range(first, steps):
        t, t_next = pairs[i]
        output = pipeline.predict(net, x, t, own)
        mean, std = ddpm_step(schedule, x, output, t, t_next)
        x_next = noised(i + 1)
        yield Step(t, t_next, x, (x_next - mean) / std)
        x = x_next


@torch.no_grad()
def sample(net, schedule, inverted, context, empty, guidance=12.5, control=None,
           hold=pipeline.as_they_are):
    """DDPM sampling with the noise of `inverted`, a list of Steps: yields the latents (b, 4, f, h, w), cleaner each
    time.

    The other arguments are those of pipeline.sample.
    """
    x = hold(inverted[0].x.expand(len(context), -1, -1, -1, -1), inverted[0].t)
    for t, t_next, _, noise in inverted:
        output = pipeline.guided(net, x, t, context, empty, guidance, control)
        mean, std = ddpm_step(schedule, x, output, t, t_next)
        x = hold(mean + std * noise, t_next)
        yield x


def ddpm_step(schedule, x, output, t, t_next):
    """The mean and the standard deviation of DDPM's step from t to t_next: DDIM's equation 12 with eta 1."""
    abar, abar_next = schedule.abar(t), schedule.abar(t_next)
    eps = schedule.epsilon(output, x, abar)
    variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = abar_next.sqrt() * x0 + (1 - abar_next - variance).sqrt() * eps
    return mean, variance.sqrt()
