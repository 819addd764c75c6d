"""The folder of a run: what it was told, what it learnt, what it made. Files are replaced whole, never half-written.

runs/<clip>/  run.json              everything that is needed to repeat it; written last, so a folder without it is no run
              clip.safetensors      mean and std of the clip's latents: neither resuming nor sampling needs the clip
              state.safetensors     while it is unfinished: tuned tensors, AdamW's moments, the step
              tuned.safetensors     the tuned tensors, by the official names
              inversion.safetensors x_T, and how many steps led there
              source.mp4, loss.csv, and an mp4, a gif and a strip (png) per sample
"""
import itertools
import json
import os
import re
import time
import warnings
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from tinytav.stable_diffusion.config import PRECISIONS, InputError
from tinytav.files.frames import replace
from tinytav.stable_diffusion.checkpoint import PREDICTIONS, read_json, read_tensors

try:
    import fcntl
except ImportError:             # Windows: nothing there keeps two train.py off one run
    fcntl = None

NEEDED = dict(clip=str, prompt=str, weights=str, fingerprint=str, frames=int, fps=str, size=int, attention=str,
              norm=str, steps=int, lr=float, seed=int, ddim_steps=int, guidance=float, precision=str, finished=float)


class Run:
    """`path`: its folder. `settings`: run.json."""

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings

    @classmethod
    def create(cls, folder, name, settings):
        """A new folder, `name` or `name-2`, ...: a run is never overwritten. save() makes it a run."""
        while True:
            path = Path(folder) / new_name(Path(folder), slug(name))
            try:
                path.mkdir(parents=True)
            except FileExistsError:     # another train.py was quicker
                continue
            lock(path)
            return cls(path, settings)

    @classmethod
    def open(cls, path):
        """Raises InputError if there is no run at `path`, or its run.json lacks or misstates something."""
        path = Path(path)
        if not (path / "run.json").is_file():
            raise InputError(f"{path} is not a run: it has no run.json. train.py makes runs.")
        settings = read_json(path / "run.json")
        for name, kind in NEEDED.items():
            value = settings.get(name)
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
                raise InputError(f"{path / 'run.json'}: {name} = {value!r} is not a {kind.__name__}.")
            if kind is not str and not 0 <= value <= 2 ** 32:
                raise InputError(f"{path / 'run.json'}: {name} = {value!r} is not from 0 to 2**32.")
        if not re.fullmatch(r"[1-9]\d{0,8}(/[1-9]\d{0,8})?", settings["fps"]) \
                or settings["precision"] not in PRECISIONS or settings.get("prediction") not in (None, *PREDICTIONS) \
                or not all(isinstance(settings.get(name) or "", str) for name in ("tokenizer", "preview")):
            raise InputError(f"{path / 'run.json'}: fps or precision, prediction, tokenizer or preview is not what "
                             "train.py writes.")
        return cls(path, settings)

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
            raise InputError(f"No finished run in {folder}: tune on a clip with train.py first, or name a run with --run.")
        return max(runs, key=lambda run: run.finished)

    @property
    def finished(self):
        """When, in seconds since 1970; 0 if it is not."""
        return self.settings["finished"]

    def check(self, sd):
        """Raises InputError unless `sd` is the Stable Diffusion this run was made with."""
        if sd.fingerprint != self.settings["fingerprint"]:
            raise InputError(f"{self.path} was made with other weights ({self.settings['weights']}, fingerprint "
                             f"{self.settings['fingerprint']}) than {sd.path} ({sd.fingerprint}): name those with --weights.")
        self.clip("cpu")

    def hold(self):
        """Lock the folder, and clear away what a killed process left there. Returns the run as it then stands."""
        lock(self.path)
        for file in self.path.glob(".*.part"):
            file.unlink()
        run = Run.open(self.path)
        if run.finished:
            (self.path / "state.safetensors").unlink(missing_ok=True)
        return run

    def save(self):
        text = json.dumps(self.settings, indent=2) + "\n"
        replace(self.path / "run.json", lambda file: Path(file).write_text(text, encoding="utf-8"))

    def finish(self):
        self.settings["finished"] = time.time()
        self.save()
        (self.path / "state.safetensors").unlink(missing_ok=True)

    def write(self, name, tensors):
        """A dict of tensors -> name.safetensors."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            replace(self.path / f"{name}.safetensors", lambda file: save_file(tensors, file))
        except safetensors.SafetensorError as error:
            raise InputError(f"{self.path / name}.safetensors cannot be written: {error}") from None

    def read(self, name, shapes=None):
        """name.safetensors -> dict of tensors. Raises InputError if they are not finite or not of these shapes."""
        if not self.has(name):
            raise InputError(f"{self.path} has no {name}.safetensors" + (
                "." if self.finished else f": it is unfinished. Go on with python train.py --resume {self.path}."))
        tensors = read_tensors(self.path / f"{name}.safetensors")
        if shapes and {key: z.shape for key, z in tensors.items()} != shapes \
                or not all(z.dtype in (torch.float32, torch.int64) and z.isfinite().all() for z in tensors.values()):
            raise InputError(f"{self.path / name}.safetensors does not fit this run, or holds NaN or infinite values.")
        return tensors

    def clip(self, device):
        """Mean and std of the clip's latents, (1, 4, f, h, w) each. Raises InputError if they are not this run's."""
        tensors = self.read("clip")
        if tensors.keys() != {"mean", "std"} or tensors["mean"].shape != tensors["std"].shape or any(
                z.ndim != 5 or z.shape[:3] != (1, 4, self.settings["frames"]) for z in tensors.values()):
            raise InputError(f"{self.path / 'clip.safetensors'} does not hold the {self.settings['frames']} frames of run.json.")
        return tensors["mean"].to(device), tensors["std"].to(device)

    def has(self, name):
        return (self.path / f"{name}.safetensors").is_file()

    def write_losses(self, losses):
        """loss.csv: step,loss. Rewritten whole with every checkpoint."""
        lines = ["step,loss", *(f"{step},{loss:.6f}" for step, loss in enumerate(losses, 1))]
        replace(self.path / "loss.csv", lambda file: Path(file).write_text("\n".join(lines) + "\n"))


def lock(folder):
    """Keeps every other train.py off `folder` until this process ends, however it ends. Raises InputError."""
    if not fcntl:
        return
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"Another train.py is at work in {folder}: wait for it, or stop it.") from None
    except OSError as error:    # some network drives
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): let no other train.py work there.")


def slug(text):
    """A file name made of a prompt's letters and digits, whatever else it holds."""
    return "-".join(re.findall(r"\w+", text.lower()))[:60].strip("-") or "empty"


def new_name(folder, name, suffixes=("",)):
    """name, or name-2, ...: the first that folder holds with none of the suffixes."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any(os.path.lexists(folder / f"{name}{suffix}") for suffix in suffixes))


def state_dict(net, optimizer, losses):
    """All that resuming needs, as flat named tensors: tuned tensors, AdamW's moments, the loss of each step done."""
    state = {"step": torch.tensor(len(losses)), "losses": torch.tensor(losses)}
    for name, p in net.tuned().items():
        moments = optimizer.state[p]
        state |= {f"tuned.{name}": p.detach(), f"exp_avg.{name}": moments["exp_avg"],
                  f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
    return state


def load_state_dict(net, optimizer, state):
    """The inverse of state_dict. Returns the losses. Raises InputError if the state is of another net."""
    shapes = {f"{what}.{name}": p.shape for what in ("tuned", "exp_avg", "exp_avg_sq") for name, p in net.tuned().items()}
    shapes |= {"step": (), "losses": (int(state.get("step", torch.tensor(0)).sum()),)}
    if {name: z.shape for name, z in state.items()} != shapes:
        raise InputError("state.safetensors does not fit this run's net: it cannot be resumed, only begun again.")
    step = int(state["step"])
    for name, p in net.tuned().items():
        p.data.copy_(state[f"tuned.{name}"])
        optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": state[f"exp_avg.{name}"].to(p.device).clone(),
                              "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(p.device).clone()}
    return state["losses"].tolist()
