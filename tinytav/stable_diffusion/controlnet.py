"""ControlNet for Stable Diffusion 1.x and 2.x: a picture (a skeleton, a depth map, edges) says where things stand.

Zhang et al., arXiv 2302.05543, section 3; equal to diffusers' ControlNetModel. Attribute names are the files' keys.
Beside the U-Net's own parts there are two new ones:
- `controlnet_cond_embedding` brings the hint from pixels to the size and channels of conv_in's output;
- 1x1 convolutions, zero before training, bring each skip and the middle's output to the U-Net.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tinytav.errors import InputError
from tinytav.stable_diffusion import checkpoint, single_file
from tinytav.stable_diffusion.unet import Encoder, UNetConfig


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The keys of a ControlNet's config.json that change the network: the U-Net's, of which it has no way up."""
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    ONLY = UNetConfig.ONLY | dict(
        _class_name=("ControlNetModel",),                                   # not a T2I-Adapter
        conditioning_channels=(3,),
        controlnet_conditioning_channel_order=("rgb",),                     # "bgr": channels in the other order
        global_pool_conditions=(False, None))                               # True: the "shuffle" ControlNet
    WAYS = ("Down",)

    @property
    def hint_factor(self):
        """The hint is so many times larger than the latents; it must be the VAE's factor."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class HintEmbedding(nn.Module):
    """The hint (b, 3, factor h, factor w) -> (b, c, h, w). Every other convolution halves the sides."""

    def __init__(self, channels, out_dim):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for dim, next_dim in zip(channels[:-1], channels[1:]):
            self.blocks.append(nn.Conv2d(dim, dim, 3, padding=1))
            self.blocks.append(nn.Conv2d(dim, next_dim, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], out_dim, 3, padding=1)

    def forward(self, hint):
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    def __init__(self, cfg=ControlNetConfig()):
        super().__init__(cfg)
        middle = cfg.block_out_channels[-1]
        hint_channels = cfg.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = HintEmbedding(hint_channels, cfg.block_out_channels[0])
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(dim, dim, 1) for dim in self.skip_channels])
        self.controlnet_mid_block = nn.Conv2d(middle, middle, 1)

    def embed_hint(self, hint):
        """The hint, RGB in [0, 1], (b, 3, factor h, factor w) -> (b, c, h, w). It depends on no timestep."""
        return self.controlnet_cond_embedding(hint)

    def forward(self, x, t, context, embedded):
        """x (b, 4, h, w), t (b,), context (b, m, d), embedded (b, c, h, w): what `embed_hint` returned -> residuals.

        They are a list of tensors: one for each skip of the U-Net, of its shape, and the middle's last.
        """
        emb = self.embed_time(t, x.dtype)
        x, skips = self.down_and_middle(self.conv_in(x) + embedded, emb, context)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*residuals, self.controlnet_mid_block(x)]


def check_fits(control, unet, vae_factor):
    """Raises InputError unless a ControlNet of this config gives residuals to a U-Net of that config."""
    problems = [f"its {name} is {getattr(control, name)}, not {getattr(unet, name)}"
                for name in ("cross_attention_dim", "block_out_channels", "layers_per_block")
                if getattr(control, name) != getattr(unet, name)]
    if control.hint_factor != vae_factor:
        problems.append(f"its hints are {control.hint_factor} times as large as the latents, not {vae_factor} times")
    if problems:
        raise InputError(f"The ControlNet does not fit this Stable Diffusion: {'; '.join(problems)}. Use one that was "
                         "trained for it.")


# ---- From disk -----------------------------------------------------------------------------------

SD2 = ControlNetConfig(**vars(single_file.SD2_UNET))
CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
# a part of a tensor's name -> the kind of file, which is no ControlNet for Stable Diffusion 1.x or 2.x
OTHER_KINDS = {
    "body": "a T2I-Adapter", "lora_controlnet": "a Control-LoRA, which is no network of its own",
    "difference": "a difference between a ControlNet and a U-Net, which is no network of its own",
    "label_emb": "a ControlNet for SDXL", "add_embedding": "a ControlNet for SDXL"}


def load_controlnet(path, device="cpu", dtype=torch.float32):
    """A ControlNet's folder (config.json beside its tensors) or single file -> ControlNet on `device`, in eval mode.

    dtype: of the weights. Raises InputError, naming the file, for what is no ControlNet for Stable Diffusion 1.x or
    2.x.
    """
    path = Path(path)
    if path.is_dir():
        part = checkpoint.read_component(path, ControlNetConfig)
    else:
        part = *read_single_file(checkpoint.read_file(path, "ControlNet"), path), str(path)
    return checkpoint.build(ControlNet, *part, dtype).to(device)


def read_single_file(tensors, where):
    """All tensors of a single file, which holds no config -> (config, its tensors by the folder layout's names)."""
    parts = {part for name in tensors for part in name.split(".")}
    other = next((kind for mark, kind in OTHER_KINDS.items() if mark in parts), None)
    if other or not parts & {"zero_convs", "controlnet_down_blocks"}:
        raise InputError(f"{where} holds {other or 'no ControlNet'}. A ControlNet for Stable Diffusion 1.x or 2.x is "
                         "needed.")
    tensors = single_file.controlnet_tensors(tensors)
    return SD2 if single_file.is_sd2(tensors, CONTEXT, where) else ControlNetConfig(), tensors
