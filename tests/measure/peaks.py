"""Measured and simulated peaks of small cases, one a line: part, precision, frames, bytes measured, bytes simulated.

Run as a process of its own by test_memory.py. A case's bytes are what it adds to the process. Linux only: there a process
may forget its highest memory so far.
"""
import ctypes
import gc
import sys
from multiprocessing import get_context
from pathlib import Path

import torch

from tinytav import pipeline
from tinytav.inflation import inflate
from tinytav.measure import memory
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner

UNET = UNetConfig(block_out_channels=(64, 128), attention_head_dim=2, cross_attention_dim=64, layers_per_block=1,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
VAE_CONFIG = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
SIDE = 24


def status(name):
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])


def run(part, dtype, frames):
    """Builds the models with random weights and does the part."""
    x, context = torch.randn(1, 4, frames, SIDE, SIDE), torch.randn(1, 77, 64)
    if part == "decoding":
        vae = VAE(VAE_CONFIG).to(dtype).requires_grad_(False)
        pipeline.decode(vae, x.repeat(1, 1, 1, 4, 4))
        return
    net = inflate(UNet(UNET).to(dtype), frames)
    if part == "sampling":
        pipeline.last(pipeline.sample(net, Schedule(), x, context, context, 1))
        return
    for block in memory.checkpointable(net).values():
        block.checkpointing = part == "recomputing"
    tuner = Tuner(net, Schedule(), x, x, context)
    for _ in range(2):                                      # the first step has no moments yet
        tuner.step()


def simulate(part, dtype, frames):
    work = memory.Work(frames, SIDE, SIDE, dtype, unet=UNET, vae=VAE_CONFIG)
    if part == "decoding":
        return memory.decoding(memory.Work(frames, 4 * SIDE, 4 * SIDE, dtype, unet=UNET, vae=VAE_CONFIG))
    if part == "sampling":
        return memory.sampling(work)
    return memory.tuning(work, ALL if part == "recomputing" else ())


ALL = [block.name for block in memory.tuning(memory.Work(1, 8, 8, unet=UNET)).blocks]


def measure(part, precision, frames):
    dtype, frames = getattr(torch, precision), int(frames)
    run(part, dtype, 1)                                     # loads the code that the part needs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                        # or the case would fill what the run before has left
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(part, dtype, frames)
    print(part, precision, frames, status("VmHWM") - before, simulate(part, dtype, frames).peak, flush=True)


for case in sys.argv[1:]:
    process = get_context("fork").Process(target=measure, args=case.split(","))     # no case sees another's memory
    process.start()
    process.join()
