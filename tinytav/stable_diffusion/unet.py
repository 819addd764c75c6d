"""Stable Diffusion's image U-Net (1.x and 2.x), untouched by the paper. Attribute names are the checkpoint's keys.

Rombach et al., arXiv 2112.10752, section 3.3; equal to diffusers' UNet2DConditionModel.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinytav.errors import InputError
from tinytav.stable_diffusion.config import Config


@dataclass(frozen=True)
class UNetConfig(Config):
    """The keys of unet/config.json that change the network. The defaults are Stable Diffusion 1.x."""
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8   # really the NUMBER of heads, one for all stages or one each
    use_linear_projection: bool = False             # SD 2
    upcast_attention: bool = False                  # SD 2.1: its attention logits overflow in fp16

    ONLY = dict(
        in_channels=(4,), out_channels=(4,),        # 9 input channels: an inpainting model
        act_fn=("silu",), addition_embed_type=(None,), attention_type=("default",), center_input_sample=(False,),
        class_embed_type=(None,), conv_in_kernel=(3,), conv_out_kernel=(3,), cross_attention_norm=(None,),
        downsample_padding=(1,), dropout=(0,), dual_cross_attention=(False,), encoder_hid_dim=(None,),
        encoder_hid_dim_type=(None,), flip_sin_to_cos=(True,), freq_shift=(0,), mid_block_scale_factor=(1,),
        mid_block_type=("UNetMidBlock2DCrossAttn",), mid_block_only_cross_attention=(None, False),
        num_attention_heads=(None,), num_class_embeds=(None,), only_cross_attention=(False,),
        resnet_out_scale_factor=(1,), resnet_skip_time_act=(False,), resnet_time_scale_shift=("default",),
        time_cond_proj_dim=(None,), time_embedding_act_fn=(None,), time_embedding_dim=(None,),
        time_embedding_type=("positional",), timestep_post_act=(None,), transformer_layers_per_block=(1,))

    LIMITS = dict(layers_per_block=(1, 32))
    WAYS = ("Down", "Up")                           # a ControlNet has no way up

    def __post_init__(self):
        """One number of heads for all stages becomes one for each. Raises InputError for what does not fit."""
        name, channels, heads = type(self).__name__, self.block_out_channels, self.attention_head_dim
        if isinstance(heads, int):
            heads = (heads,) * len(channels)
            object.__setattr__(self, "attention_head_dim", heads)
        if len(heads) != len(channels):
            raise InputError(f"{name}: {len(heads)} attention_head_dim for {len(channels)} block_out_channels.")
        if any(dim % count for dim, count in zip(channels, heads)):
            raise InputError(f"{name}: {heads} heads do not divide {channels}.")
        for way in self.WAYS:
            types = getattr(self, f"{way.lower()}_block_types")
            known = f"{way}Block2D", f"CrossAttn{way}Block2D"
            if len(types) != len(channels) or any(kind not in known for kind in types):
                raise InputError(f"{name}: the block types {types} are not implemented; {len(channels)} of "
                                 f"{' or '.join(known)} are.")


def timestep_embedding(t, dim):
    """Sinusoids of the timestep, cosines first: (b,) -> (b, dim). arXiv 1706.03762 section 3.5."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def named(**layers):
    """Layers that run one after the other, under the names that the checkpoint's keys have."""
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, with Q from x (b, n, dim), K and V from context (b, m, context_dim) or x itself."""

    def __init__(self, dim, heads, context_dim=None, upcast=False, bias=False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])          # the files' key is to_out.0

    def attend(self, q, k, v):                                              # (b, n, c), (b, m, c), (b, m, c)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))        # (b, heads, ., d)
        if self.upcast and q.dtype is torch.float16:                        # bf16 has the range of float32
            with torch.autocast(q.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.attend(self.to_q(x), self.to_k(context), self.to_v(context))


class GEGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """`SelfAttention` and `CrossAttention` build its two attentions: inflation puts its own there."""

    def __init__(self, cfg, dim, heads, SelfAttention=Attention, CrossAttention=Attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, heads, upcast=cfg.upcast_attention)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, heads, cfg.cross_attention_dim, cfg.upcast_attention)
        self.norm3 = nn.LayerNorm(dim)
        # the files' keys are net.0 and net.2, because dropout stands between them
        self.ff = named(net=nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)))

    def forward(self, x, context):                                          # (b, n, c), (b, m, d)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class Transformer(nn.Module):
    """One transformer block on the pixels of a feature map, between two projections."""

    def __init__(self, cfg, dim, heads, Block):
        super().__init__()
        projection = (lambda: nn.Linear(dim, dim)) if cfg.use_linear_projection else (lambda: nn.Conv2d(dim, dim, 1))
        self.norm = nn.GroupNorm(cfg.norm_num_groups, dim, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList([Block(cfg, dim, heads)])
        self.proj_out = projection()
        self.checkpointing = False

    @staticmethod
    def project(layer, x):
        """proj_in and proj_out are linear layers in SD 2, 1x1 convolutions in SD 1: on pixels the same thing."""
        return F.conv2d(x, layer.weight.view(*layer.weight.shape[:2], 1, 1), layer.bias)

    def forward(self, x, context):                                          # (b, c, h, w)
        y = self.project(self.proj_in, self.norm(x)).flatten(2).transpose(1, 2)                 # (b, h*w, c)
        y = self.transformer_blocks[0](y, context)
        return x + self.project(self.proj_out, y.transpose(1, 2).unflatten(2, x.shape[2:]))     # (b, c, h, w)


class ResnetBlock(nn.Module):
    """timed: whether it takes the timestep's embedding. The VAE's do not."""

    def __init__(self, cfg, dim, out_dim, Norm=nn.GroupNorm, timed=True):
        super().__init__()
        self.norm1 = Norm(cfg.norm_num_groups, dim, eps=cfg.norm_eps)
        self.conv1 = nn.Conv2d(dim, out_dim, 3, padding=1)
        if timed:
            self.time_emb_proj = nn.Linear(4 * cfg.block_out_channels[0], out_dim)
        self.norm2 = Norm(cfg.norm_num_groups, out_dim, eps=cfg.norm_eps)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else nn.Identity()
        self.checkpointing = False

    def forward(self, x, emb=None):
        y = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            y = y + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Stage(nn.Module):
    """One resolution of the U: resnets, perhaps each with a transformer, perhaps a resampler."""

    def __init__(self, resnets, attentions, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])


def stage_layers(cfg, i, kind, dims, Block, Norm):
    """The resnets of stage i, one for each of the channels `dims` that go in, and their transformers, if it has any."""
    out = cfg.block_out_channels[i]
    resnets = [ResnetBlock(cfg, dim, out, Norm) for dim in dims]
    attentions = []
    if kind.startswith("CrossAttn"):
        attentions = [Transformer(cfg, out, cfg.attention_head_dim[i], Block) for _ in dims]
    return resnets, attentions


class Encoder(nn.Module):
    """The way down and the middle of the U: what a U-Net and a ControlNet have in common.

    `Block` and `Norm` build the transformer block and the resnets' norm: inflation puts its own there.
    """

    def __init__(self, cfg, Block=TransformerBlock, Norm=nn.GroupNorm):
        super().__init__()
        self.cfg = cfg
        channels = cfg.block_out_channels
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        self.time_embedding = named(linear_1=nn.Linear(channels[0], 4 * channels[0]), act=nn.SiLU(),
                                    linear_2=nn.Linear(4 * channels[0], 4 * channels[0]))
        self.down_blocks = nn.ModuleList()
        dim = channels[0]
        self.skip_channels = [dim]                      # of each skip, from the first to the deepest
        for i, out in enumerate(channels):
            dims = [dim] + [out] * (cfg.layers_per_block - 1)
            layers = stage_layers(cfg, i, cfg.down_block_types[i], dims, Block, Norm)
            halve = named(conv=nn.Conv2d(out, out, 3, stride=2, padding=1)) if i < last else None
            self.down_blocks.append(Stage(*layers, downsampler=halve))
            self.skip_channels += [out] * (len(dims) + (i < last))
            dim = out
        resnets, attentions = stage_layers(cfg, last, "CrossAttn", [dim, dim], Block, Norm)
        self.mid_block = Stage(resnets, attentions[:1])

    def embed_time(self, t, dtype):
        """Timesteps (b,) -> (b, 4 * channels of the first stage)."""
        return self.time_embedding(timestep_embedding(t, self.cfg.block_out_channels[0]).to(dtype))

    def run(self, block, *inputs):
        """block(*inputs). Where block.checkpointing is set, the gradient computes it again from its inputs.

        Not re-entrant: that kind gives no gradient to blocks whose inputs need none.
        """
        if block.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def down_and_middle(self, x, emb, context):
        """conv_in's output -> (the middle's output, all skips, of which conv_in's output is the first)."""
        skips = [x]
        for stage in self.down_blocks:
            for i, resnet in enumerate(stage.resnets):
                x = self.run(resnet, x, emb)
                if stage.attentions:
                    x = self.run(stage.attentions[i], x, context)
                skips.append(x)
            for downsample in stage.downsamplers:
                x = downsample(x)
                skips.append(x)
        x = self.run(self.mid_block.resnets[0], x, emb)
        x = self.run(self.mid_block.attentions[0], x, context)
        x = self.run(self.mid_block.resnets[1], x, emb)
        return x, skips


class UNet(Encoder):
    """The whole U: the way up takes the skips of the way down."""

    def __init__(self, cfg=UNetConfig(), Block=TransformerBlock, Norm=nn.GroupNorm):
        super().__init__(cfg, Block, Norm)
        channels = cfg.block_out_channels
        last = len(channels) - 1
        dim, skips = channels[last], list(self.skip_channels)
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(channels))):
            dims = [(dim if j == 0 else out) + skips.pop() for j in range(cfg.layers_per_block + 1)]
            layers = stage_layers(cfg, i, cfg.up_block_types[last - i], dims, Block, Norm)
            double = named(conv=nn.Conv2d(out, out, 3, padding=1)) if i > 0 else None
            self.up_blocks.append(Stage(*layers, upsampler=double))
            dim = out
        self.conv_norm_out = Norm(cfg.norm_num_groups, channels[0], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], cfg.out_channels, 3, padding=1)

    def forward(self, x, t, context, residuals=None):
        """x (b, 4, h, w) noisy latents, t (b,) timesteps, context (b, m, d) -> (b, 4, h, w). Any h, w and m.

        residuals: a ControlNet's. They are added to the skips, and the last one to the middle's output.
        """
        emb = self.embed_time(t, x.dtype)
        x, skips = self.down_and_middle(self.conv_in(x), emb, context)
        if residuals is not None:
            *for_skips, for_middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, for_skips, strict=True)]
            x = x + for_middle
        for stage in self.up_blocks:
            for i, resnet in enumerate(stage.resnets):
                x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), emb)
                if stage.attentions:
                    x = self.run(stage.attentions[i], x, context)
            for upsample in stage.upsamplers:               # to the sides of the skip to come: halving may round up
                x = upsample(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))
