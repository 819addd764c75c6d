"""How fast the parts are on this machine, how much memory they take, and how near they come to a matrix product's rate.

    python -m tinytav bench                                             # the weights' own clip length and size
    python -m tinytav bench --random sd15 --frames 8 16 32 64 --size 128     # how time grows; needs no weights

Each part at each size runs in a fresh process: a warm-up, then some repeats, of which the median counts. In the same
process a large matrix product in the same precision shows what the machine could do at most. Memory is the process's
highest on a CPU, and what tensors take on CUDA; beside it stands what the simulation says (see memory.py).
"""
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from tinytav import cli, pipeline
from tinytav.errors import InputError
from tinytav.files.atomic import replace_text
from tinytav.inflation import inflate
from tinytav.measure import fit, memory, recompute
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.precision import PRECISIONS, cpu_has_bf16, name_of
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner
from tinytav.weights import Defaults, StableDiffusion, load

RANDOM = {"sd15": (UNetConfig(), VAEConfig())}      # what --random knows
GUIDANCE = 12.5
FORGET = Path("/proc/self/clear_refs")              # Linux: "5" written there makes a process forget its highest memory
STATUS = Path("/proc/self/status")


def arguments():
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("--random", choices=RANDOM, help="a model of this size with random weights, instead of --weights")
    p.add_argument("--frames", type=cli.number(int, 1), nargs="+", metavar="N", help="of the clip; else the weights' own")
    p.add_argument("--size", type=cli.number(int, 8), nargs="+", metavar="N",
                   help="pixels of a square; else the weights' own")
    p.add_argument("--parts", choices=PARTS, nargs="+", help="only these (default: all)")
    p.add_argument("--repeats", type=cli.number(int, 1, 900), default=5, metavar="N", help="of each part (default: 5)")
    p.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto", help="as train.py's (default: auto)")
    p.add_argument("--json", metavar="FILE", help="write the results there, too")
    return p.parse_args()


@dataclass(frozen=True)
class Case:
    """One part at one size, and all that a fresh process needs to know to measure it."""
    part: str
    frames: int
    size: int
    device: str
    precision: str
    random: str | None
    weights: str | None
    tokenizer: str | None
    prediction: str | None
    repeats: int
    checkpointing: str


@dataclass(frozen=True)
class Result:
    """What was measured: seconds, bytes, floating-point operations and their number in a second."""
    part: str
    frames: int
    size: int
    seconds: float | None = None
    peak: int | None = None                 # None where the system does not tell
    simulated: int | None = None
    flops: int | None = None
    rate: float | None = None
    matrix_rate: float | None = None        # of a large matrix product in the same process
    share: float | None = None              # rate / matrix_rate
    recomputed: int = 0                     # blocks that the gradient computes again
    error: str = ""


@dataclass(frozen=True)
class Prepared:
    """A part that is ready to run."""
    call: Callable                          # does it once
    simulate: Callable | None = None        # gives its Cost
    recomputed: int = 0                     # blocks that the gradient computes again


# ---- The parts: each prepares itself -------------------------------------------------------------

def loading(sd, case):
    def call():
        load(case.weights, case.tokenizer, case.prediction, sd.device, sd.dtype)
    return Prepared(call)


def encoding(sd, case):
    x = pipeline.gaussian((1, 3, case.size, case.size), 0).clamp(-1, 1).to(sd.device)

    def call():
        pipeline.encode(sd.vae, x)
    return Prepared(call, lambda: memory.encoding(replace(work_of(sd, case), frames=1)))


def decoding(sd, case):
    z = noise_for(sd, case)[:, :, :1]

    def call():
        pipeline.decode(sd.vae, z)
    return Prepared(call, lambda: memory.decoding(replace(work_of(sd, case), frames=1)))


def inverting(sd, case):
    net, noise, context = inflate(sd.unet, case.frames), noise_for(sd, case), context_for(sd)

    def call():
        next(pipeline.invert(net, sd.schedule, noise, context))
    return Prepared(call, lambda: memory.sampling(work_of(sd, case), guidance=1))


def sampling(sd, case):
    net, noise, context = inflate(sd.unet, case.frames), noise_for(sd, case), context_for(sd)

    def call():
        next(pipeline.sample(net, sd.schedule, noise, context, context, guidance=GUIDANCE))
    return Prepared(call, lambda: memory.sampling(work_of(sd, case), GUIDANCE))


def tuning(sd, case):
    net, noise = inflate(sd.unet, case.frames), noise_for(sd, case)
    names = recomputed_blocks(sd, case)
    recompute.switch(net, names)
    tuner = Tuner(net, sd.schedule, noise, torch.zeros_like(noise), context_for(sd))
    return Prepared(tuner.step, lambda: memory.tuning(work_of(sd, case), names), len(names))


PARTS = {
    "loading": (loading, "loading"),
    "encoding": (encoding, "VAE, encoding a frame"),
    "decoding": (decoding, "VAE, decoding a frame"),
    "inverting": (inverting, "inverting, a step"),
    "sampling": (sampling, "sampling with guidance, a step"),
    "tuning": (tuning, "tuning, a step"),
}
ON_FRAMES = ("inverting", "sampling", "tuning")         # the others take one frame, or none


def noise_for(sd, case):
    side = case.size // sd.multiple
    return pipeline.gaussian((1, 4, case.frames, side, side), 0).to(sd.device)


def context_for(sd):
    return pipeline.gaussian((1, 77, sd.unet.cfg.cross_attention_dim), 1).to(sd.device)


def work_of(sd, case):
    side = case.size // sd.vae.cfg.factor
    return memory.Work(case.frames, side, side, sd.dtype, sd.device.type, sd.unet.cfg, sd.vae.cfg)


def recomputed_blocks(sd, case):
    """The blocks that train.py would compute again here."""
    free = fit.free_bytes(sd.device) + fit.weight_bytes(sd.unet)
    return fit.plan_tuning(work_of(sd, case), free, case.checkpointing).recomputed


# ---- Models --------------------------------------------------------------------------------------

def models(case):
    """The Stable Diffusion that a case names."""
    device, dtype = torch.device(case.device), PRECISIONS[case.precision]
    if case.random is None:
        sd = load(case.weights, case.tokenizer, case.prediction, device, dtype)
        sd.text_encoder = None
        return sd
    unet, vae = RANDOM[case.random]
    return StableDiffusion(
        tokenizer=None, text_encoder=None, vae=with_random_weights(VAE, vae, device, dtype),
        unet=with_random_weights(UNet, unet, device, dtype), schedule=Schedule(), path=Path(case.random), fingerprint="",
        device=device, dtype=dtype, multiple=vae.factor)


def with_random_weights(Model, cfg, device, dtype):
    """A frozen model with small weights; norms have the scale 1. The numbers repeat, which no time depends on."""
    with torch.device("meta"):
        model = Model(cfg)
    numbers = 0.02 * pipeline.gaussian((2 ** 16,), 0)
    tensors = {}
    for name, p in model.state_dict().items():
        if p.ndim == 1 and name.endswith("weight"):
            tensors[name] = torch.ones(p.shape, device=device, dtype=dtype)
        else:
            repeats = math.ceil(p.numel() / len(numbers))
            tensors[name] = numbers.repeat(repeats)[:p.numel()].view(p.shape).to(device, dtype)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


# ---- Measuring -----------------------------------------------------------------------------------

def measure(case):
    """Runs in a fresh process: Case -> Result."""
    sd = models(case)
    prepare, _ = PARTS[case.part]
    prepared = prepare(sd, case)
    before = matrix_rate(sd.device, sd.dtype)
    forget_peak(sd.device)
    taken = seconds(prepared.call, case.repeats, sd.device)
    peak = peak_bytes(sd.device)
    machine = (before + matrix_rate(sd.device, sd.dtype)) / 2
    result = Result(case.part, case.frames, case.size, taken, peak, matrix_rate=machine,
                    recomputed=prepared.recomputed)
    if prepared.simulate is None:
        return result
    cost = prepared.simulate()
    rate = cost.flops / taken
    return replace(result, simulated=cost.peak, flops=cost.flops, rate=rate, share=rate / machine)


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


def matrix_rate(device, dtype):
    """FLOP/s of the product of two large square matrices.

    Smaller ones where the processor emulates the format: a product of 2048x2048 in bf16 then takes a quarter of a minute.
    """
    if device.type != "cpu":
        side = 8192
    elif dtype is torch.bfloat16 and not cpu_has_bf16():
        side = 256
    else:
        side = 2048
    a = torch.randn(side, side, device=device).to(dtype)

    def call():
        a @ a
    return 2 * side ** 3 / seconds(call, 3, device)


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
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])


def measure_apart(case):
    """measure(case) in a fresh process. A part for which the memory is too small gives a Result that says so."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, case).result()
    except BrokenProcessPool:
        error = "the process was ended, perhaps because the memory is too small"
    except (MemoryError, RuntimeError) as problem:
        if not cli.is_out_of_memory(problem):
            raise
        error = "the memory is too small"
    return Result(case.part, case.frames, case.size, error=error)


# ---- Printing ------------------------------------------------------------------------------------

HEADER = f"{'':32}{'seconds':>10}{'peak GiB':>10}{'simulated':>11}{'GFLOP':>10}{'GFLOP/s':>10}{'of matmul':>11}"


def row(result):
    """A line of the table."""
    _, title = PARTS[result.part]
    if result.error:
        return f"{title:32}  {result.error}"
    cells = [cell(result.seconds, 1, 10, ".3f"),
             cell(result.peak, 2 ** 30, 10, ".2f"),
             cell(result.simulated, 2 ** 30, 11, ".2f"),
             cell(result.flops, 1e9, 10, ".0f"),
             cell(result.rate, 1e9, 10, ".0f"),
             cell(result.share, 0.01, 11, ".0f", "%")]
    note = f"  {result.recomputed} blocks computed again" if result.recomputed else ""
    return f"{title:32}" + "".join(cells) + note


def cell(value, unit, width, style, end=""):
    """A number in its unit, or a dash where there is none."""
    text = "-" if value is None else format(value / unit, style) + end
    return text.rjust(width)


def scaling(results):
    """Lines: how long a part takes for each frame at each size, and the ratio to the size before."""
    lines = []
    for part in ON_FRAMES:
        before = None
        for result in results:
            if result.part != part or result.error:
                continue
            each = result.seconds / result.frames
            ratio = "" if before is None else f"  {each / before:5.2f} x the row above"
            size = f"{result.frames} frames of {result.size}x{result.size}"
            lines.append(f"{PARTS[part][1]:32}{size:>24}: {each:8.3f} s a frame{ratio}")
            before = each
    return lines


def describe(device, dtype):
    """What was measured on, for the first line and the JSON file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return dict(device=str(device), name=name, precision=name_of(dtype), threads=torch.get_num_threads(),
                torch=torch.__version__, python=platform.python_version(), date=time.strftime("%Y-%m-%d"))


def cases(args, defaults, device, dtype, weights):
    """All cases, the sizes in the order given. What takes one frame is measured once for each size."""
    sizes, counts = args.size or [defaults.size], args.frames or [defaults.frames]
    for size in sizes:
        for frames in counts:
            for part in args.parts or PARTS:
                if part == "loading" and (args.random is not None or size != sizes[0]):
                    continue
                if part not in ON_FRAMES and frames != counts[0]:
                    continue
                yield Case(part, frames, size, str(device), name_of(dtype), args.random, weights, args.tokenizer,
                           args.prediction, args.repeats, args.checkpointing)


def main():
    args = arguments()
    if args.random is None:
        sd = cli.load_weights(args)
        defaults, weights, device, dtype, multiple = sd.defaults, str(sd.path), sd.device, sd.dtype, sd.multiple
        del sd
    else:
        device = cli.choose_device(args.device)
        dtype = cli.choose_dtype(device, args.precision)
        defaults, weights, multiple = Defaults(), None, RANDOM[args.random][1].factor
        print(f"weights: random, of the size of {args.random}")
    for size in args.size or []:
        if size % multiple:
            raise InputError(f"The size {size} does not suit this model: use a multiple of {multiple}.")
    machine = describe(device, dtype)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results, shown = [], None
    for case in cases(args, defaults, device, dtype, weights):
        if shown != (case.frames, case.size):
            shown = case.frames, case.size
            print(f"\n{case.frames} frames of {case.size}x{case.size}\n{HEADER}", flush=True)
        results.append(measure_apart(case))
        print(row(results[-1]), flush=True)
    if len({(result.frames, result.size) for result in results}) > 1:
        print("\n".join(["", *scaling(results)]))
    if args.json:
        written = dict(machine=machine, results=[asdict(result) for result in results])
        replace_text(Path(args.json), json.dumps(written, indent=2) + "\n")
    return 1 if any(result.error for result in results) else 0
