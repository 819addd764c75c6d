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
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinytav import cli, memory, pipeline
from tinytav.errors import InputError
from tinytav.inflation import ATTENTIONS, inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.precision import PRECISIONS, cpu_has_bf16, name_of
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner
from tinytav.weights import Defaults, StableDiffusion, load

PARTS = {"loading": "loading", "encoding": "VAE, encoding a frame", "decoding": "VAE, decoding a frame",
         "inverting": "inverting, a step", "sampling": "sampling with guidance, a step", "tuning": "tuning, a step"}
ON_FRAMES = ("inverting", "sampling", "tuning")     # the others take one frame, or none
RANDOM = {"sd15": (UNetConfig(), VAEConfig())}      # what --random knows
GUIDANCE = 12.5
# A row of the table: each column's name, its unit and format.
COLUMNS = {"seconds": (1, ".3f"), "a frame": (1, ".3f"), "peak GiB": (2 ** 30, ".2f"), "GFLOP": (1e9, ".0f"),
           "GFLOP/s": (1e9, ".0f"), "of matmul": (1, ".0%")}
FORGET = Path("/proc/self/clear_refs")              # Linux: "5" written there makes a process forget its highest memory
STATUS = Path("/proc/self/status")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
GRADIENT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def arguments():
    p = cli.parser(__doc__.splitlines()[0], seeded=False)
    p.add_argument("--random", choices=RANDOM, help="measure random weights of this size, instead of --weights")
    p.add_argument("--frames", type=cli.number(int, 1), nargs="+", metavar="N",
                   help="measure clips of N frames, one after the other (default: the weights' own number)")
    p.add_argument("--size", type=cli.number(int, 8), nargs="+", metavar="N",
                   help="measure squares of N pixels, one after the other (default: the weights' own size)")
    p.add_argument("--parts", choices=PARTS, nargs="+", help="measure only these parts (default: all)")
    p.add_argument("--repeats", type=cli.number(int, 1, 900), default=5, metavar="N",
                   help="take the median of N repeats (default: 5)")
    p.add_argument("--attention", choices=ATTENTIONS, default="sparse-causal",
                   help="choose which frames a frame looks at (default: sparse-causal)")
    p.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto",
                   help="compute blocks again for the gradient, as train.py does (default: auto)")
    args = p.parse_args()
    if args.random and cli.given(args) & set(cli.SOURCE):
        p.error("--random takes no weights, and no flag that belongs to weights")
    return args


# ---- What is measured ----------------------------------------------------------------------------

def models(case):
    """The Stable Diffusion that a case names."""
    device, dtype = torch.device(case.device), PRECISIONS[case.precision]
    if case.random is None:
        return load(case.weights, case.tokenizer, case.prediction, device, dtype, case.vae, case.embedding)
    with device:
        unet, vae = (Model(cfg).to(dtype).eval().requires_grad_(False)
                     for Model, cfg in zip((UNet, VAE), RANDOM[case.random]))
    return StableDiffusion(tokenizer=None, text_encoder=None, vae=vae, unet=unet, schedule=Schedule(), path=Path(),
                           fingerprint="", device=device, dtype=dtype, multiple=vae.cfg.factor)


def prepare(sd, case):
    """A function that does the part once, and the inflated net, or None where the part needs none."""
    if case.part == "loading":
        return lambda: models(case), None
    side = case.size // sd.multiple
    noise = pipeline.gaussian((1, 4, case.frames, side, side), 0).to(sd.device)
    if case.part == "encoding":
        x = pipeline.gaussian((1, 3, case.size, case.size), 0).clamp(-1, 1).to(sd.device)
        return lambda: pipeline.encode(sd.vae, x), None
    if case.part == "decoding":
        return lambda: pipeline.decode(sd.vae, noise[:, :, :1]), None
    net = inflate(sd.unet, case.frames, case.attention)
    context = pipeline.gaussian((1, 77, net.cfg.cross_attention_dim), 1).to(sd.device)
    if case.part == "inverting":
        return lambda: next(pipeline.invert(net, sd.schedule, noise, context)), net
    if case.part == "sampling":
        return lambda: next(pipeline.sample(net, sd.schedule, noise, context, context, guidance=GUIDANCE)), net
    memory.prepare(net, noise.shape, sd.device, case.checkpointing)
    tuner = Tuner(net, sd.schedule, noise, torch.zeros_like(noise), context)
    steps = tuner.run(10 ** 9, climb=case.checkpointing == "auto")
    return lambda: next(steps), net


def measure(case):
    """Runs in a fresh process: a case -> a line of the table. A dash stands where nothing tells the number."""
    sd = models(case)
    sd.text_encoder = None
    call, net = prepare(sd, case)
    forget_peak(sd.device)
    taken, peak = seconds(call, case.repeats, sd.device), peak_bytes(sd.device)
    flops = operations(call)
    rate = flops and flops / taken
    each = taken / case.frames if case.part in ON_FRAMES else None
    found = taken, each, peak, flops, rate, rate and rate / matrix_rate(sd.device, sd.dtype)
    numbers = "".join(f"{'-' if value is None else format(value / unit, style):>11}"
                      for value, (unit, style) in zip(found, COLUMNS.values()))
    recomputed = memory.recomputed(net) if net else 0
    return title(case) + numbers + (f"  {recomputed} blocks computed again" if recomputed else "")


def title(case):
    """The part, as a line of the table begins."""
    return f"{PARTS[case.part]:32}"


def measure_apart(case):
    """measure(case) in a fresh process -> the line, and whether the memory sufficed. If not, the line says so."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, case).result(), True
    except BrokenProcessPool:
        error = "the process was ended, probably because the memory is too small"
    except (MemoryError, RuntimeError) as problem:
        if not memory.is_out_of_memory(problem):
            raise
        error = "the memory is too small"
    return f"{title(case)}  {error}", False


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
    """Floating-point operations of call(): its matrix products, convolutions and attention. None where it has none.

    Torch's counter has no formula for the attention that a CPU computes in one call, so it gets one here.
    """
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: attended, GRADIENT: attended_backward}) as counter:
        call()
    return counter.get_total_flops() or None


def attended(q, k, *rest, **options):
    """Attention multiplies queries by keys, and the result by values. q, k: the shapes (b, h, n, d), (b, h, m, d)."""
    return 2 * 2 * math.prod(q) * k[-2]


def attended_backward(gradient, q, k, *rest, **options):
    """The gradient takes five such products: the first one again, and two for each."""
    return 5 * 2 * math.prod(q) * k[-2]


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
    """The most memory held: by tensors on CUDA, elsewhere by this process. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


# ---- The command ---------------------------------------------------------------------------------

def cases(args, sizes, counts):
    """All cases: args with one part, size and number of frames. What takes one frame is measured once for each size."""
    for size, frames, part in itertools.product(sizes, counts, args.parts or PARTS):
        if part == "loading" and (args.random is not None or size != sizes[0]):
            continue
        if part in ON_FRAMES or frames == counts[0]:
            yield argparse.Namespace(**vars(args) | dict(part=part, frames=frames, size=size))


def choose(args):
    """Writes into args which device, precision and weights are used -> (Defaults, what sizes are multiples of)."""
    if args.random is None:
        sd = cli.load_weights(args)
        args.device, args.precision, args.weights = str(sd.device), name_of(sd.dtype), sd.source["weights"]
        return sd.defaults, sd.multiple
    device = cli.choose_device(args.device)
    args.device, args.precision = str(device), name_of(cli.choose_dtype(device, args.precision))
    print(f"weights: random, of the size of {args.random}")
    return Defaults(), RANDOM[args.random][1].factor


def main():
    args = arguments()
    defaults, multiple = choose(args)
    sizes, counts = args.size or [defaults.size], args.frames or [defaults.frames]
    if unfit := [size for size in sizes if size % multiple]:
        raise InputError(f"The size {unfit[0]} does not suit this model: use a multiple of {multiple}.")
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.machine()
    print(f"{args.device} ({name}), {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    heads, all_fit = "".join(f"{column:>11}" for column in COLUMNS), True
    for (frames, size), group in itertools.groupby(cases(args, sizes, counts), lambda case: (case.frames, case.size)):
        print(f"\n{f'{frames} frames of {size}x{size}':32}{heads}", flush=True)
        for case in group:
            line, fits = measure_apart(case)
            print(line, flush=True)
            all_fit &= fits
    return 0 if all_fit else 1
