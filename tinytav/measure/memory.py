"""How much memory a tuning step takes, how much there is, and gradient checkpointing, which trades time for it."""
import warnings
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion.unet import ResnetBlock, Transformer


def checkpoint_gradients(net):
    """Keep only what enters each resnet and transformer, and compute them again for the gradient.

    Non-reentrant: the official code's re-entrant kind loses the gradients of all 42 tuned tensors in the down blocks.
    """
    for module in net.modules():
        if isinstance(module, (ResnetBlock, Transformer)):
            module.checkpointing = True


def training_bytes(net, latent_shape, context_shape):
    """Bytes that one step keeps for the gradient, in float32, and the most with gradient checkpointing.

    Counted on fake tensors, which take no memory and choose the attention that real ones would.
    latent_shape (1, 4, f, h, w), context_shape (1, m, d).
    """
    with FakeTensorMode():
        net = VideoUNet(net.cfg, net.frames, net.attention, net.norm).requires_grad_(False)
        for p in net.tuned().values():
            p.requires_grad_()
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        kept, blocks = {}, []                                   # blocks: what enters each, and its part of kept

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor      # holding it, so that no two storages are taken for one
            return tensor
        for module in net.modules():
            if isinstance(module, (ResnetBlock, Transformer)):
                module.register_forward_pre_hook(lambda module, inputs: blocks.append([inputs[0].nbytes, len(kept)]))
                module.register_forward_hook(lambda module, inputs, output: blocks[-1].append(len(kept)))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(torch.empty(latent_shape), torch.zeros(1), torch.empty(context_shape))
    sizes = [0 if storage in weights else tensor.untyped_storage().nbytes() for storage, tensor in kept.items()]
    inside = [sum(sizes[first:end]) for _, first, end in blocks]
    return sum(sizes), sum(sizes) - sum(inside) + sum(block[0] for block in blocks) + max(inside)


def is_tight(net, latent_shape, context_shape, device, size, multiple):
    """Does a step of tuning fit only with gradient checkpointing?

    Warns where it does not even so, naming settings that would: memory grows with frames and pixels.
    """
    kept, least = training_bytes(net, latent_shape, context_shape)
    moments = 12 * sum(p.numel() for p in net.tuned().values())             # a gradient and AdamW's two, float32
    whole, least = 1.5 * kept + moments, 2.5 * least + moments              # with the gradients on their way; measured
    free = free_bytes(device)
    if least > free:
        share = max(0, free - moments) / (least - moments)
        settings = {"--frames": int(net.frames * share), "--size": int(size * share ** 0.5) // multiple * multiple}
        use = " or ".join(f"{name} {value}" for name, value in settings.items() if value) or "a machine that has more"
        warnings.warn(f"A step of tuning needs about {least / 2 ** 30:.2f} GB of memory, even with gradient "
                      f"checkpointing, and {free / 2 ** 30:.2f} GB are free: use {use}.")
    return whole > free


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
            caches = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))            # they give way
            free.append(limit - used + caches)
    return max(0, min(free))
