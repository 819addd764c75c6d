"""Mutated pictures and small videos, read as clips: each gives frames or an InputError, soon and in little memory.

Warm runs this file as a script: fuzz.py FORMAT FIRST LAST. Each case is a function of its format and its number.
"""
import random
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

from PIL import Image, features

sys.path.append(str(Path(__file__).resolve().parents[1]))       # where Warm runs it
from hardening import broken, broken_clips

SECONDS = 20                    # of computing, for one case
EDGES = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff]
PICTURES = ["png", "apng", "jpg", "webp", "animated-webp", "bmp", "gif", *["avif"] * features.check("avif")]
FORMATS = [*PICTURES, "mp4", "mkv", "webm", "avi", "mov", "video-gif"]


def main():
    name, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    from tinytav.errors import InputError
    from tinytav.files import frames
    warnings.simplefilter("ignore")
    whole, counts = original(name), Counter()
    file = Path(f"in.{name.split('-')[-1].replace('apng', 'png')}")
    frames.read(file, 16, 4, 2, exact=False)
    for number in range(first, last):
        file.write_bytes(mutated(random.Random(f"{name} {number}"), whole))
        print("at", number)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)       # ends the process, C code too
        try:
            frames.read(file, 16, 4, 2, exact=False)
            counts["read"] += 1
        except InputError:
            counts["refused"] += 1
        except Exception as error:
            print(f"FAILURE {name} {number}: {type(error).__name__}: {error}")
        if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024) > broken.MEMORY:
            sys.exit(f"FAILURE {name} {number}: takes {peak} MB")
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(counts["read"], "read,", counts["refused"], "refused")


def run(warm, place, name, first, last):
    """Tries the cases first..last - 1 of a format -> (read, refused, [what is wrong])."""
    answer = warm(place, "tests/hardening/fuzz.py", name, first, last, limit=SECONDS + last - first, allowed=str(place))
    lines = (answer.out + answer.err).splitlines()
    problems = [line for line in lines if line.startswith("FAILURE")] + answer.broken.splitlines()
    if answer.status != 0 and not problems:
        at = [line for line in lines if line.startswith("at ")][-1:]
        problems.append(f"FAILURE {name} {at}: ends with {answer.status} {answer.err[-300:]}")
    counted = [line.split() for line in lines if line.endswith("refused")]
    read, refused = (int(counted[0][i]) for i in (0, 2)) if counted else (0, 0)
    return read, refused, problems


# ---- the files -----------------------------------------------------------------------------------

def original(name):
    """Writes a whole file of this format, with metadata where it has any -> its bytes."""
    if name not in PICTURES:
        suffix = name.split("-")[-1]
        codec, pixels = broken_clips.CODECS[suffix]
        return broken_clips.video(Path(f"in.{suffix}"), size=(24, 16), codec=codec, pixels=pixels).read_bytes()
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010e: "words", 0x0132: "2026:01:01 00:00:00"})
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0words"
    steps = [Image.linear_gradient("L").resize((24, 16)).rotate(90 * i).convert("RGB") for i in range(3)]
    path = Path(f"in.{name.split('-')[-1].replace('apng', 'png')}")
    moving = dict(save_all=True, append_images=steps[1:], duration=100) if name in MOVING else {}
    picture = steps[0].convert("P") if name == "png" else steps[0]
    picture.save(path, **moving, **{} if name in ("bmp", "gif") else dict(exif=exif.tobytes()))
    return path.read_bytes()


MOVING = ("apng", "animated-webp", "gif")


def mutated(rng, data):
    """A few changes of the kinds that break readers, rather at the beginning, where the sizes and counts lie."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = int(len(data) * rng.random() ** 2)
        length = rng.choice([1, 2, 4, 16, 64])
        way = rng.randrange(7)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            value = rng.choice(EDGES) & (256 ** min(length, 4) - 1)
            data[at:at + min(length, 4)] = value.to_bytes(min(length, 4), rng.choice(["big", "little"]))
        elif way == 2:
            del data[at:at + length]
        elif way == 3:
            data[at:at] = data[at:at + length]
        elif way == 4:
            data[at:at + length] = data[(other := rng.randrange(len(data))):other + length]
        elif way == 5:
            data[at:at + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[at:]
        if not data:
            return b""
    return mended(bytes(data)) if rng.random() < 0.7 else bytes(data)


def mended(data):
    """A PNG with the checksums of its chunks made right, so that what the chunks say is read; other data as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at:at + 4])[0]
        body = data[at + 4:at + 8 + length]
        parts.append(data[at:at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


if __name__ == "__main__":
    main()
