"""ControlNet: equal to its recorded reference, from each published layout; what is no ControlNet is refused by name."""
import json

import pytest
import tiny
import torch
from safetensors.torch import save_file
from stable_diffusion.test_checkpoint import layouts, meta
from tiny import LAYOUTS, close, fill, reference

from tinytav.errors import InputError
from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.checkpoint import build
from tinytav.stable_diffusion.controlnet import (
    ControlNet,
    ControlNetConfig,
    check_fits,
    load_controlnet,
    read_single_file,
)
from tinytav.stable_diffusion.unet import UNet, UNetConfig


def recorded_config(sd):
    return json.loads((tiny.DATA / f"controlnet-{sd}.config.json").read_text())


def recorded_tensors(sd):
    """{name: tensor} of the recorded network, by the folder layout's names."""
    keys = json.loads((tiny.DATA / f"controlnet-{sd}.keys.json").read_text())
    return {name: torch.from_numpy(fill.weight(f"control.{name}", tuple(shape))) for name, shape in keys.items()}


def recorded_inputs():
    """x, context and hint of the recorded case."""
    x, context, hint = (torch.from_numpy(fill.noise(f"control.{name}", shape)) for name, shape in (
        ("x", (2, 4, 16, 24)), ("c", (2, 7, 24)), ("img", (2, 3, 128, 192))))
    return x, context, hint.abs() / 3 ** 0.5


def recorded_unet(sd):
    config = json.loads((tiny.DATA / f"controlnet-{sd}.unet.config.json").read_text())
    return tiny.filled(UNet(UNetConfig.from_json(config)))


def assert_equals_the_recording(control, sd):
    case = reference(f"controlnet-{sd}")[1]
    x, context, hint = recorded_inputs()
    residuals = control(x, case["timestep"], context, control.embed_hint(hint))
    assert len(residuals) == 13
    for name, residual in (("down0", residuals[0]), ("down1", residuals[1]), ("down11", residuals[11]),
                           ("mid", residuals[12])):
        assert close(residual, case[name]), name
    y = recorded_unet(sd)(x, case["timestep"], context, [0.7 * residual for residual in residuals])
    assert close(y, case["y"])


def write_controlnet(path, config, tensors, name="diffusion_pytorch_model"):
    """A ControlNet's folder."""
    tiny.save_json(path / "config.json", config)
    save_file(tensors, path / f"{name}.safetensors")
    return path


@pytest.mark.parametrize("sd", ["sd1", "sd2"])
@torch.no_grad()
def test_a_folder_equals_the_reference(sd, tmp_path):
    control = load_controlnet(write_controlnet(tmp_path, recorded_config(sd), recorded_tensors(sd)))
    assert not any(p.requires_grad for p in control.parameters())
    assert_equals_the_recording(control, sd)


@torch.no_grad()
def test_a_folder_in_half_precision(tmp_path):
    halves = {name: tensor.half() for name, tensor in recorded_tensors("sd1").items()}
    write_controlnet(tmp_path, recorded_config("sd1"), halves, "diffusion_pytorch_model.fp16")
    control = load_controlnet(tmp_path)
    assert control.conv_in.weight.dtype is torch.float32
    assert all(torch.equal(p, halves[name].float()) for name, p in control.state_dict().items())


def single_file_name(name):
    """The folder layout's name -> the single file's (four stages, two layers). It shares no code with the package."""
    part, _, rest = name.partition(".")
    numbers = [piece for piece in name.split(".") if piece.isdigit()]
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    last = name.rpartition(".")[2]
    if part == "conv_in":
        return f"input_blocks.0.0.{last}"
    if part == "time_embedding":
        return f"time_embed.{0 if 'linear_1' in name else 2}.{last}"
    if part == "controlnet_down_blocks":
        return f"zero_convs.{numbers[0]}.0.{last}"
    if part == "controlnet_mid_block":
        return f"middle_block_out.0.{last}"
    if part == "controlnet_cond_embedding":
        number = 0 if "conv_in" in name else 14 if "conv_out" in name else 2 * int(numbers[0]) + 2
        return f"input_hint_block.{number}.{last}"
    if "downsamplers" in name:
        return f"input_blocks.{3 * int(numbers[0]) + 3}.0.op.{last}"
    if part == "mid_block":
        layer, kind = int(numbers[0]), rest.partition(".")[0]
        place, rest = f"middle_block.{1 if kind == 'attentions' else 2 * layer}", rest.split(".", 2)[2]
    else:
        kind = rest.split(".")[1]
        place = f"input_blocks.{3 * int(numbers[0]) + int(numbers[1]) + 1}.{1 if kind == 'attentions' else 0}"
        rest = rest.split(".", 3)[3]
    if kind == "resnets":
        rest = f"{inside[rest.partition('.')[0]]}.{last}"
    return f"{place}.{rest}"


@pytest.mark.parametrize("prefix", ["control_model.", ""], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("sd", ["sd1", "sd2"])
@torch.no_grad()
def test_a_single_file_equals_the_reference(sd, prefix):
    tensors = {prefix + single_file_name(name): tensor for name, tensor in recorded_tensors(sd).items()}
    tensors = single_file.controlnet_tensors(tensors)
    assert_equals_the_recording(build(ControlNet, ControlNetConfig.from_json(recorded_config(sd)), tensors, "it"), sd)


def test_a_unet_refuses_residuals_of_another_number():
    unet = recorded_unet("sd1")
    x, context, _ = recorded_inputs()
    for number in (12, 14):
        with pytest.raises(ValueError):
            unet(x, torch.tensor([3, 801]), context, [torch.zeros(1)] * number)


@torch.no_grad()
def test_the_video_unet_adds_residuals_frame_by_frame():
    """Where nothing mixes frames, each frame's answer is the image net's under that frame's own residuals."""
    image = recorded_unet("sd1")
    video = VideoUNet(image.cfg, frames=2, attention="spatial", norm="frame")
    video.load_state_dict(image.state_dict(), strict=False)
    for block in (module for module in video.modules() if hasattr(module, "attn_temp")):
        torch.nn.init.zeros_(block.attn_temp.to_out[0].weight)
        torch.nn.init.zeros_(block.attn_temp.to_out[0].bias)
    control = build(ControlNet, ControlNetConfig.from_json(recorded_config("sd1")), recorded_tensors("sd1"), "it")
    x, context, hint = recorded_inputs()
    t = torch.tensor([801, 801])
    residuals = control(x, t, context[:1].expand(2, -1, -1), control.embed_hint(hint))
    expected = image(x, t, context[:1].expand(2, -1, -1), residuals)
    y = video(x.transpose(0, 1)[None], t[:1], context[:1], residuals)
    assert close(y[0].transpose(0, 1), expected)


@pytest.mark.parametrize("change, message", [
    (dict(cross_attention_dim=32), "its cross_attention_dim is 32, not 24"),
    (dict(block_out_channels=[32, 64, 64, 32]), r"its block_out_channels is \(32, 64, 64, 32\), not"),
    (dict(layers_per_block=1), "its layers_per_block is 1, not 2"),
    (dict(conditioning_embedding_out_channels=[8, 16]), "its hints are 2 times as large as the latents, not 8 times")])
def test_a_controlnet_for_another_stable_diffusion_is_refused(change, message):
    unet, fitting = recorded_unet("sd1").cfg, ControlNetConfig.from_json(recorded_config("sd1"))
    check_fits(fitting, unet, vae_factor=8)
    with pytest.raises(InputError, match=message):
        check_fits(ControlNetConfig.from_json(recorded_config("sd1") | change), unet, vae_factor=8)


# ---- The published ControlNet, on the meta device ------------------------------------------------

@pytest.fixture
def published():
    return json.loads((LAYOUTS / "controlnet-sd15/keys.json").read_text())


@layouts
def test_the_published_key_list_loads_strictly(published):
    config = ControlNetConfig.from_json(json.loads((LAYOUTS / "controlnet-sd15/config.json").read_text()))
    assert config == ControlNetConfig()
    tensors = {name: meta(shape) for name, shape in published["controlnet"].items()}
    control = build(ControlNet, config, tensors, "it")
    assert len(control.state_dict()) == 340
    assert sum(p.numel() for p in control.parameters()) == 361_279_120


@layouts
@pytest.mark.parametrize("prefix", [True, False])
def test_the_published_single_file_loads_strictly(published, prefix):
    tensors = {name if prefix else name.removeprefix("control_model."): meta(published["controlnet"][new])
               for name, new in published["single_file"].items()}
    build(ControlNet, *read_single_file(tensors, "it"), "it")


@layouts
def test_every_key_of_the_single_file_means_what_diffusers_says(published):
    for old, new in published["single_file"].items():
        assert single_file.controlnet_key(old.removeprefix("control_model.")) == new
        assert old == f"control_model.{single_file_name(new)}"              # the tests' own renaming is right, too


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, suffix):
    path = tmp_path / f"control_v11p_sd15_openpose{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=f"not a .safetensors file.*tinytav convert {path} .*openpose.safetensors"):
        load_controlnet(path)


def test_a_folder_of_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    tiny.save_json(tmp_path / "config.json", recorded_config("sd1"))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=f"only diffusion_pytorch_model.bin.*tinytav convert {tmp_path} NEW_FOLDER"):
        load_controlnet(tmp_path)


@pytest.mark.parametrize("settings, message", [
    (dict(_class_name="T2IAdapter"), "_class_name = 'T2IAdapter'"),
    (dict(_class_name="UNet2DConditionModel"), "_class_name = 'UNet2DConditionModel'"),
    (dict(addition_embed_type="text_time", cross_attention_dim=2048), "addition_embed_type = 'text_time'"),
    (dict(global_pool_conditions=True), "global_pool_conditions = True"),
    (dict(controlnet_conditioning_channel_order="bgr"), "controlnet_conditioning_channel_order = 'bgr'"),
    (dict(conditioning_channels=1), "conditioning_channels = 1"),
    (dict(down_block_types=["DownBlock2D"] * 3), "ControlNetConfig: the block types .* are not implemented; 4 of Down"),
    (dict(attention_head_dim=7), "ControlNetConfig: .*heads do not divide")])
def test_other_kinds_of_folders_are_refused_by_name(tmp_path, settings, message):
    write_controlnet(tmp_path, recorded_config("sd1") | settings, {"conv_in.bias": torch.zeros(32)})
    with pytest.raises(InputError, match=message):
        load_controlnet(tmp_path)


@pytest.mark.parametrize("shapes, message", [
    ({"conv_in.weight": (8, 4), "body.0.block1.weight": (8, 4)}, "a T2I-Adapter"),
    ({"adapter.body.0.resnets.0.block1.weight": (8, 4)}, "a T2I-Adapter"),
    ({"lora_controlnet": (1,), "zero_convs.0.0.weight": (8, 8)}, "a Control-LoRA"),
    ({"difference": (1,), "control_model.zero_convs.0.0.weight": (8, 8)}, "a difference"),
    ({"zero_convs.0.0.weight": (8, 8), "label_emb.0.0.weight": (8, 8)}, "a ControlNet for SDXL"),
    ({"zero_convs.0.0.weight": (8, 8), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048)},
     "2048 wide"),
    ({"zero_convs.0.0.weight": (8, 8), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 24)},
     "24 wide.*name the folder"),
    ({"zero_convs.0.0.weight": (8, 8)}, "it has no down_blocks"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4)}, "no ControlNet")])
def test_other_kinds_of_files_are_refused_by_name(tmp_path, shapes, message):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "control.safetensors")
    with pytest.raises(InputError, match=message):
        load_controlnet(tmp_path / "control.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="No ControlNet at"):
        load_controlnet(tmp_path / "absent")
    with pytest.raises(InputError, match="No config.json"):
        load_controlnet(tmp_path)


@pytest.mark.parametrize("width, sd", [(768, "sd1"), (1024, "sd2")])
def test_the_context_of_a_single_file_tells_which_stable_diffusion_it_is_for(width, sd):
    names = {"zero_convs.0.0.weight": meta((320, 320)),
             "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": meta((320, width))}
    config, _ = read_single_file(names, "it")
    assert config.cross_attention_dim == width and config.use_linear_projection == (sd == "sd2")
