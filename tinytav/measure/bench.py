"""How long each part takes here: the median of several repeats after a warm-up, on random frames.

    python -m tinytav bench

Clip length and size are the weights' own defaults, so times by numbers of steps are those of train.py and sample.py.
"""
import resource
import statistics
import sys
import time

import torch

from tinytav import cli, pipeline
from tinytav.inflation import inflate
from tinytav.measure import memory
from tinytav.stable_diffusion.checkpoint import load
from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.precision import name_of
from tinytav.tuning import Tuner


def arguments():
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="of the clip; else the weights' own number")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N", help="pixels of a square; else the weights' own")
    p.add_argument("--repeats", type=cli.number(int, 1, 900), default=5, metavar="N", help="of each part (default: 5)")
    return p.parse_args()


def seconds(call, repeats, device):
    """Median time of call() over `repeats`, after one that does not count. Waits for a GPU to finish its work."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_bytes(device):
    """The most memory held so far: by tensors on a CUDA device, elsewhere by this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parts(args, sd, frames, size):
    """Yields (name, a function that does it once). Tuning needs most and comes last, without the VAE as in train.py."""
    device, seed = sd.device, args.seed or 33
    yield "loading", lambda: load(sd.path, args.tokenizer, args.prediction, device, sd.dtype)
    x = pipeline.gaussian((1, 3, size, size), seed).clamp(-1, 1).to(device)
    side = size // sd.vae.cfg.factor
    noise = pipeline.gaussian((1, 4, frames, side, side), seed).to(device)
    yield "VAE, encoding a frame", lambda: pipeline.encode(sd.vae, x)
    yield "VAE, decoding a frame", lambda: pipeline.decode(sd.vae, noise[:, :, :1])
    empty, context = sd.encode_prompts(["", "a man is skiing"]).split(1)
    multiple, sd.text_encoder, sd.vae = sd.multiple, None, None
    net, steps = inflate(sd.unet, frames), args.repeats + 1
    inverting = pipeline.invert(net, sd.schedule, noise, empty, steps)
    yield "inverting, a step", lambda: next(inverting)
    sampling = pipeline.sample(net, sd.schedule, noise, context, empty, steps, sd.defaults.guidance)
    yield "sampling with guidance, a step", lambda: next(sampling)
    if memory.is_tight(net, noise.shape, context.shape, device, size, multiple):
        memory.checkpoint_gradients(net)
    tuner = Tuner(net, sd.schedule, noise, torch.zeros_like(noise), context, sd.defaults.lr, seed)
    yield "tuning, a step", tuner.step


def main():
    args = arguments()
    sd = cli.load_weights(args)
    frames, size = args.frames or sd.defaults.frames, args.size or sd.defaults.size
    if size % sd.multiple:
        raise InputError(f"The size {size} does not suit this model: use a multiple of {sd.multiple}.")
    print(f"{frames} frames of {size}x{size}, {sd.device}, {name_of(sd.dtype)}, {torch.get_num_threads()} CPU threads, "
          f"torch {torch.__version__}\n{'':32}{'seconds':>10}{'peak memory so far':>22}")
    for name, call in parts(args, sd, frames, size):
        median = seconds(call, args.repeats, sd.device)
        print(f"{name:32}{median:10.3f}{peak_bytes(sd.device) / 2 ** 30:18.2f} GiB", flush=True)
    return 0
