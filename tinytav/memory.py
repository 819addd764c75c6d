"""The memory of a tuning step. On a GPU a step is tried, and tried again with less. On a CPU an estimate decides
before.

A block of the U-Net that is computed again for the gradient keeps only its inputs, and costs one more forward of this
block (gradient checkpointing, Chen et al., arXiv 1604.06174). The more blocks, the less memory and the more time. So
there is a ladder. Its first rung computes nothing again. When memory runs out, tuning takes the next rung and makes
the same step again. On a CPU the kernel may end the process instead, so there an estimate chooses the rung before the
first step.
"""
import warnings
from pathlib import Path

import torch

from tinytav.stable_diffusion.unet import ResnetBlock, Transformer

# What a step keeps for each latent pixel of each frame, in bytes, where nothing is computed again: measured on a CPU
# with Stable Diffusion 1.5, whose finest level has 320 channels. The rungs keep these shares of it.
KEPT = {torch.float32: 680e3, torch.bfloat16: 320e3, torch.float16: 320e3}
SHARES = (1, 0.67, 0.57, 0.31, 0.18, 0.16)
CHANNELS = 320
SAMPLED = 0.12      # what a step of guided sampling keeps, as a share of KEPT
RESERVE = 0.1       # of the free memory, for what no estimate sees
OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
                 "MPS backend out of memory")


# ---- The ladder ----------------------------------------------------------------------------------

def blocks(net):
    """The resnets and transformers of a U-Net: what may be computed again."""
    return [module for module in net.modules() if isinstance(module, (ResnetBlock, Transformer))]


def ladder(net):
    """The rungs: nothing; the finest level's transformers; all blocks of the finest level, of the two finest, ...,
    all.
    """
    levels = [blocks(down) + blocks(up) for down, up in zip(net.down_blocks, reversed(net.up_blocks))]
    levels[-1] += blocks(net.mid_block)
    rungs = [[], [block for block in levels[0] if isinstance(block, Transformer)]]
    for count in range(1, len(levels) + 1):
        rungs.append(sum(levels[:count], []))
    return rungs


def recompute(net, rung):
    """From now on these blocks are computed again for the gradient, and no others."""
    for block in blocks(net):
        block.checkpointing = any(block is one for one in rung)


def recomputed(net):
    """How many blocks are computed again."""
    return sum(block.checkpointing for block in blocks(net))


def climb(net):
    """Takes the next rung of the ladder. False where all blocks are computed again already."""
    now = recomputed(net)
    higher = [rung for rung in ladder(net) if len(rung) > now]
    if higher:
        recompute(net, higher[0])
    return bool(higher)


def tried(net, step):
    """step(), again and again with the next rung of the ladder, until the memory is enough. Raises the last error."""
    while True:
        try:
            return step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not climb(net):
                raise
        # Here the error is gone, and with it the tensors of the failed step.
        net.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"The memory is too small for a step. From now on {recomputed(net)} of {len(blocks(net))} blocks "
                      "are computed again for the gradient, which is slower.")


def is_out_of_memory(error):
    """Does this error say that memory ran out? An "illegal memory access", for one, does not."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


# ---- Before the first step -----------------------------------------------------------------------

def prepare(net, shape, device, checkpointing="auto", free=None):
    """Chooses what is computed again for a clip of latents (1, 4, f, h, w). Returns the number of blocks.

    checkpointing: "on" all blocks, "off" none, "auto" what an estimate finds necessary on a CPU. free: bytes of memory;
    else what the system says. Warns where even the whole ladder is not enough.
    """
    rungs = ladder(net)
    recompute(net, rungs[-1] if checkpointing == "on" else [])
    if checkpointing == "auto" and device.type == "cpu":
        free = free_bytes() if free is None else free
        state = 12 * sum(p.numel() for p in net.tuned().values())       # gradients and AdamW's two moments, in float32
        shares = (*SHARES[:len(rungs) - 1], SHARES[-1])         # of fewer levels: the first ones, and the last
        needs = [state + share * pixel_bytes(net, shape) for share in shares]
        fitting = [rung for rung, need in zip(rungs, needs) if need < (1 - RESERVE) * free]
        recompute(net, fitting[0] if fitting else rungs[-1])
        warn_if_tight("A step of tuning", needs[-1], free)
    return recomputed(net)


def pixel_bytes(net, shape):
    """What a step without recomputing keeps of latents (1, 4, f, h, w): linear in their pixels and in the channels.

    Of a clip of more frames than the net's, one window is in memory at a time.
    """
    _, _, frames, height, width = shape
    pixels = min(frames, net.frames) * height * width
    return pixels * KEPT[net.conv_in.weight.dtype] * net.conv_in.out_channels / CHANNELS


def warn_before_sampling(net, shape, device):
    """Warns where sampling latents of this shape may not fit on a CPU, whose kernel would end the process."""
    if device.type == "cpu":
        warn_if_tight("Sampling", SAMPLED * pixel_bytes(net, shape), free_bytes())


def warn_if_tight(what, need, free):
    if need > (1 - RESERVE) * free:
        warnings.warn(f"{what} needs about {need / 2 ** 30:.2f} GiB of memory, and {free / 2 ** 30:.2f} are free. It "
                      "may fail. Half the --frames, or half the --window, need about half of it, half the --size a "
                      "quarter.")


def free_bytes():
    """The memory of this machine that is free, within the limits of its control groups. Infinite where it is not
    told.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
    return min(free, group_bytes())


def group_bytes(root="/sys/fs/cgroup", mine="/proc/self/cgroup"):
    """The memory that a container's or a service's limit leaves free (Linux control groups, versions 2 and 1)."""
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
            free.append(limit - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0)))
    return max(0, min(free))
