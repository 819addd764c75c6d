"""Clips of pictures, read by Pillow: a folder of them, or a GIF, an animated WebP, AVIF or PNG."""
import re
import warnings
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinytav.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF")     # whatever the suffix: no other of Pillow's readers starts
FOLDER_FPS = Fraction(8)        # a folder of pictures has no clock; the official code writes its results at 8
MOST_PIXELS = 64_000_000        # of one picture; 8K has 33 million


class Clip:
    """What a Folder, an Animation and a Video share. Each has clock() and pictures(indices)."""

    damaged = False             # True when packets could not be decoded: then recount() says what is left

    def __init__(self, path):
        self.path, self.warned = path, set()

    def count(self):
        """How many frames there are. Raises InputError."""
        return len(self.clock()[0])

    def warn(self, text):
        """Warns once of each thing, however often the clip is read."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text)


class Folder(Clip):
    """A folder of pictures, in the natural order of their names: 2.png before 10.png. Hidden files are passed over."""

    def __init__(self, path):
        super().__init__(path)
        self.files = sorted((file for file in path.iterdir() if is_wanted(file)), key=natural_order)
        if not self.files:
            raise InputError(f"{path} has 0 frames: a folder's pictures end in {', '.join(SUFFIXES)}.")

    def clock(self):
        return [i / FOLDER_FPS for i in range(len(self.files))], FOLDER_FPS

    def pictures(self, indices=None):
        """Yields the pictures of these indices, or all, as PIL pictures. Raises InputError."""
        for i in range(len(self.files)) if indices is None else indices:
            with opened_picture(self.files[i]) as picture:
                yield finished(picture)


def is_wanted(file):
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def natural_order(file):
    """A sort key by which numbers in a file's name count as numbers: every second part of the name is one."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file.name))]


class Animation(Clip):
    """A file of one or more pictures. Its delays are what browsers make of them."""

    def clock(self):
        """(The times in seconds at which frames appear, frames a second). Raises InputError."""
        times, now = [], Fraction(0)
        for _, seconds in self.frames():
            times.append(now)
            now += seconds
        return times, (len(times) - 1) / times[-1] if len(times) > 1 else FOLDER_FPS

    def pictures(self, indices=None):
        """Yields the frames of these ascending indices, or all, as PIL pictures. Raises InputError."""
        for i, (picture, _) in enumerate(self.frames()):
            if indices is None or i in indices:
                yield picture
            if indices is not None and i == indices[-1]:
                return

    def frames(self):
        """Yields (PIL picture, seconds that it is shown). Where the file is damaged it ends, with a warning."""
        with opened_picture(self.path) as file:
            count = getattr(file, "n_frames", 1)
            first = int(getattr(file, "default_image", False))              # in a PNG, for readers that cannot animate
            for i in range(first, count):
                try:
                    file.seek(i)
                    check_pixels(*file.size, self.path)
                    picture = finished(file)
                except Exception:
                    if i == first:
                        raise
                    self.warn(f"{count - i} of {count} frames of {self.path} are damaged. They are left out.")
                    return
                yield picture, shown_for(file.info.get("duration", 0))


def shown_for(milliseconds):
    """A frame's delay in a file -> seconds. Browsers show a frame of 0 or 10 ms for 100 ms."""
    return Fraction(milliseconds if milliseconds > 10 else 100).limit_denominator(1000) / 1000


def is_animation(path):
    """Is this file a picture, or several? Raises InputError if it is one that cannot be read."""
    try:
        with opened_picture(path):
            return True
    except UnidentifiedImageError:
        return False


@contextmanager
def opened_picture(path):
    """The context in which a picture file is open. Whatever Pillow raises on broken data becomes a sentence.

    A file of no known format is UnidentifiedImageError, of more than MOST_PIXELS InputError.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            check_pixels(*picture.size, path)
            yield picture
    except (InputError, MemoryError, UnidentifiedImageError):
        raise
    except Exception as error:              # broken EXIF, palettes and chunks end in a dozen classes of errors
        raise InputError(f"{path} cannot be read as a picture: {error}") from None


def check_pixels(width, height, path):
    """Raises InputError if a picture of this size would take too much memory. Call it before decoding."""
    if width * height > MOST_PIXELS:
        raise InputError(f"{path} has pictures of {width}x{height} pixels. The most is {MOST_PIXELS // 10 ** 6} million "
                         "pixels: make them smaller.")


def finished(picture):
    """An opened picture -> RGB, upright, on white where it is transparent."""
    return on_white(to_8_bits(ImageOps.exif_transpose(picture)))


def to_8_bits(picture):
    """16-bit grey -> 8-bit grey; Pillow's own conversion would cut it off at 255. Other pictures stay as they are."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def on_white(picture):
    """A PIL picture -> RGB, white where it is transparent."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
