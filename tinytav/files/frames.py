"""Videos, GIFs and folders of pictures <-> frames (f, 3, h, w) in [-1, 1]; strips. Nothing here knows of the model."""
import hashlib
import re
import warnings
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from tinytav.errors import InputError
from tinytav.files.atomic import replace

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FOLDER_FPS = Fraction(8)        # a folder of pictures has no clock; the official code writes its results at 8
LARGEST = 4096                  # pixels of the short side
# The same frames give the same file, on a machine with any number of cores: one thread, and none of x264's macroblock
# tree, whose sums come out differently with where in memory the frames lie.
REPEATABLE = {"x264-params": "mbtree=0"}
SHOWN = 256                     # smaller results are enlarged by a whole factor until their short side reaches this
LEAST_FPS = 4                   # frames further apart than this may share too little of a motion


class Source(NamedTuple):
    """The frames that were chosen from a clip."""
    x: torch.Tensor             # (f, 3, h, w) float32 in [-1, 1]
    indices: tuple[int, ...]    # of the f frames in the clip
    fps: Fraction               # of the chosen frames
    total: int                  # frames in the clip


# ---- Reading -------------------------------------------------------------------------------------

def read(path, size, multiple, frames, start=0, stride=None, exact=True):
    """Chooses frames of a video, a GIF or a folder of pictures -> Source.

    size: pixels of the short side; both sides are cropped, centred, to multiples of `multiple`. Frames are every
    stride-th from `start`; without a stride they are spread uniformly over the rest of the clip (paper, section 4:
    "uniformly sampled"). With exact=False a clip that is too short gives all it has. Raises InputError.
    """
    check_size(size, multiple)
    clip = open_clip(path)
    total = clip.count()
    indices, fps = choose(total, frames, start=start, stride=stride, exact=exact, fps=clip.fps(), path=path)
    pictures = [fit(picture, size, multiple) for picture in clip.pictures(indices)]
    if len(pictures) < len(indices):        # some videos announce more frames than can be decoded
        total = sum(1 for _ in clip.pictures())
        indices, fps = choose(total, frames, start=start, stride=stride, exact=exact, fps=clip.fps(), path=path)
        pictures = [fit(picture, size, multiple) for picture in clip.pictures(indices)]
    if len({picture.size for picture in pictures}) > 1:
        raise InputError(f"The pictures in {path} differ in size or shape; a clip needs frames of one size.")
    return Source(to_tensor(np.stack(pictures)), tuple(indices), fps, total)


def check_size(size, multiple):
    """Raises InputError unless `size` pixels can be a side of a frame."""
    if not multiple <= size <= LARGEST:
        raise InputError(f"The size {size} is not from {multiple} to {LARGEST}: use a size between them.")


def choose(total, frames, *, start, stride, exact, fps, path="the clip"):
    """Which of `total` frames to take -> (indices, fps of the result). Raises InputError if there are too few."""
    rest = total - start
    if total == 0:
        raise InputError(f"{path} has 0 frames.")
    if rest < 1:
        raise InputError(f"{path} has {total} frames; none is left from --start {start}.")
    have = rest if stride is None else (rest - 1) // stride + 1
    if have < frames and exact:
        by_stride = f" with stride {stride}" if stride else ""
        raise InputError(f"{path} has {total} frames. From frame {start}{by_stride} there are only {have}, not {frames}: "
                         f"use --frames {have} or less.")
    count = min(frames, have)
    step = Fraction(stride) if stride else Fraction(rest, count)
    return [start + int(i * step) for i in range(count)], fps / step


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


def pictures(path):
    """Every frame of a video, or every picture of a folder, as it is: a list of PIL pictures. Raises InputError."""
    return list(open_clip(path).pictures())


def read_all(path):
    """All frames of a clip as they are -> (f, 3, h, w) in [-1, 1]. Raises InputError if there are none."""
    found = pictures(path)
    if not found:
        raise InputError(f"{path} has no frames.")
    return to_tensor(np.stack(found))


def fingerprint(path):
    """A short hash of a clip's files: of the video, or of the pictures of a folder and their names."""
    path = Path(path)
    sha = hashlib.sha256()
    for file in Folder(path).files if path.is_dir() else [path]:
        sha.update(file.name.encode(errors="surrogateescape") if path.is_dir() else b"")
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()[:16]


def title(path):
    """The title in a video's metadata; write_mp4 puts the prompt there. "" if there is none. Raises InputError."""
    with opened(path) as (container, _):
        return container.metadata.get("title", "")


def open_clip(path):
    """A path -> Video or Folder. Raises InputError if nothing is there."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"No such file: {path}.")
    return Folder(path) if path.is_dir() else Video(path)


class Folder:
    """A folder of pictures, in the natural order of their names: 2.png before 10.png."""

    def __init__(self, path):
        self.files = sorted((file for file in path.iterdir() if file.suffix.lower() in PICTURES), key=natural_order)

    def count(self):
        return len(self.files)

    def fps(self):
        return FOLDER_FPS

    def pictures(self, indices=None):
        """Yields the pictures of these indices, or all, as PIL pictures. Raises InputError."""
        for i in range(len(self.files)) if indices is None else indices:
            yield open_picture(self.files[i])


def natural_order(file):
    """A sort key by which numbers in a file's name count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def open_picture(file):
    """A picture file -> RGB PIL picture, upright, on white where it is transparent. Raises InputError."""
    try:
        with Image.open(file) as picture:
            picture = to_8_bits(ImageOps.exif_transpose(picture)).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as a picture: {error}") from None
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def to_8_bits(picture):
    """16-bit grey -> 8-bit grey; Pillow's own conversion would cut it off at 255. Other pictures stay as they are."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


class Video:
    """A video or a GIF. Frames are counted without decoding them, and decoding ends with the last wanted one."""

    def __init__(self, path):
        self.path = path

    def count(self):
        """How many frames there are, by the packets of the video stream. Raises InputError."""
        with opened(self.path) as (container, stream):
            return sum(1 for packet in container.demux(stream) if packet.size)

    def fps(self):
        """Frames a second, a Fraction. Raises InputError."""
        with opened(self.path) as (_, stream):
            return stream.average_rate or stream.guessed_rate or FOLDER_FPS

    def pictures(self, indices=None):
        """Yields the frames of these ascending indices, or all, as PIL pictures. Raises InputError."""
        wanted = None if indices is None else set(indices)
        with opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            for i, frame in enumerate(container.decode(stream)):
                if wanted is None or i in wanted:
                    yield upright(frame)
                if indices is not None and i == indices[-1]:
                    return


@contextmanager
def opened(path):
    """The context in which a video is open: (container, its first video stream). FFmpeg's errors become sentences."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} cannot be read as a video: it has no video stream.")
            yield container, container.streams.video[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:                   # the second: non-UTF-8 metadata
        raise InputError(f"{path} cannot be read as a video: {getattr(error, 'strerror', error)}.") from None


def upright(frame):
    """A decoded frame -> a PIL picture, turned as the file says (its rotation counts degrees anticlockwise)."""
    return Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


# ---- Numbers -------------------------------------------------------------------------------------

def to_tensor(pictures):
    """Pictures (f, h, w, 3) uint8, an array or a tensor -> (f, 3, h, w) float32 in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Frames (f, 3, h, w), clamped to [-1, 1] -> (f, h, w, 3) uint8, a tensor."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def enlarged(x, shown=SHOWN):
    """Frames (f, 3, h, w) -> an array (f, h', w', 3) uint8, by a whole factor if the short side is below `shown`."""
    pictures = to_uint8(x).cpu().numpy()
    factor = -(-shown // min(pictures.shape[1:3]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


# ---- Writing -------------------------------------------------------------------------------------

def write_mp4(path, x, fps, crf=17, title=""):
    """Frames (f, 3, h, w) -> H.264, yuv420p, at `fps` frames a second. Raises InputError where FFmpeg refuses them."""
    rate = Fraction(fps).limit_denominator(1000)
    pictures = enlarged(x)

    def write(file):
        with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata["title"] = title
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)} | REPEATABLE)
            stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
            stream.codec_context.thread_count = 1
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    try:
        replace(path, write)
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be written as a video of {x.shape[3]}x{x.shape[2]}: {error.strerror}.") from None


def write_gif(path, x, fps):
    """Frames (f, 3, h, w) -> an endless GIF. GIF stores the delay in 1/100 s as a 16-bit number."""
    first, *rest = [Image.fromarray(picture) for picture in enlarged(x)]
    duration = min(max(20, round(1000 / float(fps))), 655350)

    def write(file):
        first.save(file, "GIF", save_all=True, append_images=rest, loop=0, duration=duration)
    replace(path, write)


def strip_columns(count, columns=8):
    """Which of `count` frames a strip of at most `columns` shows: their indices, spread evenly."""
    return np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist()


def write_strip(path, *rows, shown=SHOWN):
    """Clips of one length, one below the other, each as a row of frames -> PNG. The source comes first."""
    strip = np.concatenate([np.concatenate(list(enlarged(x, shown)), axis=1) for x in rows])
    write_picture(path, strip)


def write_picture(path, picture):
    """A picture, (h, w, 3) uint8 array -> PNG."""
    replace(path, lambda file: Image.fromarray(picture).save(file, "PNG"))
