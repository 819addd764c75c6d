"""What the commands share: flags, device and precision, errors as sentences."""
import argparse
import contextlib
import os
import re
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from tinytav import windows
from tinytav.errors import InputError
from tinytav.files import hub
from tinytav.memory import is_out_of_memory
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.checkpoint import PREDICTIONS
from tinytav.stable_diffusion.precision import PRECISIONS, cpu_has_bf16
from tinytav.weights import default_path, load, read_defaults

SOURCE = ("weights", "tokenizer", "prediction", "vae", "embedding")     # the flags that say where the weights come from
KNOWN = "knows.txt"     # a file beside weights that know only a small world: what they know, in words
# Escape sequences begin with one of them.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# ---- Flags ---------------------------------------------------------------------------------------

def parser(description, usage=None, seeded=True):
    """An argument parser with the flags of all commands that load weights. A flag not given is None.

    usage: the first line of --help; else argparse's list of all flags. seeded: is there a flag --seed?
    """
    p = argparse.ArgumentParser(description=description, usage=usage)
    p.add_argument("--weights", metavar="PATH",
                   help="use this Stable Diffusion: a folder, a .safetensors file, or hub:OWNER/NAME, which is fetched "
                        "(default: what lies in weights/)")
    p.add_argument("--tokenizer", metavar="PATH",
                   help="use this tokenizer where the weights have none: a folder, or hub:NAME, which is downloaded")
    p.add_argument("--prediction", choices=PREDICTIONS,
                   help="say what the net of a single file predicts, where the file itself does not")
    p.add_argument("--vae", metavar="PATH", help="use this VAE, a folder or a .safetensors file, not the weights' own")
    p.add_argument("--embedding", nargs="+", action="extend", metavar="FILE",
                   help="learn the words of these files (textual inversion), to write them in prompts")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; else the best there is")
    p.add_argument("--precision", choices=PRECISIONS, help="of the frozen weights; else bf16 where it is fast")
    if seeded:
        p.add_argument("--seed", type=number(int, 0, 2 ** 31), metavar="N", help="same seed, same result (default: 33)")
    return p


def add_lora(p, what):
    """The flag --lora, which train.py and sample.py have."""
    p.add_argument("--lora", nargs="+", action="extend", metavar="FILE[:SCALE]", help=what)


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def given(args):
    """The names of the flags that the user gave."""
    return {name for name, value in vars(args).items() if value is not None}


# ---- Device, precision, weights ------------------------------------------------------------------

def choose_device(name=None):
    """--device -> torch.device; without a name the best there is. Raises InputError if it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(device, name=None):
    """--precision -> torch.dtype. Without a name bf16 on a CPU or a GPU by CUDA that has it; else fp16 on CUDA and
    float32 elsewhere.
    """
    if name is not None:
        return PRECISIONS[name]
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_weights(args, source=None, precision=None, loras=()):
    """The Stable Diffusion that the flags name, or else `source`, a dict of the same names, or else what is in
    weights/.

    precision: the run's, used where --precision is not given. loras: those to merge. The first line printed says which
    weights. Raises InputError.
    """
    device = choose_device(args.device)
    source = dict(source or {})
    named = {name: getattr(args, name) for name in SOURCE if getattr(args, name) is not None}
    # what a run names by hub: is never downloaded
    connect = not any(hub.is_name(value) for name, value in source.items() if name not in named)
    if own := source.get("embedding"):              # the run's caption needs its own words, at the same ids
        more = named.get("embedding", [])
        own = [file for file in own if Path(file).is_file() or not more]        # one that is gone is in `more`, moved
        named["embedding"] = [*own, *(file for file in more if file not in own)]
    source |= named
    path = source.pop("weights", None)
    path = default_path() if path is None else path
    say(f"weights: {path}")
    precision = args.precision or precision or read_defaults(path).precision
    dtype = choose_dtype(device, precision)
    if precision is None and dtype is torch.bfloat16:
        print("precision: bf16, which this device computes fast; --precision fp32 undoes it")
    sd = load(path, device=device, dtype=dtype, connect=connect, **source)
    for word in sd.tokenizer.words:
        say(f"embedding: write {word!r} in a prompt")
    lora.merge(sd, loras)
    print_loras(loras)
    return sd


def read_loras(texts):
    """What --lora names -> a list of Lora. Raises InputError."""
    return [lora.Lora.from_text(text) for text in texts or []]


def share_out(own, named):
    """Splits the LoRAs that --lora named -> the run's own ones, at the place named now, and further ones."""
    places = {(one.fingerprint, one.scale): one.file for one in named}
    own = [replace(one, file=places.get((one.fingerprint, one.scale), one.file)) for one in own]
    return own, [one for one in named if one not in own]


def print_loras(loras):
    """Prints which LoRAs are in use."""
    for one in loras:
        say(f"lora: {one.file}, scale {one.scale:g}")


def say_windows(net, shape):
    """Tells that the net sees the clip's latents (1, 4, f, h, w) in windows, if it does."""
    if shape[2] > net.frames:
        count = len(windows.places(shape[2], net.frames))
        say(f"windows: the net sees {net.frames} of the {shape[2]} frames at a time, in {count} windows, whose results "
            "are averaged.")


def warn_about_unknown_words(weights, prompts, clip=None):
    """Warns once where weights that know a small world get words, or a clip, from outside it.

    Such weights say in knows.txt what they know. Other weights have no such file: they know anything.
    """
    file = Path(weights) / KNOWN
    if not file.is_file():
        return
    knows = file.read_text(encoding="utf-8", errors="replace").strip()
    unknown = [repr(word) for word in sorted(words(" ".join(prompts)) - words(knows))]
    if clip and not unknown and Path(clip).resolve().parent != Path(weights).resolve():
        unknown = [str(clip)]
    if unknown:
        warnings.warn(f"{weights} may not know {', '.join(unknown)}: it draws {knows[:400]}. For anything else use "
                      "Stable Diffusion: weights/README.md says how.")


def words(text):
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the"}


def progress(steps, total, name):
    """A progress bar around an iterable of `total` steps, as editing.py's functions take it."""
    return tqdm(steps, plain(name)[:30], total, unit="step")


# ---- Words and errors ----------------------------------------------------------------------------

def plain(text):
    """The text with every control character shown as an escape, so that no name can command the terminal."""
    return CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], str(text))


def say(text):
    print(plain(text))


def run(main):
    """Calls main() as a script. What the user can mend is a sentence and exit status 2, not a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                          # the shell has closed it: `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")       # file names may hold bytes that are not UTF-8
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:                                     # what reads the output has ended: `| head -1`
        sys.stdout = None
        os._exit(141)
    except (InputError, OSError) as error:
        complain(f"error: {error}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain(f"error: the memory is too small: {str(error).splitlines()[0] if str(error) else 'no more is free.'} "
                 "Half the --frames, or half the --window, need about half of it, half the --size a quarter.")
        sys.exit(2)
    except KeyboardInterrupt:
        complain("stopped")
        sys.exit(130)


def complain(text):
    """A line for the user on stderr, if someone reads it."""
    with contextlib.suppress(OSError):
        print(plain(text), file=sys.stderr)
