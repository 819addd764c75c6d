"""Folders of pictures and animated pictures. Delays: what Chromium 156 makes of them."""
import struct
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps
from video_maker import COLOURS, numbered, numbers, quadrants, shown

from tinytav.errors import InputError
from tinytav.files import clips, frames

R, G, B, Y = COLOURS


def pictures(count):
    return [Image.fromarray(picture) for picture in numbered(count)]


def folder(path, **files):
    """A folder of grey pictures: name, without .png -> number of the picture."""
    path.mkdir()
    grey = pictures(12)
    for name, number in files.items():
        grey[number].save(path / f"{name}.png")
    return path


def transparent(size=64):
    """Quadrants whose right half is transparent."""
    picture = np.dstack([quadrants(size, size), np.full((size, size), 255, np.uint8)])
    picture[:, size // 2:, 3] = 0
    return Image.fromarray(picture)


# ---- Folders -------------------------------------------------------------------------------------

def test_a_folder_goes_by_number(tmp_path):
    source = frames.read(folder(tmp_path / "f", **{"a2": 2, "a10": 10, "a1": 1}), 32, 8, 3)
    assert numbers(source.x) == [1, 2, 10] and source.fps == 8


def test_figures_that_are_no_numbers_are_sorted_too(tmp_path):
    assert len(frames.pictures(folder(tmp_path / "f", **{"0²0": 1, "1²1": 2, "x": 3, "٣": 4, "²": 5}))) == 5


def test_hidden_files_are_passed_over(tmp_path):
    path = folder(tmp_path / "f", a=1, b=2)
    (path / "._a.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert numbers(frames.read_all(path)) == [1, 2]


def test_suffixes_in_capitals_count(tmp_path):
    path = folder(tmp_path / "f", a=1)
    (path / "a.png").rename(path / "a.PNG")
    pictures(3)[2].save(path / "b.JPeG", "JPEG")
    assert numbers(frames.read_all(path)) == [1, 2]


def test_a_folder_without_pictures_says_what_they_end_in(tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II*")
    with pytest.raises(InputError, match=r"0 frames: .* \.png, \.jpg, \.jpeg, \.webp, \.avif, \.bmp"):
        frames.read(tmp_path, 32, 8, 1)


@pytest.mark.parametrize("orientation, expected", [
    (1, (R, G, B, Y)), (2, (G, R, Y, B)), (3, (Y, B, G, R)), (4, (B, Y, R, G)), (5, (R, B, G, Y)), (6, (B, R, Y, G)),
    (7, (Y, G, B, R)), (8, (G, Y, R, B))])
def test_a_photograph_is_upright(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quadrants()).save(tmp_path / "a.png", exif=exif)
    assert shown(frames.pictures(tmp_path)[0]) == expected
    assert shown(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGB")) == expected


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(ramp).save(tmp_path / "1.png")
    assert abs(np.asarray(frames.pictures(tmp_path)[0])[0, :, 0] - np.linspace(0, 255, 64)).max() < 1


def test_pictures_of_mixed_sizes_are_refused(tmp_path):
    path = folder(tmp_path / "f", a=1, b=2)
    Image.new("RGB", (80, 40)).save(path / "c.png")
    for read in (lambda: frames.read(path, 32, 8, 3), lambda: frames.read_all(path)):
        with pytest.raises(InputError, match="one size"):
            read()


# ---- Animations ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options", [("a.gif", {}), ("a.webp", dict(lossless=True)), ("a.png", {}),
                                           ("a.avif", {}), ("movie", dict(format="GIF"))])
def test_animated_pictures_are_read_at_their_rate(tmp_path, name, options):
    first, *rest = pictures(6)
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=120, **options)
    source = frames.read(tmp_path / name, 32, 8, 3)
    assert source.indices == (0, 2, 4) and numbers(source.x) == [0, 2, 4] and source.total == 6
    assert source.fps == Fraction(100, 24)


@pytest.mark.parametrize("delays, asked, indices, fps", [
    ([40] * 23 + [3000], 8, tuple(range(0, 24, 3)), Fraction(25, 3)),       # the last frame's hold is no motion
    ([10] * 24, 12, tuple(range(0, 24, 2)), 5), ([0] * 24, 12, tuple(range(0, 24, 2)), 5),      # as if it were 100 ms
    ([20] * 24, 12, tuple(range(0, 24, 2)), 25),
    ([1000] + [100] * 20 + [50] * 3, 10, (0, 0, 0, 0, 3, 7, 10, 13, 16, 19), Fraction(25, 8)),
    ([1000] + [100] * 23, 24, tuple(range(24)), 10)])                       # all of them: each comes once
def test_a_gifs_frames_are_taken_at_the_times_at_which_a_browser_shows_them(tmp_path, delays, asked, indices, fps):
    first, *rest = pictures(24)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=delays)
    source = frames.read(tmp_path / "a.gif", 32, 8, asked)
    assert source.indices == indices and numbers(source.x) == list(indices) and source.fps == fps


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "f/1.png", "f/1.webp", "a.avif"])
def test_transparent_parts_are_white(tmp_path, name):
    (tmp_path / "f").mkdir()
    options = {} if name[0] == "f" else dict(save_all=True, append_images=[transparent().rotate(180)], disposal=2)
    transparent().save(tmp_path / name, **options | (dict(lossless=True) if "webp" in name else {}))
    right = shown(frames.pictures(tmp_path / ("f" if name[0] == "f" else name))[0])
    assert right[1] == right[3] == "ffffff" and right[0] != "ffffff"


def test_the_picture_for_readers_that_cannot_animate_is_no_frame(tmp_path):
    first, *rest = pictures(4)
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, default_image=True, duration=100)
    assert numbers(frames.read_all(tmp_path / "a.png")) == [1, 2, 3]


def test_of_a_damaged_animation_the_whole_frames_are_read(tmp_path):
    noise = [Image.effect_noise((64, 64), 90) for _ in range(8)]
    noise[0].save(tmp_path / "a.gif", save_all=True, append_images=noise[1:], duration=100)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:len(data) * 3 // 5])
    with pytest.warns(UserWarning, match="a.gif is damaged: 1 of 5 frames"):
        assert len(frames.pictures(tmp_path / "a.gif")) == 4


# ---- Hostile files -------------------------------------------------------------------------------

def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side):
    rows = zlib.compress(bytes((side // 8 + 2) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_gif(side, screen):
    frame = b"\x21\xf9\4\x09\x0a\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, side, side) + b"\0\2\2\x44\1\0"
    small = b"\x21\xf9\4\1\x0a\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0\0\0\0\xff\xff\xff" + small + frame + b";"


@pytest.mark.parametrize("name, data", [("a.gif", huge_gif(1, screen=16000)), ("a.png", huge_png(9000)),
                                        ("f/0.png", huge_png(9000))])
def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, name, data):
    (tmp_path / "f").mkdir()
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(clips, "finished", lambda _: pytest.fail("decoded"))
    with pytest.raises(InputError, match="pixels"):
        frames.read(tmp_path / ("f" if name[0] == "f" else name), 32, 8, 1)


def test_a_frame_larger_than_its_gif_is_not_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(huge_gif(12000, screen=8))
    finished, decoded = clips.finished, []
    monkeypatch.setattr(clips, "finished", lambda picture: decoded.append(picture.size) or finished(picture))
    with pytest.warns(UserWarning, match="1 of 2 frames"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert [picture.size for picture in frames.pictures(tmp_path / "a.gif")] == [(8, 8)]
    assert set(decoded) == {(8, 8)}


@pytest.mark.parametrize("name", ["a.png", "f/a.png"])
def test_the_content_decides_and_no_other_reader_starts(tmp_path, monkeypatch, name):
    from PIL import EpsImagePlugin
    (tmp_path / "f").mkdir()
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript started"))
    with pytest.raises(InputError, match="cannot be read"):
        frames.read(tmp_path / ("f" if name[0] == "f" else name), 32, 8, 1)


@pytest.mark.parametrize("error", [SyntaxError, struct.error, KeyError, ZeroDivisionError, EOFError, OverflowError])
def test_whatever_pillow_raises_is_a_sentence(tmp_path, monkeypatch, error):
    def fails(picture):
        raise error("broken")
    monkeypatch.setattr(ImageOps, "exif_transpose", fails)
    path = folder(tmp_path / "f", a=1)
    for clip in (path, path / "a.png"):
        with pytest.raises(InputError, match="a.png cannot be read as a picture: .*broken"):
            frames.read(clip, 32, 8, 1)


@pytest.mark.parametrize("suffix", ["webp", "jpg", "avif", "png"])
def test_mutated_pictures_are_read_or_a_sentence(tmp_path, suffix):
    """The mutations are in the file's first bytes, or in those of its EXIF."""
    exif, file = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112], exif[0x8769] = 6, {0x9003: "2020"}
    Image.effect_noise((24, 24), 60).convert("RGB").save(file, exif=exif.tobytes())
    whole, random = np.frombuffer(file.read_bytes(), np.uint8), np.random.default_rng(0)
    for begin in [0, max(0, file.read_bytes().find(b"MM\0*"))] * 40:
        data = whole.copy()
        data[random.integers(begin, begin + 60, 3)] = random.integers(0, 256, 3)
        file.write_bytes(data.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                frames.read(tmp_path, 16, 8, 1)
            except InputError as error:
                assert file.name in str(error) or "long and thin" in str(error)
