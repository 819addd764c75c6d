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
from tinytav.stable_diffusion.config import Config
from tinytav.stable_diffusion.unet import Encoder, UNetConfig, check_types, set_heads


@dataclass(frozen=True)
class ControlNetConfig(Config):
    """The keys of a ControlNet's config.json that change the network. The defaults fit Stable Diffusion 1.x."""
    in_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8   # really the NUMBER of heads, one for all stages or one each
    use_linear_projection: bool = False             # SD 2
    upcast_attention: bool = False                  # SD 2.1
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    ONLY = UNetConfig.ONLY | dict(
        conditioning_channels=(3,),
        controlnet_conditioning_channel_order=("rgb",),                     # "bgr": channels in the other order
        global_pool_conditions=(False, None))                               # True: the "shuffle" ControlNet

    LIMITS = UNetConfig.LIMITS

    @property
    def hint_factor(self):
        """The hint is so many times larger than the latents; it must be the VAE's factor."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def __post_init__(self):
        set_heads(self)
        check_types(self, self.down_block_types, "DownBlock2D")


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
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(dim, dim, 1) for dim in self.skip_channels()])
        self.controlnet_mid_block = nn.Conv2d(middle, middle, 1)

    def embed_hint(self, hint):
        """The hint, RGB in [0, 1], (b, 3, factor h, factor w) -> (b, c, h, w). It depends on no timestep."""
        return self.controlnet_cond_embedding(hint)

    def residuals(self, x, t, context, embedded):
        """What `forward` returns, of a hint that `embed_hint` has embedded."""
        emb = self.embed_time(t, x.dtype)
        x, skips = self.down(self.conv_in(x) + embedded, emb, context)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*residuals, self.controlnet_mid_block(x)]

    def forward(self, x, t, context, hint):
        """x (b, 4, h, w), t (b,), context (b, m, d), hint (b, 3, factor h, factor w) in [0, 1] -> the residuals.

        They are a list of tensors: one for each skip of the U-Net, of its shape, and the middle's last.
        """
        return self.residuals(x, t, context, self.embed_hint(hint))


def check_fits(control, unet, vae_factor):
    """Raises InputError unless a ControlNet of this config gives residuals to a U-Net of that config."""
    problems = []
    if control.cross_attention_dim != unet.cross_attention_dim:
        problems.append(f"its text context is {control.cross_attention_dim} wide, not {unet.cross_attention_dim}")
    if control.block_out_channels != unet.block_out_channels:
        problems.append(f"it has {control.block_out_channels} channels, not {unet.block_out_channels}")
    if control.layers_per_block != unet.layers_per_block:
        problems.append(f"it has {control.layers_per_block} layers in a stage, not {unet.layers_per_block}")
    if control.hint_factor != vae_factor:
        problems.append(f"its hints are {control.hint_factor} times as large as the latents, not {vae_factor} times")
    if problems:
        raise InputError(f"The ControlNet does not fit this Stable Diffusion: {'; '.join(problems)}. Use one that was "
                         "trained for it.")


# ---- From disk -----------------------------------------------------------------------------------

# upcast as 2.1's own config says
SD2 = ControlNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
                       upcast_attention=True)
CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
WANTED = "A ControlNet for Stable Diffusion 1.x or 2.x is needed."


def load_controlnet(path, device="cpu", dtype=torch.float32):
    """A ControlNet's folder (config.json beside its tensors) or single file -> ControlNet on `device`, in eval mode.

    dtype: of the weights. Raises InputError, naming the file, for what is no ControlNet for Stable Diffusion 1.x or
    2.x.
    """
    path = Path(path)
    if path.is_dir():
        config, tensors, where = _read_folder(path)
    elif path.is_file():
        config, tensors, where = _read_single_file(path)
    else:
        raise InputError(f"No ControlNet at {path}: name its folder or its .safetensors file.")
    return checkpoint.build(ControlNet, config, tensors, where, dtype).to(device)


def _read_folder(path):
    if (path / "config.json").is_file() and (kind := kind_by_config(checkpoint.read_json(path / "config.json"))):
        raise InputError(f"{path} holds {kind}. {WANTED}")
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if pickles and not any(path.glob("*.safetensors")):
        raise InputError(f"{path} holds no .safetensors file, only {pickles[0]}. "
                         f"{checkpoint.how_to_convert(path)}")
    return checkpoint.read_component(path, ControlNetConfig)


def _read_single_file(path):
    tensors = checkpoint.read_file(path, "ControlNet")
    if kind := kind_by_names(tensors):
        raise InputError(f"{path} holds {kind}. {WANTED}")
    tensors = single_file.controlnet_tensors(tensors)
    return config_by_shapes(tensors, path), tensors, str(path)


def kind_by_config(d):
    """What another kind of model a config.json tells of, in words; None where it does not tell."""
    name = d.get("_class_name", "ControlNetModel")
    if name == "T2IAdapter" or "adapter_type" in d:
        return "a T2I-Adapter"
    if name != "ControlNetModel":
        return f"a {name}"
    if d.get("addition_embed_type") == "text_time" or d.get("cross_attention_dim") == 2048:
        return "a ControlNet for SDXL"
    return None


def kind_by_names(tensors):
    """What another kind of model a file's tensor names tell of, in words; None where they do not tell."""
    parts = {part for name in tensors for part in name.split(".")}
    if "body" in parts:
        return "a T2I-Adapter"
    if "lora_controlnet" in parts:
        return "a Control-LoRA, which is no network of its own"
    if "difference" in parts:
        return "a difference between a ControlNet and a U-Net, which is no network of its own"
    if parts & {"label_emb", "add_embedding"}:
        return "a ControlNet for SDXL"
    if not parts & {"zero_convs", "controlnet_down_blocks"}:
        return "no ControlNet"
    return None


def config_by_shapes(tensors, where):
    """The config of a single file, which holds none: that of SD 1.x or of SD 2.x. Raises InputError."""
    if CONTEXT not in tensors or tensors[CONTEXT].ndim < 2:
        raise InputError(f"{where} is not a ControlNet for Stable Diffusion: it has no {CONTEXT}.")
    width = tensors[CONTEXT].shape[1]
    if width == 2048:
        raise InputError(f"{where} holds a ControlNet for SDXL. {WANTED}")
    if width not in (768, 1024):
        raise InputError(f"{where}: its text context is {width} wide; Stable Diffusion 1.x has 768, 2.x has 1024. If a "
                         "config.json lies beside it, name the folder.")
    return ControlNetConfig() if width == 768 else SD2
