"""Videos, GIFs and folders of images <-> frames (f, 3, h, w) in [-1, 1]; strips. Nothing here knows of the model."""
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from tinytav.stable_diffusion.config import InputError

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FOLDER_FPS = Fraction(8)        # a folder of images has no clock; 8 is what the official code writes its results with
LARGEST = 4096                  # pixels of the short side
SHOWN = 256                     # smaller results are enlarged by a whole factor until their short side reaches this


def read(path, size, multiple, frames, start=0, stride=None, exact=True):
    """A clip -> (x (f, 3, h, w) float32 in [-1, 1], indices of the f frames in the source, fps of x as a Fraction).

    size: pixels of the short side; both sides are cropped, centred, to multiples of `multiple`. Frames are every
    stride-th from `start`; without stride, spread uniformly over the rest of the clip (paper, section 4: "uniformly
    sampled"). With exact=False a shorter clip gives all it has. Raises InputError.
    """
    path = Path(path)
    if not multiple <= size <= LARGEST:
        raise InputError(f"The size {size} is not from {multiple} to {LARGEST}: use a multiple of {multiple}.")
    if not path.exists():
        raise InputError(f"No such file: {path}.")
    pictures, fps = (_folder(path), FOLDER_FPS) if path.is_dir() else (_video(path), _fps(path))
    total = sum(1 for _ in pictures)
    indices, fps = choose(total, frames, start, stride, exact, fps, path)
    pictures = _folder(path) if path.is_dir() else _video(path)
    wanted, chosen = set(indices), {}
    for i, picture in enumerate(pictures):
        if i in wanted:
            chosen[i] = fit(picture(), size, multiple)
    if len({picture.size for picture in chosen.values()}) > 1:
        raise InputError(f"The pictures in {path} differ in size or shape; a clip needs frames of one size.")
    x = np.stack([np.asarray(chosen[i]) for i in indices])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1, indices, fps


def pictures(path):
    """Every frame of a video, or every picture of a folder, as it is: a list of PIL pictures. Raises InputError."""
    path = Path(path)
    return [picture() for picture in (_folder(path) if path.is_dir() else _video(path))]


def title(path):
    """What write_mp4 was told that a video shows; "" where it says nothing."""
    with av.open(str(path)) as container:
        return container.metadata.get("title", "")


def choose(total, frames, start, stride, exact, fps, path="the clip"):
    """Which of `total` frames to take -> (indices, fps of the result). Raises InputError if they are too few."""
    rest = total - start
    if total == 0 or rest < 1:
        raise InputError(f"{path} has {total} frames" + (f"; none is left from --start {start}." if total else "."))
    have = rest if stride is None else (rest - 1) // stride + 1
    if have < frames and exact:
        raise InputError(f"{path} has {total} frames, too few for {frames} from {start}"
                         + (f" by strides of {stride}" if stride else "") + f": use --frames {have} or less.")
    count = min(frames, have)
    step = Fraction(stride) if stride else Fraction(rest, count)
    return [start + int(i * step) for i in range(count)], fps / step


def fit(picture, size, multiple):
    """A PIL picture -> RGB, short side `size`, aspect kept, then centre-cropped to multiples of `multiple`."""
    scale = size / min(picture.size)
    width, height = (round(n * scale) // multiple * multiple for n in picture.size)
    if width * height > 16 * size * size:
        raise InputError(f"Pictures of {'x'.join(map(str, picture.size))} are too long and thin: crop them to 16:1.")
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _folder(path):
    """Yields one function per picture, which opens it: names in natural order, 2.png before 10.png."""
    natural = lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
    for file in sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES), key=natural):
        yield lambda file=file: _open(file)


def _open(file):
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as a picture: {error}") from None
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _video(path):
    """Yields one function per decoded frame, which turns it into a picture: counting frames converts none."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield lambda frame=frame: upright(frame)
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:       # the last: names within it that are no text
        reason = "it has no video stream" if isinstance(error, IndexError) else getattr(error, "strerror", error)
        raise InputError(f"{path} cannot be read as a video: {reason}.") from None


def upright(frame):
    """A decoded frame -> a picture, turned as the file says (its rotation counts degrees anticlockwise)."""
    return Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _fps(path):
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.average_rate or stream.guessed_rate or FOLDER_FPS
    except (av.FFmpegError, IndexError, UnicodeDecodeError):
        return FOLDER_FPS               # _video says what is wrong


def to_uint8(x, shown=SHOWN):
    """(f, 3, h, w) in [-1, 1] -> (f, h, w, 3) uint8, enlarged by a whole factor if the short side is below `shown`."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    factor = -(-shown // min(x.shape[1:3]))
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(path, x, fps, crf=17, title=""):
    """Frames (f, 3, h, w) -> H.264, yuv420p, at `fps` frames a second. Sides must be even after enlarging."""
    def write(file):
        with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata["title"] = title
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000),
                                          options={"crf": str(crf)})
            pictures = to_uint8(x)
            stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    try:
        replace(path, write)
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be written as a video of {x.shape[3]}x{x.shape[2]}: {error.strerror}.") from None


def write_gif(path, x, fps):
    """Frames (f, 3, h, w) -> an endless GIF. Its clock ticks in hundredths of a second."""
    first, *rest = [Image.fromarray(picture) for picture in to_uint8(x)]
    replace(path, lambda file: first.save(file, "GIF", save_all=True, append_images=rest, loop=0,
                                          duration=min(max(20, round(1000 / float(fps))), 655350)))     # 16 bits


def write_strip(path, *rows, columns=8, shown=SHOWN):
    """Clips, one below the other, each as a row of at most `columns` frames -> PNG. The source comes first."""
    rows = [x[np.linspace(0, len(x) - 1, min(columns, len(x))).round().astype(int)] for x in rows]
    strip = np.concatenate([np.concatenate(list(to_uint8(x, shown)), axis=1) for x in rows])
    replace(path, lambda file: Image.fromarray(strip).save(file, "PNG"))


def replace(path, write):
    """write(temporary file), then rename it to `path`: a reader finds the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")          # no two processes write into one
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
