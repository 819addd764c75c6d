"""Every module equals its recorded reference (diffusers, transformers, the official Tune-A-Video), in float32."""
import json

import pytest
import torch
from safetensors import safe_open
from tiny import DATA, close, fill, filled, reference

from tinytav import pipeline, tuning
from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig


def assert_keys(model, name):
    """Attribute names are the checkpoint's keys: same names, same shapes, none more."""
    keys = {key: list(p.shape) for key, p in model.state_dict().items()}
    assert keys == json.loads((DATA / f"{name}.keys.json").read_text())


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
@torch.no_grad()
def test_unet(sd):
    config, case = reference(f"unet-{sd}")
    unet = filled(UNet(UNetConfig.from_json(config)))
    assert_keys(unet, f"unet-{sd}")
    assert close(unet(case["x"], case["timestep"], case["context"]), case["y"])


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
@torch.no_grad()
def test_unet_on_sides_that_halve_unevenly(sd):
    """9x13 latents: where halving rounds up, the way back takes the skip's size."""
    unet = filled(UNet(UNetConfig.from_json(reference(f"unet-{sd}")[0])))
    x, context = (torch.from_numpy(fill.noise(f"odd.{name}", shape))
                  for name, shape in (("x", (2, 4, 9, 13)), ("context", (2, 7, 24))))
    assert close(unet(x, torch.tensor([3, 801]), context), reference("unet-odd")[1][f"unet-{sd}.y"])


@torch.no_grad()
def test_vae():
    config, case = reference("vae")
    vae = filled(VAE(VAEConfig.from_json(config)))
    assert_keys(vae, "vae")
    mean, std = vae.encode(case["x"])
    scale = config["scaling_factor"]
    assert close(mean / scale, case["mean"])
    assert close(2 * (std / scale).log(), case["logvar"])
    assert close(vae.decode(case["z"] * scale), case["decoded"])


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
@torch.no_grad()
def test_text_encoder(sd):
    config, case = reference(f"clip-{sd}")
    encoder = filled(TextEncoder(TextEncoderConfig.from_json(config)))
    assert_keys(encoder, f"clip-{sd}")
    assert close(encoder(case["ids"]), case["y"])


@torch.no_grad()
def test_both_towers_of_clip():
    config, case = reference("clip-full")
    clip = filled(CLIP(CLIPConfig.from_json(config)))
    assert_keys(clip, "clip-full")
    assert close(clip.text_model(case["ids"]), case["text_hidden"])
    assert close(clip.vision_model(case["pixels"]), case["vision_hidden"])
    assert close(clip.encode_text(case["ids"]), case["text_embeds"])
    assert close(clip.encode_image(case["pixels"]), case["image_embeds"])
    assert close(clip(case["pixels"], case["ids"]), case["logits_per_image"])


@pytest.mark.filterwarnings("ignore:The prompt has")
def test_tokenizer():
    tokenizer = Tokenizer.from_folder(DATA / "tokenizer")
    for case in json.loads((DATA / "tokenizer/cases.json").read_text())["cases"]:
        assert tokenizer([case["text"]])[0].tolist() == case["ids"], case["text"]
    assert tokenizer(["caf\u00e9"]).equal(tokenizer(["cafe\u0301"]))          # composed and decomposed


class Recorded(torch.nn.Module):
    """A net that gives recorded answers, whatever it is asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.frames, self.weight = outputs, 3, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, context, residuals=None):
        return next(self.outputs)


@pytest.mark.parametrize("name, prediction", [("sd1", "epsilon"), ("sd2-v", "v_prediction")])
def test_ddim_both_ways(name, prediction):
    case, schedule = reference(f"ddim-{name}")[1], Schedule(prediction_type=prediction)
    assert torch.equal(schedule.abar_table, case["alphas_cumprod"])
    assert [t for t, _ in schedule.pairs(50)] == case["timesteps50"].tolist()
    assert [t for t, _ in schedule.pairs(10)] == case["timesteps"].tolist()
    assert [t for t, _ in reversed(schedule.pairs(10))] == case["inverse_timesteps"].tolist()
    x0 = torch.from_numpy(fill.noise("ddim.x", (1, 4, 3, 8, 8)))
    for direction in ("sample", "inverse"):
        outputs = iter(torch.from_numpy(fill.noise(f"ddim.eps{i}", x0.shape)) for i in range(10))
        net = Recorded(outputs)
        if direction == "sample":
            walk = pipeline.sample(net, schedule, x0, x0[0, 0], x0[0, 0], steps=10, guidance=1)
        else:
            walk = pipeline.invert(net, schedule, x0, None, steps=10)
        for i, x in enumerate(walk):
            assert close(x, case[f"{direction}{i}"]), f"{direction} {i}"


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_forward_process_and_velocity(name):
    case = reference(f"ddim-{name}")[1]
    x0, noise = (torch.from_numpy(fill.noise(f"ddim.{what}", (2, 4, 3, 8, 8))) for what in ("x", "noise"))
    t = torch.tensor([3, 801])
    assert close(Schedule().add_noise(x0, noise, t), case["noised"])
    assert close(Schedule(prediction_type="v_prediction").target(x0, noise, t), case["velocity"])


def video_unet(sd):
    return filled(VideoUNet(UNetConfig.from_json(reference(f"unet-{sd}")[0]), frames=3))


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
def test_official_video_unet_its_loss_and_all_gradients(sd):
    net, case = video_unet(sd), reference(f"tav-{sd}")[1]
    if sd == "sd1":
        assert_keys(net, "tav-sd1")
    assert set(net.tuned()) == set(json.loads((DATA / f"tav-{sd}.trainable.json").read_text()))
    net.requires_grad_(False)
    for p in net.tuned().values():
        p.requires_grad_()
    y = net(case["x"], case["timestep"].expand(2), case["context"])
    assert close(y, case["y"])
    loss = torch.nn.functional.mse_loss(y, case["target"])
    assert close(loss, case["loss"][0])
    loss.backward()
    for name, p in net.tuned().items():
        assert close(p.grad.norm(), case[f"gradnorm.{name}"], 1e-4), name
    for key in case:
        if key.startswith("grad."):
            assert close(dict(net.named_parameters())[key.removeprefix("grad.")].grad, case[key], 1e-4), key


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
def test_official_inversion_and_guided_sampling(sd):
    net, case = video_unet(sd), reference(f"tav-{sd}")[1]
    empty, context = case["ddim.context_uncond"], case["ddim.context"]
    x_T = pipeline.last(pipeline.invert(net, Schedule(), case["ddim.latents"], empty, steps=10))
    assert close(x_T, case["ddim.inverted"], 1e-4)
    x_0 = pipeline.last(pipeline.sample(net, Schedule(), case["ddim.sample_start"], context, empty, 10, guidance=7.5))
    assert close(x_0, case["ddim.sampled"], 1e-4)


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
def test_a_whole_run_of_the_official_code(sd, monkeypatch):
    """Tuning by the official recipe, inversion, and guided sampling, with the official run's own draws."""
    case = reference(f"tav-run-{sd}")[1]
    with safe_open(DATA / f"tav-run-{sd}.safetensors", "pt") as file:
        told = file.metadata()
    shape = (1, 4, int(told["frames"]), int(told["height"]), int(told["width"]))

    def drawn(name, shape=shape):
        return torch.from_numpy(fill.noise(f"run.{name}", shape))

    def official_draw(seed, k, shape, timesteps):
        return drawn(f"draw{k}"), drawn(f"noise{k}"), int(case["timesteps"][k])
    monkeypatch.setattr(tuning, "draw", official_draw)
    own, empty, want = (drawn(name, (1, 9, 24)) for name in ("own", "empty", "want"))
    mean, std = drawn("mean"), 0.1 * drawn("std").abs()
    net = filled(VideoUNet(UNetConfig.from_json(reference(f"unet-{sd}")[0]), shape[2])).requires_grad_(False)
    steps = int(told["steps"])
    losses = torch.tensor([loss for _, loss in tuning.tune(net, Schedule(), mean, std, own, steps, float(told["lr"]))])
    assert close(losses, case["losses"], 1e-4)
    for name, p in net.tuned().items():
        assert close(p.norm(), case[f"norm.{name}"], 1e-4), name
        if f"tuned.{name}" in case:
            assert close(p, case[f"tuned.{name}"], 1e-4), name
    ddim_steps = int(told["ddim_steps"])
    noise = pipeline.last(pipeline.invert(net, Schedule(), mean, empty, ddim_steps))
    assert close(noise, case["inverted"], 1e-4)
    edited = pipeline.last(pipeline.sample(net, Schedule(), noise, want, empty, ddim_steps, float(told["guidance"])))
    assert close(edited, case["edited"], 1e-4)
