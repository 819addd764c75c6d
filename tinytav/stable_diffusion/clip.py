"""CLIP whole: the vision tower beside the text tower, the projections into their common space, a picture's preparation.

Radford et al., arXiv 2103.00020, figure 3; equal to transformers' CLIPModel. Nothing of Tune-A-Video needs it: the
metrics do, and the toy's pre-training. Attribute names are the checkpoint's keys.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tinytav.errors import InputError
from tinytav.stable_diffusion.config import Config
from tinytav.stable_diffusion.text_encoder import CLIPEncoder, TextEncoderConfig, TextTransformer


@dataclass(frozen=True)
class VisionConfig(Config):
    """`vision_config` in a CLIP folder's config.json. The defaults are ViT-L/14."""
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    ONLY = dict(hidden_act=("quick_gelu", "gelu"), attention_dropout=(0,), num_channels=(3,))
    LIMITS = dict(num_hidden_layers=(1, 100))


@dataclass(frozen=True)
class CLIPConfig(Config):
    """A CLIP folder's config.json. The defaults are ViT-L/14."""
    projection_dim: int = 768
    text_config: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    @classmethod
    def from_json(cls, d):
        if not isinstance(d, dict) or "text_config" not in d or "vision_config" not in d:
            raise InputError("CLIPConfig: a JSON object with text_config and vision_config is expected.")
        return super().from_json(d | dict(text_config=TextEncoderConfig.from_json(d["text_config"]),
                                          vision_config=VisionConfig.from_json(d["vision_config"])))


class VisionEmbeddings(nn.Module):
    """A picture as one class token and its patches, each with a position."""

    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(cfg.hidden_size) * cfg.hidden_size ** -0.5)
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.hidden_size)

    def forward(self, x):                                                   # (n, 3, h, w)
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)        # (n, l, d)
        first = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)   # so spelt in every checkpoint
        self.encoder = CLIPEncoder(cfg)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, x):                                                   # (n, 3, h, w) -> (n, 1 + l, d)
        return self.encoder(self.pre_layrnorm(self.embeddings(x)), causal=False)


class CLIP(nn.Module):
    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        self.cfg = cfg
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))               # log(1 / 0.07)
        self.text_model = TextTransformer(cfg.text_config)
        self.vision_model = VisionTransformer(cfg.vision_config)
        self.visual_projection = nn.Linear(cfg.vision_config.hidden_size, cfg.projection_dim, bias=False)
        self.text_projection = nn.Linear(cfg.text_config.hidden_size, cfg.projection_dim, bias=False)

    def encode_text(self, ids):
        """Token ids (n, l) -> unit vectors (n, projection_dim): the state at the first end token, projected."""
        eos = self.cfg.text_config.eos_token_id
        # configs of before 2023 say eos 2; their end token is the largest id in the row
        end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
        pooled = self.text_model(ids)[torch.arange(len(ids), device=ids.device), end]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def encode_image(self, pixels):
        """Pictures (n, 3, image_size, image_size), normalised by preprocessor_config.json -> (n, projection_dim)."""
        pooled = self.vision_model.post_layernorm(self.vision_model(pixels)[:, 0])
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def forward(self, pixels, ids):
        """Cosines times the learned temperature: (n, 3, h, w), (m, l) -> (n, m)."""
        return self.logit_scale.exp() * self.encode_image(pixels) @ self.encode_text(ids).T


@dataclass(frozen=True)
class Preprocessor(Config):
    """A CLIP folder's preprocessor_config.json, applied as in transformers' CLIPImageProcessor. Defaults: ViT-L/14."""
    size: int | dict = 224              # of the short side, or {"shortest_edge": n}; {"height": h, "width": w} squashes
    crop_size: int | dict = 224         # of the centre; or {"height": h, "width": w}
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    ONLY = dict(do_resize=(True,), do_center_crop=(True,), do_rescale=(True,), do_normalize=(True,), resample=(3,),
                rescale_factor=(1 / 255,))

    def __call__(self, pictures):
        """PIL pictures -> (n, 3, h, w) float32: resized in 8 bits, bicubic; the centre cropped; normalised."""
        x = torch.from_numpy(np.stack([np.asarray(self._crop(self._resize(picture))) for picture in pictures]))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (x.permute(0, 3, 1, 2) / 255 - mean) / std

    def _resize(self, picture):
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else self.size
        if short := size.get("shortest_edge"):
            sides = [int(short * n / min(picture.size)) for n in picture.size]      # rounded down, as there
        else:
            sides = size["width"], size["height"]
        return picture.convert("RGB").resize(sides, Image.Resampling.BICUBIC)

    def _crop(self, picture):
        """What is beyond the picture is black."""
        crop = dict(height=self.crop_size, width=self.crop_size) if isinstance(self.crop_size, int) else self.crop_size
        left, top = (picture.width - crop["width"]) // 2, (picture.height - crop["height"]) // 2
        return picture.crop((left, top, left + crop["width"], top + crop["height"]))
