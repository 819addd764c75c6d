"""How much memory a tuning step takes, how much there is, and gradient checkpointing, which trades time for it."""
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from .inflation import VideoUNet
from .unet import ResnetBlock, Transformer


def checkpoint_gradients(net):
    """Keep only what enters each resnet and transformer, and compute them again for the gradient.

    Non-reentrant: the official code's re-entrant kind loses the gradients of all 42 tuned tensors in the down blocks.
    """
    for module in net.modules():
        if isinstance(module, (ResnetBlock, Transformer)):
            module.forward = _checkpointed(module.forward)


def _checkpointed(forward):
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def training_bytes(net, latent_shape, context_shape):
    """Bytes that one step keeps for the gradient, in float32: counted on the meta device, where nothing is computed.

    latent_shape (1, 4, f, h, w), context_shape (1, m, d).
    """
    with torch.device("meta"):
        net = VideoUNet(net.cfg, net.frames, net.attention, net.norm).requires_grad_(False)
        for p in net.tuned().values():
            p.requires_grad_()
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor      # holding it, so that no two storages are taken for one
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(torch.empty(latent_shape), torch.zeros(1), torch.empty(context_shape))
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


def free_bytes(device):
    """Memory that is free on the device; without a limit where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
