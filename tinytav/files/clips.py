"""Clips of pictures, read by Pillow: a folder of them, or a GIF, an animated WebP, AVIF or PNG."""
import re
import warnings
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinytav.errors import InputError, check_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF")     # no other of Pillow's readers starts, whatever the suffix
FOLDER_FPS = Fraction(8)        # a folder of pictures has no clock; the official code writes its results at 8
MOST_PIXELS = 64_000_000        # of one picture; 8K has 33 million


class Reader:
    """Base of Folder, Animation and Video. clock() -> (when frames appear, in seconds; frames a second).

    pictures(indices) yields the frames of these ascending indices as PIL pictures, RGB. Both raise InputError.
    """

    damaged = False             # True once packets could not be decoded; recount() then makes clock() right

    def __init__(self, path):
        self.path = path

    def count(self):
        """How many frames there are. Raises InputError if there is none."""
        count = len(self.clock()[0])
        if count == 0:
            raise InputError(f"{self.path} has 0 frames.")
        return count

    def warn_of_damage(self, lost, total):
        warnings.warn(f"{self.path} is damaged: {lost} of {total} frames cannot be decoded. The others are used.")


class Folder(Reader):
    """A folder of pictures, in the natural order of their names: 2.png before 10.png. Hidden files are passed over."""

    def __init__(self, path):
        super().__init__(path)
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
        if not files:
            raise InputError(f"{path} has 0 frames: a folder's pictures end in {', '.join(SUFFIXES)}.")
        self.files = sorted(files, key=natural_order)

    def clock(self):
        return [i / FOLDER_FPS for i in range(len(self.files))], FOLDER_FPS

    def pictures(self, indices):
        for i in indices:
            with opened_picture(self.files[i]) as picture:
                yield finished(picture)


def natural_order(file):
    """A sort key by which numbers in a file's name count as numbers: every second part of the name is one."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file.name))]


class Animation(Reader):
    """A file of one or more pictures. Its delays are those that browsers make of them."""

    def clock(self):
        times, now = [], Fraction(0)
        for _, milliseconds in self.frames():
            times.append(now)
            now += Fraction(milliseconds if milliseconds > 10 else 100).limit_denominator(1000) / 1000
        return times, (len(times) - 1) / times[-1] if len(times) > 1 else FOLDER_FPS

    def pictures(self, indices):
        for i, (picture, _) in enumerate(islice(self.frames(), indices[-1] + 1)):
            if i in indices:
                yield picture

    def frames(self):
        """Yields (PIL picture, delay in ms). Where the file is damaged it ends, with a warning."""
        with opened_picture(self.path) as file:
            first = int(getattr(file, "default_image", False))              # in a PNG, for readers that cannot animate
            count = getattr(file, "n_frames", 1)
            for i in range(first, count):
                try:
                    file.seek(i)
                    check_pixels(*file.size, self.path)
                    picture = finished(file)
                except Exception:
                    if i == first:
                        raise
                    self.warn_of_damage(count - i, count)
                    return
                yield picture, file.info.get("duration", 0)


def is_picture(path):
    """Is a file of one of FORMATS, whole or broken?"""
    try:
        Image.open(path, formats=FORMATS).close()
    except Exception as error:
        return not isinstance(error, UnidentifiedImageError)
    return True


@contextmanager
def opened_picture(path):
    """The context in which a picture file is open. Whatever Pillow raises on broken data becomes an InputError."""
    try:
        check_file(path)
        with Image.open(path, formats=FORMATS) as picture:
            check_pixels(*picture.size, path)
            yield picture
    except (InputError, MemoryError):
        raise
    except Exception as error:              # broken EXIF, palettes and chunks end in a dozen classes of errors
        raise InputError(f"{path} cannot be read as a picture: {error}") from None


def check_pixels(width, height, path):
    """Raises InputError if a picture of this size would take too much memory. Call it before decoding."""
    if width * height > MOST_PIXELS:
        raise InputError(f"{path} has pictures of {width}x{height} pixels, which is more than "
                         f"{MOST_PIXELS // 10 ** 6} million: make them smaller.")


def finished(picture):
    """An opened picture -> RGB, upright, on white where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):        # 16-bit grey, which Pillow's own conversion would cut off at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return on_white(picture)


def on_white(picture):
    """A PIL picture -> RGB, white where it is transparent."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
