"""Broken and hostile clips: videos, GIFs, and folders of pictures."""
import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from hardening.broken import EITHER, ERROR, OK, flip, kind, train
from PIL import Image

CODECS = {"mp4": ("libx264", "yuv420p"), "mov": ("libx264", "yuv420p"), "mkv": ("ffv1", "yuv420p"),
          "gif": ("gif", "rgb8"), "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mpeg4", "yuv420p")}


def video(path, frames=4, size=(40, 32), codec="libx264", pixels="yuv420p", ticks=None):
    """A small video of noise that moves; ticks: when each frame is shown, in 24ths of a second."""
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for i in range(frames):
            picture = np.tile(np.roll(noise, i, 1), (size[1] // 16 + 1, size[0] // 16 + 1, 1))[:size[1], :size[0]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = ticks[i] if ticks else i, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def some_video(rng, place):
    suffix = rng.choice(sorted(CODECS))
    codec, pixels = CODECS[suffix]
    return video(place / f"in.{suffix}", codec=codec, pixels=pixels)


def pictures(place, sizes, suffix="png", mode="RGB"):
    (place / "in").mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size, 17 * i if mode in "LI;16P" else None).save(place / f"in/{i}.{suffix}")
    return place / "in"


# ---- videos --------------------------------------------------------------------------------------

@kind(EITHER)
def clip_truncated(rng, place):
    path = some_video(rng, place)
    data = path.read_bytes()
    path.write_bytes(data[:rng.randrange(len(data))])
    return train(path.name)


@kind(EITHER)
def clip_with_flipped_bits(rng, place):
    path = some_video(rng, place)
    data = path.read_bytes()
    head = rng.random() < 0.5                               # a container's sizes and counts lie at its ends
    path.write_bytes(flip(rng, data, 0 if head else len(data) // 2, len(data), rng.choice([1, 4, 40])))
    return train(path.name)


@kind(ERROR)
def clip_without_a_frame(rng, place):
    path = place / "in.mp4"
    video(path, frames=0) if rng.random() < 0.5 else path.write_bytes(b"")
    return train(path.name)


@kind(OK)
def clip_of_one_frame(rng, place):
    return train(video(place / "in.mp4", frames=1, size=(rng.randrange(16, 80, 2), 32)).name)


@kind(OK)
def clip_of_variable_rate(rng, place):
    ticks = sorted(rng.sample(range(1000), 6))
    return train(video(place / f"in.{rng.choice(['mp4', 'mkv'])}", 6, ticks=ticks).name)


@kind(OK)
def clip_of_odd_size(rng, place):
    size = rng.randrange(17, 200, 2), rng.randrange(17, 100, 2)
    return train(video(place / "in.mkv", size=size, codec="ffv1", pixels="yuv444p").name)


@kind(EITHER)
def clip_of_huge_size(rng, place):
    size = rng.choice([(8192, 16), (16, 8192), (2560, 1440), (2, 4096), (16384, 2)])
    return train(video(place / "in.mkv", 2, size, "ffv1", "bgr0").name)


@kind(OK)
def clip_with_alpha(rng, place):
    codec, pixels, suffix = rng.choice([("qtrle", "argb", "mov"), ("ffv1", "yuva420p", "mkv"), ("png", "rgba", "mov")])
    return train(video(place / f"in.{suffix}", codec=codec, pixels=pixels).name)


@kind(OK)
def clip_with_a_rotation_flag(rng, place):
    path = video(place / "in.mp4", size=(64, 32))
    data = path.read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40                   # version 0: the matrix begins 40 bytes after the flags
    turn = rng.choice([(0, 1, 0, -1, 0, 0), (-1, 0, 0, 0, -1, 0), (0, -1, 0, 1, 0, 0)])
    turned = b"".join(struct.pack(">i", n << 16) for n in turn)
    path.write_bytes(data[:matrix] + turned + data[matrix + 24:])
    return train(path.name)


@kind(OK)
def clip_of_10_bit(rng, place):
    pixels = rng.choice(["yuv420p10le", "yuv422p10le", "yuv444p10le"])
    return train(video(place / "in.mkv", codec=rng.choice(["libx264", "ffv1"]), pixels=pixels).name)


@kind(ERROR)
def clip_of_sound_only(rng, place):
    path = place / f"in.{rng.choice(['mp4', 'mkv', 'mov'])}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return train(path.name)


@kind(ERROR)
def clip_that_is_text_or_noise(rng, place):
    path = place / f"in.{rng.choice(['mp4', 'gif', 'webm', 'mov'])}"
    path.write_bytes(rng.choice([
        b"not a video\n" * 50, rng.randbytes(5000), b"\0" * 100, b"#EXTM3U\nhttp://localhost/a.ts\n", b"GIF89a",
        b"ffconcat version 1.0\nfile ../precious.txt\n", b"\x00\x00\x00\x18ftypmp42"]))
    return train(path.name)


@kind(ERROR)
def clip_that_names_another_file(rng, place):
    """A playlist or a script for FFmpeg, which would open the other, good clip."""
    other = rng.choice(["clip.mp4", str(place / "clip.mp4"), f"file://{place}/clip.mp4", "file:clip.mp4"])
    text = rng.choice([
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{other}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{other}'\nduration 0.25\n", f"file '{other}'\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="x"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="9">'
        f"<BaseURL>{other}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        f"[playlist]\nFile1={other}\nNumberOfEntries=1\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na={other}\n"])
    path = place / f"in.{rng.choice(['m3u8', 'mp4', 'txt', 'ffconcat', 'mpd', 'pls', 'sdp', 'mov', 'gif'])}"
    path.write_text(text)
    return train(path.name)


@kind(ERROR)
def clip_that_is_an_address(rng, place):
    """FFmpeg's own names for things that are no files."""
    return train(rng.choice([
        "file:clip.mp4", "concat:clip.mp4|clip.mp4", "subfile,,start,0,end,0,,:clip.mp4", "http://127.0.0.1:9/a.mp4",
        "cache:clip.mp4", "data:video/mp4;base64,AAAA", "tcp://127.0.0.1:9", "pipe:0", "testsrc", "async:clip.mp4",
        "hls+file:clip.mp4", "crypto:clip.mp4", "ftp://127.0.0.1:9/a", "/dev/video0", "lavfi:testsrc"]))


@kind(OK)
def clip_whose_name_means_something_elsewhere(rng, place):
    name = rng.choice([
        "12:30.mp4", "concat:a.mp4", "file:a.mp4", "http:.mp4", "%03d.mp4", "[1-3].mp4", "*.mp4", "a?b.mp4", "a#b.mp4",
        "-.mp4", "--steps.mp4", "a|b.mp4", "a,b;c.mp4", "~.mp4", "$HOME.mp4", "`x`.mp4", "'\".mp4", "CLIP.MP4",
        "a b.mp4", "0²0.mp4", "\x1b[31mred\x1b[0m.mp4", "a\nb.mp4", "\u202e4pm.mp4"])
    (place / "clip.mp4").rename(place / name)
    return train(f"./{name}")


@kind(ERROR)
def clip_that_is_no_file(rng, place):
    (place / "empty.mp4").mkdir()
    (place / "loop.mp4").symlink_to("loop.mp4")
    (place / "gone.mp4").symlink_to("nothing.mp4")
    return train(rng.choice(["empty.mp4", "loop.mp4", "gone.mp4", "none.mp4", "", "w/unet", "a" * 300, "/dev/null", "-",
                             "clip.mp4/x"]))


# ---- pictures ------------------------------------------------------------------------------------

@kind(ERROR)
def folder_of_mixed_sizes(rng, place):
    pictures(place, [(64, 32), (32, 64)] if rng.random() < 0.5 else [(90, 30), (30, 30), (60, 30)])
    return train("in")


@kind(OK)
def folder_of_odd_pictures(rng, place):
    mode, suffix = rng.choice([("L", "png"), ("I;16", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "bmp"),
                               ("RGBA", "webp"), ("LA", "png"), ("RGB", "jpeg")])
    pictures(place, [(rng.randrange(1, 90),) * 2] * 3, suffix, mode)
    return train("in")


@kind(OK)
def folder_with_odd_names(rng, place):
    """Numbers of other scripts, and what other systems leave beside the pictures."""
    folder = pictures(place, [(32, 32)] * 3)
    name = rng.choice(["0²0.png", "٣.png", "½.png", "①.png", "9" * 200 + ".png", "\x1b[31m.png", "a\n.png", " .png",
                       "-.PNG", "\udcff.png"])
    (folder / "0.png").rename(folder / name)
    for name in ("._1.png", ".DS_Store", "Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\x16\7" * 20)
    (folder / "__MACOSX").mkdir()
    return train("in")


@kind(EITHER)
def folder_with_a_broken_picture(rng, place):
    folder = pictures(place, [(40, 40)] * 3, rng.choice(["png", "jpg", "webp", "bmp"]))
    file = sorted(folder.iterdir())[0]
    data = file.read_bytes()
    file.write_bytes(rng.choice([data[:rng.randrange(len(data))], flip(rng, data, 0, len(data), 8), b"", b"text"]))
    return train("in")


@kind(ERROR)
def picture_of_another_format(rng, place):
    """Pillow chooses its reader by content. That of EPS starts Ghostscript; most others are seldom read by anyone."""
    file = pictures(place, [(8, 8)] * 2) / "0.png"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    formats = ["ppm", "tga", "pcx", "sgi", "tiff", "icns", "dds", "im", "msp", "xbm", "ico", "jp2"]
    chosen = rng.choice(["eps", "eps", *formats])
    if chosen == "eps":
        file.write_bytes(postscript)
    else:
        picture = Image.new("1" if chosen in ("msp", "xbm") else "RGB", (16, 16))
        picture.save(place / f"made.{chosen}")
        (place / f"made.{chosen}").rename(file)
    return train("in")


@kind(ERROR)
def picture_that_claims_to_be_huge(rng, place):
    file = pictures(place, [(8, 8)] * 2) / "0.png"
    data = file.read_bytes()
    side = rng.choice([20000, 2 ** 16, 2 ** 30])
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    file.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    return train("in")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side, suffix):
    """A small file that decodes to side x side pixels."""
    if suffix == "gif":                                     # the screen is large, the one frame a pixel
        return b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@kind(ERROR)
def picture_that_is_huge(rng, place):
    """A file of kilobytes that decodes to gigabytes, as a picture of a folder or as the clip."""
    suffix, side = rng.choice([("gif", 16000), ("gif", 65535), ("png", 13300), ("png", 13000)])
    folder = rng.random() < 0.5
    if folder:
        pictures(place, [(8, 8)] * 2)
    name = "in/0.png" if folder else f"in.{suffix}"
    (place / name).write_bytes(bomb(side, suffix))
    return train("in" if folder else name)


@kind(EITHER)
def clip_of_many_frames(rng, place):
    """A GIF of a few kilobytes that lasts for thousands of frames, and one whose frames claim to be many more."""
    frame = b",\0\0\0\0\x40\0\x40\0\0\2\2D\1\0"
    head = b"GIF89a" + struct.pack("<HH", 64, 64) + b"\x80\0\0\0\0\0\xff\xff\xff"
    (place / "in.gif").write_bytes(head + frame * rng.choice([2000, 20_000]) + b";")
    return train("in.gif")


@kind(ERROR)
def clip_that_is_a_device_or_a_pipe(rng, place):
    """Reading it never ends."""
    os.mkfifo(place / "in.mp4")
    pictures(place, [(8, 8)] * 2)
    os.mkfifo(place / "in/2.png")
    return train(rng.choice(["/dev/zero", "/dev/urandom", "in.mp4", "in"]))
