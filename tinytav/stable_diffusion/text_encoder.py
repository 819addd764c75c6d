"""CLIP's text tower: token ids -> context. Attribute names are the checkpoint's keys.

Radford et al., arXiv 2103.00020; equal to transformers' CLIPTextModel. Stable Diffusion 1.x uses OpenAI's ViT-L/14
(quick_gelu), 2.x the first 23 layers of OpenCLIP's ViT-H/14 (gelu).
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tinytav.stable_diffusion.config import Config


@dataclass(frozen=True)
class TextEncoderConfig(Config):
    """The keys of text_encoder/config.json that change the network. The defaults are Stable Diffusion 1.x."""
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407                       # where CLIP pools; a context needs none of it

    ONLY = dict(hidden_act=("quick_gelu", "gelu"), attention_dropout=(0,))
    LIMITS = dict(num_hidden_layers=(1, 100), eos_token_id=(0, 2 ** 20))


class CLIPAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        if cfg.hidden_size % cfg.num_attention_heads:               # checkpoint.build names the file
            raise ValueError(f"{cfg.num_attention_heads} heads do not divide {cfg.hidden_size}")
        self.heads = cfg.num_attention_heads
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.out_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x, causal):                                           # (n, l, d)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)       # (n, heads, l, d/heads)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.quick = cfg.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = CLIPAttention(cfg)
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, x, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class CLIPEncoder(nn.Module):
    """The stack of layers that both of CLIP's towers share; only the text tower's attention is causal."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList([Layer(cfg) for _ in range(cfg.num_hidden_layers)])

    def forward(self, x, causal):
        for layer in self.layers:
            x = layer(x, causal)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids):                                                 # (n, l) -> (n, l, d)
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = CLIPEncoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, ids):
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))


class TextEncoder(nn.Module):
    def __init__(self, cfg=TextEncoderConfig()):
        super().__init__()
        self.cfg = cfg
        self.text_model = TextTransformer(cfg)

    def forward(self, ids):
        """Token ids (n, l), l <= max_position_embeddings -> context (n, l, d), after the final norm."""
        return self.text_model(ids)
