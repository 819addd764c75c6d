"""The simulation sees what torch really keeps and computes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

from tinytav.measure import memory
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.stable_diffusion.vae import VAEConfig

UNET, VAE = UNetConfig.from_json(tiny.UNET), VAEConfig.from_json(tiny.VAE)
KILO = 1024
# In bf16 oneDNN keeps about 20 MB of its own, whatever the number of frames. They must not be a large part of the peak.
CASES = ["tuning,float32,4", "tuning,float32,8", "tuning,bfloat16,12", "tuning,bfloat16,20", "recomputing,bfloat16,24",
         "sampling,float32,8", "decoding,float32,2"]


def test_a_storage_counts_once_and_until_its_last_tensor_is_gone():
    with memory.simulation("cpu") as meter:
        x = torch.zeros(KILO)                               # 4 KiB
        view = x.view(32, 32)[1:]
        x.add_(1)
        assert meter.alive == 4 * KILO
        y = x + x
        del x
        assert meter.alive == 8 * KILO                      # the view still holds the first
        del view
        assert meter.alive == 4 * KILO
        half = y.to(torch.bfloat16)
        assert meter.alive == 6 * KILO and max(meter.peaks.values()) == 8 * KILO
        del y, half
        assert meter.alive == 0


def test_what_the_gradient_keeps_is_alive_until_the_backward_pass_is_done_with_it():
    with memory.simulation("cpu") as meter:
        x = torch.zeros(KILO, requires_grad=True)
        y = x.exp().exp()                                   # both results are kept
        assert meter.alive == 12 * KILO
        y.sum().backward()
        del y
        assert meter.alive == 8 * KILO                      # x and its gradient


def test_attention_counts_its_matrix_products_forward_and_backward():
    """As many operations as the same attention written out in matrix products, which torch itself counts."""
    found = []
    for written_out in (False, True):
        with memory.simulation("cpu") as meter:
            q, k, v = (torch.zeros(2, 3, n, 16, requires_grad=True) for n in (40, 24, 24))
            if written_out:
                y = (q @ k.transpose(2, 3)).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v)
            forward = meter.flops
            y.sum().backward()
            found.append((forward, meter.flops - forward))
    (forward, backward), (plain_forward, plain_backward) = found
    assert forward == plain_forward == 2 * 2 * 2 * 3 * 40 * 24 * 16
    assert backward == plain_backward + forward // 2        # flash attention computes the logits a second time


def test_a_step_of_tuning_holds_weights_gradients_and_moments_and_grows_with_the_clip():
    cost = memory.tuning(memory.Work(3, 8, 8, unet=UNET))
    net = memory.on_meta(memory.Work(3, 8, 8, unet=UNET))
    assert cost.weights == sum(p.nbytes for p in net.parameters())
    assert cost.peak > cost.weights + 3 * sum(p.nbytes for p in net.tuned().values())
    larger, half = (memory.tuning(memory.Work(*size, dtype, unet=UNET))
                    for size, dtype in (((6, 16, 16), torch.float32), ((3, 8, 8), torch.bfloat16)))
    assert larger.peak > cost.peak > half.peak and larger.flops > 7 * cost.flops and half.flops == cost.flops


def test_guidance_asks_for_two_answers():
    work = memory.Work(3, 16, 16, unet=UNET)
    both, one = memory.sampling(work), memory.sampling(work, guidance=1)
    assert both.flops == 2 * one.flops and both.weights == one.weights and both.peak > one.peak


def test_the_vae_is_simulated_too():
    work = memory.Work(3, 16, 16, vae=VAE)
    for cost in (memory.encoding(work), memory.decoding(work)):
        assert cost.peak > cost.weights > 0 and cost.flops > 0


def test_stable_diffusion_at_24_frames_of_512_pixels_in_bf16_needs_at_most_6_5_gib():
    work = memory.Work(24, 64, 64, torch.bfloat16)
    names = {name for name, _ in memory.checkpointable(memory.on_meta(work)).items()}
    assert memory.tuning(work, names).peak < 6.5 * 2 ** 30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak can be read on Linux only")
def test_simulated_peaks_are_measured_ones_within_25_per_cent():
    """Each in a process of its own, whose small tensors, too, go back to the system when they are freed."""
    script = Path(__file__).parent / "peaks.py"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, *CASES], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    for line in lines:
        *_, measured, simulated = line.split()
        assert 0.75 * int(measured) < int(simulated) < 1.25 * int(measured), line
