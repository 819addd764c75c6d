"""From a clip on disk to an edited clip: the life of a run. The method is in pipeline.py and tuning.py.

A session holds the weights, the inflated U-Net, and the folder of a run. `begin` reads and encodes the clip once,
`tune` makes the steps and saves them now and then, `finish` saves the tuned tensors and the inverted clip, `edit`
makes one edit and writes its files. The scripts, the evaluation of sets and a notebook all use it. A `progress` is a
function of (an iterable of steps, their number, a name) that returns an iterable; the default shows nothing.
"""
import sys
import time
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import tinytav
from tinytav import memory, tuning, windows
from tinytav.errors import InputError
from tinytav.files import page, records
from tinytav.files.frames import (
    FOLDER_FPS,
    check_size,
    fingerprint,
    read,
    read_at,
    strip_columns,
    warn_if_far_apart,
    write_gif,
    write_mp4,
    write_strip,
)
from tinytav.files.runs import Run, Settings, new_name, slug
from tinytav.inflation import VideoUNet, inflate
from tinytav.keep import FirstFrame, Keep, Mask, free_latents, read_mask
from tinytav.noise import NOISES
from tinytav.pipeline import decode, encode, last, no_progress
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.precision import name_of
from tinytav.weights import StableDiffusion

SUFFIXES = (".mp4", ".gif", ".png", ".sample.json")     # of an edit's files
# Entries of an edit's record that are flags of sample.py.
RECORDED = ("guidance", "noise", "seed", "strength", "negative", "precision", "control", "hint", "control_scale",
            "mask", "mask_word", "first_frame")
SAVING = 20             # a twentieth of the time goes into saving what is tuned


@dataclass
class Clip:
    """A clip and its caption as tuning and editing need them, encoded once."""
    mean: torch.Tensor              # of its latents, (1, 4, f, h/8, w/8)
    std: torch.Tensor
    context: torch.Tensor           # of its caption, (1, m, d)
    empty: torch.Tensor             # of the empty prompt, (1, m, d)


class Edit(NamedTuple):
    frames: torch.Tensor            # (f, 3, h, w) in [-1, 1]
    file: Path                      # the file to look at: an mp4, or of a single frame a png
    page: Path                      # the page of the folder


def chosen(value, default):
    """The value, or the default if it is None."""
    return default if value is None else value


# ---- The parts -----------------------------------------------------------------------------------

def encode_clip(sd, x, prompt):
    """Frames (f, 3, h, w) in [-1, 1] and their caption -> Clip. Raises InputError if the latents are not finite."""
    mean, std = (z.contiguous() for z in encode(sd.vae, x.to(sd.device)))      # as a resumed run reads them
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise InputError("The VAE gives this clip latents that are not finite: try --precision fp32.")
    context, empty = sd.encode_prompts([prompt, ""]).split(1)
    return Clip(mean, std, context, empty)


def default_window(sd, *frames):
    """How many frames the net sees at once where no one says: the largest of the weights' own number and `frames`."""
    return max(windows.LEAST, sd.defaults.frames, *frames)


def new_net(sd, count, attention="sparse-causal", norm="clip", seed=33):
    """The inflated U-Net for `count` frames.

    If the official code has tuned the weights, the T-Attn stored with them is used. Otherwise it is new, and its
    first q, k and v come from the seed alone. The caller's random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):             # inflation draws on the CPU
        torch.manual_seed(seed)
        net = inflate(sd.unet, count, attention, norm)
    for name, tensor in sd.temporal.items():
        net.get_parameter(name).copy_(tensor)
    return net


def sample_clip(sd, net, noise, prompt, guidance, negative="", control=None, progress=no_progress, keep=Keep()):
    """Samples from a Noise under a prompt -> frames (f, 3, h, w) in [-1, 1].

    negative: the prompt that guidance goes away from. control: a control.Control. keep: what Session.keep returned.
    Raises InputError if the result is not finite.
    """
    context, away = sd.encode_prompts([prompt, negative]).split(1)
    with keep.during(net, sd.tokenizer, prompt) as keeps:
        walk = noise.sample(net, sd.schedule, context, away, guidance, control, keeps)
        latents = last(progress(walk, noise.count, prompt))
    x = keep.paste(decode(sd.vae, latents), sd.vae)
    if not x.isfinite().all():
        raise InputError(f"{prompt!r} gave values that are not finite: use a smaller --guidance or --precision fp32.")
    return x


# ---- The life of a run ---------------------------------------------------------------------------

@dataclass
class Session:
    """The weights and a net. With a run it edits the run's clip; without one it samples from noise alone."""
    sd: StableDiffusion
    net: VideoUNet
    run: Run | None = None
    clip: Clip | None = None
    shape: tuple = ()               # of the latents that are sampled, (1, 4, f, h/8, w/8)
    loras: list = field(default_factory=list)       # those added to the run's own
    moved: list = field(default_factory=list)       # those of the run that lie elsewhere now
    strength: float = 1.            # how much of its tuning the net has
    tuner: tuning.Tuner | None = None

    # ---- Tuning

    def tune(self, checkpointing="auto"):
        """Prepares the tuning, or goes on where its saved state stands. Returns a generator of (steps done, loss).

        It saves the state at each quarter and now and then. checkpointing: as in memory.prepare. Raises InputError as
        tuning.Tuner does.
        """
        settings, clip = self.run.settings, self.clip
        memory.prepare(self.net, clip.mean.shape, self.sd.device, checkpointing)
        self.tuner = tuning.Tuner(self.net, self.sd.schedule, clip.mean, clip.std, clip.context, settings.lr,
                                  settings.seed)
        if self.run.has("state"):
            self.tuner.load_state_dict(self.run.read("state"))
        return self._saved_now_and_then(self.tuner.run(settings.steps, climb=checkpointing == "auto"))

    def _saved_now_and_then(self, steps):
        save_at = 0.
        for step, loss in steps:
            if step in self.quarters or time.monotonic() > save_at:
                save_at = time.monotonic() + SAVING * self.save()
            yield step, loss

    @property
    def quarters(self):
        """The steps after each quarter of the tuning."""
        return {self.run.settings.steps * i // 4 for i in (1, 2, 3, 4)}

    def save(self):
        """Writes what resuming needs, and the page. Returns the seconds it took."""
        began = time.monotonic()
        self.run.write("state", self.tuner.state_dict())
        self.run.write_losses(self.tuner.losses)
        page.write(self.run.path)
        return time.monotonic() - began

    def finish(self, progress=no_progress):
        """Saves the tuned tensors and the inverted clip, and marks the run as finished. Returns the page's path.

        Raises InputError if the inverted clip is not finite.
        """
        self.run.write("tuned", self.net.tuned())
        noise = self.make_noise("inverted", progress=progress)
        self.run.write("inversion", dict(noise=noise.x, steps=torch.tensor(noise.steps)))
        self.run.finish()
        return page.write(self.run.path)

    # ---- Editing

    def make_noise(self, name=None, steps=None, seed=33, progress=no_progress, way=False):
        """What edits start from: a Noise, made. name: a key of NOISES; else inverted where there is a clip, or random.

        The run's saved inversion is used where it fits. Without steps the run's or the weights' own hold. way: invert
        anew in any case, and keep the latents of each step, which an edit needs that keeps something. The noise itself
        is the saved one then, too, so that it is the same to the last bit. Raises InputError if the noise needs a clip
        of this size and there is none, or if it is not finite.
        """
        kind = NOISES[name or ("inverted" if self.clip else "random")]
        if kind.needs_clip and (self.clip is None or self.clip.mean.shape != self.shape):
            raise InputError(f"The {kind.name} noise is made from a run's clip, and has its frames and its size: name "
                             "a run with --run and leave out --frames and --size, or begin with --noise random.")
        begun = {0: self.clip.mean} if way and self.clip else None
        noise = kind(chosen(steps, self.defaults.ddim_steps), seed, way=begun)
        saved = self.saved_inversion() if kind.name == "inverted" else {}
        fits = saved and int(saved["steps"]) == noise.steps
        if way or not fits:
            noise.make(self.net, self.sd.schedule, self.shape, self.clip, progress)
        if fits:
            noise.x = saved["noise"].to(self.sd.device)
        return noise

    def saved_inversion(self):
        """What `finish` saved of the inverted clip; empty where the net is not the one that inverted it."""
        changed = self.net.attention != self.run.settings.attention or self.loras or self.strength != 1
        if changed or not self.run.has("inversion"):
            return {}
        return self.run.read("inversion", dict(noise=self.shape, steps=()))

    def keep(self, mask=None, mask_word=None, first_frame=None):
        """What edits keep -> a Keep, for `edit`. Without any of the three it keeps nothing.

        mask: a file, as keep.read_mask reads it: black where the clip is kept. mask_word: a word of the prompts, whose
        attention makes the mask. first_frame: a picture. Raises InputError if they do not fit the clip.
        """
        if (mask or mask_word) and (self.clip is None or self.clip.mean.shape != self.shape):
            raise InputError("Outside a mask the run's clip is kept, with its frames and its size: name a run with "
                             "--run, and leave out --frames and --size.")
        if mask_word and self.net.frames < self.shape[2]:
            raise InputError(f"The net sees the clip in windows of {self.net.frames} frames, which draw no mask of a "
                             "word: give one with --mask.")
        keep, cell = Keep(), self.sd.multiple
        size = [cell * side for side in self.shape[3:]]
        if mask_word:
            keep.word, keep.clip = mask_word, self.clip.mean
            keep.record |= dict(mask_word=mask_word)
        if mask:
            keep.pixels = read_mask(mask, self.run.settings, *size, cell).to(self.sd.device)
            keep.mask = Mask(self.clip.mean, free_latents(keep.pixels, cell))
            keep.record |= dict(mask=str(mask), mask_fingerprint=fingerprint(mask))
        if first_frame:
            latents, _ = encode(self.sd.vae, read_at(first_frame, {1: [0]}, *size, cell).to(self.sd.device))
            keep.first = FirstFrame(latents)
            if mask:
                keep.pixels[0] = True               # the first frame is the given one, whole
            keep.record |= dict(first_frame=str(first_frame), first_frame_fingerprint=fingerprint(first_frame))
        return keep

    def edit(self, prompt, noise=None, guidance=None, negative="", control=None, out=None, progress=no_progress,
             keep=Keep()):
        """Makes an edit and writes its video, gif, strip and record -> Edit. The page shows it.

        Of a single frame it writes a picture in place of video, gif and strip. noise: what `make_noise` returned; else
        the inverted clip, or random noise. Without guidance the run's or the weights' own holds. out: a folder; else
        the run's, or samples/. keep: what `keep` returned. Raises InputError as make_noise and sample_clip do.
        """
        noise = noise or self.make_noise(progress=progress, way=bool(keep))
        guidance = chosen(guidance, self.defaults.guidance)
        x = sample_clip(self.sd, self.net, noise, prompt, guidance, negative, control, progress, keep)
        folder = Path(out or (self.run.path if self.run else "samples"))
        folder.mkdir(parents=True, exist_ok=True)
        name = new_name(folder, self.file_name(prompt, noise, control, keep), SUFFIXES)
        file = self.write(folder / name, x, self.rows_above(noise, control), prompt)
        record = self.record(noise, guidance, negative, control) | keep.record
        records.write_record(folder, name, prompt, record, self.command(prompt, record, out))   # last: all is there
        return Edit(x, file, page.write(folder))

    def file_name(self, prompt, noise, control, keep=Keep()):
        """A file name for an edit. It is for people: what made the edit stands in its record."""
        words = [] if noise.name == "inverted" or self.run is None else [noise.name]
        words += ["control"] * bool(control) + ["kept"] * bool(keep)
        return "-".join([slug(prompt), *words])

    def record(self, noise, guidance, negative="", control=None):
        """The settings of an edit: all that decides the result, beside the run, the weights and what is kept."""
        settings = dict(ddim_steps=noise.steps, guidance=guidance, noise=noise.name,
                        seed=noise.seed if noise.seeded else None,
                        negative=negative or None, attention=self.net.attention, frames=self.shape[2],
                        size=self.sd.multiple * min(self.shape[3:]), precision=name_of(self.sd.dtype),
                        weights=self.sd.fingerprint, strength=self.strength if self.strength != 1 else None,
                        lora=[f"{one.fingerprint}:{one.scale}" for one in self.loras] or None)
        if control is not None:
            settings |= dict(control=control.path, hint=control.hint, control_scale=control.scale)
        return {name: value for name, value in settings.items() if value is not None}

    def command(self, prompt, record, out=None):
        """The line that makes an edit again, whatever the defaults are then."""
        flags = dict(run=self.run.path if self.run else None, **self.source(), prompt=prompt, out=out)
        flags |= {name: record.get(name) for name in RECORDED} | dict(steps=record["ddim_steps"])
        flags["lora"] = [f"{one.file}:{one.scale}" for one in (*self.moved, *self.loras)] or None
        if self.run is None or self.net.attention != self.run.settings.attention:
            flags["attention"] = self.net.attention
        if self.clip is None or self.clip.mean.shape != self.shape:
            flags |= dict(frames=record["frames"], size=record["size"])
        return records.call("python sample.py", [], flags)

    def source(self):
        """The flags that name the weights, where the run does not."""
        return {} if self.run and self.run.settings.source() == self.sd.source else self.sd.source

    def rows_above(self, noise, control):
        """What a strip shows above the edit, each (n, 3, h, w) in [-1, 1]: the source, and the hints."""
        rows = [self.source_row] if noise.needs_clip else []
        if control is not None:
            rows.append(2 * control.hints[strip_columns(len(control.hints))] - 1)
        return rows

    @cached_property
    def source_row(self):
        """The frames of the source that a strip shows, as the VAE gives them back."""
        return decode(self.sd.vae, self.clip.mean[:, :, strip_columns(self.clip.mean.shape[2])])

    def write(self, stem, x, above, prompt):
        """Writes frames x (f, 3, h, w): a strip, a gif, and last an mp4 with the prompt as its title.

        Of a single frame it writes a picture alone. Returns the path of the file to look at.
        """
        picture, video = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.mp4")
        write_strip(picture, *above, x[strip_columns(len(x))])
        if len(x) == 1:
            return picture
        fps = Fraction(self.run.settings.fps) if self.run else FOLDER_FPS
        write_gif(stem.with_name(f"{stem.name}.gif"), x, fps)
        write_mp4(video, x, fps, title=prompt)
        return video

    @property
    def defaults(self):
        """Where steps of sampling and guidance come from: the run, else the weights."""
        return self.run.settings if self.run else self.sd.defaults


def begin(sd, clip, prompt, out="runs", folder=None, *, size=None, frames=None, window=None, start=0, stride=None,
          steps=None, lr=None, ddim_steps=None, guidance=None, attention="sparse-causal", norm="clip", seed=33,
          preview=None, loras=()):
    """Reads a video, a GIF or a folder of pictures, encodes it once, and makes a new run of it -> Session.

    The run's folder is out/NAME, or out/NAME-2, ...; or `folder`, which must not exist. size: pixels of the short
    side. frames: how many; a shorter clip is then refused. window: how many of them the net sees at once (windows.py);
    else at most the weights' own number of frames. start, stride: as in files.frames.read. loras: those that are
    merged into `sd` already. preview: a prompt that run.json keeps. Where a number is None, the weights' own holds.
    Raises InputError.
    """
    if not prompt.strip():
        raise InputError("The prompt is empty: say in a few words what the clip shows.")
    if frames and window and window > frames:
        raise InputError(f"The window of {window} frames is longer than the clip of {frames}: use a window of {frames} "
                         "frames or less, or leave it out.")
    d, window = sd.defaults, chosen(window, default_window(sd))
    size = chosen(size, d.size)
    source = read(clip, size, sd.multiple, chosen(frames, d.frames), start=start, stride=stride,
                  exact=frames is not None)
    warn_if_far_apart(source, clip)
    settings = Settings.from_json(dict(
        clip=str(clip), clip_fingerprint=fingerprint(clip), prompt=prompt, preview=preview,
        fingerprint=sd.fingerprint, precision=name_of(sd.dtype), lora=[asdict(one) for one in loras] or None,
        size=size, frames=len(source.x), window=window if window < len(source.x) else None, start=start, stride=stride,
        indices=list(source.indices), total=source.total, fps=str(source.fps),
        steps=chosen(steps, 0 if sd.temporal else d.steps), lr=chosen(lr, d.lr),
        ddim_steps=chosen(ddim_steps, d.ddim_steps), guidance=chosen(guidance, d.guidance),
        attention=attention, norm=norm, seed=seed, **sd.source,
        versions=dict(tinytav=tinytav.__version__, torch=torch.__version__, python=sys.version.split()[0])))
    encoded = encode_clip(sd, source.x, prompt)

    def fill(run):
        run.write("clip", dict(mean=encoded.mean, std=encoded.std))
        write_mp4(run.path / "source.mp4", source.x, source.fps)
        run.save()
    run = Run.create(folder or Path(out or "runs") / slug(Path(clip).stem), settings, fill, another=folder is None)
    page.write(run.path)
    net = new_net(sd, settings.window or settings.frames, attention, norm, seed)
    return Session(sd, net, run, encoded, tuple(encoded.mean.shape))


def resume(sd, run):
    """An unfinished run -> Session, with the net as it was before tuning. `tune` goes on from the saved state.

    The caller holds the run's lock. `sd`: the run's weights with its LoRAs merged. Raises InputError if they do not
    fit.
    """
    settings = run.settings
    if run.finished:
        raise InputError(f"{run.path} is finished: sample from it with sample.py --run.")
    clip = clip_of(run, sd)
    net = new_net(sd, settings.window or settings.frames, settings.attention, settings.norm, settings.seed)
    return Session(sd, net, run, clip, tuple(clip.mean.shape))


def open_run(sd, run, attention=None, frames=None, size=None, loras=(), strength=1.):
    """A finished run, or the path of one -> Session, with the tuned net. Raises InputError if they do not fit.

    `sd`: the run's weights with its LoRAs merged. attention, frames (their number), size (of a square): other than
    the run's. loras: more LoRAs, which are added to the tuned net and to the text encoder. strength: how much of the
    tuning the net has (tuning.blend).
    """
    run = run if isinstance(run, Run) else Run.open(run)
    settings = run.settings
    run.check(sd)
    frames, window = frames or settings.frames, settings.window or default_window(sd, settings.frames)
    net = new_net(sd, min(frames, window), attention or settings.attention, settings.norm, settings.seed)
    tuned = net.tuned()
    tensors = run.read("tuned", {name: p.shape for name, p in tuned.items()})
    tuning.blend(tuned, tensors, strength)
    if not all(p.isfinite().all() for p in tuned.values()):
        raise InputError(f"At a strength of {strength:g} the tuned tensors are not finite: use a smaller --strength.")
    lora.merge(SimpleNamespace(unet=net, text_encoder=sd.text_encoder), loras)
    clip = clip_of(run, sd)                 # its prompts are encoded with all LoRAs
    sides = tuple(clip.mean.shape[3:]) if size is None else square(sd, size)
    return Session(sd, net, run, clip, (1, 4, frames, *sides), list(loras), strength=strength)


def untuned(sd, frames=None, size=None, attention="sparse-causal", loras=()):
    """The inflated, untuned net -> Session without a run. loras: those that are merged into `sd` already."""
    frames = frames or sd.defaults.frames
    net = new_net(sd, min(frames, default_window(sd)), attention)
    return Session(sd, net, shape=(1, 4, frames, *square(sd, size or sd.defaults.size)), loras=list(loras))


def square(sd, size):
    """The sides of the latents of a square of `size` pixels. Raises InputError for a size that no frame can have."""
    check_size(size, sd.multiple)
    return size // sd.multiple, size // sd.multiple


def clip_of(run, sd):
    """A run's clip and its caption -> Clip, on the device of `sd`. Raises InputError if they do not fit the run."""
    run.check(sd)
    mean, std = (z.to(sd.device) for z in run.latents())
    context, empty = sd.encode_prompts([run.settings.prompt, ""]).split(1)
    return Clip(mean, std, context, empty)
