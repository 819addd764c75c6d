"""What a folder says of its samples, in NAME.sample.json beside each, and the shell's lines that make them again."""
import csv
import json
import shlex
from pathlib import Path

from tinytav.errors import InputError, check_file
from tinytav.files import frames
from tinytav.files.atomic import replace_text
from tinytav.stable_diffusion.checkpoint import read_json

# The settings of a run that are flags of train.py.
TUNING_FLAGS = ("weights", "tokenizer", "prediction", "vae", "embedding", "size", "frames", "start", "stride", "steps",
                "lr", "attention", "norm", "precision", "seed", "preview")


# ---- Records -------------------------------------------------------------------------------------

def write_record(folder, name, prompt, settings, repeat):
    """Writes NAME.sample.json: a sample's settings, and the command that repeats it."""
    details = dict(prompt=prompt, settings=settings, command=repeat)
    replace_text(Path(folder) / f"{name}.sample.json", json.dumps(details, indent=2) + "\n")


def record(file):
    """A JSON file's object; an empty one where the file is absent or broken."""
    try:
        return read_json(file) if file.is_file() else {}
    except InputError:
        return {}


def inner(details, name):
    """The object that a record holds under this name; an empty one where it holds none."""
    return details[name] if isinstance(details.get(name), dict) else {}


def read_samples(folder):
    """[(file name, record)], the source first, then from the oldest to the newest. Each has a prompt and settings."""
    names = [file.name.removesuffix(".sample.json") for file in folder.glob("*.sample.json")]
    stems = [folder / name for name in names]
    pictures = [Path(f"{stem}.png") for stem in stems if not Path(f"{stem}.mp4").exists()]  # beside one it is a strip
    found = []
    for path in by_time([*folder.glob("*.mp4"), *pictures]):
        details = record(path.with_suffix(".sample.json"))
        if not isinstance(details.get("prompt"), str):
            details["prompt"] = title(path) or path.stem
        details["settings"] = inner(details, "settings")
        found.append((path.name, details))
    return sorted(found, key=lambda sample: sample[0] != "source.mp4")      # a stable sort


def by_time(paths):
    """Those of the paths that are files, the oldest first. A link that leads nowhere is no file."""
    return sorted(filter(Path.is_file, paths), key=lambda path: (path.stat().st_mtime, path.name))


def title(path):
    """The prompt that an mp4 keeps; "" where it keeps none, or cannot be read."""
    try:
        return frames.title(path)
    except (OSError, ValueError):                           # PyAV's errors are both
        return ""


def read_losses(folder):
    """The numbers of loss.csv; an empty list where it is absent or broken."""
    try:
        check_file(folder / "loss.csv")
        with open(folder / "loss.csv", encoding="utf-8", newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return []
    return [loss for loss in losses if abs(loss) < 1e100]


# ---- Lines for a shell ---------------------------------------------------------------------------

def command(*words):
    """Words -> a line for the shell."""
    return shlex.join(map(str, words))


def call(program, places, values):
    """A line that calls a program with positional words and flags, also where one begins with a dash.

    program: its words as one text. values: {name: value}, as `flags` takes them.
    """
    if any(str(place).startswith("-") for place in places):
        return command(*program.split(), *flags(values), "--", *places)
    return command(*program.split(), *places, *flags(values))


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
    """The line that repeats the run in this folder, with every setting named, so that no default can change it.

    settings: run.json's object, perhaps edited by hand. What is no text and no number is left out.
    """
    plain = {name: value for name, value in settings.items() if isinstance(value, (str, int, float))}
    given = {name: plain.get(name) for name in TUNING_FLAGS}
    words = settings.get("embedding") if isinstance(settings.get("embedding"), list) else []
    given["embedding"] = [word for word in words if isinstance(word, str)] or None
    if given["steps"] == 0:                 # a net that was tuned before: train.py takes it as it is, without the flag
        given["steps"] = None
    loras, files = (settings[name] if isinstance(settings.get(name), list) else [] for name in ("lora", "embedding"))
    given["lora"] = [f"{lora['file']}:{lora['scale']}" for lora in loras if is_lora(lora)] or None
    given["embedding"] = [file for file in files if isinstance(file, str)] or None
    return call("python train.py", [plain.get("clip"), plain.get("prompt")], given | dict(out=folder.parent))


def is_lora(item):
    return isinstance(item, dict) and isinstance(item.get("file"), str) and isinstance(item.get("scale"), (int, float))
