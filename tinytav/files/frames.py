"""Clips on disk -> frames (f, 3, h, w) in [-1, 1], and back. Nothing here knows of the model.

clips.py and video.py read what is on disk, writing.py writes; this file chooses frames and fits them to a size.
"""
# ruff: noqa: F401
import hashlib
import warnings
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from tinytav.errors import InputError, check_file
from tinytav.files.clips import FOLDER_FPS, Animation, Folder, is_picture
from tinytav.files.video import Video
from tinytav.files.writing import enlarged, strip_columns, to_uint8, write_gif, write_mp4, write_picture, write_strip

LARGEST = 4096                  # pixels of the short side
LEAST_FPS = 4                   # of the chosen frames: at fewer, neighbours may share too little of a motion


class Source(NamedTuple):
    """The frames that were chosen from a clip."""
    x: torch.Tensor             # (f, 3, h, w) float32 in [-1, 1]
    indices: tuple[int, ...]    # of the f frames in the clip
    fps: Fraction               # of the chosen frames
    total: int                  # frames in the clip


def read(path, size, multiple, frames, start=0, stride=None, exact=True):
    """Chooses frames of a video, an animated picture or a folder of pictures -> Source.

    size: pixels of the short side; both sides are cropped, centred, to multiples of `multiple`. Frames are every
    stride-th from `start`; without a stride they are spread uniformly over the rest of the clip (paper, section 4:
    "uniformly sampled"). With exact=False a clip that is too short gives all it has. Raises InputError.
    """
    check_size(size, multiple)
    clip = open_clip(path)

    def chosen():
        times, fps = clip.clock()
        indices, fps = choose(times, fps, frames, start, stride, exact, path)
        wanted = sorted(set(indices))
        fitted = dict(zip(wanted, (fit(picture, size, multiple) for picture in clip.pictures(wanted))))
        return fitted, indices, fps, len(times)

    fitted, indices, fps, total = chosen()
    if clip.damaged or not fitted.keys() >= set(indices):                   # fewer frames than the file announces
        clip.recount()
        fitted, indices, fps, total = chosen()
    return Source(stacked([fitted[i] for i in indices], path), tuple(indices), fps, total)


def check_size(size, multiple):
    """Raises InputError unless `size` pixels can be a side of a frame."""
    if not multiple <= size <= LARGEST:
        raise InputError(f"The size {size} is not from {multiple} to {LARGEST}: use a size between them.")


def choose(times, fps, frames, start, stride, exact, path):
    """Which frames of a clip to take -> (indices, fps of the result). Raises InputError if there are too few.

    times: when each frame appears, in seconds. If they are uneven, and neither is there a stride nor are all frames
    taken, the chosen frames are those that a player shows at evenly spread times; one that stays long may come twice.
    The time for which the last frame stays does not count.
    """
    rest, has = len(times) - start, "1 frame" if len(times) == 1 else f"{len(times)} frames"
    if rest < 1:
        raise InputError(f"{path} has {has}; none is left from --start {start}.")
    have = rest if stride is None else (rest - 1) // stride + 1
    if have < frames and exact:
        by_stride = f" with stride {stride}" if stride else ""
        raise InputError(f"{path} has {has}. From frame {start}{by_stride} there {'is' if have == 1 else 'are'} only "
                         f"{have}, not {frames}: use --frames {have} or less.")
    count = min(frames, have)
    step = Fraction(stride) if stride else Fraction(rest, count)
    indices = [start + int(i * step) for i in range(count)]
    if are_even(times) or count == 1:
        return indices, fps / step
    if stride or count == rest:
        return indices, 1 / gap([times[i] for i in indices])
    spacing = (times[-1] + gap(times[start:]) - times[start]) / count
    return [bisect_right(times, times[start] + i * spacing) - 1 for i in range(count)], 1 / spacing


def are_even(times):
    """Is each frame less than half a frame away from its time by an even clock?"""
    mean = (times[-1] - times[0]) / max(1, len(times) - 1)
    return all(2 * abs(time - times[0] - i * mean) < mean for i, time in enumerate(times[1:], start=1))


def gap(times):
    """The usual time between neighbours, which a few long stays do not change."""
    return median(after - before for before, after in zip(times, times[1:]))


def warn_if_far_apart(source, path):
    """Warns where the chosen frames are so far apart that their motion may be lost."""
    if len(source.x) > 1 and source.fps < LEAST_FPS:
        seconds = float(1 / source.fps)
        warnings.warn(f"The chosen frames of {path} are {seconds:.1f} seconds apart. Motion between them may be lost: "
                      "choose a shorter part with --start and --stride.")


def fit(picture, size, multiple):
    """A PIL picture -> RGB, short side `size`, aspect kept, then centre-cropped to multiples of `multiple`."""
    scale = size / min(picture.size)
    width, height = (round(n * scale) // multiple * multiple for n in picture.size)
    if width * height > 16 * size * size:
        raise InputError(f"Pictures of {'x'.join(map(str, picture.size))} are too long and thin: crop them to 16:1.")
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def read_at(path, places, height, width, cell):
    """Frames of a clip, cropped to height x width pixels -> (n, 3, height, width) in [-1, 1].

    This is for what belongs to a clip that `read` has cropped: its mask, its hints, another first frame. `read` cuts
    off less than `cell` pixels. places: {how many frames the clip may have: the indices of those to take}. Raises
    InputError for another number of frames or another shape, and where a frame cannot be decoded.
    """
    clip = open_clip(path)
    count = clip.count()
    if count not in places:
        needed = " or ".join(map(str, sorted(places)))
        raise InputError(f"The number of frames in {path} is {count}, and must be {needed}.")
    indices = places[count]
    wanted = sorted(set(indices))
    found = dict(zip(wanted, (fit_to(picture, height, width, cell, path) for picture in clip.pictures(wanted))))
    if clip.damaged or len(found) < len(wanted):
        raise InputError(f"{path} is damaged: some of its frames cannot be decoded.")
    return stacked([found[i] for i in indices], path)


def fit_to(picture, height, width, cell, path):
    """A PIL picture -> centre-cropped to height x width pixels. Raises InputError unless the crop is below a cell."""
    scale = max(width / picture.width, height / picture.height)
    if max(scale * picture.width - width, scale * picture.height - height) >= cell:
        raise InputError(f"{path} is {picture.width}x{picture.height} pixels where the clip to be sampled is "
                         f"{width}x{height}: crop it to the same shape.")
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def read_all(path):
    """Every frame of a clip as it is, (f, 3, h, w) in [-1, 1]. Raises InputError if there is none."""
    return stacked(pictures(path), path)


def stacked(pictures, path):
    """PIL pictures -> (f, 3, h, w) in [-1, 1]. Raises InputError unless they are of one size."""
    if len({picture.size for picture in pictures}) > 1:
        raise InputError(f"The pictures in {path} differ in size or shape; a clip needs frames of one size.")
    return to_tensor(np.stack(pictures))


def pictures(path):
    """Every frame of a clip as it is: a list of PIL pictures, at least one. Raises InputError."""
    clip = open_clip(path)
    found = list(clip.pictures(range(clip.count())))
    if clip.damaged:
        clip.recount()
    return found


def open_clip(path):
    """A path -> Folder, Animation or Video. Raises InputError if nothing is there."""
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise InputError(f"{'Not a regular file' if path.exists() else 'No such file'}: {path}.")
    return Animation(path) if is_picture(path) else Video(path)


def fingerprint(path):
    """A short hash of a clip's content: a file's bytes, or the names and bytes of a folder's pictures."""
    path, digest = Path(path), hashlib.sha256()
    for file in Folder(path).files if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.name}/{file.stat().st_size}/".encode(errors="surrogateescape"))
        check_file(file)
        with open(file, "rb") as data:
            while block := data.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def to_tensor(pictures):
    """Pictures (f, h, w, 3) uint8, an array or a tensor -> (f, 3, h, w) float32 in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
