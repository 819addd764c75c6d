"""Editing a clip, in the order the data flows: encode, invert, sample, decode. Official pipeline_tuneavideo.py and util.py.

`invert` and `sample` are generators, so that progress and previews stay outside; `last` takes their final value.
"""
import torch

from tinytav.stable_diffusion.ddim import move

PIXELS = 2 ** 20        # how many pixels go through the VAE at once


def chunks(x, pixels_each):
    return x.split(max(1, PIXELS // pixels_each))


@torch.no_grad()
def encode(vae, frames):
    """Frames (f, 3, h, w) in [-1, 1] -> mean and std of the clip's latents, (1, 4, f, h/8, w/8) each."""
    parts = [vae.encode(x) for x in chunks(frames, frames[0, 0].numel())]
    return tuple(torch.cat(z).float().transpose(0, 1)[None] for z in zip(*parts))


@torch.no_grad()
def decode(vae, latents):
    """Latents (1, 4, f, h/8, w/8) -> frames (f, 3, h, w) in [-1, 1]."""
    z = latents[0].transpose(0, 1)
    parts = [vae.decode(part) for part in chunks(z, z[0, 0].numel() * vae.cfg.factor ** 2)]
    return torch.cat(parts).float().clamp(-1, 1)


@torch.no_grad()
def invert(net, schedule, latents, empty, steps=50):
    """DDIM inversion: yields the clip's latents (b, 4, f, h, w), ever noisier. The last one is x_T.

    empty: the empty prompt's context (b, m, d), "no textual condition" (paper, section 3.3). Official util.py, ddim_loop.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):                       # from t_next, the cleaner end, up to t
        t, t_next = torch.tensor((t, t_next), device=x.device)
        eps = schedule.epsilon(net(x, t.expand(len(x)), empty).float(), x, schedule.abar(t_next))
        x = move(x, eps, schedule.abar(t_next), schedule.abar(t))
        yield x


@torch.no_grad()
def sample(net, schedule, noise, context, empty, steps=50, guidance=12.5):
    """DDIM sampling: yields latents (b, 4, f, h, w), ever cleaner, from x_T `noise` under the prompts' context (b, m, d).

    eps = eps(empty) + guidance (eps(prompt) - eps(empty)): classifier-free guidance, arXiv 2207.12598, equation 6 with
    guidance = 1 + w. At guidance 1 the net is asked once a step, otherwise for both in one batch.
    """
    x, both = noise, torch.cat([empty, context])
    for t, t_next in schedule.pairs(steps):
        t, t_next = torch.tensor((t, t_next), device=x.device)
        if guidance == 1:
            output = net(x, t.expand(len(x)), context).float()
        else:
            without, given = net(x.repeat(2, 1, 1, 1, 1), t.expand(2 * len(x)), both).float().chunk(2)
            output = without + guidance * (given - without)
        x = move(x, schedule.epsilon(output, x, schedule.abar(t)), schedule.abar(t), schedule.abar(t_next))
        yield x


def gaussian(shape, seed):
    """White noise to sample from, the same on every device: a function of shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(steps):
    """The final value of a generator."""
    for value in steps:
        pass
    return value
