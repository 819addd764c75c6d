"""From a clip on disk to an edited clip: the level that the scripts and a notebook use. The method is in pipeline.py.

A clip is read and encoded once, a net is tuned on it, and each prompt makes an edit. The same for a run's folder, where
clip, net and noise lie saved. A `progress` is a function of (an iterable of steps, their number, a name) that returns an
iterable; the default shows nothing.
"""
from dataclasses import dataclass
from fractions import Fraction

import torch

from tinytav import edit_friendly
from tinytav.errors import InputError
from tinytav.files.frames import read
from tinytav.inflation import inflate
from tinytav.pipeline import decode, encode, invert, last, sample
from tinytav.tuning import Tuner

NOT_FINITE = ("The net inverts the clip to values that are not finite: tune again with a smaller --lr, or use --precision "
              "fp32.")


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
    source = read(path, chosen(size, sd.defaults.size), sd.multiple, chosen(frames, sd.defaults.frames), start=start,
                  stride=stride, exact=frames is not None)
    return encode_clip(sd, source, prompt)


def encode_clip(sd, source, prompt):
    """files.frames.Source and its caption -> Clip. Raises InputError if the latents are not finite."""
    mean, std = encode(sd.vae, source.x.to(sd.device))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise InputError("The VAE gives this clip latents that are not finite: try --precision fp32.")
    context, empty = sd.encode_prompts([prompt, ""]).split(1)
    return Clip(mean, std, context, empty, source.fps, source.indices, source.total)


def chosen(value, default):
    """The value, or the default if it is None."""
    return default if value is None else value


def no_progress(steps, total, name):
    """The progress that shows nothing."""
    return steps


def new_net(sd, count, attention="sparse-causal", norm="clip", seed=33):
    """The inflated U-Net for `count` frames.

    If the official code has tuned the weights, T-Attn is theirs. Otherwise it is new, and its first q, k and v come from
    the seed alone. The caller's random state stays as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = inflate(sd.unet, count, attention, norm)
    for name, tensor in sd.temporal.items():
        net.get_parameter(name).copy_(tensor)
    return net


def tune_on(sd, clip, steps=None, lr=None, seed=33, attention="sparse-causal", norm="clip", progress=no_progress):
    """Inflates the U-Net and tunes it on a clip -> VideoUNet. Without steps or lr the weights' defaults hold."""
    net = new_net(sd, clip.frames, attention, norm, seed)
    tuner = Tuner(net, sd.schedule, clip.mean, clip.std, clip.context, chosen(lr, sd.defaults.lr), seed)
    steps = chosen(steps, sd.defaults.steps)
    for _ in progress(range(steps), steps, "tuning"):
        tuner.step()
    return net


def invert_clip(sd, net, clip, steps=None, progress=no_progress):
    """The clip's noise x_T (1, 4, f, h/8, w/8), under `net`. Raises InputError if it is not finite."""
    steps = chosen(steps, sd.defaults.ddim_steps)
    noise = last(progress(invert(net, sd.schedule, clip.mean, clip.empty, steps), steps, "inverting"))
    if not noise.isfinite().all():
        raise InputError(NOT_FINITE)
    return noise


def invert_edit_friendly(sd, net, clip, steps=None, seed=33, progress=no_progress):
    """The clip's edit-friendly noise under `net`, a list of edit_friendly.Step, for sample_clip.

    Without steps (of sampling) the weights' default holds. Raises InputError if the noise is not finite.
    """
    steps = chosen(steps, sd.defaults.ddim_steps)
    walk = edit_friendly.invert(net, sd.schedule, clip.mean, clip.context, steps, seed)
    inverted = list(progress(walk, edit_friendly.count(steps), "inverting"))
    if not all(step.noise.isfinite().all() for step in inverted):
        raise InputError(NOT_FINITE)
    return inverted


def sample_clip(sd, net, noise, prompt, steps=None, guidance=None, progress=no_progress, control=None):
    """Samples from noise under a prompt -> frames (f, 3, h, w) in [-1, 1].

    noise: x_T (1, 4, f, h/8, w/8), or what invert_edit_friendly returns, which has its own steps. Without steps (of DDIM)
    or guidance the weights' defaults hold. control: a control.Control. Raises InputError if the result is not finite.
    """
    guidance = chosen(guidance, sd.defaults.guidance)
    context, empty = sd.encode_prompts([prompt, ""]).split(1)
    if isinstance(noise, list):
        steps = len(noise)
        walk = edit_friendly.sample(net, sd.schedule, noise, context, empty, guidance, control)
    else:
        steps = chosen(steps, sd.defaults.ddim_steps)
        walk = sample(net, sd.schedule, noise, context, empty, steps, guidance, control)
    x = decode(sd.vae, last(progress(walk, steps, prompt)))
    if not x.isfinite().all():
        raise InputError(f"{prompt!r} gave values that are not finite: use a smaller --guidance or --precision fp32.")
    return x


def edit(sd, net, clip, prompt, steps=None, guidance=None, progress=no_progress):
    """The clip as the prompt wants it: inverted, then sampled -> frames (f, 3, h, w) in [-1, 1].

    For several prompts, call invert_clip once and sample_clip for each. Arguments and errors as theirs.
    """
    noise = invert_clip(sd, net, clip, steps, progress)
    return sample_clip(sd, net, noise, prompt, steps, guidance, progress)


# ---- The same from a run's folder ----------------------------------------------------------------

def clip_of(run, sd):
    """A run's clip and its caption -> Clip, on the device of `sd`. Raises InputError if they do not fit the run."""
    mean, std = (z.to(sd.device) for z in run.latents())
    context, empty = sd.encode_prompts([run.settings.prompt, ""]).split(1)
    settings = run.settings
    return Clip(mean, std, context, empty, Fraction(settings.fps), settings.indices or (), settings.total)


def net_of(run, sd, attention=None, frames=None):
    """The inflated U-Net with a run's tuned tensors -> VideoUNet. Raises InputError if they do not fit.

    attention, frames: other than the run's own.
    """
    settings = run.settings
    net = new_net(sd, frames or settings.frames, attention or settings.attention, settings.norm)
    tuned = net.tuned()
    tensors = run.read("tuned", {name: p.shape for name, p in tuned.items()})
    for name, p in tuned.items():
        p.copy_(tensors[name])
    return net


def noise_of(run, sd, net, clip, steps, progress=no_progress):
    """A run's noise x_T (1, 4, f, h/8, w/8), as it was saved.

    With another number of steps or another attention the clip is inverted anew. Raises InputError as invert_clip does.
    """
    if net.attention == run.settings.attention and run.has("inversion"):
        inversion = run.read("inversion", dict(noise=clip.mean.shape, steps=()))
        if int(inversion["steps"]) == steps:
            return inversion["noise"].to(sd.device)
    return invert_clip(sd, net, clip, steps, progress)
