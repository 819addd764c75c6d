"""Everything Tune-A-Video changes in Stable Diffusion's U-Net. Wu et al., arXiv 2212.11565.

Inside, the frames of a clip are folded into the batch, "(b f)". So a 1x3x3 convolution (section 3.2, "pseudo 3D") IS
the 2-D convolution, and needs no line here. What lets frames look at each other is: ST-Attn in place of the
self-attention, a temporal self-attention at the end of each block, and group norms over the whole clip.
"""
from functools import partial

import torch
from torch import nn

from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.unet import Attention, TransformerBlock, UNet

# Frame i takes keys and values from these frames (section 3.2 and figure 4; the others are there for comparison).
LOOKS_AT = {
    "sparse-causal": lambda i, f: [0, max(i - 1, 0)],      # ST-Attn; frame 0 is its own predecessor, as in the official
    "spatial": lambda i, f: [i],                           # attention.py, SparseCausalAttention.forward
    "first": lambda i, f: [0],
    "causal": lambda i, f: [*range(i + 1)],
    "full": lambda i, f: [*range(f)],
}
# What is tuned (section 3.3, figure 4; official train_tuneavideo.py, trainable_modules): 112 tensors at Stable
# Diffusion's size. The new ones are 112 too, but not the same: two queries a block are old, and norm_temp's two are new
# and stay frozen at 1 and 0.
TUNED = ("attn1.to_q.", "attn2.to_q.", "attn_temp.")


class SpatioTemporalAttention(Attention):
    """attn1: queries from frame i, keys and values from the frames that `attention` lets it look at."""

    def __init__(self, frames, attention, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frames = frames
        self.rows = [LOOKS_AT[attention](i, frames) for i in range(frames)]

    def forward(self, x):                                                   # (b f) n c
        q, k, v = (z.unflatten(0, (-1, self.frames)) for z in (self.to_q(x), self.to_k(x), self.to_v(x)))
        if len({len(row) for row in self.rows}) == 1:
            look = torch.tensor(self.rows, device=x.device)                 # (f, r): all frames in one call
            k, v = (z[:, look].flatten(2, 3).flatten(0, 1) for z in (k, v))                     # (b f) r*n c
            return self.attend(q.flatten(0, 1), k, v)
        # rows of unequal length, one call a frame: repeating frames to fill a row would change the softmax
        return torch.stack([self.attend(q[:, i], k[:, row].flatten(1, 2), v[:, row].flatten(1, 2))
                            for i, row in enumerate(self.rows)], dim=1).flatten(0, 1)


class ClipCrossAttention(Attention):
    """attn2: all tokens of a clip look at its one context, so K and V are projected once a clip, not once a frame."""

    def __init__(self, frames, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frames = frames

    def forward(self, x, context):                                          # (b f) n c, b m d
        y = x.unflatten(0, (-1, self.frames)).flatten(1, 2)                 # b (f n) c
        return super().forward(y, context).view_as(x)


class TemporalAttention(Attention):
    """attn_temp: each pixel looks at itself in all frames. No positional encoding, as in the official code."""

    def __init__(self, frames, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frames = frames

    def forward(self, x):                                                   # (b f) n c
        y = x.unflatten(0, (-1, self.frames)).transpose(1, 2)               # b n f c
        y = super().forward(y.flatten(0, 1)).view_as(y)
        return y.transpose(1, 2).flatten(0, 1)                              # (b f) n c


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm whose mean and variance run over all frames of a clip, as over the official code's 5-D tensors.

    So are the resnets' norms and conv_norm_out. The norm before each transformer stays per frame, there as here.
    """

    def __init__(self, frames, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frames = frames

    def forward(self, x):                                                   # (b f) c h w
        y = x.unflatten(0, (-1, self.frames)).transpose(1, 2)               # b c f h w
        return super().forward(y).transpose(1, 2).flatten(0, 1)


class VideoTransformerBlock(TransformerBlock):
    """TransformerBlock's three lines, with attn1 and attn2 replaced by those that know of frames, and then T-Attn."""

    def __init__(self, frames, attention, cfg, dim, heads):
        super().__init__(cfg, dim, heads)
        self.attn1 = SpatioTemporalAttention(frames, attention, dim, heads, upcast=cfg.upcast_attention)
        self.attn2 = ClipCrossAttention(frames, dim, heads, cfg.cross_attention_dim, cfg.upcast_attention)
        self.norm_temp = nn.LayerNorm(dim)
        self.attn_temp = TemporalAttention(frames, dim, heads, upcast=cfg.upcast_attention)

    def forward(self, x, context):                                          # (b f) n c, b m d
        x = super().forward(x, context)
        x = x + self.attn_temp(self.norm_temp(x))
        return x


class VideoUNet(UNet):
    def __init__(self, cfg, frames, attention="sparse-causal", norm="clip"):
        """`attention`: a row of LOOKS_AT. `norm`: "clip" (official) or "frame", the resnets' group norms."""
        if attention not in LOOKS_AT or norm not in ("clip", "frame") or frames < 1:
            raise InputError(f"A video U-Net of {frames} frames with {attention!r} attention and {norm!r} norm is not "
                             f"known: frames from 1, attention {', '.join(LOOKS_AT)}, norm clip or frame.")
        super().__init__(cfg, partial(VideoTransformerBlock, frames, attention),
                         partial(ClipGroupNorm, frames) if norm == "clip" else nn.GroupNorm)
        self.frames, self.attention, self.norm = frames, attention, norm

    def forward(self, x, t, context, residuals=None):
        """Noisy clips x (b, 4, f, h, w), t (b,), context (b, m, d) -> (b, 4, f, h, w).

        residuals: a ControlNet's, whose batch is the frames, (b f) c h w.
        """
        y = x.transpose(1, 2).flatten(0, 1)                                 # (b f) 4 h w
        y = super().forward(y, t.repeat_interleave(self.frames), context, residuals)
        return y.unflatten(0, (-1, self.frames)).transpose(1, 2)            # b 4 f h w

    def tuned(self):
        """{name: parameter} of what tuning may change: W^Q of ST-Attn and cross-attention, all of T-Attn."""
        return {name: p for name, p in self.named_parameters() if any(part in name for part in TUNED)}


def inflate(unet, frames, attention="sparse-causal", norm="clip"):
    """Image U-Net -> video U-Net: every key kept, only `*_temp.*` new, and at first the same function of a still clip.

    T-Attn's output projection starts at zero, weight and bias (the official code leaves the bias: README's audit); its
    q, k and v are drawn from torch's global generator. Frozen tensors are shared with `unet`; tuned ones are copies in
    float32, so `unet` stays what it was.
    """
    with torch.device("meta"):
        video = VideoUNet(unet.cfg, frames, attention, norm)
    tuned = video.tuned()
    kept = {name: p.float().clone() if name in tuned else p for name, p in unet.state_dict().items()}
    missing, unexpected = video.load_state_dict(kept, strict=False, assign=True)
    assert not unexpected and all("_temp." in name for name in missing)
    for block in (m for m in video.modules() if isinstance(m, VideoTransformerBlock)):
        for module in (block.norm_temp, *block.attn_temp.modules()):
            if list(module.parameters(recurse=False)):
                module.to_empty(device=unet.conv_in.weight.device)
                module.reset_parameters()
        nn.init.zeros_(block.attn_temp.to_out[0].weight)
        nn.init.zeros_(block.attn_temp.to_out[0].bias)
    return video.requires_grad_(False)
