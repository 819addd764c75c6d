"""What attention between frames costs as a clip grows: O(2 f N^2) for ST-Attn, O((f N)^2) for full (paper, section 3.2)."""
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinytav.inflation import VideoUNet, inflate
from tinytav.measure import memory

COUNTS = (4, 8, 16, 32, 64)     # frames whose latents are 16x16


def rows(sd):
    """Yields (frames, then of ST-Attn and of full attention: GFLOP, GFLOP, MB, MB, seconds, seconds)."""
    context = sd.encode_prompts([""])
    for count in COUNTS:
        shape, found = (1, 4, count, 16, 16), []
        for attention in ("sparse-causal", "full"):
            net = inflate(sd.unet, count, attention)
            found.append((gflop(net, shape, context.shape), megabytes(net, shape),
                          min(seconds(net, torch.randn(shape), context) for _ in range(3))))
        yield count, *(x for pair in zip(*found) for x in pair)


def megabytes(net, shape):
    """What a step of tuning needs beside the weights."""
    cost = memory.tuning(memory.Work(*shape[2:], unet=net.cfg, attention=net.attention, norm=net.norm))
    return (cost.peak - cost.weights) / 1e6


@torch.no_grad()
def gflop(net, latent_shape, context_shape):
    """10^9 operations of the two products in all attn1 of a call (not cross- or temporal attention); a multiply-add is two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VideoUNet(net.cfg, net.frames, net.attention)(torch.empty(latent_shape), torch.empty(1), torch.empty(context_shape))
    return sum(ops.get(torch.ops.aten.bmm, 0) for name, ops in counter.get_flop_counts().items() if name.endswith("attn1")) / 1e9


@torch.no_grad()
def seconds(net, latents, context):
    start = time.perf_counter()
    net(latents, torch.zeros(1), context)
    return time.perf_counter() - start
