"""Broken clips, checkpoints, prompts and runs, each a function of a seeded random generator.

`KINDS` maps each kind to (function, what may come of it). The function spoils something in `place`, a folder with the
weights w, the clip clip.mp4, a finished run runs/done and an unfinished one runs/half, and returns the command to try.
"""
import json
import random
import struct
import zipfile
import zlib
from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

OK, ERROR, EITHER = "right result", "error sentence", "either"
KINDS = {}
CODECS = {"mp4": ("libx264", "yuv420p"), "mov": ("libx264", "yuv420p"), "mkv": ("ffv1", "yuv420p"), "gif": ("gif", "rgb8"),
          "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mpeg4", "yuv420p")}


def kind(outcome):
    def keep(function):
        KINDS[function.__name__.replace("_", " ")] = (function, outcome)
        return function
    return keep


def train(clip, prompt="a man", *more):
    return ["train.py", clip, prompt, "--weights", "w", "--out", "out", *more]


def flip(rng, data, low, high, count):
    """Bytes with `count` random bits turned over between low and high."""
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(low, max(low + 1, min(high, len(data))))] ^= 1 << rng.randrange(8)
    return bytes(data)


# ---- clips ---------------------------------------------------------------------------------------

def video(path, frames=4, size=(40, 32), codec="libx264", pixels="yuv420p", ticks=None):
    """A small video of noise that moves; ticks: when each frame is shown, in 24ths of a second."""
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
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
    path.write_bytes(rng.choice([b"not a video\n" * 50, rng.randbytes(5000), b"\0" * 100, b"#EXTM3U\nhttp://localhost/a.ts\n",
                                 b"ffconcat version 1.0\nfile ../precious.txt\n", b"GIF89a", b"\x00\x00\x00\x18ftypmp42"]))
    return train(path.name)


def pictures(place, sizes, suffix="png", mode="RGB"):
    (place / "in").mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size, 17 * i if mode in "LI;16P" else None).save(place / f"in/{i}.{suffix}")
    return place / "in"


@kind(ERROR)
def folder_of_mixed_sizes(rng, place):
    pictures(place, [(64, 32), (32, 64)] if rng.random() < 0.5 else [(90, 30), (30, 30), (60, 30)])
    return train("in")


@kind(OK)
def folder_of_odd_pictures(rng, place):
    mode, suffix = rng.choice([("L", "png"), ("I;16", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "bmp"), ("RGBA", "webp"),
                               ("LA", "png"), ("RGB", "jpeg")])
    pictures(place, [(rng.randrange(1, 90),) * 2] * 3, suffix, mode)
    return train("in")


@kind(EITHER)
def folder_with_a_broken_picture(rng, place):
    folder = pictures(place, [(40, 40)] * 3, rng.choice(["png", "jpg", "webp", "bmp"]))
    file = sorted(folder.iterdir())[0]
    data = file.read_bytes()
    file.write_bytes(rng.choice([data[:rng.randrange(len(data))], flip(rng, data, 0, len(data), 8), b"", b"text"]))
    return train("in")


@kind(ERROR)
def picture_that_claims_to_be_huge(rng, place):
    file = pictures(place, [(8, 8)] * 2) / "0.png"
    data = file.read_bytes()
    side = rng.choice([20000, 2 ** 16, 2 ** 30])
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    file.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    return train("in")


@kind(ERROR)
def clip_that_is_no_file(rng, place):
    (place / "empty.mp4").mkdir()
    (place / "loop.mp4").symlink_to("loop.mp4")
    return train(rng.choice(["empty.mp4", "loop.mp4", "none.mp4", "", "w/unet", "a" * 300, "/dev/null", "-", "clip.mp4/x"]))


# ---- checkpoints ---------------------------------------------------------------------------------

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def use_weights(rng):
    """Either script, on the weights in w."""
    return rng.choice([train("clip.mp4"), ["sample.py", "--prompt", "a man", "--weights", "w", "--frames", "2", "--steps", "1",
                                           "--out", "out"]])


def some_tensors(rng, place):
    part = rng.choice(sorted(PARTS))
    return place / "w" / part / f"{PARTS[part]}.safetensors"


def header_and_data(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_header(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil_tensors(rng, file):
    """One way in which a safetensors file is broken. Returns what may come of it."""
    data = file.read_bytes()
    header, values = header_and_data(file)
    header.pop("__metadata__", None)
    name, other = rng.sample(sorted(header), 2) if len(header) > 1 else sorted(header) * 2
    length = len(data) - len(values)
    way = rng.randrange(13)
    if way == 0:
        file.write_bytes(data[:rng.randrange(len(data))])
    elif way in (1, 2):
        file.write_bytes(flip(rng, data, 0, length, rng.choice([1, 2, 8])))
        return EITHER
    elif way == 3:
        file.write_bytes(struct.pack("<Q", rng.choice([2 ** 60, 2 ** 63, 2 ** 64 - 1, len(data), 0])) + data[8:])
    elif way == 4:
        header[name]["data_offsets"] = rng.choice([header[other]["data_offsets"], [0, 2 ** 62], [-4, 0], [8, 4]])
        write_header(file, header, values)
        return EITHER if name == other else ERROR
    elif way == 5:
        low, high = header[name]["data_offsets"]
        value = rng.choice([float("nan"), float("inf"), float("-inf")])
        place = low + rng.randrange((high - low) // 4) * 4
        write_header(file, header, values[:place] + struct.pack("<f", value) + values[place + 4:])
        return EITHER if header[name]["dtype"] != "F32" else ERROR
    elif way == 6:
        header[name]["shape"] = [1, *header[name]["shape"], 2]
        write_header(file, header, values)
    elif way == 7:
        header[name + rng.choice([".x", "é", "\n", "/../"])] = header.pop(name)
        write_header(file, header, values)
    elif way == 8:
        header[name]["dtype"] = rng.choice(["F64", "BF16", "I32", "U32", "F8_E4M3", "C64", "F4", "BOOL", "X", 5, None])
        write_header(file, header, values)
        return EITHER
    elif way == 9:
        file.unlink()
    elif way == 10:
        file.write_bytes(rng.choice([b"", b"{}", b"\x80\x04K\x05.", rng.randbytes(200), b"PK\3\4" + rng.randbytes(100)]))
    elif way == 11:
        file.unlink(), file.mkdir()
    else:
        file.write_bytes(flip(rng, data, length, len(data), 40))
        return EITHER
    return ERROR


@kind(EITHER)
def weights_with_broken_tensors(rng, place):
    outcome = spoil_tensors(rng, some_tensors(rng, place))
    return use_weights(rng), outcome


@kind(ERROR)
def weights_with_missing_shards(rng, place):
    file = some_tensors(rng, place)
    header, _ = header_and_data(file)
    shards = {name: f"{file.stem}-{i % 2}.safetensors" for i, name in enumerate(header)}
    file.rename(file.with_name(f"{file.stem}-0.safetensors"))
    index = rng.choice([dict(weight_map=shards), {}, [], dict(weight_map=["a"]), dict(weight_map={"a": 5}),
                        dict(weight_map={"a": ""}), dict(weight_map={"a": "../../precious.txt"}), dict(weight_map={})])
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    return use_weights(rng)


@kind(EITHER)
def weights_with_a_missing_file(rng, place):
    files = sorted(f for f in (place / "w").rglob("*") if f.is_file() and f.name != "defaults.json")   # without it: 500 steps
    rng.choice(files).unlink()
    return use_weights(rng)


@kind(ERROR)
def weights_that_are_a_pickle(rng, place):
    """One that would make a file outside, were it ever loaded: by its own name, and renamed to safetensors."""
    pickle = b"cos\nsystem\n(S'touch " + str(place / "pwned").encode() + b"'\ntR."
    if rng.random() < 0.5:
        some_tensors(rng, place).write_bytes(pickle)
        return use_weights(rng)
    name = f"model.{rng.choice(['ckpt', 'bin', 'pt', 'pth', 'pkl', 'safetensors'])}"
    (place / name).write_bytes(pickle)
    return ["sample.py", "--prompt", "a man", "--weights", name, "--out", "out"]


WRONG = [None, True, False, 0, -1, 1, 3, 7, 2 ** 31, 10 ** 30, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "x", "4", [], [0],
         [1, 2], ["a"], [None], [[1]], {}, {"a": 1}, "../../etc/x", "\ud800", [10 ** 9] * 2, [16, 32], [-16, 32], [16, "32"]]


def spoil_json(rng, file):
    """A JSON file with a wrong value somewhere, or that is none."""
    way = rng.randrange(10)
    if way == 0:
        file.write_bytes(rng.choice([b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"null", b"[]", b"5", b'"x"', b"9" * 5000,
                                     b"{" + b'"a":{' * 50_000]))
        return
    d = json.loads(file.read_text())
    name = rng.choice(sorted(d))
    if way == 1 and file.name != "defaults.json":
        del d[name]
    elif isinstance(d[name], list) and d[name] and way < 5:
        d[name][rng.randrange(len(d[name]))] = rng.choice(WRONG)
    else:
        d[name] = rng.choice(WRONG)
    file.write_text(json.dumps(d))


@kind(EITHER)
def weights_with_wrong_json(rng, place):
    files = [*(place / "w").rglob("*config.json"), place / "w/defaults.json", *(place / "w").rglob("*map.json")]
    spoil_json(rng, rng.choice(sorted(set(files))))
    return use_weights(rng)


@kind(EITHER)
def weights_with_a_broken_tokenizer(rng, place):
    folder = place / "w/tokenizer"
    way = rng.randrange(5)
    if way == 0:
        spoil_json(rng, folder / "vocab.json")
    elif way == 1:
        settings = dict(model_max_length=rng.choice(WRONG + [76, 78, 2]), pad_token=rng.choice(WRONG + ["!", "<|endoftext|>"]))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif way == 2:
        file = folder / "merges.txt"
        file.write_bytes(rng.choice([b"", b"a\n", b"a b c\n", b"zz yy\n", b"\xff\xff\n", rng.randbytes(500)]))
    elif way == 3:
        file = folder / rng.choice(["vocab.json", "merges.txt"])
        file.write_bytes(flip(rng, file.read_bytes(), 0, 4000, 5))
    else:
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab[rng.choice(sorted(vocab))] = rng.choice([650, 10 ** 6, 2 ** 32 - 1])
        (folder / "vocab.json").write_text(json.dumps(vocab))
    return use_weights(rng)


# ---- prompts and flags ---------------------------------------------------------------------------

PROMPTS = ["", " ", "\t\n", "word " * 10_000, "w" * 20_000, "🐼⛷️👨‍👩‍👧‍👦" * 20, "\x01\x02\x1b[31mred\x7f", "../../etc/x", "/etc/passwd", "..", ".",
           "a/b\\c:d*e?f", "con", "nul.txt", "<|endoftext|> <|startoftext|>", "\u202egnp.exe", "\u0301" * 500, "漢字" * 100, "𐍈" * 200,
           "\udcff\udcfe bytes", "--", "-x", "$(touch pwned)", "`touch pwned`", "%s%n{0}", "line\nbreak\r\nline", "source", "run",
           "preview-1", "\ufeffbom", "\uffff", "İSTANBUL ß ﬁ", "e\u0301" * 90, "\\", "'; drop", "~", "*"]


def some_prompt(rng):
    if rng.random() < 0.5:
        return rng.choice(PROMPTS)
    ranges = [(1, 32), (32, 127), (0x80, 0x250), (0x300, 0x370), (0x4e00, 0x9fff), (0x1f300, 0x1faff), (0x10330, 0x1034a)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.choice([1, 10, 300])))


@kind(EITHER)
def prompt_to_tune_on(rng, place):
    prompt = some_prompt(rng)
    return train("clip.mp4", prompt), ERROR if not prompt.strip() or "\udcff" in prompt else (
        EITHER if prompt.startswith("-") else OK)


@kind(EITHER)
def prompts_to_sample(rng, place):
    prompts = [some_prompt(rng) for _ in range(2)]
    return ["sample.py", "--run", "runs/done", "--prompt", *prompts], ERROR if "\udcff" in "".join(prompts) else (
        EITHER if any(prompt.startswith("-") for prompt in prompts) else OK)


@kind(EITHER)
def clip_with_a_strange_name(rng, place):
    name = some_prompt(rng).replace("/", "_")[:50].replace("\0", "_") or "x"
    path = place / f"{name}.mp4"
    (place / "clip.mp4").rename(path)
    return train(f"./{path.name}")


@kind(EITHER)
def flags_out_of_bounds(rng, place):
    number = lambda: rng.choice(["-1", "0", "1", "3", "8", "10000", "1000000", "1e9", "nan", "inf", "-inf", "x", "", "1e-45", "1e38",
                                 "9" * 30, "0x10", "１６"])
    if rng.random() < 0.5:
        flag = rng.choice(["--size", "--frames", "--start", "--stride", "--lr", "--seed"])
        return train("clip.mp4", "a man", f"{flag}={number()}", "--steps", "1")
    flag = rng.choice(["--size", "--frames", "--steps", "--guidance", "--seed"])
    return ["sample.py", "--prompt", "a man", "--weights", "w", f"{flag}={number()}", "--out", "out"] + (
        ["--frames=2"] if flag != "--frames" else ["--steps=1"])


# ---- runs ----------------------------------------------------------------------------------------

def use_run(rng, name):
    if name == "half":
        return ["train.py", "--resume", "runs/half"]
    return ["sample.py", "--run", "runs/done", "--prompt", "a man", *rng.choice(
        [[], ["--no-inversion"], ["--noise", "edit-friendly"], ["--steps", "2"]])]


@kind(EITHER)
def run_json_edited(rng, place):
    name = rng.choice(["half", "done"])
    file = place / f"runs/{name}/run.json"
    long = json.loads(file.read_text()) if file.exists() else {}
    spoil_json(rng, file)
    try:                                                    # more steps, or dearer ones, are no error: only not tried here
        d = json.loads(file.read_text())
        for key in ("steps", "ddim_steps"):
            if isinstance(d.get(key), int) and not isinstance(d[key], bool) and d[key] > 100:
                d[key] = long[key]
                file.write_text(json.dumps(d))
    except (ValueError, AttributeError, RecursionError):
        pass
    return use_run(rng, name)


@kind(EITHER)
def run_with_broken_tensors(rng, place):
    name = rng.choice(["half", "done"])
    files = sorted((place / f"runs/{name}").glob("*.safetensors"))
    spoil_tensors(rng, rng.choice(files))
    return use_run(rng, name)


@kind(EITHER)
def run_with_a_missing_file(rng, place):
    name = rng.choice(["half", "done"])
    rng.choice(sorted(f for f in (place / f"runs/{name}").iterdir() if f.is_file())).unlink()
    return use_run(rng, name)


@kind(ERROR)
def run_of_other_weights(rng, place):
    name = rng.choice(["half", "done"])
    file = some_tensors(rng, place)
    header, values = header_and_data(file)
    low, high = next(v["data_offsets"] for v in header.values() if "data_offsets" in v)
    write_header(file, header, values[:low] + struct.pack("<f", rng.random()) * ((high - low) // 4) + values[high:])
    return use_run(rng, name)


# ---- LoRA ----------------------------------------------------------------------------------------

MODULE = "tinytav/__main__.py"          # python -m tinytav
LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora_tensors(name=f"lora_unet_{LAYER}", rank=2, out=16, width=16):
    """One layer's LoRA in kohya's spelling, which fits the weights in w."""
    return {f"{name}.lora_down.weight": torch.full((rank, width), 0.1), f"{name}.lora_up.weight": torch.full((out, rank), 0.1),
            f"{name}.alpha": torch.tensor(1.)}


def use_lora(rng, text):
    return [*use_weights(rng), "--lora", text]


@kind(EITHER)
def lora_with_broken_tensors(rng, place):
    save_file(lora_tensors() | lora_tensors("lora_te_text_model_encoder_layers_0_mlp_fc1", out=96, width=24), place / "l.safetensors")
    outcome = spoil_tensors(rng, place / "l.safetensors")
    return use_lora(rng, "l.safetensors"), outcome


@kind(ERROR)
def lora_of_another_kind_or_model(rng, place):
    name = f"lora_unet_{LAYER}"
    ones = torch.ones(2, 2)
    strange = rng.choice([
        {f"{name}.hada_w1_a": ones}, {f"{name}.lokr_w1": ones}, {f"{name}.dora_scale": ones}, {f"{name}.lora_mid.weight": ones},
        {"lora_te1_x.alpha": ones}, {"text_encoder_2.x.lora_A.weight": ones}, {"": ones}, {".alpha": ones}, {"x.lora_up.weight": ones},
        {f"{name}.diff": ones}, {f"{name}.lora_down.weight": torch.ones(2)}, {f"{name}.lora_down.weight": torch.ones(())},
        {f"{name}.lora_down.weight": torch.ones(0, 16)}, {f"{name}.alpha": torch.ones(0)}, {f"{name}.alpha": torch.ones(2)},
        {f"{name}.lora_up.weight": torch.ones(2, 16)}, {f"{name}.lora_up.weight": torch.ones(16, 2, 3, 3)},
        {f"{name}.lora_down.weight": torch.ones(2, 16, 3, 3)}, {f"{name}.lora_down.weight": torch.ones(2, 16).int()},
        {f"{name}.lora_down.weight": torch.ones(2, 16) / 0}, {f"{name}.alpha": torch.tensor(float("nan"))},
        lora_tensors(f"{name}_x"), lora_tensors("lora_unet_"), lora_tensors("lora_unet_mid_block_attentions_0_norm"),
        lora_tensors("lora_unet_up_blocks_9_attentions_0_proj_in"), lora_tensors(f"unet.{LAYER}")])
    good = rng.choice([{}, lora_tensors()])
    save_file(good | strange, place / "l.safetensors")
    return use_lora(rng, "l.safetensors"), ERROR


@kind(ERROR)
def lora_that_is_another_file(rng, place):
    (place / "dir.safetensors").mkdir()
    (place / "text.safetensors").write_text("not a LoRA")
    (place / "old.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(place / "pwned").encode() + b"'\ntR.")
    (place / "old.safetensors").write_bytes((place / "old.pt").read_bytes())
    save_file({}, place / "empty.safetensors")
    return use_lora(rng, rng.choice([
        "dir.safetensors", "text.safetensors", "old.pt", "old.safetensors", "empty.safetensors", "nothing.safetensors", "", ":", "clip.mp4",
        "w", "w/unet/diffusion_pytorch_model.safetensors", "runs/done/tuned.safetensors", "a" * 300, "/dev/null", "w/unet/config.json"]))


@kind(EITHER)
def lora_with_a_scale_out_of_bounds(rng, place):
    save_file(lora_tensors(), place / "l.safetensors")
    scale = rng.choice(["nan", "inf", "-inf", "1e400", "0", "-1", "1e6", "1e7", "-1e6", "1e-40", "", "x", "1:1", "１", "0x1", "1_0", " 1"])
    return use_lora(rng, f"l.safetensors:{scale}")


@kind(EITHER)
def run_json_with_another_lora(rng, place):
    name = rng.choice(["half", "done"])
    save_file(lora_tensors(), place / "l.safetensors")
    entry = dict(file=rng.choice(["l.safetensors", "none", "", "w", "../../etc/x"]), scale=rng.choice([1, 0.5, 0]),
                 fingerprint=rng.choice(["", "0" * 16]))
    if rng.random() < 0.5:
        entry[rng.choice(sorted(entry))] = rng.choice(WRONG)
    file = place / f"runs/{name}/run.json"
    lora = rng.choice([[entry], [entry] * 3, [[entry]], entry, "l.safetensors", 5, [], [None]])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora": lora}))
    return use_run(rng, name), EITHER if lora == [] else ERROR


# ---- pickles, and what convert makes of them -----------------------------------------------------

def convert(source, target="out/model.safetensors"):
    return [MODULE, "convert", source, target]


def some_pickle(rng, place):
    """A checkpoint as trainers write it."""
    path = place / f"in.{rng.choice(['ckpt', 'pt', 'pth', 'bin'])}"
    tensors = load_file(place / "w/vae/diffusion_pytorch_model.safetensors")
    torch.save(rng.choice([tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors}]), path)
    return path


def archive(path, pickle, compressed=False, **records):
    """A file with the parts of one that torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, data in ({"data.pkl": pickle, "version": b"3\n", "byteorder": b"little"} | records).items():
            file.writestr(f"archive/{name}", data)
    return path


@kind(EITHER)
def pickle_truncated_or_with_flipped_bits(rng, place):
    path = some_pickle(rng, place)
    data = path.read_bytes()
    low, high = rng.choice([(0, 4000), (len(data) - 30_000, len(data)), (0, len(data))])
    path.write_bytes(rng.choice([data[:rng.randrange(len(data))], flip(rng, data, low, high, rng.choice([1, 3, 30]))]))
    return convert(path.name)


@kind(ERROR)
def pickle_that_would_run_code(rng, place):
    """It would make a file, in one of the ways that a pickle can call something, alone or in a checkpoint's archive."""
    touch = b"touch " + str(place / "pwned").encode()
    text = b"S'" + touch + b"'\n"
    short = bytes([len(touch)]) + touch if len(touch) < 256 else bytes([5]) + b"false"
    pickle = rng.choice([
        b"cos\nsystem\n(" + text + b"tR.", b"(" + text + b"ios\nsystem\n.", b"(cos\nsystem\n" + text + b"o.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.", b"\x80\x02cos\nsystem\nU" + short + b"\x85\x81.",
        b"cbuiltins\neval\n(S'open(\"pwned\", \"w\")'\ntR.", b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR.",
        b"csubprocess\nPopen\n(" + text + b"tR.", b"ctorch\nload\n(S'precious.txt'\ntR.", b"ctorch.hub\nload\n(S'x'\ntR.",
        b"cruntpy\n_run_code\n(S'x'\ntR.", b"ccollections\nOrderedDict\n(tRcos\nsystem\nb.", b"\x80\x02}X\x01\x00\x00\x00a"
        b"cnumpy.core.multiarray\nscalar\n(tRs."])
    path = place / "in.ckpt"
    if rng.random() < 0.2:
        path.write_bytes(pickle)
    else:
        archive(path, pickle, compressed=rng.random() < 0.3, **rng.choice([{}, {"code/x.py": b"x", "constants.pkl": pickle}]))
    return convert(path.name)


@kind(ERROR)
def pickle_that_is_no_checkpoint(rng, place):
    path = place / "in.pt"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I4\nt(I1\ntI00\n"
    contents = rng.choice([
        lambda: archive(path, b""), lambda: archive(path, b"."), lambda: archive(path, rng.randbytes(200)),
        lambda: archive(path, b"(" * 10 ** 6), lambda: archive(path, b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b"."),
        lambda: archive(path, b"N."), lambda: archive(path, b"}."), lambda: archive(path, b"cbuiltins\nbytearray\n(I" + b"9" * 14 + b"\ntR."),
        lambda: archive(path, b"}S'a'\n" + tensor + b"ccollections\nOrderedDict\n(tRtRs."),                  # no data/0
        lambda: archive(path, b"}S'a'\n" + tensor.replace(b"(I4\nt(I1", b"(I999999999999\nt(I0") + b"ccollections\nOrderedDict\n(tRtRs.",
                        **{"data/0": bytes(16)}),
        lambda: archive(path, b"}S'a'\n" + tensor.replace(b"tQI0\n", b"tQI99\n") + b"ccollections\nOrderedDict\n(tRtRs.",
                        **{"data/0": bytes(16)}),
        lambda: zipfile.ZipFile(path, "w").close(), lambda: path.write_bytes(b""), lambda: path.write_bytes(b"PK\3\4" + rng.randbytes(100)),
        lambda: torch.save([1, 2], path), lambda: torch.save({5: torch.ones(1)}, path), lambda: torch.save(torch.ones(3), path),
        lambda: torch.save({"a": torch.eye(3).to_sparse()}, path), lambda: torch.save({"a": torch.ones(1, device="meta")}, path),
        lambda: torch.save({"a": torch.ones(1).expand(10 ** 9)}, path), lambda: torch.save({"a": torch.ones(2) * 1j}, path),
        lambda: torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False), path.mkdir,
        lambda: archive(path, b"}.", compressed=True, **{"../../precious.txt": b"x"})])
    contents()
    return convert(path.name)


@kind(EITHER)
def names_for_convert(rng, place):
    torch.save({"a": torch.ones(1)}, place / "in.pt")
    names = ["in.pt", "w", "clip.mp4", "precious.txt", "none.pt", "", ".", "a" * 300, "/dev/null", "w/unet/config.json", "in.pt/x"]
    target = rng.choice(["out/a.safetensors", "out", "w", "precious.txt", "in.pt", "w/unet/diffusion_pytorch_model.safetensors", "",
                         "clip.mp4/a.safetensors", "/dev/null/a.safetensors", "out/" + "a" * 300 + ".safetensors", "out/a.bin"])
    return convert(rng.choice(names), target)


@kind(EITHER)
def folder_to_convert_with_a_broken_file(rng, place):
    folder = place / "w"
    for file in folder.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    way = rng.randrange(5)
    if way == 0:
        file.write_bytes(flip(rng, file.read_bytes(), 0, 4000, 10))
    elif way == 1:
        (folder / "unet/diffusion_pytorch_model.bin.index.json").write_text(rng.choice(["{}", "[", '{"weight_map": {"a": 5}}']))
    elif way == 2:
        archive(folder / "x.pt", b"cos\nsystem\n(S'touch " + str(place / "pwned").encode() + b"'\ntR.")
    elif way == 3:
        (folder / "loop").symlink_to(folder), (folder / "nowhere.bin").symlink_to("nothing")
    else:
        torch.save({"a": torch.ones(1)}, file.with_suffix(".pt")), torch.save({"a": torch.ones(1)}, file.with_suffix(".ckpt"))
    return convert("w", "out")


@kind(EITHER)
def official_net_with_broken_tensors(rng, place):
    """w as the official code would have left it, with one thing wrong in the U-Net."""
    file = place / "w/unet/diffusion_pytorch_model.safetensors"
    tensors = {name: z.clone() for name, z in load_file(file).items()}
    temporal = {name.replace(".attn1.", ".attn_temp."): z.clone() for name, z in tensors.items() if ".attn1." in name}
    temporal |= {name.replace(".norm1.", ".norm_temp."): z.clone() for name, z in tensors.items()
                 if ".transformer_blocks.0.norm1." in name}
    name, other = rng.sample(sorted(temporal), 2)
    way = rng.randrange(6)
    if way == 0:
        del temporal[name]
    elif way == 1:
        temporal[name] = temporal[name] * rng.choice([float("nan"), float("inf")])
    elif way == 2:
        temporal[name] = temporal[name][..., :-1].contiguous()
    elif way == 3:
        temporal[name.replace("_temp.", "_temp.x.")] = temporal.pop(name)
    elif way == 4:
        temporal = {name: temporal[name]}
    save_file(tensors | temporal, file)
    if way == 5:
        return use_weights(rng), spoil_tensors(rng, file)
    return use_weights(rng), ERROR


def make(name, seed, place):
    """Spoils `place` -> (script and arguments, what may come of it)."""
    function, outcome = KINDS[name]
    result = function(random.Random(f"{name} {seed}"), place)
    return result if isinstance(result, tuple) else (result, outcome)
