"""The folder of a run: settings, tuned tensors, results. Files are replaced whole, never half-written.

runs/<clip>/  run.json              everything that is needed to repeat it; a folder without it is no run
              clip.safetensors      mean and std of the clip's latents: neither resuming nor sampling needs the clip
              state.safetensors     while it is unfinished: tuned tensors, AdamW's moments, the losses, fp16's scale
              tuned.safetensors     the tuned tensors, by the official names
              inversion.safetensors x_T, and how many steps led there
              source.mp4, loss.csv, index.html, and an mp4, a gif, a strip (png) and a record (json) per sample;
              previews, metrics.json and pictures of attention, where they were asked for
"""
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from dataclasses import replace as changed
from pathlib import Path

import torch

from tinytav.errors import InputError
from tinytav.files.atomic import clear, replace_tensors, replace_text, umask
from tinytav.inflation import ATTENTIONS
from tinytav.stable_diffusion.checkpoint import PREDICTIONS, read_json, read_tensors
from tinytav.stable_diffusion.config import Config
from tinytav.stable_diffusion.lora import Lora
from tinytav.stable_diffusion.precision import PRECISIONS
from tinytav.windows import LEAST

try:
    import fcntl
except ImportError:             # Windows: nothing there keeps two train.py off one run
    fcntl = None

LARGE = 2 ** 32
MOST_STEPS = 10 ** 6        # of tuning: more would take months on a CPU
FIRST_FILES = ("clip.safetensors", "source.mp4", "run.json")        # those that a new run begins with
FPS = r"[1-9]\d{0,19}(/[1-9]\d{0,19})?"     # a Fraction as text


@dataclass(frozen=True)
class Settings(Config):
    """run.json: the settings that train.py was given, and what it needs to know again."""
    clip: str                       # path of the source
    prompt: str                     # its caption
    weights: str                    # path of the Stable Diffusion
    fingerprint: str                # of these weights
    size: int                       # pixels of the short side
    frames: int
    fps: str                        # of the chosen frames, a fraction
    steps: int                      # of tuning
    lr: float
    ddim_steps: int
    guidance: float
    attention: str
    norm: str
    seed: int
    precision: str
    window: int | None = None       # frames that the net sees at once; None: all of them
    start: int = 0
    stride: int | None = None
    indices: tuple[int, ...] | None = None      # of the chosen frames in the source
    total: int = 0                              # frames in the source
    tokenizer: str | None = None
    prediction: str | None = None
    vae: str | None = None                      # path of another VAE than the weights' own
    embedding: tuple[str, ...] | None = None    # paths of learned words
    preview: str | None = None
    clip_fingerprint: str | None = None         # of the source's files
    lora: tuple[dict, ...] | None = None        # each with file, scale and fingerprint
    versions: dict = field(default_factory=dict)
    finished: float = 0             # when, in seconds since 1970; 0 if it is not finished

    LIMITS = dict(guidance=(0, LARGE), seed=(0, LARGE), start=(0, LARGE), indices=(0, LARGE), total=(0, LARGE),
                  finished=(0, LARGE), lr=(0, LARGE), steps=(0, MOST_STEPS))
    ONLY = dict(precision=tuple(PRECISIONS), prediction=(None, *PREDICTIONS), attention=tuple(ATTENTIONS),
                norm=("clip", "frame"))
    LONGEST = LARGE                 # a clip may have any number of frames

    def __post_init__(self):
        if self.window is not None and not LEAST <= self.window < self.frames:
            raise InputError(f"A window of {self.window} of {self.frames} frames is not possible: use one from {LEAST} "
                             "frames to the number of frames.")
        if not re.fullmatch(FPS, self.fps):
            raise InputError(f"Settings: fps = {self.fps!r} is not a number of frames a second, such as 8 or "
                             "30000/1001.")
        self.loras()

    def source(self):
        """Where the weights come from, as cli.load_weights takes it."""
        return dict(weights=self.weights, tokenizer=self.tokenizer, prediction=self.prediction, vae=self.vae,
                    embedding=self.embedding)

    def loras(self):
        """The LoRAs that the weights were changed by. Raises InputError for what is none."""
        return [Lora.from_json(lora) for lora in self.lora or ()]


class Run:
    """`path`: its folder. `settings`: run.json. `held`: the open folder, while this process holds its lock."""

    def __init__(self, path, settings):
        self.path, self.settings, self.held = Path(path), settings, None

    # ---- Making and finding runs

    @classmethod
    def create(cls, path, settings, fill, another=True):
        """A new, locked run in a folder of this path, or else of path-2, ...: a run is never overwritten.

        fill(run) writes its files. The folder is hidden until they are all there. With another=False it has this very
        path; raises FileExistsError if there is something already.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        run = cls(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent), settings)
        try:
            run.lock()
            run.path.chmod(0o777 & ~umask())
            fill(run)
            if another:
                path = path.with_name(new_name(path.parent, path.name))
            if os.path.lexists(path):
                raise FileExistsError(f"{path} is there already.")
            run.path.rename(path)
        except BaseException:
            run.close()
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        run.path = path
        return run

    @classmethod
    def open(cls, path):
        """Raises InputError if there is no run at `path`, or its run.json lacks or misstates something."""
        file = Path(path) / "run.json"
        if not file.is_file():
            raise InputError(f"{path} is not a run: it has no run.json. train.py makes runs.")
        try:
            return cls(path, Settings.from_json(read_json(file)))
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    @classmethod
    def locked(cls, path):
        """The run in a folder, for this process alone until close(), cleared of what a killed one left."""
        run = cls.open(path)
        run.lock()
        run.settings = cls.open(path).settings      # another process may have finished it before the lock
        clear(run.path)
        if run.finished:
            run.file("state").unlink(missing_ok=True)
        return run

    def lock(self):
        """Keeps every other process off the folder until close(), or until this process ends. Raises InputError."""
        if not fcntl:
            return
        self.held = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(f"Another process is at work in {self.path}: wait for it, or stop it.") from None
        except OSError as error:    # some network drives
            warnings.warn(f"{self.path} cannot be locked ({error.strerror}): let no other process work there.")

    def close(self):
        """Gives the lock back."""
        if self.held is not None:
            os.close(self.held)
            self.held = None

    @classmethod
    def newest(cls, folder):
        """The run in `folder` that was last finished. Raises InputError if there is none."""
        runs = []
        for file in sorted(Path(folder).glob("*/run.json")):
            try:
                runs.append(cls.open(file.parent))
            except InputError as error:
                warnings.warn(f"passed over: {error}")
        if not any(run.finished for run in runs):
            raise InputError(f"No finished run in {folder}: tune on a clip with train.py first, or name a run "
                             "with --run.")
        return max(runs, key=lambda run: run.settings.finished)

    @property
    def finished(self):
        return self.settings.finished > 0

    def check(self, sd):
        """Raises InputError unless `sd` is the Stable Diffusion of this run. It may have learned further words."""
        if self.settings.fingerprint not in (sd.fingerprint, *sd.before):
            raise InputError(f"{self.path} was made with other weights ({self.settings.weights}, fingerprint "
                             f"{self.settings.fingerprint}) than {sd.path} ({sd.fingerprint}): name those with "
                             "--weights.")

    def latents(self):
        """Mean and std of the clip's latents, (1, 4, f, h, w) each. Raises InputError if they are not this run's."""
        tensors = self.read("clip")
        shape = tensors["mean"].shape if "mean" in tensors else ()
        if {name: tensor.shape for name, tensor in tensors.items()} != dict(mean=shape, std=shape) \
                or len(shape) != 5 or shape[:3] != (1, 4, self.settings.frames):
            raise InputError(f"{self.file('clip')} does not hold the {self.settings.frames} frames of "
                             "run.json.")
        return tensors["mean"], tensors["std"]

    # ---- Files

    def save(self):
        """Writes run.json."""
        replace_text(self.path / "run.json", json.dumps(asdict(self.settings), indent=2) + "\n")

    def finish(self):
        """Marks the run as finished and removes what only resuming needs."""
        self.settings = changed(self.settings, finished=time.time())
        self.save()
        self.file("state").unlink(missing_ok=True)

    def file(self, name):
        return self.path / f"{name}.safetensors"

    def has(self, name):
        return self.file(name).is_file()

    def write(self, name, tensors):
        """A dict of tensors -> name.safetensors. Raises InputError if they cannot be written."""
        replace_tensors(self.file(name), {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})

    def require(self, name):
        """Raises InputError unless the run has name.safetensors."""
        if not self.has(name):
            go_on = f"python train.py --resume {shlex.quote(str(self.path))}"
            hint = "." if self.finished else f": it is unfinished. Go on with {go_on}."
            raise InputError(f"{self.path} has no {name}.safetensors{hint}")

    def read(self, name, shapes=None):
        """name.safetensors -> dict of tensors. Raises InputError if they are not finite or not of these shapes."""
        self.require(name)
        tensors = read_tensors(self.file(name))
        fits = shapes is None or {key: tensor.shape for key, tensor in tensors.items()} == shapes
        if not fits or not all(is_sound(tensor) for tensor in tensors.values()):
            raise InputError(f"{self.file(name)} does not fit this run, or holds NaN or infinite values.")
        return tensors

    def write_losses(self, losses):
        """loss.csv: step,loss. Rewritten whole with every checkpoint."""
        lines = ["step,loss", *(f"{step},{loss:.6f}" for step, loss in enumerate(losses, 1))]
        replace_text(self.path / "loss.csv", "\n".join(lines) + "\n")


def is_sound(tensor):
    """Is a tensor what a run saves: finite float32 numbers, or a single integer?"""
    if tensor.ndim == 0 and tensor.dtype is torch.int64:
        return True
    return tensor.dtype is torch.float32 and bool(tensor.isfinite().all())


def remove_abandoned(folder):
    """Removes the hidden folders of runs that a killed process was making, and no other hidden folder."""
    for left in folder.glob(".*.part"):
        files = [file.name for file in left.glob("*")]
        if not files or any(not name.endswith(".part") and name not in FIRST_FILES for name in files):
            continue                            # just made, or not ours
        run = Run(left, None)
        try:
            run.lock()
        except InputError:                      # its process is alive
            continue
        run.close()
        shutil.rmtree(left, ignore_errors=True)


def slug(text):
    """A file name made of a prompt's letters and digits: at most 60 characters and 100 bytes."""
    name = "-".join(re.findall(r"\w+", text.lower()))[:60]
    return name.encode()[:100].decode(errors="ignore").strip("-") or "empty"


def free_name(name, is_taken):
    """name, or name-2, name-3, ...: the first that is not taken."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not is_taken(name))


def new_name(folder, name, suffixes=("",)):
    """As `free_name`: taken is what the folder holds with one of the suffixes."""
    return free_name(name, lambda name: any(os.path.lexists(folder / f"{name}{suffix}") for suffix in suffixes))
