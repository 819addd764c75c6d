"""What is written plays as it should, and reads as it was."""
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tinytav.errors import InputError
from tinytav.files import frames

COLOURS = [(224, 32, 32), (32, 192, 64), (32, 64, 224), (240, 160, 48), (128, 128, 128), (255, 255, 255), (0, 0, 0),
           (200, 150, 120)]


def stripes(size):
    """Two frames of vertical stripes of COLOURS."""
    picture = np.uint8(COLOURS).repeat(size // 8, axis=0)[None].repeat(size, axis=0)
    return frames.to_tensor(np.stack([picture, picture[:, ::-1]]))


def smooth(size, count=3):
    """Smooth colours, without steps."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    return torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("prompt", ["a man", "naïve 日本語 “q” = ; # \\ x", "two\nlines", "long " * 200, ""])
def test_a_clip_has_its_prompt_as_its_title(tmp_path, prompt):
    frames.write_mp4(tmp_path / "x.mp4", torch.zeros(2, 3, 16, 16), fps=8, title=prompt)
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.metadata.get("title", "") == prompt


def test_what_is_written_can_be_read_again_enlarged_by_a_whole_factor(tmp_path):
    ramp = torch.linspace(-1, 1, 16)[None, None, None].expand(4, 3, 16, 16)
    x = ramp * torch.tensor([1, 0.5, 0, -1]).view(4, 1, 1, 1)
    for name, write, tolerance in (("a.mp4", frames.write_mp4, 0.08), ("a.gif", frames.write_gif, 0.08)):
        write(tmp_path / name, x, Fraction(10))
        back = frames.read(tmp_path / name, 16, 4, 4)
        assert (back.x - x).abs().mean() < tolerance and back.fps == 10
        assert frames.read_all(tmp_path / name).shape[2:] == (256, 256)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize("size", [256, 512, 768])
def test_video_gif_and_strip_show_the_same_colours(tmp_path, size):
    x = stripes(size)
    frames.write_mp4(tmp_path / "a.mp4", x, 8)
    frames.write_gif(tmp_path / "a.gif", x, 8)
    frames.write_strip(tmp_path / "a.png", x[:1])
    for name, tolerance in (("a.mp4", 2), ("a.gif", 0), ("a.png", 0)):
        row = np.asarray(frames.pictures(tmp_path / name)[0], int)[size // 2, size // 16::size // 8]
        assert abs(row - COLOURS).max() <= tolerance, name


@pytest.mark.parametrize("size", [256, 768])
def test_a_video_says_by_which_matrix_it_is_to_be_shown(tmp_path, size):
    frames.write_mp4(tmp_path / "a.mp4", stripes(size), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_range, context.color_primaries, context.color_trc
        red = next(container.decode(video=0)).to_ndarray()[size // 2, size // 16]
    assert tags == (6, 1, 1, 1)                 # the matrix of BT.601; limited range; primaries and transfer of BT.709
    assert abs(int(red) - (16 + 219 * (0.299 * 224 + 0.587 * 32 + 0.114 * 32) / 255)) <= 1


def test_ten_rounds_of_writing_and_reading_move_neither_light_nor_colour(tmp_path):
    x = y = smooth(256)
    for _ in range(10):
        frames.write_mp4(tmp_path / "a.mp4", y, 8, crf=4)
        y = frames.read_all(tmp_path / "a.mp4")
    difference = (y - x) * 127.5
    assert difference.mean(dim=(0, 2, 3)).abs().max() < 0.08 and difference.abs().mean() < 1.5


def test_a_lower_crf_is_a_better_picture(tmp_path):
    x = (smooth(256) + torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(1)) / 8).clamp(-1, 1)
    error, size = [], []
    for crf in (4, 17, 40):
        frames.write_mp4(tmp_path / "a.mp4", x, 8, crf=crf)
        error.append((frames.read_all(tmp_path / "a.mp4") - x).abs().mean())
        size.append((tmp_path / "a.mp4").stat().st_size)
    assert error == sorted(error) and size == sorted(size, reverse=True) and error[2] > 1.3 * error[0]


@pytest.mark.parametrize("fps", [Fraction(8), Fraction(30000, 1001), Fraction(25, 3), Fraction(1, 3600), 60, 0.5])
def test_a_video_plays_at_the_rate_of_its_frames(tmp_path, fps):
    frames.write_mp4(tmp_path / "a.mp4", smooth(32), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        assert abs(stream.duration * stream.time_base * fps / 3 - 1) < 0.002
    assert times == pytest.approx([i / float(fps) for i in range(3)], rel=0.002)


def test_a_gif_plays_without_end_at_its_rate(tmp_path):
    frames.write_gif(tmp_path / "a.gif", smooth(32), 10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0 and gif.n_frames == 3 and gif.info["duration"] == 100


def test_a_strip_has_the_source_above_the_result(tmp_path):
    columns = frames.strip_columns(12)
    assert columns == [0, 2, 3, 5, 6, 8, 9, 11] and frames.strip_columns(3) == [0, 1, 2]
    frames.write_strip(tmp_path / "strip.png", -torch.ones(12, 3, 16, 16)[columns], torch.ones(12, 3, 16, 16)[columns])
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (512, 8 * 256, 3)
    assert (strip[:256] == 0).all() and (strip[256:] == 255).all()


def test_a_video_is_the_same_bits_on_any_number_of_cores(tmp_path):
    frames.write_mp4(tmp_path / "x.mp4", torch.zeros(3, 3, 32, 32), fps=8)
    told = (tmp_path / "x.mp4").read_bytes()
    assert b" threads=1 " in told and b" mbtree=0 " in told                 # x264 writes into a file what it was told


def test_a_size_that_h264_does_not_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="x.mp4 cannot be written as a video of 257x258: "):
        frames.write_mp4(tmp_path / "x.mp4", torch.zeros(1, 3, 258, 257), 8)
    assert not list(tmp_path.iterdir())
