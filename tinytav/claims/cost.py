"""What attention between frames costs: O(2 f N^2) for ST-Attn, O((f N)^2) for full attention (paper, section 3.2)."""
from timeit import repeat

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinytav.claims.tables import grid
from tinytav.inflation import VideoUNet, inflate

COUNTS = (4, 8, 16, 32, 64)     # frames whose latents are 16x16


def table(sd):
    """A line for each number of frames: operations of a call, MB that a tuning step keeps, seconds of a call."""
    context, lines = sd.encode_prompts([""]), []
    for count in COUNTS:
        latents, found = torch.randn(1, 4, count, 16, 16), []
        for attention in ("sparse-causal", "full"):
            net = inflate(sd.unet, count, attention)
            found.append([measure(net, latents, context) for measure in (gflop, megabytes, seconds)])
        lines.append([str(count), *(f"{x:.2f}" for pair in zip(*found) for x in pair)])
    heads = [f"{attention}, {unit}" for unit in ("GFLOP", "MB", "s") for attention in ("ST-Attn", "full")]
    return grid(["frames", *heads], lines)


@torch.no_grad()
def gflop(net, latents, context):
    """10^9 operations of the two products in all attn1 of a call (no other attention); a multiply-add counts as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VideoUNet(net.cfg, net.frames, net.attention)(latents.to("meta"), torch.empty(1), context.to("meta"))
    operations = [ops for name, ops in counter.get_flop_counts().items() if name.endswith("attn1")]
    return sum(ops.get(torch.ops.aten.bmm, 0) for ops in operations) / 1e9


def megabytes(net, latents, context):
    """10^6 bytes that a call keeps for its backward pass while the net is tuned: each storage once, and no weights."""
    for p in net.tuned().values():
        p.requires_grad_()
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(latents, torch.zeros(1), context).sum().backward()      # until then all is held, so no address comes twice
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return sum(size for address, size in storages.items() if address not in weights) / 1e6


@torch.no_grad()
def seconds(net, latents, context):
    """Of one call, the fastest of three."""
    return min(repeat(lambda: net(latents, torch.zeros(1), context), number=1, repeat=3))
