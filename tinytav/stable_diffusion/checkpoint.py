"""Stable Diffusion from disk: a folder or a single file of safetensors, read strictly; then built.

Models are built on the meta device and take the memory-mapped tensors as they are, so that loading needs no second
copy. Nothing is ever unpickled.
"""
import hashlib
import re
import shlex
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tinytav.errors import InputError, check_file
from tinytav.stable_diffusion import embedding, single_file
from tinytav.stable_diffusion.config import read_json
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.tokenizer import END, Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig

MODELS = dict(unet=(UNet, UNetConfig), vae=(VAE, VAEConfig), text_encoder=(TextEncoder, TextEncoderConfig))
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
STEMS = ("diffusion_pytorch_model", "model")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
PASSED_OVER = re.compile(r"(text_projection|logit_scale|loss|model_ema)\b")     # what trainers leave beside a part


def read(path, tokenizer=None, prediction=None, vae=None, embeddings=(), half=False, unet_config=UNetConfig):
    """A Stable Diffusion folder or single file -> (parts, Schedule, Tokenizer, fingerprints).

    parts: {a name of MODELS: (config, tensors, where they come from)}. fingerprints: of the weights as they are on
    disk, then with each learned word.

    tokenizer: a folder or a tokenizer.json; by default the checkpoint's own. prediction: "epsilon" or "v", where the
    file does not tell. vae: a folder or a file, in place of the checkpoint's own. embeddings: files of learned words.
    half: take fp16 files where both lie in a folder. unet_config: reads the config.json of a folder's U-Net. Raises
    InputError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        parts, schedule = _read_folder(path, prediction, half, unet_config)
    else:
        parts, schedule = _read_single_file(path, prediction)
    parts["vae"] = _choose_vae(path, parts.get("vae"), vae)
    text_config = parts["text_encoder"][0]
    tokenizer = _find_tokenizer(path, tokenizer, pad="!" if text_config.hidden_size == 1024 else END)
    if tokenizer.size != text_config.vocab_size or tokenizer.length > text_config.max_position_embeddings:
        raise InputError(f"The tokenizer knows {tokenizer.size} tokens and makes rows of {tokenizer.length}, the text "
                         f"encoder in {path} {text_config.vocab_size} and {text_config.max_position_embeddings}: they "
                         "do not belong together. Learned tokens stand in the tokenizer's JSON files.")
    marks = [fingerprint(parts, schedule, tokenizer)]
    for file in embeddings:
        word, vectors = embedding.parse(read_file(file, "embedding"), file)
        parts["text_encoder"] = embedding.add(word, vectors, tokenizer, *parts["text_encoder"])
        marks.append(short_hash(f"{marks[-1]} {word}".encode() + vectors.float().numpy().tobytes()))
    return parts, schedule, tokenizer, marks


def build(Model, config, tensors, where, dtype=torch.float32):
    """Model(config) holding `tensors` (a dict), which must fit exactly. They are converted to dtype."""
    try:
        with torch.device("meta"):
            model = Model(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:     # torch's words for numbers that clash
        raise InputError(f"{where}: no {Model.__name__} can be built of its config.json: {error}.") from None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = modern_names(tensors, shapes)
    for name in shapes.keys() & tensors.keys():     # a 1x1 convolution may be saved as a linear layer, or vice versa
        if [n for n in tensors[name].shape if n != 1] == [n for n in shapes[name] if n != 1]:
            tensors[name] = tensors[name].reshape(shapes[name])
    if problems := misfits(tensors, shapes):
        raise InputError(f"{where} does not fit this {Model.__name__}: {problems}.")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def misfits(tensors, shapes):
    """Why tensors {name: tensor} are not those of shapes {name: shape}, or not finite: a text, empty if they fit."""
    problems = [f"{what}: {some(sorted(names))}" for what, names in (
        ("missing", shapes.keys() - tensors.keys()), ("unexpected", tensors.keys() - shapes.keys())) if names]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor, shape = tensors[name], shapes[name]
        if tensor.shape != shape:
            problems.append(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is of type {tensor.dtype}, not floating-point")
        elif not tensor.is_meta and not tensor.float().isfinite().all():        # a meta tensor has no values
            problems.append(f"{name} holds NaN or infinite values")
    return some(problems, "; ")


def modern_names(tensors, wanted):
    """Names of older files -> today's: the VAE's attention, CLIP without its prefix. What no model has is left out."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids") or name not in wanted and PASSED_OVER.match(name):
            continue
        if (prefixed := f"text_model.{name}") in wanted:
            name = prefixed
        elif name not in wanted:
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                name = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.", name)
        out[name] = tensor
    return out


def some(names, comma=", "):
    """The first three of many names."""
    return comma.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def how_to_convert(path):
    """A sentence for whoever has a file of another kind than safetensors, or a folder with pickled weights."""
    path = Path(path)
    if path.is_file() and path.suffix not in PICKLED:
        kind = "GGUF holds rounded numbers, which nothing here computes with. " if path.suffix == ".gguf" else ""
        return f"Only .safetensors files are read. {kind}Look for the same model as .safetensors."
    new = path.with_suffix(".safetensors") if path.suffix in PICKLED else "NEW_FOLDER"
    return ("Only .safetensors files are read. Convert it first, which runs no code in it: "
            f"python -m tinytav convert {shlex.join([str(path), str(new)])}")


def read_file(path, what):
    """All tensors of a file that the user named. what: "weights", "VAE", ... Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No {what} at {path}: name a .safetensors file.")
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file. {how_to_convert(path)}")
    return read_tensors(path)


def read_tensors(path):
    """All tensors of one safetensors file, memory-mapped. Raises InputError."""
    with _opened(path) as file:             # torch.compile writes `_orig_mod.` into names
        return {name.replace("_orig_mod.", ""): file.get_tensor(name) for name in file.keys()}      # noqa: SIM118


def read_header(path):
    """The tensors' names and the metadata, a dict of texts, of one safetensors file. Raises InputError."""
    with _opened(path) as file:
        return file.keys(), file.metadata() or {}


@contextmanager
def _opened(path):
    try:
        check_file(path)
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}. It may be truncated: fetch it "
                         "again.") from None


def _component_files(folder, half=False):
    """The safetensors of one component: sharded or whole, full precision before fp16, or after it if `half`."""
    for stem in STEMS:
        full = (f"{stem}.safetensors.index.json", f"{stem}.safetensors")
        fp16 = (f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors")
        for index, whole in (fp16, full) if half else (full, fp16):
            if (folder / index).is_file():
                names = read_json(folder / index).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                    raise InputError(f"{folder / index} has no weight_map of file names.")
                return [folder / Path(name).name for name in sorted(set(names.values()))]
            if (folder / whole).is_file():
                return [folder / whole]
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    whole = folder.parent if (folder.parent / "unet").is_dir() else folder
    raise InputError(f"No {' or '.join(stem + '.safetensors' for stem in STEMS)} in {folder}"
                     + (f", only {others[0]}: rename it if that is what you want." if others else
                        f", only {pickles[0]}. {how_to_convert(whole)}" if pickles else "."))


def read_component(folder, Config, half=False):
    """One component's folder -> (config, tensors, where)."""
    if not (folder / "config.json").is_file():
        raise InputError(f"No config.json in {folder}: that is not the folder of a model.")
    tensors = {}
    for file in _component_files(folder, half):
        tensors |= read_tensors(file)
    try:
        return Config.from_json(read_json(folder / "config.json")), tensors, str(folder)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def _read_folder(path, prediction, half, unet_config):
    configs = {name: Config for name, (_, Config) in MODELS.items()} | {"unet": unet_config}
    missing = [name for name in configs if not (path / name).is_dir()]
    if {"unet", "text_encoder"} & set(missing):
        more = " Name a folder in its snapshots/." if (path / "snapshots").is_dir() else ""
        raise InputError(f"{path} is not a Stable Diffusion folder: it has no {', '.join(missing)}.{more}")
    parts = {name: read_component(path / name, configs[name], half) for name in configs if name not in missing}
    file = path / "scheduler" / "scheduler_config.json"
    try:
        schedule = read_json(file) | ({"prediction_type": PREDICTIONS[prediction]} if prediction else {})
        return parts, Schedule.from_json(schedule)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _read_single_file(path, prediction):
    if not path.is_file():
        raise InputError(f"No weights at {path}: name a Stable Diffusion folder or a .safetensors file with --weights.")
    parts = single_file.components(read_file(path, "weights"), path)
    prediction = prediction or _said_prediction(path)
    if parts["unet"][0].cross_attention_dim == 1024 and prediction is None:
        raise InputError(f"{path} is a Stable Diffusion 2.x file, which does not say what it predicts: add "
                         "--prediction epsilon for 2.0-base and 2.1-base (512 pixels), --prediction v for 2.0 and 2.1 "
                         "(768 pixels).")
    parts = {name: (config, tensors, f"{path} ({name})") for name, (config, tensors) in parts.items()}
    return parts, Schedule(prediction_type=PREDICTIONS[prediction or "epsilon"])


def _said_prediction(path):
    """What the header says that the net predicts, "epsilon" or "v" (ModelSpec); None where it does not say."""
    said = read_header(path)[1].get("modelspec.prediction_type")
    if said not in (None, "epsilon", "v"):
        raise InputError(f"{path} says that it predicts {said!r}. Only epsilon and v are computed; --prediction sets "
                         "one.")
    return said


def _choose_vae(path, own, other):
    """The part of the VAE: `other`, a folder or a file by either layout's names, or else the checkpoint's `own`."""
    if other is None:
        if own is None:
            raise InputError(f"{path} has no VAE: name one with --vae.")
        return own
    other = Path(other)
    if other.is_dir():
        part = read_component(other / "vae" if (other / "vae").is_dir() else other, VAEConfig)
    else:
        part = *single_file.vae(read_file(other, "VAE")), str(other)
    scale, expected = part[0].scaling_factor, (own[0] if own else VAEConfig()).scaling_factor
    if scale != expected:
        raise InputError(f"{other} scales its latents by {scale}, {path} by {expected}: they do not belong together.")
    return part


def _find_tokenizer(path, tokenizer, pad):
    if tokenizer is not None:
        return Tokenizer.from_folder(tokenizer, pad)
    base = path if path.is_dir() else path.parent
    for folder in (base / "tokenizer", base):
        if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
            return Tokenizer.from_folder(folder, pad)
    raise InputError(f"No tokenizer beside {path}: put vocab.json and merges.txt there, name their folder with "
                     "--tokenizer, or let --tokenizer hub:openai/clip-vit-large-patch14 download it.")


def fingerprint(parts, schedule, tokenizer):
    """A short hash of what decides the results: settings, vocabulary, and a thousand or two values of every tensor."""
    told = [repr(unusual(schedule)).encode(), repr(sorted(tokenizer.bpe.get_vocab().items())).encode()]
    for config, tensors, _ in (parts[name] for name in MODELS):
        told.append(repr(unusual(config)).encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            values = tensor.flatten()[::max(1, tensor.numel() // 1024)].contiguous()
            told.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            told.append(values.view(torch.uint8).numpy().tobytes())
    return short_hash(b"".join(told))


def short_hash(data):
    return hashlib.sha256(data).hexdigest()[:16]


def unusual(config):
    """The settings of a config that differ from its defaults. So a new setting does not change old fingerprints."""
    return [(f.name, getattr(config, f.name)) for f in fields(config) if getattr(config, f.name) != f.default]
