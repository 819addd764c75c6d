"""Makes small videos of every kind that a test needs."""
from fractions import Fraction

import av
import numpy as np

COLOURS = ("e02020", "20c040", "2040e0", "f0a030")      # upper left, upper right, lower left, lower right


def quadrants(width=64, height=48, colours=COLOURS):
    """A picture (h, w, 3) uint8 of four colours."""
    four = np.uint8([list(bytes.fromhex(colour)) for colour in colours]).reshape(2, 2, 3)
    return four.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def shown(picture):
    """The four colours of a PIL picture of quadrants, as hexadecimal numbers."""
    w, h = picture.size
    return tuple(bytes(picture.getpixel((x, y))).hex() for y in (h // 4, h * 3 // 4) for x in (w // 4, w * 3 // 4))


def differ(colours, others):
    """The largest difference between two tuples of colours, of 255."""
    a, b = (np.array([list(bytes.fromhex(colour)) for colour in four], int) for four in (colours, others))
    return abs(a - b).max()


def numbered(count):
    """Grey pictures; the level of picture i is 10 + 8 i."""
    return [np.full((32, 32, 3), 10 + 8 * i, np.uint8) for i in range(count)]


def numbers(x):
    """Frames (f, 3, h, w) made of `numbered` pictures -> which ones they are."""
    return [round(((level + 1) * 127.5 - 10) / 8) for level in x.mean(dim=(1, 2, 3)).tolist()]


def write_video(path, pictures, stamps=None, fps=24, **stream):
    """Pictures (h, w, 3) uint8 or uint16, or RGBA -> a video. stamps: their times in 1/1000 s, for a variable rate."""
    with av.open(str(path), "w") as container:
        encode(container, add_stream(container, pictures[0], fps=fps, **stream), pictures, stamps, fps)
    return path


def add_stream(container, picture, fps=24, codec="libx264", pix_fmt="yuv420p", options=None, **settings):
    """settings: attributes of the codec's context."""
    stream = container.add_stream(codec, rate=fps, options={"crf": "1"} if options is None else options)
    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pix_fmt
    for name, value in settings.items():
        setattr(stream.codec_context, name, value)
    return stream


def encode(container, stream, pictures, stamps=None, fps=24):
    if stamps:
        stream.codec_context.time_base = Fraction(1, 1000)
    for i, picture in enumerate(pictures):
        form = "rgb48le" if picture.dtype == np.uint16 else "rgba" if picture.shape[2] == 4 else "rgb24"
        frame = av.VideoFrame.from_ndarray(picture, format=form)
        colorspace = {1: "itu709", 9: 9}.get(stream.codec_context.colorspace, "itu601")
        frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=colorspace, interpolation=0x4 | 0x40000 | 0x2000)
        frame.pts, frame.time_base = (stamps[i], Fraction(1, 1000)) if stamps else (i, 1 / Fraction(fps))
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def set_display_matrix(path, a, b, c, d):
    """Writes another display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)
