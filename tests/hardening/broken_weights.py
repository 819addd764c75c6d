"""Broken and hostile weights: Stable Diffusion, tokenizers, LoRAs, and the pickles that convert reads."""
import json
import struct
import zipfile

import torch
from hardening.broken import EITHER, ERROR, MODULE, Case, flip, kind, sample, train
from safetensors.torch import load_file, save_file

# ---- checkpoints ---------------------------------------------------------------------------------

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def use_weights(rng):
    """Either script, on the weights in w."""
    return rng.choice([train("clip.mp4"), sample()])


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
        noise = rng.randbytes(200)
        file.write_bytes(rng.choice([b"", b"{}", b"\x80\x04K\x05.", noise, b"PK\3\4" + noise]))
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
    files = sorted(file for file in (place / "w").rglob("*") if file.is_file())
    files.remove(place / "w/defaults.json")                 # without it a run has 500 steps
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


WRONG = [None, True, False, 0, -1, 1, 3, 7, 2 ** 31, 10 ** 30, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "x",
         "4", [], [0], [1, 2], ["a"], [None], [[1]], {}, {"a": 1}, "../../etc/x", "\ud800", "a\0b", [10 ** 9] * 2,
         [16, 32], [-16, 32], [16, "32"], 10 ** 400, 30_000, [[]] * 1000]


def spoil_json(rng, file):
    """A JSON file with a wrong value somewhere, or that is none."""
    way = rng.randrange(10)
    if way == 0:
        file.write_bytes(rng.choice([b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"null", b"[]", b"5", b'"x"',
                                     b"9" * 5000, b"{" + b'"a":{' * 50_000, "{\"é\": 1}".encode("latin-1")]))
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
        settings = dict(model_max_length=rng.choice([*WRONG, 76, 78, 2]),
                        pad_token=rng.choice([*WRONG, "!", "<|endoftext|>"]))
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


# ---- LoRA ----------------------------------------------------------------------------------------

LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora_tensors(name=f"lora_unet_{LAYER}", rank=2, out=16, width=16):
    """One layer's LoRA in kohya's spelling, which fits the weights in w."""
    down, up = torch.full((rank, width), 0.1), torch.full((out, rank), 0.1)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.)}


def use_lora(rng, text):
    return [*use_weights(rng), "--lora", text]


@kind(EITHER)
def lora_with_broken_tensors(rng, place):
    text = lora_tensors("lora_te_text_model_encoder_layers_0_mlp_fc1", out=96, width=24)
    save_file(lora_tensors() | text, place / "l.safetensors")
    outcome = spoil_tensors(rng, place / "l.safetensors")
    return use_lora(rng, "l.safetensors"), outcome


@kind(ERROR)
def lora_of_another_kind_or_model(rng, place):
    name = f"lora_unet_{LAYER}"
    down, up, alpha = f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
    ones = torch.ones(2, 2)
    strange = rng.choice([
        {f"{name}.hada_w1_a": ones}, {f"{name}.lokr_w1": ones}, {f"{name}.dora_scale": ones}, {f"{name}.diff": ones},
        {f"{name}.lora_mid.weight": ones}, {"lora_te1_x.alpha": ones}, {"text_encoder_2.x.lora_A.weight": ones},
        {"": ones}, {".alpha": ones}, {"x.lora_up.weight": ones}, {"\x1b[31m.lora_up.weight": ones},
        {down: torch.ones(2)}, {down: torch.ones(())}, {down: torch.ones(0, 16)}, {down: torch.ones(2, 16, 3, 3)},
        {down: torch.ones(2, 16).int()}, {down: torch.ones(2, 16) / 0},
        {alpha: torch.ones(0)}, {alpha: torch.ones(2)}, {alpha: torch.tensor(float("nan"))},
        {up: torch.ones(2, 16)}, {up: torch.ones(16, 2, 3, 3)},
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
    (place / "gone.safetensors").symlink_to("nothing")
    return use_lora(rng, rng.choice([
        "dir.safetensors", "text.safetensors", "old.pt", "old.safetensors", "empty.safetensors", "nothing.safetensors",
        "gone.safetensors", "", ":", "clip.mp4", "w", "w/unet/diffusion_pytorch_model.safetensors",
        "w/unet/config.json", "runs/done/tuned.safetensors", "a" * 300, "/dev/null"]))


@kind(EITHER)
def lora_with_a_scale_out_of_bounds(rng, place):
    save_file(lora_tensors(), place / "l.safetensors")
    scale = rng.choice(["nan", "inf", "-inf", "1e400", "0", "-1", "1e6", "1e7", "-1e6", "1e-40", "", "x", "1:1", "１",
                        "0x1", "1_0", " 1"])
    return use_lora(rng, f"l.safetensors:{scale}")


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
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.",
        b"\x80\x02cos\nsystem\nU" + short + b"\x85\x81.",
        b"cbuiltins\neval\n(S'open(\"pwned\", \"w\")'\ntR.", b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR.",
        b"csubprocess\nPopen\n(" + text + b"tR.", b"ctorch\nload\n(S'precious.txt'\ntR.",
        b"ctorch.hub\nload\n(S'x'\ntR.", b"cruntpy\n_run_code\n(S'x'\ntR.",
        b"ccollections\nOrderedDict\n(tRcos\nsystem\nb.",
        b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\nscalar\n(tRs."])
    path = place / "in.ckpt"
    if rng.random() < 0.2:
        path.write_bytes(pickle)
    else:
        records = rng.choice([{}, {"code/x.py": b"x", "constants.pkl": pickle}])
        archive(path, pickle, compressed=rng.random() < 0.3, **records)
    return convert(path.name)


TENSOR = (b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n"
          b"(I4\nt(I1\ntI00\n")
END = b"ccollections\nOrderedDict\n(tRtRs."
DATA = {"data/0": bytes(16)}
NO_CHECKPOINTS = [                      # pickles around which an archive is written, and its other records
    (b"", {}), (b".", {}), (b"(" * 10 ** 6, {}), (b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".", {}), (b"N.", {}),
    (b"}.", {}),
    (b"cbuiltins\nbytearray\n(I" + b"9" * 14 + b"\ntR.", {}), (b"}S'a'\n" + TENSOR + END, {}),            # no data/0
    (b"}S'a'\n" + TENSOR.replace(b"(I4\nt(I1", b"(I999999999999\nt(I0") + END, DATA),
    (b"}S'a'\n" + TENSOR.replace(b"tQI0\n", b"tQI99\n") + END, DATA)]
NO_TENSORS = [[1, 2], {5: torch.ones(1)}, torch.ones(3), {"a": torch.eye(3).to_sparse()}, {"a": torch.ones(2) * 1j},
              {"a": torch.ones(1, device="meta")}, {"a": torch.ones(1).expand(10 ** 9)}]


@kind(ERROR)
def pickle_that_is_no_checkpoint(rng, place):
    path = place / "in.pt"
    way = rng.randrange(5)
    if way == 0:
        rng.choice([lambda: zipfile.ZipFile(path, "w").close(), path.mkdir,
                    lambda: path.write_bytes(rng.choice([b"", b"PK\3\4" + rng.randbytes(100)]))])()
    elif way == 1:
        torch.save(rng.choice(NO_TENSORS), path)
    elif way == 2:
        archive(path, rng.randbytes(200))
    elif way == 3:
        archive(path, b"}.", compressed=True, **{"../../precious.txt": b"x"})
    else:
        pickle, records = rng.choice(NO_CHECKPOINTS)
        archive(path, pickle, **records)
    return convert(path.name)


@kind(EITHER)
def pickle_that_would_be_larger_than_memory(rng, place):
    """Small files: zeros that were compressed, and many views of one storage."""
    path = place / "in.pt"
    way = rng.randrange(3)
    if way == 0:
        archive(path, bytes(2 ** 28), compressed=True)
    elif way == 1:
        size = 2 ** 26
        pickle = TENSOR.replace(b"I4\ntQ", b"I%d\ntQ" % size).replace(b"(I4\nt", b"(I%d\nt" % size)
        archive(path, b"}S'a'\n" + pickle + END, compressed=True, **{"data/0": bytes(4 * size)})
    else:
        whole = torch.zeros(10_000_000)
        torch.save({str(i): whole[i:] for i in range(200)}, path)
    return Case(convert(path.name), EITHER, memory=700)


@kind(EITHER)
def pickle_with_odd_names(rng, place):
    name = rng.choice(["__metadata__", "", "a" * 10_000, "\x1b[31m", "a\nb", "é", "\udcff", "../../a", "=1+1"])
    torch.save({name: torch.ones(2), "b": torch.ones(1)}, place / "in.pt")
    return convert("in.pt")


@kind(EITHER)
def pickle_in_the_old_format(rng, place):
    """torch's format before 1.6: read by the restricted reader, or refused."""
    path = some_pickle(rng, place)
    tensors = load_file(place / "w/vae/diffusion_pytorch_model.safetensors")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    if rng.random() < 0.5:
        data = path.read_bytes()
        path.write_bytes(rng.choice([data[:rng.randrange(len(data))], flip(rng, data, 0, len(data), 5)]))
    return convert(path.name)


@kind(EITHER)
def names_for_convert(rng, place):
    torch.save({"a": torch.ones(1)}, place / "in.pt")
    names = ["in.pt", "w", "clip.mp4", "precious.txt", "none.pt", "", ".", "a" * 300, "/dev/null", "w/unet/config.json",
             "in.pt/x"]
    target = rng.choice(["out/a.safetensors", "out", "out/a.bin", "out/" + "a" * 300 + ".safetensors", "w", "in.pt", "",
                         "precious.txt", "w/unet/diffusion_pytorch_model.safetensors", "clip.mp4/a.safetensors",
                         "/dev/null/a.safetensors"])
    return convert(rng.choice(names), target)


@kind(EITHER)
def folder_to_convert_with_a_broken_file(rng, place):
    folder = place / "w"
    for file in folder.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    way = rng.randrange(4)
    if way == 0:
        file.write_bytes(flip(rng, file.read_bytes(), 0, 4000, 10))
    elif way == 1:
        archive(folder / "x.pt", b"cos\nsystem\n(S'touch " + str(place / "pwned").encode() + b"'\ntR.")
    elif way == 2:
        (folder / "loop").symlink_to(folder), (folder / "nowhere.bin").symlink_to("nothing")
    else:
        for suffix in (".pt", ".ckpt"):
            torch.save({"a": torch.ones(1)}, file.with_suffix(suffix))
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
