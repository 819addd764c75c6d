"""Encoding, inverting, sampling, decoding; equality stands in test_reference.py."""
import gc
import weakref

import pytest
import tiny
import torch
from tiny import UNET, filled
from torch._subclasses import FakeTensorMode

from tinytav import editing, pipeline, tuning
from tinytav.inflation import VideoUNet, inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.tuning import Tuner
from tinytav.weights import load


def setting():
    """A net of 3 frames, latents, and two contexts; always the same."""
    generator = torch.Generator().manual_seed(0)
    net = filled(inflate(filled(UNet(UNetConfig.from_json(UNET))), 3))
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    return net, x, torch.randn(2, 7, 24, generator=generator).split(1)


@pytest.fixture
def sd(tmp_path):
    return load(tiny.write_folder(tmp_path / "w"))


# ---- The steps -----------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_with_a_real_net_reconstruction_improves_with_steps(prediction):
    net, x0, (empty, _) = setting()
    net.conv_out.weight *= 0.2          # filled weights make a rougher function than a trained net is
    schedule = Schedule(prediction_type=prediction)
    errors = []
    for steps in (5, 20, 80):
        x_T = pipeline.last(pipeline.invert(net, schedule, x0, empty, steps))
        x = pipeline.last(pipeline.sample(net, schedule, x_T, empty, empty, steps, 1))
        errors.append((x - x0).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05 * x0.square().mean()


def test_guidance_mixes_the_two_answers():
    net, x, (empty, context) = setting()

    def one_step(guidance):
        return pipeline.last(pipeline.sample(net, Schedule(), x, context, empty, 1, guidance))
    difference = one_step(1) - one_step(0)
    torch.testing.assert_close(one_step(5), one_step(0) + 5 * difference, atol=1e-3, rtol=1e-3)


def test_the_vae_takes_a_clip_in_parts_and_gives_the_same(sd, monkeypatch):
    x = torch.rand(7, 3, 16, 24) * 2 - 1
    whole = pipeline.encode(sd.vae, x)
    assert whole[0].shape == whole[1].shape == (1, 4, 7, 8, 12)
    for z, expected in zip(whole, sd.vae.encode(x)):                        # mean, std
        torch.testing.assert_close(z[0].transpose(0, 1), expected)
    decoded = pipeline.decode(sd.vae, whole[0])
    assert decoded.shape == x.shape
    monkeypatch.setattr(pipeline, "PIXELS", 2 * 16 * 24)           # two frames at once
    assert [len(part) for part in pipeline.chunks(x, 16 * 24)] == [2, 2, 2, 1]
    taken = []
    sd.vae.decoder.register_forward_pre_hook(lambda module, inputs: taken.append(len(inputs[0])))
    for part, at_once in zip(pipeline.encode(sd.vae, x), whole):
        torch.testing.assert_close(part, at_once, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipeline.decode(sd.vae, whole[0]), decoded, atol=1e-5, rtol=1e-5)
    assert taken == [2, 2, 2, 1]                                    # pixels of frames are counted, not of latents


def test_a_frame_of_more_than_a_megapixel_goes_through_the_vae_alone():
    assert [len(part) for part in pipeline.chunks(torch.zeros(3, 1), 2 ** 20 + 1)] == [1, 1, 1]
    assert [len(part) for part in pipeline.chunks(torch.zeros(3, 1), 2 ** 20)] == [1, 1, 1]
    assert [len(part) for part in pipeline.chunks(torch.zeros(5, 1), 2 ** 19)] == [2, 2, 1]


def test_no_step_of_an_edit_keeps_a_graph():
    """Half of the net is trainable; its activations must not stay in memory over fifty steps."""
    net, x, (empty, context) = setting()
    for p in net.tuned().values():
        p.requires_grad_()
    inverting = pipeline.invert(net, Schedule(), x, empty, 2)
    sampling = pipeline.sample(net, Schedule(), x, context, empty, 2, 2.)
    assert not any(z.requires_grad for z in (*inverting, *sampling))


# ---- Devices and precision -----------------------------------------------------------------------

def fake_getitem(x, key):
    """x[key] for ints, slices and None by plain operations: Python's own indexing asks for a real CUDA device."""
    keys, dim = key if isinstance(key, tuple) else (key,), 0
    for one in keys:
        if one is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(one, int):
            x = x.select(dim, one)
        else:
            start, stop, step = one.indices(x.shape[dim])
            assert step == 1
            x, dim = x.narrow(dim, start, stop - start), dim + 1
    return x


def test_no_tensor_of_the_cpu_meets_one_of_the_gpu(monkeypatch):
    """Fake tensors of a CUDA device refuse a CPU tensor beside them; scalars alone may mix. No GPU is needed."""
    with torch.device("meta"):
        net = VideoUNet(UNetConfig.from_json(UNET), 3).requires_grad_(False)
    drawn = tuning.draw(33, 0, (1, 4, 3, 8, 8), 1000)
    monkeypatch.setattr(tuning, "draw", lambda *args: drawn)       # a fake random number has no value
    fake = torch._subclasses.FakeTensor
    monkeypatch.setattr(fake, "__getitem__", fake_getitem, raising=False)
    monkeypatch.setattr(fake, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cuda")
        x, context = torch.empty(1, 4, 3, 8, 8, device="cuda"), torch.empty(1, 7, 24, device="cuda")
        noise = pipeline.last(pipeline.invert(net, Schedule(), x, context, 2))
        latents = pipeline.last(pipeline.sample(net, Schedule(), noise, context, context, 2, 7.5))
        with torch.no_grad():                                      # a backward pass needs a real device
            loss = Tuner(net, Schedule(), x, x, context).loss()
        assert {z.device.type for z in (noise, latents, loss)} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):          # the fake device does refuse a CPU tensor
            net(x.cpu() + torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu"), context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_a_context_and_weights_keep_their_formats(tmp_path, dtype):
    sd = load(tiny.write_folder(tmp_path / "w"), dtype=dtype)
    context, empty = sd.encode_prompts(["a man", ""]).split(1)
    net = editing.new_net(sd, 3)
    formats = {name: p.dtype for name, p in net.named_parameters()}
    tuned = net.tuned().keys()
    assert all(formats[name] is torch.float32 for name in tuned)
    assert all(formats[name] is dtype for name in formats.keys() - tuned if "norm_temp" not in name)
    mean, std = pipeline.encode(sd.vae, torch.rand(3, 3, 16, 16))
    tuner = Tuner(net, sd.schedule, mean, std, context)
    tuner.step()
    noise = pipeline.last(pipeline.invert(net, sd.schedule, mean, empty, 2))
    assert context.dtype is mean.dtype is noise.dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")                    # no generator leaves its context open
    assert {name: p.dtype for name, p in net.named_parameters()} == formats


def test_a_part_set_to_none_leaves_memory_at_once(sd):
    """No reference cycle keeps it: the garbage collector is off."""
    gc.collect()
    gc.disable()
    try:
        mean, _ = pipeline.encode(sd.vae, torch.rand(2, 3, 16, 16))
        sd.encode_prompts(["a man"])
        gone = [weakref.ref(sd.vae), weakref.ref(sd.text_encoder)]
        sd.vae = sd.text_encoder = None
        assert [reference() for reference in gone] == [None, None]
        assert sd.multiple == 2
    finally:
        gc.enable()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_edit_on_cuda_is_near_the_same_on_a_cpu(tmp_path, dtype):
    """Mean difference: at most 0.01 of the range [-1, 1] in float32, 0.03 in half precision."""
    folder, clip = tiny.write_folder(tmp_path / "w"), tiny.write_clip(tmp_path / "clip.mp4")
    results = []
    for device, precision in (("cpu", torch.float32), ("cuda", dtype)):
        sd = load(folder, device=device, dtype=precision)
        session = editing.begin(sd, clip, "a man", tmp_path / device, steps=3)
        for _ in session.tune():
            pass
        results.append(session.edit("a panda", guidance=2).frames.cpu())
    assert (results[0] - results[1]).abs().mean() < (0.01 if dtype is torch.float32 else 0.03)
