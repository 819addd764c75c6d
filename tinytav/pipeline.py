"""The steps of an edit, in the order the data flows: encode, invert, sample, decode.

Wu et al., arXiv 2212.11565, section 3.3 and figure 2: V* = Decode(DDIM-sample(DDIM-invert(Encode(V)), T*)). Official
pipeline_tuneavideo.py and util.py. `invert` and `sample` are generators, so that progress and previews stay outside.
"""
import torch

from tinytav import windows
from tinytav.stable_diffusion.ddim import move
from tinytav.stable_diffusion.precision import autocast

PIXELS = 2 ** 20        # how many pixels go through a network of pixels at once


@torch.no_grad()
def encode(vae, x):
    """Frames x (f, 3, h, w) in [-1, 1] -> mean and std of the clip's latents, (1, 4, f, h/8, w/8) each, float32."""
    with autocast(vae):
        parts = [vae.encode(part) for part in chunks(x, pixels_each=x[0, 0].numel())]
    means, stds = zip(*parts)
    return as_clip(torch.cat(means)), as_clip(torch.cat(stds))


@torch.no_grad()
def decode(vae, latents):
    """Latents (1, 4, f, h/8, w/8) -> frames (f, 3, h, w) in [-1, 1]."""
    z = latents[0].transpose(0, 1)                                          # (f, 4, h/8, w/8)
    with autocast(vae):
        parts = [vae.decode(part) for part in chunks(z, pixels_each=z[0, 0].numel() * vae.cfg.factor ** 2)]
    return torch.cat(parts).float().clamp(-1, 1)


def chunks(x, pixels_each):
    """Parts of a batch x (f, ...) that a network of pixels takes at once; each item stands for `pixels_each` pixels."""
    return x.split(max(1, PIXELS // pixels_each))


def as_clip(z):
    """(f, 4, h, w) -> (1, 4, f, h, w), float32."""
    return z.float().transpose(0, 1)[None]


@torch.no_grad()
def invert(net, schedule, latents, empty, steps=50):
    """DDIM inversion: yields the latents (b, 4, f, h, w), noisier after each step. The last one is x_T,
    which stands at the first timestep of sampling (981 of 1000 for 50 steps).

    empty (b, m, d): the context of the empty prompt, the paper's "no textual condition". Official util.py, ddim_loop.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):                       # from t_next, the cleaner end, up to t
        output = predict(net, x, t, empty)
        eps = schedule.epsilon(output, x, schedule.abar(t_next))
        x = move(x, eps, schedule.abar(t_next), schedule.abar(t))
        yield x


def as_they_are(x, t):
    """The `hold` that keeps nothing."""
    return x


@torch.no_grad()
def sample(net, schedule, noise, context, empty, steps=50, guidance=12.5, control=None, hold=as_they_are):
    """DDIM sampling from x_T `noise`: yields the latents (b, 4, f, h, w), cleaner after each step.

    context, empty (b, m, d): of the prompts, and of the empty or a negative prompt. control: a control.Control, which
    acts on both halves of guidance. hold: a function of latents and their timestep that puts in place what is kept.
    """
    pairs = schedule.pairs(steps)
    x = hold(noise, pairs[0][0])
    for t, t_next in pairs:
        output = guided(net, x, t, context, empty, guidance, control)
        eps = schedule.epsilon(output, x, schedule.abar(t))
        x = hold(move(x, eps, schedule.abar(t), schedule.abar(t_next)), t_next)
        yield x


def guided(net, x, t, context, empty, guidance, control=None):
    """The net's prediction by classifier-free guidance: empty + guidance (prompt - empty).

    arXiv 2207.12598, equation 6 with guidance = 1 + w. At guidance 1 the net runs for the prompt alone, otherwise for
    both in one batch.
    """
    if guidance == 1:
        return predict(net, x, t, context, control)
    both = predict(net, torch.cat([x, x]), t, torch.cat([empty, context]), control)
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def predict(net, x, t, context, control=None):
    """The net's prediction (b, 4, f, h, w), float32, for latents x that stand at timestep t, an int.

    A clip of more frames than the net's is predicted in windows (windows.py).
    """
    t = torch.full((len(x),), t, device=x.device)

    def predict_window(part, place):
        residuals = None if control is None else control.residuals(part, t, context, place)
        with autocast(net):
            return net(part, t, context, residuals).float()
    return windows.average(predict_window, x, windows.places(x.shape[2], net.frames))


def gaussian(shape, seed):
    """White noise to sample from, the same on every device: a function of shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_progress(steps, total, name):
    """The progress that shows nothing: a function of (an iterable of steps, their number, a name) -> an iterable."""
    return steps


def last(steps):
    """The final value of a generator; None if there is none."""
    value = None
    for value in steps:  # noqa: B007
        pass
    return value
