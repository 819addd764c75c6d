"""Clips in and out."""
import warnings
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_clip

from tinytav.errors import InputError
from tinytav.files import frames


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", frames=10, size=(48, 40))


def numbered_folder(path, numbers, size=(40, 40)):
    path.mkdir()
    for i in numbers:
        Image.new("RGB", size, (10 * i, 0, 0)).save(path / f"{i}.png")
    return path


@pytest.mark.parametrize("total, asked, expected, fps", [
    (10, dict(frames=5), [0, 2, 4, 6, 8], 6), (10, dict(frames=3, start=1), [1, 4, 7], 4),
    (10, dict(frames=3, stride=2), [0, 2, 4], 6), (10, dict(frames=3, start=7, stride=1), [7, 8, 9], 12),
    (4, dict(frames=8, exact=False), [0, 1, 2, 3], 12), (4, dict(frames=8, stride=2, exact=False), [0, 2], 6)])
def test_which_frames_are_taken(total, asked, expected, fps):
    asked = dict(start=0, stride=None, exact=True) | asked
    assert frames.choose(total, fps=Fraction(12), **asked) == (expected, fps)


@pytest.mark.parametrize("total, asked, message", [
    (4, dict(frames=8), "4 frames. From frame 0 there are only 4, not 8: use --frames 4"), (0, dict(frames=1), "0 frames"),
    (10, dict(frames=6, stride=2), "From frame 0 with stride 2 there are only 5, not 6: use --frames 5"),
    (10, dict(frames=1, start=10), "none is left from --start 10")])
def test_too_few_frames_are_an_error_that_says_how_many_there_are(total, asked, message):
    with pytest.raises(InputError, match=message):
        frames.choose(total, fps=Fraction(12), **dict(start=0, stride=None, exact=True) | asked)


def test_a_video_is_read_in_range_at_its_rate(clip):
    source = frames.read(clip, size=16, multiple=4, frames=5)
    assert source.x.shape == (5, 3, 16, 16) and source.x.dtype is torch.float32
    assert -1 <= source.x.min() < -0.5 and 0.5 < source.x.max() <= 1
    assert source.indices == (0, 2, 4, 6, 8) and source.total == 10 and source.fps == 6


def count_decoded(monkeypatch):
    """A list that grows with each frame that is turned into a picture, and one with each that is decoded."""
    shown, decoded, upright = [], [], frames.upright
    monkeypatch.setattr(frames, "upright", lambda frame: shown.append(1) or upright(frame))
    opened = frames.opened

    class Watched:
        def __init__(self, container):
            self.container = container

        def demux(self, stream):
            return self.container.demux(stream)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(1)
                yield frame

    @contextmanager
    def watched(path):
        with opened(path) as (container, stream):
            yield Watched(container), stream
    monkeypatch.setattr(frames, "opened", watched)
    return shown, decoded


def test_a_video_is_decoded_once_and_only_up_to_the_last_wanted_frame(clip, monkeypatch):
    shown, decoded = count_decoded(monkeypatch)
    assert frames.read(clip, 16, 4, 2, start=1, stride=3).indices == (1, 4)
    assert len(decoded) == 5 and len(shown) == 2


def test_a_video_that_announces_more_frames_than_it_holds_is_chosen_from_anew(clip, monkeypatch):
    monkeypatch.setattr(frames.Video, "count", lambda self: 20)
    source = frames.read(clip, 16, 4, 5)
    assert source.total == 10 and source.indices == (0, 2, 4, 6, 8)


@pytest.mark.parametrize("fps, warns", [(Fraction(24), False), (Fraction(4), False), (Fraction(4, 5), True)])
def test_frames_that_are_far_apart_are_warned_of(fps, warns):
    source = frames.Source(torch.zeros(3, 3, 8, 8), (0, 30, 60), fps, 90)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frames.warn_if_far_apart(source, "clip.mp4")
    assert [str(w.message)[:50] for w in caught] == ["The chosen frames of clip.mp4 are 1.2 seconds apar"][:warns]


@pytest.mark.parametrize("size, fitted", [((100, 50), (64, 32)), ((50, 101), (32, 64)), ((51, 49), (32, 32)),
                                          ((33, 32), (32, 32))])
def test_the_aspect_is_kept_and_the_rest_cropped(size, fitted):
    assert frames.fit(Image.new("RGB", size), 32, 4).size == fitted


def test_cropping_takes_the_middle_without_squashing():
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (30, 0, 60, 30))
    middle = np.asarray(frames.fit(picture, 30, 30))
    assert middle.shape == (30, 90, 3)
    middle = np.asarray(frames.fit(picture.resize((70, 30)), 30, 30))
    assert middle.shape == (30, 60, 3) and (middle[:, 30] == 255).all() and (middle[:, 5] == 0).all()


def test_a_folder_of_images_goes_by_number(tmp_path):
    folder = numbered_folder(tmp_path / "f", [2, 10, 1])
    source = frames.read(folder, 40, 4, 3)
    assert [round(float(v + 1) * 12.75) for v in source.x[:, 0, 0, 0]] == [1, 2, 10] and source.fps == 8


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    (tmp_path / "f").mkdir()
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(ramp).save(tmp_path / "f/1.png")
    x = frames.read(tmp_path / "f", 64, 8, 1).x
    assert x[0, 0, 0].sub(torch.linspace(-1, 1, 64)).abs().max() < 0.02


def test_transparent_pictures_stand_on_white(tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "f/1.png")
    assert frames.read(tmp_path / "f", 8, 4, 1).x.min() == 1


def test_pictures_of_mixed_sizes_are_refused(tmp_path):
    folder = numbered_folder(tmp_path / "f", [1, 2])
    Image.new("RGB", (80, 40)).save(folder / "3.png")
    with pytest.raises(InputError, match="one size"):
        frames.read(folder, 40, 4, 3)


def text(path):
    path.write_text("not a video")


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


@pytest.mark.parametrize("make, message", [(text, "cannot be read as a video"), (audio_only, "no video stream"),
                                           (lambda p: None, "No such file"), (lambda p: p.mkdir(), "0 frames")])
def test_what_is_not_a_video_is_named(tmp_path, make, message):
    make(path := tmp_path / "clip.mp4")
    with pytest.raises(InputError, match=f"{message}|clip.mp4.*{message}"):
        frames.read(path, 16, 4, 2)


def test_a_size_below_the_models_multiple_is_refused(clip):
    with pytest.raises(InputError, match="not from 64 to 4096"):
        frames.read(clip, 32, 64, 2)


def test_what_is_written_can_be_read_again_enlarged_by_a_whole_factor(tmp_path):
    x = torch.linspace(-1, 1, 16)[None, None, None].expand(4, 3, 16, 16) * torch.tensor([1, 0.5, 0, -1]).view(4, 1, 1, 1)
    for name, write, tolerance in (("a.mp4", frames.write_mp4, 0.08), ("a.gif", frames.write_gif, 0.08)):
        write(tmp_path / name, x, Fraction(10))
        back = frames.read(tmp_path / name, 16, 4, 4)
        assert (back.x - x).abs().mean() < tolerance and back.fps == 10
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.video[0].width == 256
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_a_strip_has_the_source_above_the_result(tmp_path):
    columns = frames.strip_columns(12)
    assert columns == [0, 2, 3, 5, 6, 8, 9, 11] and frames.strip_columns(3) == [0, 1, 2]
    frames.write_strip(tmp_path / "strip.png", -torch.ones(12, 3, 16, 16)[columns], torch.ones(12, 3, 16, 16)[columns])
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (512, 8 * 256, 3)
    assert (strip[:256] == 0).all() and (strip[256:] == 255).all()


def test_bytes_and_numbers_are_inverse_to_each_other():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = frames.to_tensor(every)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(frames.to_uint8(x), every)


def test_rotation_flags_are_followed(tmp_path):
    class Turned:
        rotation = -90

        @staticmethod
        def to_ndarray(format):
            return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert frames.upright(Turned).size == (2, 3)


def test_a_video_is_the_same_bits_on_any_number_of_cores(tmp_path):
    frames.write_mp4(tmp_path / "x.mp4", torch.zeros(3, 3, 32, 32), fps=8)
    told = (tmp_path / "x.mp4").read_bytes()
    assert b" threads=1 " in told and b" mbtree=0 " in told                 # x264 writes into a file what it was told
