"""Clips of any length: the net sees a part of one at a time. It is not in the paper.

A net of w frames sees a longer clip in windows: the clip's first frame and w - 1 consecutive frames. So ST-Attn looks
at the same first frame everywhere. T-Attn has no positions, so it takes any window. Tuning takes one window at each
step. Inversion and sampling average the predictions of overlapping windows at each step, as MultiDiffusion (arXiv
2302.08113) and Gen-L-Video (arXiv 2305.18264) do. The group norms that run over a clip run over a window then.
"""
from random import Random

import torch

LEAST = 3       # frames of a window: the first one, and two neighbours


def places(count, window):
    """The windows of a clip of `count` frames: what indexes the frames of each. A clip that fits is one window, whole.

    Each has frame 0. Its other frames begin (window - 1) // 2 frames after those of the window before, and the last
    window ends with the clip.
    """
    if count <= window:
        return [slice(None)]
    length = window - 1
    starts = [*range(1, count - length, length // 2), count - length]
    return [[0, *range(start, start + length)] for start in starts]


def drawn(places, seed, k):
    """The window that step k of tuning takes: a function of (seed, k), independent of the step's other randomness."""
    return Random(f"{seed}/{k}").choice(places)


def average(predict, x, places):
    """The mean of the windows' predictions, frame by frame, for a clip x (b, c, f, h, w). One window runs at a time.

    predict: a function of (a window of x, its place) -> the same shape. A single window's prediction is returned as
    it is.
    """
    if len(places) == 1:
        return predict(x, places[0])
    total, seen = torch.zeros_like(x), torch.zeros(x.shape[2], 1, 1, device=x.device)
    for place in places:
        total[:, :, place] += predict(x[:, :, place], place)
        seen[place] += 1
    return total / seen
