"""What an edit keeps: the clip outside a mask, and a first frame that the user gives. Neither is in the paper.

After each step of sampling, what is kept is put in place, at the step's noise: Avrahami et al., arXiv 2111.14818, for
pictures. The kind of noise knows which noise that is (noise.py, `noised`). The kept clip has the latents that its
inversion passed at this step. A given picture gets the same noise added. At the end the latents that are kept are
exactly those of clip and picture, and outside a mask the pixels are the clip's.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

from tinytav.attention_maps import WordMaps, watched, word_positions
from tinytav.files.frames import read_at
from tinytav.inflation import ClipCrossAttention
from tinytav.pipeline import decode

THRESHOLD = 0.3         # of a word's mask, as a part of the largest attention (Prompt-to-Prompt's LocalBlend)


# Each of the three is called with latents x (b, 4, f, h, w) at some timestep, and a function that noises latents to it.

class Mask(NamedTuple):
    """Keeps the clip outside a mask. clip: its latents (1, 4, f, h, w). free: where x may change, (f, h, w) bool."""
    clip: torch.Tensor
    free: torch.Tensor

    def __call__(self, x, noised):
        return torch.where(self.free, x, noised(self.clip))


class WordMask(NamedTuple):
    """Keeps the clip where a word draws no attention. maps: the word's WordMaps, which watch the net.

    The mask is where the word's cross-attention, averaged over the steps so far, exceeds a part of its maximum:
    LocalBlend of Hertz et al., arXiv 2208.01626.
    """
    clip: torch.Tensor
    maps: WordMaps

    def __call__(self, x, noised):
        if self.maps.mean.count == 0:               # before the first step
            return x
        return torch.where(large(self.maps.mean.value()).to(x.device), x, noised(self.clip))


class FirstFrame(NamedTuple):
    """Holds the first frame at a picture. latents (b or 1, 4, 1, h, w): of the picture."""
    latents: torch.Tensor

    def __call__(self, x, noised):
        return torch.cat([noised(self.latents).expand(len(x), -1, -1, -1, -1), x[:, :, 1:]], dim=2)


def large(maps):
    """Maps (f, h, w) -> where they are large, and one latent around: (f, h, w) bool."""
    found = (maps / maps.amax((1, 2), keepdim=True) > THRESHOLD).float()
    return F.max_pool2d(found, 3, stride=1, padding=1).bool()


@dataclass
class Keep:
    """What edits of a session keep, as editing.Session.keep makes it. The empty one keeps nothing."""
    mask: Mask | None = None
    pixels: torch.Tensor | None = None      # of the mask, where frames may change: (f, H, W) bool
    word: str | None = None                 # whose attention makes a mask
    clip: torch.Tensor | None = None        # what is kept outside it
    first: FirstFrame | None = None
    record: dict = field(default_factory=dict)      # of an edit's record: the flags, and fingerprints of files

    def __bool__(self):
        return bool(self.mask or self.word or self.first)

    @contextmanager
    def during(self, net, tokenizer, prompt):
        """Within it, the list of what Noise.sample holds while it samples this prompt. The first frame comes last.

        Raises InputError if the prompt does not hold the word.
        """
        masks, frames = ([each] if each else [] for each in (self.mask, self.first))
        if self.word is None:
            yield masks + frames
            return
        positions = word_positions(tokenizer, prompt, self.word)
        word = WordMask(self.clip, WordMaps(net.frames, positions, *self.clip.shape[3:]))
        with watched(net, ClipCrossAttention, word.maps):
            yield [*masks, word, *frames]

    def paste(self, x, vae):
        """Frames x (f, 3, H, W) with the clip's own outside the mask, as the VAE gives them back.

        A latent stands for a cell of pixels, and the VAE mixes neighbours. So latents alone keep no pixel exactly.
        """
        if self.pixels is None:
            return x
        return torch.where(self.pixels[:, None], x, decode(vae, self.mask.clip))


# ---- Files ---------------------------------------------------------------------------------------

def read_mask(path, settings, height, width, cell):
    """A mask's pixels for each frame of a run, cropped as its clip was: (f, height, width) bool, True where white.

    path: a picture for all frames, or a video or a folder with one for each frame of the run or of the whole clip.
    settings: the run's. cell: pixels of a latent. Raises InputError for another number of frames or another shape.
    """
    places = {1: [0] * settings.frames, settings.frames: range(settings.frames)}
    if settings.indices:
        places = {settings.total: settings.indices} | places
    return read_at(path, places, height, width, cell).mean(1) > 0


def free_latents(mask, cell):
    """A mask of pixels (f, H, W) bool -> (f, h, w): a latent may change if any of its pixels may."""
    return F.max_pool2d(mask.float(), cell).bool()
