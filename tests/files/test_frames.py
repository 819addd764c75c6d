"""Choosing frames of a clip, and what there is to know of one."""
import re
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_clip

from tinytav.errors import InputError
from tinytav.files import frames, video


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", frames=10, size=(48, 40))


def choose(total, start=0, stride=None, exact=True, **asked):
    """Of `total` frames at 12 a second."""
    times = [Fraction(i, 12) for i in range(total)]
    return frames.choose(times, Fraction(12), start=start, stride=stride, exact=exact, path="the clip", **asked)


@pytest.mark.parametrize("total, asked, expected, fps", [
    (10, dict(frames=5), [0, 2, 4, 6, 8], 6), (10, dict(frames=3, start=1), [1, 4, 7], 4),
    (10, dict(frames=3, stride=2), [0, 2, 4], 6), (10, dict(frames=3, start=7, stride=1), [7, 8, 9], 12),
    (4, dict(frames=8, exact=False), [0, 1, 2, 3], 12), (4, dict(frames=8, stride=2, exact=False), [0, 2], 6)])
def test_which_frames_are_taken(total, asked, expected, fps):
    assert choose(total, **asked) == (expected, fps)


@pytest.mark.parametrize("total, asked, message", [
    (4, dict(frames=8), "4 frames. From frame 0 there are only 4, not 8: use --frames 4"),
    (0, dict(frames=1), "0 frames"),
    (10, dict(frames=6, stride=2), "From frame 0 with stride 2 there are only 5, not 6: use --frames 5"),
    (10, dict(frames=1, start=10), "10 frames; none is left from --start 10"),
    (1, dict(frames=2), "the clip has 1 frame. From frame 0 there is only 1, not 2")])
def test_too_few_frames_are_an_error_that_says_how_many_there_are(total, asked, message):
    with pytest.raises(InputError, match=message):
        choose(total, **asked)


@pytest.mark.parametrize("late, indices, fps", [(0.4, [0, 2, 4], 5), (0.6, [0, 2, 3], 5)])
def test_a_frame_that_is_late_by_half_a_frame_makes_a_clip_uneven(late, indices, fps):
    times = [Fraction(i, 10) for i in range(6)]
    times[4] += Fraction(late) / 10
    assert frames.choose(times, Fraction(10), 3, 0, None, True, "the clip") == (indices, fps)


def test_a_video_is_read_in_range_at_its_rate(clip):
    source = frames.read(clip, size=16, multiple=4, frames=5)
    assert source.x.shape == (5, 3, 16, 16) and source.x.dtype is torch.float32
    assert -1 <= source.x.min() < -0.5 and 0.5 < source.x.max() <= 1
    assert source.indices == (0, 2, 4, 6, 8) and source.total == 10 and source.fps == 6


def count_decoded(monkeypatch):
    """A list that grows with each frame that is turned into a picture, and one with each that is decoded."""
    pictures, decoded, picture, all_frames = [], [], video.Video.picture, video.Video.frames

    def counted(self, container, stream):
        for frame in all_frames(self, container, stream):
            decoded.append(1)
            yield frame
    monkeypatch.setattr(video.Video, "picture", lambda *args: pictures.append(1) or picture(*args))
    monkeypatch.setattr(video.Video, "frames", counted)
    return pictures, decoded


def test_a_video_is_decoded_once_and_only_up_to_the_last_wanted_frame(clip, monkeypatch):
    shown, decoded = count_decoded(monkeypatch)
    assert frames.read(clip, 16, 4, 2, start=1, stride=3).indices == (1, 4)
    assert len(decoded) == 5 and len(shown) == 2


def test_a_video_that_announces_more_frames_than_it_holds_is_chosen_from_anew(clip, monkeypatch):
    real, calls = video.clock, []

    def announces(stamps, stream):
        calls.append(stamps)
        return real(list(range(0, 20480, 1024)) if len(calls) == 1 else stamps, stream)
    monkeypatch.setattr(video, "clock", announces)
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


def test_all_frames_are_read_as_they_are(clip, tmp_path):
    x = frames.read_all(clip)
    assert x.shape == (10, 3, 280, 336) and x.dtype is torch.float32
    assert torch.equal(frames.to_uint8(x)[3], torch.tensor(np.asarray(frames.pictures(clip)[3])))
    audio_only(tmp_path / "song.mp4")
    with pytest.raises(InputError, match="no video stream"):
        frames.read_all(tmp_path / "song.mp4")


def test_a_fingerprint_is_of_the_content(clip, tmp_path):
    before = frames.fingerprint(clip)
    assert re.fullmatch("[0-9a-f]{16}", before) and frames.fingerprint(clip.rename(tmp_path / "other.mp4")) == before
    with open(tmp_path / "other.mp4", "ab") as file:
        file.write(b"x")
    assert frames.fingerprint(tmp_path / "other.mp4") != before


def test_a_folders_fingerprint_is_of_its_pictures_and_their_names(tmp_path):
    seen = set()

    def is_new():
        count = len(seen)
        seen.add(frames.fingerprint(tmp_path))
        return len(seen) > count
    for name, level in (("1.png", 1), ("2.png", 2)):
        Image.new("L", (8, 8), level).save(tmp_path / name)
        assert is_new()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._1.png").write_text("x")
    assert not is_new()
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    assert is_new()
    Image.new("L", (8, 8), 3).save(tmp_path / "3.png")
    assert is_new()


def test_bytes_and_numbers_are_inverse_to_each_other():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = frames.to_tensor(every)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(frames.to_uint8(x), every)
