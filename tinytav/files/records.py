"""What a folder says of its samples, in NAME.sample.json beside each, and the shell's lines that make them again."""
import json
import shlex
from pathlib import Path

from tinytav.errors import InputError, check_file
from tinytav.files.atomic import replace_text
from tinytav.stable_diffusion.checkpoint import read_json

# The settings of a run that are flags of train.py.
TUNING_FLAGS = ("weights", "tokenizer", "prediction", "vae", "embedding", "size", "frames", "window", "start",
                "stride", "steps", "lr", "attention", "norm", "precision", "seed", "preview")


# ---- Records -------------------------------------------------------------------------------------

def write_record(folder, name, prompt, settings, repeat):
    """Writes NAME.sample.json: a sample's settings, and the command that repeats it."""
    details = dict(prompt=prompt, settings=settings, command=repeat)
    replace_text(Path(folder) / f"{name}.sample.json", json.dumps(details, indent=2) + "\n")


def record(file):
    """A JSON file's object; an empty one where the file is absent or broken."""
    try:
        return read_json(file)
    except InputError:
        return {}


def inner(details, name, kind=dict):
    """What a record holds under this name, if it is of this kind; else an empty one."""
    value = details.get(name)
    return value if isinstance(value, kind) else kind()


def read_samples(folder):
    """[(file name, record)], the source first, then from the oldest to the newest. Each has a prompt and settings.

    Samples are videos, and pictures that have a record. A picture beside a video of its name is that video's strip.
    """
    found = []
    for path in by_time([*folder.glob("*.mp4"), *folder.glob("*.png")]):
        details = record(path.with_suffix(".sample.json"))
        if path.suffix == ".png" and (not details or path.with_suffix(".mp4").exists()):
            continue
        prompt = details.get("prompt")
        details["prompt"] = prompt if isinstance(prompt, str) else path.stem
        details["settings"] = inner(details, "settings")
        found.append((path.name, details))
    return sorted(found, key=lambda sample: sample[0] != "source.mp4")      # a stable sort


def by_time(paths):
    """Those of the paths that are files, the oldest first. A link that leads nowhere is no file."""
    return sorted(filter(Path.is_file, paths), key=lambda path: (path.stat().st_mtime, path.name))


def read_losses(folder):
    """The numbers of loss.csv; an empty list where it is absent or broken."""
    try:
        check_file(folder / "loss.csv")
        _, *lines = (folder / "loss.csv").read_text(encoding="utf-8").splitlines()
        losses = [float(line.split(",")[1]) for line in lines]
    except (OSError, IndexError, ValueError):
        return []
    return [loss for loss in losses if abs(loss) < 1e100]


# ---- Lines for a shell ---------------------------------------------------------------------------

def call(program, places, values):
    """A line for the shell that calls a program with positional words and flags, also where one begins with a dash.

    program: its words as one text. values: {name: value}, as `flags` takes them.
    """
    words = [*places, *flags(values)]
    if any(str(place).startswith("-") for place in places):
        words = [*flags(values), "--", *places]
    return shlex.join([*program.split(), *map(str, words)])


def flags(values):
    """{name: value} -> the words of a command line. None and False are not given; a list follows its flag.

    A value that begins with a dash is joined to its flag, or argparse would take it for another flag.
    """
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        items = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        items = [str(item) for item in items]
        if any(item.startswith("-") for item in items):
            words += [f"{flag}={item}" for item in items]
        else:
            words += [flag, *items]
    return words


def tuning_command(folder, settings):
    """The line that repeats the run in this folder. It names every setting, so that no default can change it."""
    given = {name: getattr(settings, name) for name in TUNING_FLAGS}
    given["window"] = settings.window or settings.frames
    given["steps"] = settings.steps or None     # without the flag a net that was tuned before stays as it is
    given["lora"] = [f"{one.file}:{one.scale}" for one in settings.loras()] or None
    return call("python train.py", [settings.clip, settings.prompt], given | dict(out=folder.parent))
