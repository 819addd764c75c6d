"""Stable Diffusion's autoencoder: pictures <-> latents. Attribute names are the checkpoint's keys.

Rombach et al., arXiv 2112.10752, section 3.1; equal to diffusers' AutoencoderKL. This file owns the latent scale:
`encode` returns latents multiplied by it, and `decode` expects them so. Who uses the VAE need not know of it.
"""
from dataclasses import dataclass

import torch
from torch import nn

from tinytav.stable_diffusion.config import Config
from tinytav.stable_diffusion.unet import Attention, ResnetBlock, named


@dataclass(frozen=True)
class VAEConfig(Config):
    """The keys of vae/config.json that change the network. The defaults are Stable Diffusion's."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215                 # makes latents of unit variance

    ONLY = dict(in_channels=(3,), out_channels=(3,), act_fn=("silu",), latents_mean=(None,), latents_std=(None,),
                mid_block_add_attention=(True,), shift_factor=(None,), use_quant_conv=(True,),
                use_post_quant_conv=(True,))

    LIMITS = dict(layers_per_block=(1, 32))
    norm_eps = 1e-6                                 # no key of the file

    @property
    def factor(self):
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class PixelAttention(Attention):
    """Self-attention over all pixels, one head as wide as the channels."""

    def __init__(self, cfg, dim):
        super().__init__(dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(cfg.norm_num_groups, dim, eps=1e-6)

    def forward(self, x):                                                   # (n, c, h, w)
        y = self.group_norm(x).flatten(2).transpose(1, 2)                   # (n, h*w, c)
        return x + super().forward(y).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, cfg, dim):
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(cfg, dim)])
        self.resnets = nn.ModuleList([ResnetBlock(cfg, dim, dim, timed=False) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def downsample(dim):
    """Halves the sides. Pads right and below only: the U-Net's pads every side."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(dim, dim, 3, stride=2))


def upsample(dim):
    return named(grow=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(dim, dim, 3, padding=1))


def stages(cfg, channels, count, name, resampler):
    """One stage for each of `channels`: `count` resnets, then, except in the last, a resampler of this name."""
    for i, out in enumerate(channels):
        dims = [channels[max(i - 1, 0)]] + [out] * (count - 1)
        layers = dict(resnets=nn.Sequential(*(ResnetBlock(cfg, dim, out, timed=False) for dim in dims)))
        if i < len(channels) - 1:
            layers[name] = nn.Sequential(resampler(out))
        yield named(**layers)


def encoder(cfg):
    """Pictures (n, 3, h, w) -> (n, 8, h/8, w/8), of which quant_conv makes mean and log-variance."""
    channels = cfg.block_out_channels
    return named(
        conv_in=nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1),
        down_blocks=nn.Sequential(*stages(cfg, channels, cfg.layers_per_block, "downsamplers", downsample)),
        mid_block=MidBlock(cfg, channels[-1]),
        conv_norm_out=nn.GroupNorm(cfg.norm_num_groups, channels[-1], eps=1e-6),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(channels[-1], 2 * cfg.latent_channels, 3, padding=1))


def decoder(cfg):
    """What post_quant_conv makes of latents, (n, 4, h/8, w/8) -> pictures (n, 3, h, w)."""
    channels = cfg.block_out_channels[::-1]
    return named(
        conv_in=nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1),
        mid_block=MidBlock(cfg, channels[0]),
        up_blocks=nn.Sequential(*stages(cfg, channels, cfg.layers_per_block + 1, "upsamplers", upsample)),
        conv_norm_out=nn.GroupNorm(cfg.norm_num_groups, channels[-1], eps=1e-6),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(channels[-1], cfg.out_channels, 3, padding=1))


class VAE(nn.Module):
    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = encoder(cfg)
        self.decoder = decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, x):
        """Pictures x (n, 3, h, w) in [-1, 1] -> mean and std of the posterior, (n, 4, h/8, w/8) each, scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))
        return mean * self.cfg.scaling_factor, std * self.cfg.scaling_factor

    def decode(self, z):
        """Scaled latents z (n, 4, h/8, w/8) -> pictures (n, 3, h, w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.cfg.scaling_factor))
