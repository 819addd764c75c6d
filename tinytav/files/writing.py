"""Frames (f, 3, h, w) in [-1, 1] -> videos, GIFs, strips of pictures."""
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from tinytav.errors import InputError
from tinytav.files.atomic import replace
from tinytav.files.colour import ACCURATE

# The same frames give the same file, on a machine with any number of cores: one thread, and none of x264's macroblock
# tree, whose sums come out differently with where in memory the frames lie. chromaloc says where swscale puts chroma:
# between two pixels. Without it, colours move by half a pixel each time a clip is read and written.
X264 = {"x264-params": "mbtree=0:chromaloc=1"}
SHOWN = 256                     # smaller results are enlarged by a whole factor until their short side reaches this
# What a player must know, by the numbers of ITU-T H.273: matrix of BT.601, primaries and transfer of BT.709. Chromium
# shows these colours to within 2 of 255, and by the matrix of BT.709 to within 7.
TAGS = dict(colorspace=6, color_range=1, color_primaries=1, color_trc=1)


def to_uint8(x):
    """Frames (f, 3, h, w), clamped to [-1, 1] -> (f, h, w, 3) uint8, a tensor."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def enlarged(x, shown=SHOWN):
    """Frames (f, 3, h, w) -> an array (f, h', w', 3) uint8, by a whole factor if the short side is below `shown`."""
    pictures = to_uint8(x).cpu().numpy()
    factor = -(-shown // min(pictures.shape[1:3]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(path, x, fps, crf=17, title=""):
    """Frames (f, 3, h, w) -> H.264, yuv420p, BT.709, at `fps` frames a second. Raises InputError where FFmpeg refuses.

    crf: x264's quality; a lower value is a better picture and a larger file. title: goes into the video's metadata.
    """
    pictures = enlarged(x)

    def write(file):
        with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata["title"] = title
            stream = container.add_stream("libx264", rate=short(fps), options={"crf": str(crf)} | X264)
            stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
            stream.codec_context.thread_count = 1
            for name, value in TAGS.items():                               # a player would guess by the size
                setattr(stream.codec_context, name, value)
            for picture in pictures:
                container.mux(stream.encode(to_yuv(picture)))
            container.mux(stream.encode())
    try:
        replace(path, write)
    except av.FFmpegError as error:
        size = f"{x.shape[3]}x{x.shape[2]}"
        raise InputError(f"{path} cannot be written as a video of {size}: {error.strerror}.") from None


def short(fps):
    """A rate as a fraction of small numbers. Where frames last more than a second, their duration is one."""
    fps = Fraction(fps)
    return fps.limit_denominator(1000) if fps >= 1 else 1 / (1 / fps).limit_denominator(1000)


def to_yuv(picture):
    """A picture (h, w, 3) uint8 -> a yuv420p frame, as TAGS says."""
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, interpolation=ACCURATE)


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
