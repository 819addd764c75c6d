"""Ways to begin and to sample that are not in the paper, tried beside it: three of the claims table's variants.

All work on latents (1, 4, f, h, w) of one clip, and take contexts (b, m, d) as pipeline.py does. Two more variants need no
code of their own: inversion with the source's caption, and guidance away from it (arXiv 2305.16807).
"""
import torch
from torch.nn import functional as F

from tinytav import pipeline
from tinytav.inflation import ClipCrossAttention
from tinytav.measure.attention import WordMaps, watched
from tinytav.stable_diffusion.ddim import move

ROUNDS = 3              # of fixed-point inversion, for each step
SKIPPED = 0.36          # of edit-friendly sampling's steps: those that would change the layout (arXiv 2304.06140, section 5)
THRESHOLD = 0.3         # of blending, as a part of the largest attention (Prompt-to-Prompt's LocalBlend)


def guided(net, schedule, x, t, context, empty, guidance):
    """The noise in x at timestep t, by classifier-free guidance."""
    both = pipeline.predict(net, torch.cat([x, x]), t, torch.cat([empty, context]))
    unconditional, conditional = both.chunk(2)
    return schedule.epsilon(unconditional + guidance * (conditional - unconditional), x, schedule.abar(t))


@torch.no_grad()
def fixed_point(net, schedule, latents, context, steps):
    """DDIM inversion that sampling takes back exactly: yields latents as pipeline.invert does.

    Sampling predicts the noise at the noisier end of a step. Plain inversion predicts it from the cleaner end's latents.
    Here the noisier end is found by iteration: x = move(start, eps(x)). Pan et al., arXiv 2309.04907, section 3.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):
        start = x
        for _ in range(ROUNDS):
            output = pipeline.predict(net, x, t, context)
            eps = schedule.epsilon(output, x, schedule.abar(t))
            x = move(start, eps, schedule.abar(t_next), schedule.abar(t))
        yield x


def stochastic_step(schedule, x, eps, t, t_next):
    """The mean and the standard deviation of DDPM's step from t to t_next: DDIM's equation 12 with eta 1."""
    abar, abar_next = schedule.abar(t), schedule.abar(t_next)
    variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = abar_next.sqrt() * x0 + (1 - abar_next - variance).sqrt() * eps
    return mean, variance.sqrt()


@torch.no_grad()
def edit_friendly(net, schedule, latents, own, wanted, empty, steps, guidance, seed):
    """Edits by edit-friendly DDPM noise: Huberman-Spiegelglas et al., arXiv 2304.06140, algorithm 1. -> (b, 4, f, h, w)

    The clip is noised independently for every timestep. The noise that leads from one of them to the next, under the
    source's caption `own` (1, m, d), is kept, and added again while sampling the prompts `wanted` (b, m, d).
    """
    pairs = schedule.pairs(steps)
    noised = [schedule.add_noise(latents, pipeline.gaussian(latents.shape, 1000 * seed + i), t) for i, (t, _) in enumerate(pairs)]
    noised.append(latents)
    count = len(wanted)
    first = round(SKIPPED * steps)
    x = noised[first].expand(count, -1, -1, -1, -1)
    for i in range(first, steps):
        t, t_next = pairs[i]
        eps = schedule.epsilon(pipeline.predict(net, noised[i], t, own), noised[i], schedule.abar(t))
        mean, std = stochastic_step(schedule, noised[i], eps, t, t_next)
        noise = (noised[i + 1] - mean) / std
        eps = guided(net, schedule, x, t, wanted, empty.expand_as(wanted), guidance)
        mean, std = stochastic_step(schedule, x, eps, t, t_next)
        x = mean + std * noise
    return x


@torch.no_grad()
def blended(net, schedule, trajectory, context, empty, positions, guidance):
    """One edit (1, 4, f, h, w) that keeps the inverted clip wherever the edited words draw no attention.

    trajectory: the clip's latents and those of each step of its inversion. context (1, m, d). positions: of the edited
    words in the prompt. After each step the latents outside the words' mask are those of the trajectory. The mask is where
    their cross-attention, averaged over the steps so far, exceeds a part of its maximum: Hertz et al., arXiv 2208.01626,
    section 3, and its code's LocalBlend.
    """
    *before, x = trajectory
    maps = WordMaps(net.frames, positions, *x.shape[3:])
    with watched(net, ClipCrossAttention, maps):
        for t, t_next in schedule.pairs(len(before)):
            eps = guided(net, schedule, x, t, context, empty, guidance)
            x = move(x, eps, schedule.abar(t), schedule.abar(t_next))
            x = torch.where(mask(maps.mean.value()), x, before.pop())
    return x


def mask(maps):
    """Maps (f, h, w) -> where they are large, and one latent around: (f, h, w) bool."""
    large = (maps / maps.amax((1, 2), keepdim=True) > THRESHOLD).float()
    return F.max_pool2d(large, 3, stride=1, padding=1).bool()
