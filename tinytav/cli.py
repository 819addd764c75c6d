"""What both scripts share: flags, device and precision, errors as sentences."""
import argparse
import re
import sys
import warnings
from pathlib import Path

import torch

from tinytav.stable_diffusion.config import PRECISIONS, InputError
from tinytav.stable_diffusion.checkpoint import PREDICTIONS, default_path, load

SOURCE = ("weights", "tokenizer", "prediction")         # what tells where the weights come from


def parser(description):
    """An argument parser with the flags that train.py and sample.py have in common."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                argument_default=argparse.SUPPRESS)
    p.add_argument("--weights", metavar="PATH", help="Stable Diffusion folder or .safetensors file; else what lies in weights/")
    p.add_argument("--tokenizer", metavar="PATH", help="where the checkpoint has none: a folder, or hub:NAME to download")
    p.add_argument("--prediction", choices=PREDICTIONS, help="of a Stable Diffusion 2.x single file")
    p.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps")
    p.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help="auto: fp32, on CUDA bf16 or fp16")
    p.add_argument("--seed", type=number(int, 0, 2 ** 31), default=33, metavar="N", help="same seed, same result")
    return p


def given(p, args):
    """The names of the flags that the user gave, also where the value is the default."""
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))
    return {name for name, value in vars(p.parse_args(namespace=blank)).items() if value is not None}


def number(kind, low, high=float("inf")):
    """An argparse type: a number from low to high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def name_of(dtype):
    """torch.float32 -> "fp32"."""
    return next(name for name, value in PRECISIONS.items() if value is dtype)


def run(main):
    """Calls main() as a script: an InputError or a failing disk is a sentence and exit status 2, not a traceback."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")       # file names may hold bytes that are no text
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(f"error: the memory is too small: {str(error).partition(chr(10))[0]} Half the --frames need about half of "
              "it, half the --size a quarter.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def device_and_dtype(args):
    """--device and --precision -> torch.device, torch.dtype."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name} cannot be used: {str(error).splitlines()[0]}") from None
    precision = args.precision
    if precision == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = half if device.type == "cuda" else "fp32"
    return device, PRECISIONS[precision]


def load_weights(args, run=None):
    """The Stable Diffusion that --weights names, or the run's, on its device. The first line printed says which.

    Raises InputError if the run was made with another.
    """
    device, dtype = device_and_dtype(args)
    source = {name: run.settings.get(name) for name in SOURCE} if run else {}
    source |= {name: getattr(args, name) for name in SOURCE if hasattr(args, name)}
    path = source.pop("weights", None) or default_path()
    print(f"weights: {path}")
    sd = load(path, dtype=dtype, **source)
    if run:
        run.check(sd)
    for model in (sd.unet, sd.vae, sd.text_encoder):
        model.to(device)
    for model, calls in ((sd.vae, ("encode", "decode")), (sd.text_encoder, ("forward",))):
        autocast(model, device, dtype, *calls)
    return sd, device, dtype


def warn_of_the_unknown(sd, prompts, clip=None):
    """One warning where weights of a small world are shown words, or a clip, from outside it."""
    unknown = sorted(words(" ".join(prompts)) - words(sd.defaults.draws))
    if sd.defaults.draws and (unknown or clip and Path(clip).resolve().parent != sd.path.resolve()):
        what = ", ".join(map(repr, unknown)) or clip
        warnings.warn(f"{sd.path} may not know {what}: it draws {sd.defaults.draws}. For anything else use Stable "
                      "Diffusion: weights/README.md says how.")


def words(text):
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the"}


def autocast(model, device, dtype, *calls):
    """Let the named methods compute in dtype. Weights that are tuned stay float32 and are cast on the way."""
    if dtype is not torch.float32:
        for name in calls:
            setattr(model, name, torch.autocast(device.type, dtype)(getattr(model, name)))
