"""Pose control: a ControlNet's hints guide a clip's frames, in the pipeline and by sample.py."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scripts import call

from tinytav import pipeline
from tinytav.control import Control, load_control
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.inflation import inflate
from tinytav.stable_diffusion.controlnet import ControlNet, ControlNetConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig

CONTROL = {name: value for name, value in tiny.UNET.items() if name not in ("up_block_types", "_class_name")} | dict(
    _class_name="ControlNetModel", conditioning_embedding_out_channels=[8, 16])


def controlnet():
    return tiny.filled(ControlNet(ControlNetConfig.from_json(CONTROL)))


def write_controlnet(path, **settings):
    """A ControlNet's folder that fits tiny.write_folder's U-Net."""
    config = CONTROL | settings
    tiny.save_json(path / "config.json", config)
    model = tiny.filled(ControlNet(ControlNetConfig.from_json(config)))
    save_file(model.state_dict(), path / "diffusion_pytorch_model.safetensors")
    return path


def write_hints(path, count, size=(38, 32), seed=0):
    """A folder of `count` random pictures of (width, height)."""
    path.mkdir()
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    return path


def setting():
    """A net of 3 frames, latents of two clips, two contexts, and a hint for each frame."""
    generator = torch.Generator().manual_seed(0)
    net = tiny.filled(inflate(tiny.filled(UNet(UNetConfig.from_json(tiny.UNET))), 3))
    x = torch.randn(2, 4, 3, 8, 8, generator=generator)
    context = torch.randn(2, 7, 24, generator=generator)
    return net, x, context, torch.rand(3, 3, 16, 16, generator=generator)


# ---- The pipeline --------------------------------------------------------------------------------

@torch.no_grad()
def test_each_frame_gets_the_residuals_of_its_own_hint_alone():
    _, x, context, hints = setting()
    t = torch.tensor([801, 3])
    model = controlnet()
    residuals = Control(model, hints, scale=0.7).residuals(x, t, context)
    for clip in range(2):
        for frame in range(3):
            hint = model.embed_hint(hints[frame][None])
            alone = model(x[clip, :, frame][None], t[clip][None], context[clip][None], hint)
            for found, expected in zip(residuals, alone, strict=True):
                assert tiny.close(found[3 * clip + frame], 0.7 * expected[0])


class Recorder:
    """A net of three frames that keeps what it is asked and answers with noise of its own."""
    frames = 3

    def __init__(self):
        self.asked = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, *inputs):
        self.asked.append(inputs)
        return torch.zeros_like(inputs[0])


@pytest.mark.parametrize("guidance, clips", [(1, 1), (7.5, 2)])
@torch.no_grad()
def test_both_halves_of_guidance_are_controlled(guidance, clips):
    _, x, context, hints = setting()
    x, (empty, context) = x[:1], context.split(1)
    control, net = Control(controlnet(), hints), Recorder()
    pipeline.last(pipeline.sample(net, Schedule(), x, context, empty, 2, guidance, control))
    assert len(net.asked) == 2
    for latents, t, contexts, residuals in net.asked:
        assert all(len(residual) == 3 * clips for residual in residuals)
        expected = control.residuals(latents, t, contexts)
        assert all(torch.equal(*pair) for pair in zip(residuals, expected, strict=True))
    assert len(net.asked[0][2]) == clips
    if clips == 2:          # the prompt is in the second half, and the ControlNet sees it
        first, second = residuals[-1].chunk(2)
        assert not torch.equal(first, second)


@torch.no_grad()
def test_a_scale_of_nothing_changes_nothing_and_a_scale_of_one_something():
    net, x, context, hints = setting()
    x, (empty, context) = x[:1], context.split(1)

    def sampled(control):
        return pipeline.last(pipeline.sample(net, Schedule(), x, context, empty, 2, 3.0, control))
    free = sampled(None)
    assert torch.equal(sampled(Control(controlnet(), hints, scale=0)), free)
    assert not tiny.close(sampled(Control(controlnet(), hints)), free, 1e-2)


def hints_of(path, count):
    """The hints of a file for a clip of `count` frames of 38x32 pixels, as sample.py reads them."""
    folder = path.with_name("controlnet")
    if not folder.exists():
        write_controlnet(folder)
    sd = SimpleNamespace(device="cpu", dtype=torch.float32, multiple=2, unet=UNet(UNetConfig.from_json(tiny.UNET)))
    return load_control(sd, folder, path, (1, 4, count, 16, 19)).hints


def test_hints_are_cropped_and_resized_as_a_clip_is(tmp_path):
    path = write_hints(tmp_path / "hints", 3, size=(77, 64))
    hints = hints_of(path, 3)
    assert hints.shape == (3, 3, 32, 38)
    clip = frames.read(path, 32, 2, 3).x
    assert torch.equal(hints, (clip + 1) / 2) and 0 <= hints.min() < hints.max() <= 1


def test_hints_may_be_a_video(tmp_path):
    frames.write_mp4(tmp_path / "hint.mp4", torch.zeros(4, 3, 32, 38), 8)
    assert hints_of(tmp_path / "hint.mp4", 4).shape == (4, 3, 32, 38)


@pytest.mark.parametrize("count", [2, 6])
def test_hints_of_another_number_are_refused(tmp_path, count):
    write_hints(tmp_path / "hints", count)
    with pytest.raises(InputError, match=f"The number of frames in .*hints is {count}, and must be 3"):
        hints_of(tmp_path / "hints", 3)


def test_hints_of_another_shape_are_refused(tmp_path):
    write_hints(tmp_path / "hints", 3, size=(64, 32))
    with pytest.raises(InputError, match="is 64x32 pixels where the clip to be sampled is 38x32"):
        hints_of(tmp_path / "hints", 3)


def test_hints_of_another_kind_are_refused(tmp_path):
    (tmp_path / "pose.json").write_text('{"people": []}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/pose.json").write_text('{"people": []}')
    messages = {"pose.json": "cannot be read as a video", "folder": "has 0 frames", "none": "No such file"}
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            hints_of(tmp_path / name, 3)


# ---- The command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(place):
    """A folder with a checkpoint, a finished run of 3 frames of 38x32, a ControlNet and hints."""
    write_controlnet(place / "c")
    write_hints(place / "hints", 3)
    return place


def sample(place, *args, status=0):
    return call(place, "sample.py", "--prompt", "a dog", *args, status=status)


def result(place, name):
    return Path(place / name).read_bytes()


def test_a_run_follows_hints_from_its_inverted_noise(place):
    sample(place, "--out", "free")
    sample(place, "--control", "c", "--hint", "hints", "--out", "pose")
    names = {path.name for path in (place / "pose").iterdir()}
    assert names >= {f"a-dog-control{end}" for end in (".mp4", ".gif", ".png")}
    assert result(place, "pose/a-dog-control.gif") != result(place, "free/a-dog.gif")
    settings = json.loads((place / "pose/a-dog-control.sample.json").read_text())["settings"]
    assert (settings["control"], settings["hint"], settings["control_scale"]) == ("c", "hints", 1)
    free, pose = (Image.open(place / name) for name in ("free/a-dog.png", "pose/a-dog-control.png"))
    assert pose.height == free.height * 3 // 2          # the strip shows the source, the hints and the result
    sample(place, "--control", "c", "--hint", "hints", "--control-scale", 0, "--noise", "inverted", "--out", "none")
    assert result(place, "none/a-dog-control.gif") == result(place, "free/a-dog.gif")


def test_the_noise_can_be_chosen(place):
    for noise in ("random", "shared", "edit-friendly"):
        name = f"a-dog-{noise}"
        sample(place, "--noise", noise, "--out", "noises")
        sample(place, "--noise", noise, "--control", "c", "--hint", "hints", "--out", "noises")
        assert result(place, f"noises/{name}.gif") != result(place, f"noises/{name}-control.gif")
    assert result(place, "noises/a-dog-shared.gif") != result(place, "noises/a-dog-random.gif")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_run_hints_guide_the_untuned_net(place, precision):
    if not (place / "two").exists():
        write_hints(place / "two", 2, size=(24, 24))
    sample(place, "--weights", "w", "--frames", 2, "--size", 24, "--precision", precision, "--control", "c",
           "--hint", "two", "--out", precision)
    assert (place / precision / "a-dog-control.mp4").exists()


@pytest.mark.parametrize("args, message", [
    (["--control", "c"], "--control and --hint belong together"),
    (["--hint", "hints"], "--control and --hint belong together"),
    (["--control-scale", 1], "--control-scale has no meaning without"),
    (["--control", "c", "--hint", "clip.mp4"], "The number of frames in clip.mp4 is 6, and must be 3"),
    (["--control", "c", "--hint", "w"], "has 0 frames"),
    (["--control", "c", "--hint", "c/config.json"], "cannot be read as a video"),
    (["--control", "c", "--hint", "square"], "is 32x32 pixels where the clip to be sampled is 38x32"),
    (["--control", "absent", "--hint", "hints"], "No ControlNet at absent"),
    (["--control", "w/unet", "--hint", "hints"], "w/unet does not fit this ControlNet: missing: controlnet_cond"),
    (["--control", "other", "--hint", "hints"], "its cross_attention_dim is 32, not 24"),
    (["--control", "pose.pth", "--hint", "hints"], "python -m tinytav convert pose.pth pose.safetensors"),
    (["--weights", "w", "--noise", "inverted"], "The inverted noise is made from a run's clip"),
    (["--frames", 2], "The inverted noise is made from a run's clip, and has its frames and its size"),
    (["--noise", "edit-friendly", "--size", 24], "The edit-friendly noise is made from a run's clip"),
    (["--noise", "inverted", "--seed", 3], "The inverted noise has nothing random"),
    (["--weights", "w", "--noise", "edit-friendly"], "The edit-friendly noise is made from a run's clip")])
def test_what_does_not_fit_is_an_error_before_anything_is_sampled(place, args, message):
    if not (place / "square").exists():
        write_hints(place / "square", 3, size=(32, 32))
        write_controlnet(place / "other", cross_attention_dim=32)
        (place / "pose.pth").write_bytes(b"\x80\x04")
    done = sample(place, *args, "--out", "wrong", status=2)
    assert message in done.err and "Traceback" not in done.err
    assert not (place / "wrong").exists()
