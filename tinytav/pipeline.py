"""Editing a clip, in the order the data flows: read, encode, tune, invert, sample, decode.

Wu et al., arXiv 2212.11565, section 3.3 and figure 2: V* = Decode(DDIM-sample(DDIM-invert(Encode(V)), T*)). Official
pipeline_tuneavideo.py and util.py. The first part holds the method's steps; `invert` and `sample` are generators, so that
progress and previews stay outside. The second part puts them together for one clip, as the scripts use them.
"""
from dataclasses import dataclass
from fractions import Fraction

import torch

from tinytav.files.frames import read
from tinytav.inflation import inflate
from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.ddim import move
from tinytav.stable_diffusion.precision import autocast
from tinytav.tuning import Tuner

PIXELS = 2 ** 20        # how many pixels go through the VAE at once


# ---- The steps ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(vae, x):
    """Frames x (f, 3, h, w) in [-1, 1] -> mean and std of the clip's latents, (1, 4, f, h/8, w/8) each, float32."""
    means, stds = [], []
    with autocast(vae):
        for part in chunks(x, pixels_each=x[0, 0].numel()):
            mean, std = vae.encode(part)
            means.append(mean)
            stds.append(std)
    return as_clip(torch.cat(means)), as_clip(torch.cat(stds))


@torch.no_grad()
def decode(vae, latents):
    """Latents (1, 4, f, h/8, w/8) -> frames (f, 3, h, w) in [-1, 1]."""
    z = latents[0].transpose(0, 1)                                          # (f, 4, h/8, w/8)
    with autocast(vae):
        parts = [vae.decode(part) for part in chunks(z, pixels_each=z[0, 0].numel() * vae.cfg.factor ** 2)]
    return torch.cat(parts).float().clamp(-1, 1)


def chunks(x, pixels_each):
    """Parts of a batch x (f, ...) that the VAE takes at once; each item stands for `pixels_each` pixels."""
    return x.split(max(1, PIXELS // pixels_each))


def as_clip(z):
    """(f, 4, h, w) -> (1, 4, f, h, w), float32."""
    return z.float().transpose(0, 1)[None]


@torch.no_grad()
def invert(net, schedule, latents, empty, steps=50):
    """DDIM inversion: yields the latents (b, 4, f, h, w), noisier after each step. The last one is x_T.

    empty (b, m, d): the context of the empty prompt, the paper's "no textual condition". Official util.py, ddim_loop.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):                       # from t_next, the cleaner end, up to t
        output = ask(net, x, t, empty)
        eps = schedule.epsilon(output, x, schedule.abar(t_next))
        x = move(x, eps, schedule.abar(t_next), schedule.abar(t))
        yield x


@torch.no_grad()
def sample(net, schedule, noise, context, empty, steps=50, guidance=12.5):
    """DDIM sampling from x_T `noise`: yields the latents (b, 4, f, h, w), cleaner after each step.

    context, empty (b, m, d): of the prompts and of the empty prompt. Classifier-free guidance, arXiv 2207.12598, equation
    6 with guidance = 1 + w: eps = eps(empty) + guidance (eps(prompt) - eps(empty)). At guidance 1 the net is asked for
    the prompt alone, otherwise for both in one batch.
    """
    x = noise
    for t, t_next in schedule.pairs(steps):
        if guidance == 1:
            output = ask(net, x, t, context)
        else:
            both = ask(net, torch.cat([x, x]), t, torch.cat([empty, context]))
            without, given = both.chunk(2)
            output = without + guidance * (given - without)
        eps = schedule.epsilon(output, x, schedule.abar(t))
        x = move(x, eps, schedule.abar(t), schedule.abar(t_next))
        yield x


def ask(net, x, t, context):
    """The net's answer (b, 4, f, h, w), float32, for latents x that stand at timestep t, an int."""
    with autocast(net):
        return net(x, torch.full((len(x),), t, device=x.device), context).float()


def noise_shape(sd, count, width, height):
    """The shape of the latents of a clip of `count` frames of these pixels, rounded down to what the model takes."""
    return 1, 4, count, height // sd.multiple, width // sd.multiple


def gaussian(shape, seed):
    """White noise to sample from, the same on every device: a function of shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(steps):
    """The final value of a generator."""
    for value in steps:
        pass
    return value


# ---- The steps together, for one clip ----------------------------------------------------------------------------------

@dataclass
class Clip:
    """A clip and its caption as tuning and editing need them, encoded once."""
    mean: torch.Tensor              # of its latents, (1, 4, f, h/8, w/8)
    std: torch.Tensor
    context: torch.Tensor           # of its caption, (1, m, d)
    empty: torch.Tensor             # of the empty prompt, (1, m, d)
    fps: Fraction                   # frames a second of the chosen frames
    indices: tuple[int, ...] = ()   # of the chosen frames in the source
    total: int = 0                  # frames that the source has

    @property
    def frames(self):
        return self.mean.shape[2]


def read_clip(sd, path, prompt, size=None, frames=None, start=0, stride=None):
    """Reads a video, a GIF or a folder of pictures and encodes it and its caption -> Clip.

    size: pixels of the short side. frames: how many; a shorter clip is then refused. Without them the weights'
    defaults hold, and a shorter clip gives what it has. start, stride: as in files.frames.read. Raises InputError.
    """
    source = read(path, size or sd.defaults.size, sd.multiple, frames or sd.defaults.frames, start, stride,
                  exact=frames is not None)
    return encode_clip(sd, source, prompt)


def encode_clip(sd, source, prompt):
    """files.frames.Source and its caption -> Clip. Raises InputError if the latents are not finite."""
    mean, std = encode(sd.vae, source.x.to(sd.device))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise InputError("The VAE gives this clip latents that are not finite: try --precision fp32.")
    context, empty = sd.encode_prompts([prompt, ""]).split(1)
    return Clip(mean, std, context, empty, source.fps, source.indices, source.total)


def no_progress(steps, total, name):
    """The progress that shows nothing. A progress takes an iterable, its length and a name, and returns an iterable."""
    return steps


def new_net(sd, count, attention="sparse-causal", norm="clip", seed=33):
    """The inflated U-Net for `count` frames; T-Attn's first q, k and v come from the seed."""
    torch.manual_seed(seed)
    return inflate(sd.unet, count, attention, norm)


def tune_on(sd, clip, steps=None, lr=None, seed=33, attention="sparse-causal", norm="clip", progress=no_progress):
    """Inflates the U-Net and tunes it on a clip -> VideoUNet. Without steps or lr the weights' defaults hold."""
    net = new_net(sd, clip.frames, attention, norm, seed)
    tuner = Tuner(net, sd.schedule, clip.mean, clip.std, clip.context, lr or sd.defaults.lr, seed)
    steps = steps or sd.defaults.steps
    for _ in progress(range(steps), steps, "tuning"):
        tuner.step()
    return net


def invert_clip(sd, net, clip, steps=None, progress=no_progress):
    """The clip's noise x_T (1, 4, f, h/8, w/8), under `net`. Raises InputError if it is not finite."""
    steps = steps or sd.defaults.ddim_steps
    noise = last(progress(invert(net, sd.schedule, clip.mean, clip.empty, steps), steps, "inverting"))
    if not noise.isfinite().all():
        raise InputError("The net inverts the clip to values that are not finite: tune again with a smaller --lr, or use "
                         "--precision fp32.")
    return noise


def sample_clip(sd, net, noise, prompt, steps=None, guidance=None, progress=no_progress):
    """Samples from noise x_T (1, 4, f, h/8, w/8) under a prompt -> frames (f, 3, h, w) in [-1, 1].

    Without steps (of DDIM) or guidance the weights' defaults hold. Raises InputError if the result is not finite.
    """
    steps = steps or sd.defaults.ddim_steps
    guidance = sd.defaults.guidance if guidance is None else guidance
    context, empty = sd.encode_prompts([prompt, ""]).split(1)
    latents = last(progress(sample(net, sd.schedule, noise, context, empty, steps, guidance), steps, prompt))
    if not latents.isfinite().all():
        raise InputError(f"{prompt!r} gave values that are not finite: use a smaller --guidance or --precision fp32.")
    return decode(sd.vae, latents)


def edit(sd, net, clip, prompt, steps=None, guidance=None, progress=no_progress):
    """The clip as the prompt wants it: inverted, then sampled -> frames (f, 3, h, w) in [-1, 1].

    For several prompts, call invert_clip once and sample_clip for each. Arguments and errors as theirs.
    """
    noise = invert_clip(sd, net, clip, steps, progress)
    return sample_clip(sd, net, noise, prompt, steps, guidance, progress)
