"""A video is read as a player shows it. Expected colours: the ffmpeg command line (5.1) and Chromium 156, by hand."""
import warnings
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from video_maker import (
    COLOURS,
    add_stream,
    differ,
    encode,
    numbered,
    numbers,
    quadrants,
    set_display_matrix,
    shown,
    write_video,
)

from tinytav.errors import InputError
from tinytav.files import frames, video

R, G, B, Y = COLOURS


def first(path):
    return frames.pictures(path)[0]


def warned(read, *args, **kwargs):
    """(What `read` returns, the texts of its warnings as a command shows them: each once.)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = read(*args, **kwargs)
    return result, [str(warning.message) for warning in caught]


# ---- Colours -------------------------------------------------------------------------------------

HDR = dict(codec="ffv1", pix_fmt="yuv444p10le", options={}, colorspace=9, color_primaries=9, color_range=1)


@pytest.mark.parametrize("transfer, signal, expected", [
    (16, ("7d4c38", "94944f", "9494c0", "202840"), ("d7171e", "f4ec00", "6d7bff", "001e3a")),
    (18, ("9d442f", "bfbfbf", "4070d0", "e0e060"), ("e01d28", "f2f2f2", "0065fa", "fdf400"))], ids=["PQ", "HLG"])
def test_high_dynamic_range_is_converted_and_said_once(tmp_path, transfer, signal, expected):
    """Expected: ffmpeg's filters that colour.to_standard names."""
    picture = quadrants(colours=signal).astype(np.uint16) * 257
    path = write_video(tmp_path / "hdr.mkv", [picture] * 3, color_trc=transfer, **HDR)
    pictures, texts = warned(frames.pictures, path)
    assert all(differ(shown(picture), expected) <= 3 for picture in pictures)
    assert len(texts) == 1 and "converted to standard range" in texts[0]


def test_high_dynamic_range_without_a_matrix_has_that_of_bt2020(tmp_path):
    pictures = []
    for colorspace in (9, 2):
        picture = quadrants(colours=("7d4c38", "94944f", "9494c0", "202840")).astype(np.uint16) * 257
        path = write_video(tmp_path / "hdr.mkv", [picture], color_trc=16, **HDR)
        data = path.read_bytes()
        assert data.count(b"\x55\xb1\x81\x09") == 1                               # Matroska's MatrixCoefficients
        path.write_bytes(data.replace(b"\x55\xb1\x81\x09", bytes([0x55, 0xb1, 0x81, colorspace])))
        pictures.append(np.asarray(warned(first, path)[0]))
    assert (pictures[0] == pictures[1]).all()


def test_greys_are_read_without_bias(tmp_path):
    levels = np.arange(256, dtype=np.uint8)
    with av.open(str(tmp_path / "grey.mkv"), "w") as container:
        stream = add_stream(container, np.zeros((64, 256, 3)), codec="ffv1", options={})
        planes = np.concatenate([np.tile(levels.clip(16, 235), (64, 1)), np.full((32, 256), 128, np.uint8)])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    exact = (levels.clip(16, 235) - 16.0) * 255 / 219
    difference = np.asarray(first(tmp_path / "grey.mkv"))[32] - exact[:, None]
    assert abs(difference.mean()) < 0.01 and abs(difference).max() < 0.5


@pytest.mark.parametrize("size, matrix, tagged", [((768, 576), 6, False), ((960, 720), 1, False),
                                                  ((1280, 544), 1, False), ((64, 48), 1, True), ((960, 720), 6, True)])
def test_colours_without_a_matrix_are_guessed_as_chromium_does(tmp_path, size, matrix, tagged):
    path = write_video(tmp_path / "x.mp4", [quadrants(*size)], colorspace=matrix)
    if not tagged:
        untagged = dict(options={"crf": "1", "x264-params": "colormatrix=undef"})
        write_video(path, [quadrants(*size)], colorspace=matrix, **untagged)
        strip_colour_box(path)
    assert differ(shown(first(path)), COLOURS) <= 3


def strip_colour_box(path):
    """Makes the box `colr` of an mp4, which names the matrix, one that readers pass over."""
    path.write_bytes(path.read_bytes().replace(b"colr", b"free"))


@pytest.mark.parametrize("name, stream", [("a.webm", dict(codec="libvpx-vp9", pix_fmt="yuva420p", options={})),
                                          ("a.mov", dict(codec="prores_ks", pix_fmt="yuva444p10le", options={}))])
def test_transparent_parts_of_a_video_are_white(tmp_path, name, stream):
    picture = np.dstack([quadrants(128, 128), np.full((128, 128), 255, np.uint8)])
    picture[:, 64:, 3] = 0
    path = write_video(tmp_path / name, [picture] * 3, **stream)
    assert differ(shown(first(path)), (R, "ffffff", B, "ffffff")) <= 3


# ---- Shapes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("matrix, expected", [
    ((1, 0, 0, 1), (R, G, B, Y)), ((-1, 0, 0, 1), (G, R, Y, B)), ((1, 0, 0, -1), (B, Y, R, G)),
    ((-1, 0, 0, -1), (Y, B, G, R)), ((0, 1, -1, 0), (B, R, Y, G)), ((0, -1, 1, 0), (G, Y, R, B)),
    ((0, 1, 1, 0), (R, B, G, Y)), ((0, -1, -1, 0), (Y, G, B, R))])
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix, expected):
    path = write_video(tmp_path / "x.mp4", [quadrants()])
    set_display_matrix(path, *matrix)
    assert differ(shown(first(path)), expected) <= 3
    assert first(path).size == ((64, 48) if matrix[0] else (48, 64))


def test_side_data_that_pyav_cannot_name_does_not_hide_the_rotation():
    class Frame:
        rotation = 90

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")
    assert shown(video.upright(Image.fromarray(quadrants()), Frame())) == (G, Y, R, B)


@pytest.mark.parametrize("sar, size", [(Fraction(64, 45), (91, 48)), (Fraction(1, 2), (32, 48)), (None, (64, 48))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, sar, size):
    settings = dict(sample_aspect_ratio=sar) if sar else {}
    assert first(write_video(tmp_path / "x.mp4", [quadrants()], **settings)).size == size


def test_the_rows_of_another_moment_are_left_out_of_an_interlaced_clip(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2] = 255
    path = write_video(tmp_path / "x.mp4", [picture], options={"crf": "1", "x264-params": "tff=1"}, pix_fmt="yuv444p")
    pictures, texts = warned(frames.pictures, path)
    assert pictures[0].size == (64, 64) and np.asarray(pictures[0]).min() > 245
    assert len(texts) == 1 and "interlaced" in texts[0]


# ---- Times ---------------------------------------------------------------------------------------

UNEVEN = [100 * i for i in range(10)] + [1000 + 500 * i for i in range(4)]      # 10 frames a second, then 2


@pytest.mark.parametrize("asked, indices, fps", [
    (dict(frames=6), (0, 4, 8, 10, 11, 12), Fraction(60, 26)), (dict(frames=4, start=10), (10, 11, 12, 13), 2),
    (dict(frames=7), (0, 3, 7, 10, 10, 11, 12), Fraction(70, 26)), (dict(frames=4, stride=2), (0, 2, 4, 6), 5),
    (dict(frames=14), tuple(range(14)), 10)])
def test_frames_of_a_variable_rate_are_spread_over_time(tmp_path, asked, indices, fps):
    path = write_video(tmp_path / "x.mkv", numbered(14), UNEVEN, fps=1000)
    source = frames.read(path, 32, 8, **asked)
    assert source.indices == indices and numbers(source.x) == list(indices)
    assert source.fps == fps and source.total == 14


def test_times_that_are_rounded_do_not_move_frames(tmp_path):
    path = write_video(tmp_path / "x.mkv", numbered(24), fps=24)                  # Matroska rounds 41.67 to 42 ms
    source = frames.read(path, 32, 8, 12)
    assert source.indices == tuple(range(0, 24, 2)) and source.fps == 12


@pytest.mark.parametrize("stamps, average, times, fps", [
    ([0, 42, 83, 125], 24, [0, 0.042, 0.083, 0.125], 24), ([0, 40, 80, 120], Fraction(5, 2), [0, 0.04, 0.08, 0.12], 25),
    ([80, 0, 40], 25, [0, 0.04, 0.08], 25), ([0, 0, 40], 10, [0, 0.1, 0.2], 10), ([None] * 3, 10, [0, 0.1, 0.2], 10),
    ([7], 24, [0], 24), ([7], None, [0], 30)])
def test_a_videos_clock(stamps, average, times, fps):
    """The average is without the stamps' rounding, but it counts how long the last frame stays."""
    stream = SimpleNamespace(average_rate=average, guessed_rate=30, time_base=Fraction(1, 1000))
    found, rate = video.clock(stamps, stream)
    assert [float(time) for time in found] == times and rate == fps


def test_frames_before_the_beginning_of_a_cut_clip_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(video.Video, "recount", lambda self: pytest.fail("counted twice"))
    path = write_video(tmp_path / "x.mp4", numbered(12), stamps=range(-200, 400, 50), fps=20, options={"bf": "0"})
    source = frames.read(path, 32, 8, 4)
    assert source.total == 8 and source.indices == (0, 2, 4, 6) and numbers(source.x) == [4, 6, 8, 10]


def test_one_frame_an_hour_is_read_and_written_at_that_rate(tmp_path):
    write_video(tmp_path / "x.mkv", numbered(8), fps=Fraction(1, 3600))
    source = frames.read(tmp_path / "x.mkv", 32, 8, 4)
    assert source.fps == Fraction(1, 7200)
    frames.write_mp4(tmp_path / "y.mp4", source.x, source.fps)
    assert frames.read(tmp_path / "y.mp4", 32, 8, 4).fps == Fraction(1, 7200)


# ---- Damage --------------------------------------------------------------------------------------

def damaged(path, bad=(36,)):
    """72 frames in groups of 12; the length of the bad packets' first unit is no length."""
    write_video(path, [np.roll(quadrants(), i, axis=1) for i in range(72)], options={"g": "12", "bf": "0", "crf": "20"})
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for i in bad:
        data[places[i]:places[i] + 4] = b"\xff" * 4
    path.write_bytes(data)
    return path


def test_frames_that_decode_are_used_and_the_lost_ones_counted(tmp_path):
    path = damaged(tmp_path / "x.mp4")
    pictures, texts = warned(frames.pictures, path)
    assert len(pictures) == 61 and len(texts) == 1 and "11 of 72 frames" in texts[0]     # ffmpeg: 61
    source, texts = warned(frames.read, path, 32, 8, 61)
    assert source.total == 61 and source.fps == 24 and len(texts) == 1
    source, texts = warned(frames.read, path, 32, 8, 6)                            # frame 35 is shown until 47 comes
    assert source.indices == (0, 12, 24, 35, 37, 49) and source.total == 61 and len(texts) == 1
    with pytest.raises(InputError, match="there are only 61, not 62"), pytest.warns(UserWarning, match="11 of 72"):
        frames.read(path, 32, 8, 62)


def test_damage_after_the_last_wanted_frame_is_not_met(tmp_path):
    source, texts = warned(frames.read, damaged(tmp_path / "x.mp4"), 32, 8, 5, stride=2)
    assert source.total == 72 and not texts


def test_a_video_without_a_whole_frame_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no frame can be decoded"):
        frames.read(damaged(tmp_path / "x.mp4", bad=range(72)), 32, 8, 2)


# ---- Streams, names, formats ---------------------------------------------------------------------

def test_the_stream_is_the_one_that_a_player_takes(tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        other = add_stream(container, quadrants(32, 32))
        wanted = add_stream(container, quadrants())
        other.disposition, wanted.disposition = 0, 1
        encode(container, other, [quadrants(32, 32)])
        encode(container, wanted, [quadrants()] * 2)
    assert [picture.size for picture in frames.pictures(tmp_path / "x.mp4")] == [(64, 48)] * 2


@pytest.mark.parametrize("read", [frames.read_all, lambda path: frames.read(path, 32, 8, 1)])
def test_a_video_without_frames_is_refused(tmp_path, read):
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(InputError, match="empty.avi has 0 frames"):
        read(tmp_path / "empty.avi")


@pytest.mark.parametrize("cover, message", [(True, "no video stream"), (False, "no video stream")])
def test_a_song_is_no_video_whether_or_not_it_has_a_cover(tmp_path, cover, message):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        if cover:
            picture = add_stream(container, quadrants(), codec="mjpeg", pix_fmt="yuvj420p", options={})
            picture.disposition = av.stream.Disposition.attached_pic
            encode(container, picture, [quadrants()])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(InputError, match=message):
        frames.read(tmp_path / "song.mp4", 32, 8, 1)


@pytest.mark.parametrize("name", ["12:30.mp4", "-i.mp4", "a%03d.mp4", "b\udcff.mp4", "é ü.MP4", "concat:x"])
def test_a_video_may_have_any_name(tmp_path, monkeypatch, name):
    write_video(tmp_path / "x.mp4", [quadrants()]).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert first(name).size == (64, 48) and len(frames.fingerprint(name)) == 16


@pytest.mark.parametrize("name, text", [
    ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nx.mp4\n#EXT-X-ENDLIST\n"),
    ("x.mp4.txt", "ffconcat version 1.0\nfile x.mp4\n"),
    ("x.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n")])
def test_a_playlist_opens_no_other_file(tmp_path, name, text):
    write_video(tmp_path / "x.mp4", [quadrants()])
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="cannot be read as a video"):
        frames.pictures(tmp_path / name)


def test_a_title_that_is_not_utf8_is_read(tmp_path):
    frames.write_mp4(tmp_path / "x.mp4", frames.to_tensor(np.stack([quadrants()])), 8, title="a dog ABC")
    data = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(data.replace(b"ABC", b"\xc8BC"))
    with video.opened(tmp_path / "x.mp4") as (container, _):
        assert container.metadata["title"] == "a dog \ufffdBC" and first(tmp_path / "x.mp4")


def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", [quadrants()])
    monkeypatch.setattr("tinytav.files.clips.MOST_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(video.Video, "frames", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="has pictures of 64x48 pixels"):
        frames.read(path, 32, 8, 1)


def test_a_video_that_becomes_too_large_is_not_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", [quadrants()])
    monkeypatch.setattr(video, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(InputError, match="no frame can be decoded"):
        frames.read(path, 32, 8, 1)


def test_a_long_reading_shows_its_progress(tmp_path, monkeypatch, capsys):
    path = write_video(tmp_path / "x.mp4", numbered(6))
    frames.read(path, 32, 8, 2)
    assert capsys.readouterr().err == ""                                           # it took less than two seconds
    bar = video.tqdm
    monkeypatch.setattr(video, "tqdm", lambda *args, delay, **kwargs: bar(*args, mininterval=0, **kwargs))
    assert frames.read(path, 32, 8, 2).indices == (0, 3)
    assert "reading" in (err := capsys.readouterr().err) and "/4" in err
