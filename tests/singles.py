"""Single files of Stable Diffusion, small: what the loader's tests and the commands' tests are made of."""
import functools
import re

import tiny
import torch

from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig

# A single file has published widths only. Here the reader's configs are made small; its names stay the published ones.
UNET = tiny.reference("unet-sd1")[0] | dict(block_out_channels=[32, 32, 32, 32])
SMALL = dict(UNetConfig=UNetConfig.from_json(UNET | dict(cross_attention_dim=768)),
             SD2_UNET=UNetConfig.from_json(UNET | dict(cross_attention_dim=1024, use_linear_projection=True)),
             VAEConfig=VAEConfig.from_json(tiny.VAE | dict(
                 block_out_channels=[8] * 4, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
                 up_block_types=["UpDecoderBlock2D"] * 4)),
             TextEncoderConfig=TextEncoderConfig.from_json(tiny.TEXT | dict(hidden_size=768)),
             SD2_TEXT=TextEncoderConfig.from_json(tiny.TEXT | dict(hidden_size=1024)))


def unet_single_names(model):
    """{a tensor's name: what a single file calls it}: all that could stand there, read by unet_key."""
    inner = {name.split(".", 4)[-1] for name in model if ".attentions." in name}
    inner |= {f"{part}.{end}" for part in single_file.RESNET for end in ("weight", "bias")}
    blocks = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(12) for j in range(2)]
    blocks += ["middle_block.0", "middle_block.1", "middle_block.2"]
    names = [f"{block}.{rest}" for block in blocks for rest in inner]
    outer = ["input_blocks.3.0.op", "input_blocks.6.0.op", "input_blocks.9.0.op", "output_blocks.2.1.conv",
             "output_blocks.5.2.conv", "output_blocks.8.2.conv", *single_file.OUTER]
    names += [f"{part}.{end}" for part in outer for end in ("weight", "bias")]
    return {single_file.unet_key(name): name for name in names}


def vae_single_names():
    block = ["norm1", "conv1", "norm2", "conv2", "nin_shortcut"]
    blocks = [f"{side}.{i}.block.{j}" for side in ("down", "up") for i in range(4) for j in range(3)]
    blocks += ["mid.block_1", "mid.block_2"]
    layers = [f"{name}.{part}" for name in blocks for part in block]
    layers += [f"{side}.{i}.{side}sample.conv" for side in ("down", "up") for i in range(4)]
    layers += [f"mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
    layers += ["norm_out", "conv_in", "conv_out"]
    layers = [f"{half}.{layer}" for half in ("encoder", "decoder") for layer in layers]
    layers += ["quant_conv", "post_quant_conv"]
    return {single_file.vae_key(f"{layer}.{end}"): f"{layer}.{end}" for layer in layers for end in ("weight", "bias")}


def openclip(tensors):
    """Our text encoder's tensors as OpenCLIP stores them, q, k and v in one."""
    out, thirds = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        for old, new in single_file.OPENCLIP.items():
            name = name.replace(new, old)
        if match := re.match(r"(.+attn\.)[qkv]_proj\.(.+)", name):
            thirds.setdefault(f"{match[1]}in_proj_{match[2]}", {})[name] = tensor
        else:
            out[name] = tensor
    for name, parts in thirds.items():
        q, k, v = (next(z for key, z in parts.items() if f".{letter}_proj." in key) for letter in "qkv")
        out[name] = torch.cat([q, k, v])
    return out


def single(unet, text, prefix):
    """All tensors of a small single file, with fill.py's weights."""
    vae = tiny.filled(VAE(SMALL["VAEConfig"])).state_dict()
    unet = tiny.filled(UNet(unet)).state_dict()
    text = tiny.filled(TextEncoder(text)).state_dict()
    unet_names, vae_names = unet_single_names(unet), vae_single_names()
    tensors = {f"model.diffusion_model.{unet_names[name]}": z for name, z in unet.items()}
    tensors |= {f"first_stage_model.{vae_names[name]}": z for name, z in vae.items()}
    text = openclip(text) if prefix.endswith("model.") else text
    return tensors | {f"cond_stage_model.{prefix}{name}": z for name, z in text.items()}


@functools.cache
def single1():
    """Stable Diffusion 1.x. Callers leave it as it is."""
    return single(SMALL["UNetConfig"], SMALL["TextEncoderConfig"], "transformer.")


@functools.cache
def single2():
    """Stable Diffusion 2.x. Callers leave it as it is."""
    return single(SMALL["SD2_UNET"], SMALL["SD2_TEXT"], "model.")


def make_small(monkeypatch):
    """The reader's configs of a single file are the small ones for the rest of a test."""
    for name, config in SMALL.items():
        monkeypatch.setattr(single_file, name, config if name.startswith("SD2") else lambda config=config: config)
