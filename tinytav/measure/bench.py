"""How fast the parts are on this machine, how much memory they take, and how near they come to a matrix product's rate.

    python -m tinytav bench                                             # the weights' own clip length and size
    python -m tinytav bench --random sd15 --frames 8 16 32 64 --size 128     # how time grows; needs no weights
    python -m tinytav bench --parts sampling tuning --attention full         # what other attention costs

Each part at each size runs in a fresh process: once to warm up, then some times, of which the median counts, and once
more under torch's counter of floating-point operations. In the same process a large matrix product of this precision
shows what the machine can do at most. Memory is the most that the process held on a CPU, or that tensors took on CUDA.
"""
import argparse
import itertools
import math
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinytav import cli, memory, pipeline
from tinytav.errors import InputError
from tinytav.inflation import ATTENTIONS, inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.precision import cpu_has_bf16, name_of
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner
from tinytav.weights import StableDiffusion

PARTS = {"encoding": "VAE, encoding the clip", "decoding": "VAE, decoding the clip", "inverting": "inverting, a step",
         "sampling": "sampling with guidance, a step", "tuning": "tuning, a step"}
RANDOM = {"sd15": (UNetConfig(), VAEConfig())}      # what --random knows
COLUMNS = ("seconds", "a frame", "peak GiB", "GFLOP", "GFLOP/s", "of matmul")
REPEATS = 5
FORGET = Path("/proc/self/clear_refs")              # Linux: "5" written there makes a process forget its highest memory
STATUS = Path("/proc/self/status")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GRADIENT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Torch's counter has no formula for the attention that a CPU computes in one call. Attention multiplies queries
# (b, h, n, d) by keys (b, h, m, d), and the result by values. Its gradient takes five such products.
FORMULAS = {ATTENTION: lambda q, k, *rest, **options: 2 * 2 * math.prod(q) * k[-2],
            GRADIENT: lambda gradient, q, k, *rest, **options: 5 * 2 * math.prod(q) * k[-2]}


# ---- What is measured ----------------------------------------------------------------------------

def models(args):
    """The Stable Diffusion that the flags name. Prints which one it is."""
    if args.random is None:
        return cli.load_weights(args)
    print(f"weights: random, of the size of {args.random}")
    device = cli.choose_device(args.device)
    dtype = cli.choose_dtype(device, args.precision)
    with device:
        unet, vae = (Model(cfg).to(dtype).eval().requires_grad_(False)
                     for Model, cfg in zip((UNet, VAE), RANDOM[args.random]))
    return StableDiffusion(tokenizer=None, text_encoder=None, vae=vae, unet=unet, schedule=Schedule(), path=Path(),
                           fingerprint="", device=device, dtype=dtype, multiple=vae.cfg.factor)


def prepare(sd, case):
    """A function that does the part once, and the inflated net."""
    net = inflate(sd.unet, case.frames, case.attention)
    side = case.size // sd.multiple
    x = pipeline.gaussian((case.frames, 3, case.size, case.size), 0).clamp(-1, 1).to(sd.device)
    noise = pipeline.gaussian((1, 4, case.frames, side, side), 0).to(sd.device)
    context = pipeline.gaussian((1, 77, net.cfg.cross_attention_dim), 1).to(sd.device)
    if case.part == "tuning":
        memory.prepare(net, noise.shape, sd.device, case.checkpointing)
        tuner = Tuner(net, sd.schedule, noise, torch.zeros_like(noise), context)
        steps = tuner.run(10 ** 9, climb=case.checkpointing == "auto")
        return lambda: next(steps), net
    return {
        "encoding": lambda: pipeline.encode(sd.vae, x),
        "decoding": lambda: pipeline.decode(sd.vae, noise),
        "inverting": lambda: next(pipeline.invert(net, sd.schedule, noise, context)),
        "sampling": lambda: next(pipeline.sample(net, sd.schedule, noise, context, context, guidance=2.)),
    }[case.part], net


def measure(case):
    """Runs in a fresh process: a case -> a line of the table."""
    with redirect_stdout(None):             # the command has said which weights they are
        sd = models(case)
    sd.text_encoder = None
    call, net = prepare(sd, case)
    forget_peak(sd.device)
    taken, peak = seconds(call, REPEATS, sd.device), peak_bytes(sd.device)
    flops = operations(call)
    share = flops / taken / matrix_rate(sd.device, sd.dtype)
    recomputed = memory.recomputed(net)
    line = (f"{taken:11.3f}{taken / case.frames:11.3f}{peak / 2 ** 30:11.2f}{flops / 1e9:11.0f}"
            f"{flops / taken / 1e9:11.0f}{share:11.0%}")
    return line + (f"  {recomputed} blocks computed again" if recomputed else "")


def measure_apart(case):
    """measure(case) in a fresh process -> the line, or None where the memory did not suffice."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, case).result()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, BrokenProcessPool) and not memory.is_out_of_memory(error):
            raise
        return None                 # a broken pool is one whose process the kernel has ended


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


def operations(call):
    """Floating-point operations of call(): its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def matrix_rate(device, dtype):
    """FLOP/s of the product of two large square matrices.

    They are smaller where the processor emulates the format: 2048x2048 in bf16 would take a quarter of a minute.
    """
    emulated = device.type == "cpu" and dtype is torch.bfloat16 and not cpu_has_bf16()
    side = 256 if emulated else 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side ** 3 / seconds(lambda: a @ a, 3, device)


def forget_peak(device):
    """From now on peak_bytes() counts anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif FORGET.exists():
        FORGET.write_text("5")


def peak_bytes(device):
    """The most memory held: by tensors on CUDA, elsewhere by this process. nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), math.nan)


# ---- The command ---------------------------------------------------------------------------------

def arguments():
    p = cli.parser(__doc__.splitlines()[0], seeded=False)
    p.add_argument("--random", choices=RANDOM, help="measure random weights of this size, instead of --weights")
    p.add_argument("--frames", type=cli.number(int, 1), nargs="+", metavar="N",
                   help="measure clips of N frames, one after the other (default: the weights' own number)")
    p.add_argument("--size", type=cli.number(int, 8), nargs="+", metavar="N",
                   help="measure squares of N pixels, one after the other (default: the weights' own size)")
    p.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="measure only these parts (default: all)")
    p.add_argument("--attention", choices=ATTENTIONS, default="sparse-causal",
                   help="choose which frames a frame looks at (default: sparse-causal)")
    p.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto",
                   help="compute blocks again for the gradient, as train.py does (default: auto)")
    args = p.parse_args()
    if args.random and cli.given(args) & set(cli.SOURCE):
        p.error("--random takes no weights, and no flag that belongs to weights")
    return args


def main():
    args = arguments()
    sd = models(args)
    args.device, args.precision, sizes = str(sd.device), name_of(sd.dtype), args.size or [sd.defaults.size]
    if unfit := [size for size in sizes if size % sd.multiple]:
        raise InputError(f"The size {unfit[0]} does not suit this model: use a multiple of {sd.multiple}.")
    name = torch.cuda.get_device_name(sd.device) if sd.device.type == "cuda" else platform.machine()
    print(f"{args.device} ({name}), {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    sides = list(itertools.product(sizes, args.frames or [sd.defaults.frames]))
    del sd                                              # each part's process has its own
    for size, frames in sides:
        heads = "".join(f"{column:>11}" for column in COLUMNS)
        print(f"\n{f'{frames} frames of {size}x{size}':32}{heads}", flush=True)
        for part in args.parts:
            line = measure_apart(argparse.Namespace(**vars(args) | dict(part=part, frames=frames, size=size)))
            print(f"{PARTS[part]:32}{line or '  the memory is too small'}", flush=True)
    return 0
