"""Where attention looks while the net computes: maps that are taken beside the model's own fused calls.

The model computes attention in one fused call that returns no map. So a map is computed beside it, from what enters
each attention, and only for what is asked for. Nothing in the model is replaced, and its results stay the same bits.
"""
import math
import re
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from tinytav.errors import InputError


@contextmanager
def watched(net, kind, look):
    """Within it, before a module of `kind` in `net` computes, look(module, *inputs) gets what enters it."""
    def hook(module, inputs):
        with torch.no_grad():
            look(module, *inputs)           # returns nothing, so the inputs stay as they are
    handles = [module.register_forward_pre_hook(hook) for module in net.modules() if isinstance(module, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probabilities(attention, q, k):
    """softmax(Q K^T / sqrt(d)), the mean over heads: projected q (n, c), k (m, c) -> (n, m), in float32."""
    q, k = (z.float().unflatten(-1, (attention.heads, -1)).transpose(0, 1) for z in (q, k))     # (heads, ., d)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1).mean(0)


def grid(n, height, width):
    """Height and width of a layer's n pixels: those of the latents, halved some times, rounding up."""
    while height * width > n:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == n
    return height, width


class Mean:
    """The mean of maps (f, h, w) of several layers and steps, each enlarged to the latents' size."""

    def __init__(self, height, width):
        self.size, self.total, self.count = (height, width), 0., 0

    def add(self, maps):
        self.total = self.total + F.interpolate(maps[None], self.size, mode="bilinear")[0]
        self.count += 1

    def value(self):
        return (self.total / self.count).cpu()


class WordMaps:
    """How much attention each pixel pays to the tokens at `positions` of the last prompt of a batch."""

    def __init__(self, frames, positions, height, width):
        self.frames, self.positions, self.mean = frames, positions, Mean(height, width)

    def __call__(self, attention, x, context):                              # (b f) n c, b m d
        k = attention.to_k(context[-1])
        maps = [probabilities(attention, attention.to_q(frame), k)[:, self.positions].sum(-1)       # n
                for frame in x[-self.frames:]]
        self.mean.add(torch.stack(maps).unflatten(1, grid(x.shape[1], *self.mean.size)))


def word_positions(tokenizer, prompt, word):
    """Where the tokens of `word` stand in the prompt's row of ids. Raises InputError if the prompt has no such word."""
    spans = spans_of(word, prompt)
    offsets = tokenizer.bpe.encode(prompt, add_special_tokens=False).offsets[:tokenizer.length - 2]
    positions = [1 + i for i, (first, end) in enumerate(offsets)            # 1: the row begins with <|startoftext|>
                 if any(first < span_end and end > span_first for span_first, span_end in spans)]
    if not word.strip() or not positions:
        raise InputError(f"{prompt!r} does not hold the word {word!r}, or is cut before it: name a word of "
                         "the prompt.")
    return positions


def spans_of(word, prompt):
    """Where the word stands in the prompt, and is no part of a longer word: [(start, end)]."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
