"""Everything Tune-A-Video changes in Stable Diffusion's U-Net. Wu et al., arXiv 2212.11565, section 3.2.

Inside the U-Net the frames of a clip are folded into the batch, written (b f). A 1x3x3 convolution on a clip is then
the same as the 3x3 convolution on its frames, so the convolutions stay as they are. Three things let frames see each
other:

1. ST-Attn takes the place of the self-attention: frame i looks at the first frame and at the frame before it.
2. T-Attn, a temporal self-attention, is added at the end of each transformer block.
3. The resnets' group norms run over all frames of a clip: in the official code, not in the paper.

In the shapes below: b clips, f frames, n pixels of a feature map, c channels, m text tokens of width d.
"""
from functools import partial

import torch
from torch import nn

from tinytav.errors import InputError
from tinytav.stable_diffusion.unet import Attention, TransformerBlock, UNet

# What is tuned (section 3.3 and figure 4; official train_tuneavideo.py, trainable_modules): the queries of both old
# attentions and all of T-Attn. At Stable Diffusion's size these are 112 tensors. Inflation adds 112 tensors too, but
# not the same ones: the norm before T-Attn is new and stays frozen, as in the official code.
TUNED = ("attn1.to_q.", "attn2.to_q.", "attn_temp.")


# ---- Attention between frames --------------------------------------------------------------------

class FrameAttention(Attention):
    """Base of the attentions that know how many frames are folded into the batch."""

    def __init__(self, frames, dim, heads, context_dim=None, upcast=False):
        super().__init__(dim, heads, context_dim, upcast)
        self.frames = frames

    def unfold(self, z):                                                    # (b f) n c -> b f n c
        return z.unflatten(0, (-1, self.frames))


class SparseCausalAttention(FrameAttention):
    """ST-Attn: Q from frame v_i, K and V from [v_1, v_i-1]. Official attention.py, SparseCausalAttention.

    The first frame is its own predecessor, so it looks at itself twice.
    """

    def forward(self, x):                                                   # (b f) n c
        q = self.to_q(x)
        k = self.first_and_previous(self.to_k(x))
        v = self.first_and_previous(self.to_v(x))
        return self.attend(q, k, v)

    def first_and_previous(self, z):                                        # (b f) n c -> (b f) 2n c
        z = self.unfold(z)
        first = z[:, :1].expand_as(z)
        previous = torch.cat([z[:, :1], z[:, :-1]], dim=1)
        return torch.cat([first, previous], dim=2).flatten(0, 1)


class SpatialAttention(FrameAttention):
    """Each frame looks at itself: the image U-Net's self-attention."""


class FirstFrameAttention(FrameAttention):
    """Every frame looks at the first frame. All queries of a clip share its keys, so one call serves all frames."""

    def forward(self, x):                                                   # (b f) n c
        first = self.unfold(x)[:, 0]                                        # b n c
        q = self.unfold(self.to_q(x)).flatten(1, 2)                         # b (f n) c
        return self.attend(q, self.to_k(first), self.to_v(first)).view_as(x)


class CausalAttention(FrameAttention):
    """Frame i looks at frames 1 to i. The rows differ in length, so each frame has a call of its own."""

    def forward(self, x):                                                   # (b f) n c
        q, k, v = (self.unfold(z) for z in (self.to_q(x), self.to_k(x), self.to_v(x)))
        rows = []
        for i in range(self.frames):
            seen = slice(0, i + 1)
            rows.append(self.attend(q[:, i], k[:, seen].flatten(1, 2), v[:, seen].flatten(1, 2)))
        return torch.stack(rows, dim=1).flatten(0, 1)


class FullAttention(FrameAttention):
    """Every frame looks at all frames: one call over all pixels of the clip."""

    def forward(self, x):                                                   # (b f) n c
        y = self.unfold(x).flatten(1, 2)                                    # b (f n) c
        return super().forward(y).view_as(x)


# The paper uses the first (section 3.2); the others are for its comparisons.
ATTENTIONS = {
    "sparse-causal": SparseCausalAttention,
    "spatial": SpatialAttention,
    "first": FirstFrameAttention,
    "causal": CausalAttention,
    "full": FullAttention,
}


class ClipCrossAttention(FrameAttention):
    """Cross-attention to the caption. All pixels of a clip share one context, so its K and V are projected once."""

    def forward(self, x, context):                                          # (b f) n c, b m d
        y = self.unfold(x).flatten(1, 2)                                    # b (f n) c
        return super().forward(y, context).view_as(x)


class TemporalAttention(FrameAttention):
    """T-Attn: each pixel looks at itself in all frames. It has no positional encoding, as in the official code."""

    def forward(self, x):                                                   # (b f) n c
        y = self.unfold(x).transpose(1, 2).contiguous()                     # b n f c; in order: else products are slow
        y = super().forward(y.flatten(0, 1)).view_as(y)                     # each pixel is a sequence of f tokens
        return y.transpose(1, 2).flatten(0, 1)                              # (b f) n c


# ---- The video U-Net -----------------------------------------------------------------------------

class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm whose mean and variance run over all frames of a clip, as over the official code's 5-D tensors.

    The resnets and conv_norm_out have it. The norm before each transformer stays per frame, in the official code too.
    """

    def __init__(self, frames, groups, channels, eps):
        super().__init__(groups, channels, eps)
        self.frames = frames

    def forward(self, x):                                                   # (b f) c h w
        y = x.unflatten(0, (-1, self.frames)).transpose(1, 2)               # b c f h w
        return super().forward(y).transpose(1, 2).flatten(0, 1)


class VideoTransformerBlock(TransformerBlock):
    """TransformerBlock with attentions that know of frames, and T-Attn after its three parts (figure 4)."""

    def __init__(self, frames, attention, cfg, dim, heads):
        super().__init__(cfg, dim, heads, partial(ATTENTIONS[attention], frames), partial(ClipCrossAttention, frames))
        self.norm_temp = nn.LayerNorm(dim)
        self.attn_temp = TemporalAttention(frames, dim, heads, upcast=cfg.upcast_attention)

    def forward(self, x, context):                                          # (b f) n c, b m d
        x = super().forward(x, context)
        x = x + self.attn_temp(self.norm_temp(x))
        return x

    def initialise_temporal(self):
        """At the start T-Attn adds zero: its output projection is zero, weight and bias.

        The official code leaves the bias random, so its inflated net is not quite the image net.
        """
        self.norm_temp.reset_parameters()
        for linear in (self.attn_temp.to_q, self.attn_temp.to_k, self.attn_temp.to_v):
            linear.reset_parameters()
        nn.init.zeros_(self.attn_temp.to_out[0].weight)
        nn.init.zeros_(self.attn_temp.to_out[0].bias)


class VideoUNet(UNet):
    """The inflated U-Net for clips of a fixed number of frames.

    attention: a key of ATTENTIONS. norm: "clip" (official) or "frame", what the resnets' group norms run over. Raises
    InputError for any other value, and for fewer than one frame.
    """

    def __init__(self, cfg, frames, attention="sparse-causal", norm="clip"):
        if attention not in ATTENTIONS or norm not in ("clip", "frame") or frames < 1:
            raise InputError(f"A video U-Net of {frames} frames with {attention!r} attention and {norm!r} norm is not "
                             f"known: frames from 1, attention {', '.join(ATTENTIONS)}, norm clip or frame.")
        Block = partial(VideoTransformerBlock, frames, attention)
        Norm = partial(ClipGroupNorm, frames) if norm == "clip" else nn.GroupNorm
        super().__init__(cfg, Block, Norm)
        self.frames, self.attention, self.norm = frames, attention, norm

    def forward(self, x, t, context, residuals=None):
        """Noisy clips x (b, 4, f, h, w), timesteps t (b,), context (b, m, d) -> (b, 4, f, h, w).

        residuals: a ControlNet's, whose batch is the frames, (b f) c h w. Raises InputError for a clip of another
        number of frames.
        """
        if x.shape[2] != self.frames:
            raise InputError(f"This net is for clips of {self.frames} frames, and the clip has {x.shape[2]}.")
        y = x.transpose(1, 2).flatten(0, 1)                                 # (b f) 4 h w
        y = super().forward(y, t.repeat_interleave(self.frames), context, residuals)
        return y.unflatten(0, (-1, self.frames)).transpose(1, 2)            # b 4 f h w

    def tuned(self):
        """{name: parameter} of what tuning may change: W^Q of ST-Attn and cross-attention, all of T-Attn."""
        return {name: p for name, p in self.named_parameters() if any(part in name for part in TUNED)}


def inflate(unet, frames, attention="sparse-causal", norm="clip"):
    """Image U-Net -> VideoUNet: every tensor is kept, only `*_temp.*` are new, and a still clip gives the same answer.

    T-Attn's q, k and v are drawn from torch's global generator. Frozen tensors are shared with `unet`. Tuned ones are
    copies in float32, so `unet` stays what it was. Raises InputError as VideoUNet does.
    """
    with torch.device("meta"):
        video = VideoUNet(unet.cfg, frames, attention, norm)
    tuned = video.tuned()
    kept = {name: p.float().clone() if name in tuned else p for name, p in unet.state_dict().items()}
    missing, unexpected = video.load_state_dict(kept, strict=False, assign=True)
    assert not unexpected and all("_temp." in name for name in missing)
    for block in video.modules():
        if isinstance(block, VideoTransformerBlock):
            block.norm_temp.to_empty(device="cpu")          # drawn on the CPU: the same on every device
            block.attn_temp.to_empty(device="cpu")
            block.initialise_temporal()
            block.norm_temp.to(unet.conv_in.weight.device)
            block.attn_temp.to(unet.conv_in.weight.device)
    return video.requires_grad_(False)
