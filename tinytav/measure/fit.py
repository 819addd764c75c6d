"""Does the work fit into the memory that is free? What to compute again, and what to tell the user where it does not."""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tinytav.measure import memory, recompute

RESERVE = 0.1       # of free memory is left for what the simulation cannot see: scratch memory, gaps between tensors
TUNING_MAPS = 1000  # a step of tuning keeps fewer of the U-Net's largest feature maps; Stable Diffusion's about 400
SAMPLING_MAPS = 100 # a step of sampling; Stable Diffusion's about 40
GIB = 2 ** 30


# ---- What is decided -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """How the work is done, and what the user should know of it; "" if nothing."""
    recomputed: frozenset = frozenset()     # names of the blocks to compute again
    note: str = ""
    warning: str = ""


def plan_tuning(work, free, checkpointing="auto"):
    """Plan of a step of tuning with `free` bytes of memory. checkpointing: "on", "off", or "auto" for what is needed."""
    free *= 1 - RESERVE
    if checkpointing != "on" and surely_fits(work, free, TUNING_MAPS):
        return Plan()
    if checkpointing == "auto":
        names, cost = recompute.fit(work, free)
    else:
        names = every_name(work) if checkpointing == "on" else frozenset()
        cost = memory.tuning(work, names)
    note = f"a step of tuning needs {gib(cost.peak)} of memory"
    if names:
        note += f"; for that {len(names)} of {len(every_name(work))} blocks are computed again (gradient checkpointing)"
    warning = ""
    if cost.peak > free:
        warning = advice("A step of tuning", work, cost.peak, free, lambda smaller: memory.tuning(smaller, names).peak)
    return Plan(frozenset(names), note, warning)


def plan_sampling(work, free, guidance, others=0):
    """Plan of sampling and of decoding the result. others: bytes of further models that lie in memory meanwhile."""
    free = (1 - RESERVE) * free - others
    if surely_fits(work, free, SAMPLING_MAPS):
        return Plan()

    def peak(work):
        net = memory.sampling(work, guidance)
        return max(net.peak, net.weights + memory.decoding(work).peak)

    need = peak(work)
    return Plan(warning=advice("Sampling", work, need, free, peak) if need > free else "")


def every_name(work):
    return frozenset(recompute.everything(memory.on_meta(work)))


def surely_fits(work, free, maps):
    """Is the work so small that it need not be simulated? maps: more feature maps than it keeps at a time."""
    if work.attention == "causal":                          # its copies of K and V grow with the square of the frames
        return False
    weights = 4 * sum(p.numel() for p in memory.on_meta(work).parameters())
    largest_map = 4 * work.frames * work.height * work.width * work.unet.block_out_channels[0]
    return 4 * weights + maps * largest_map < free          # weights, gradients and AdamW's two moments


# ---- What is said --------------------------------------------------------------------------------

def advice(what, work, need, free, peak):
    """A sentence for work that needs more than is free, with settings that fit. peak(work): bytes that work needs."""
    share = share_that_fits(work, need, free, peak)
    frames = math.floor(work.frames * share)
    short_side = 8 * math.floor(min(work.height, work.width) * share ** 0.5)
    settings = [f"--frames {frames}"] if frames > 0 else []
    settings += [f"--size {short_side}"] if short_side > 0 else []
    use = " or ".join(settings) or "a machine that has more"
    return f"{what} needs about {gib(need)} of memory, and {gib(max(0, free))} are free. It may fail: then use {use}."


def share_that_fits(work, need, free, peak):
    """The share of the work's pixels that fits, a little less to be sure.

    Above what one frame of one pixel needs, memory grows with the number of pixels.
    """
    least = peak(replace(work, frames=1, height=1, width=1))
    return max(0., 0.95 * (free - least) / (need - least))


def gib(count):
    return f"{count / GIB:.2f} GiB"


def weight_bytes(model):
    return sum(p.nbytes for p in model.parameters())


# ---- What is free --------------------------------------------------------------------------------

def free_bytes(device):
    """Memory that is free on the device; without a limit where the system does not tell (macOS, Windows)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
    return min(free, group_bytes())


def group_bytes(root="/sys/fs/cgroup", mine="/proc/self/cgroup"):
    """Memory that a container's or a service's limit leaves free (Linux control groups, versions 2 and 1)."""
    free = [float("inf")]
    lines = Path(mine).read_text().splitlines() if Path(mine).is_file() else []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds not in ("", "memory"):
            continue
        names = ("max", "current") if kinds == "" else ("limit_in_bytes", "usage_in_bytes")
        top = Path(root, kinds)
        here = top / path.strip("/")
        for folder in (top, here, *here.parents):               # the limits above count too; a container sees its top
            try:
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):                       # no such group, or "max": no limit
                continue
            free.append(limit - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0)))      # caches give way
    return max(0, min(free))
