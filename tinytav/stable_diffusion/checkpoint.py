"""Stable Diffusion from disk: a folder or a single file of safetensors, read strictly; then built.

Models are built on the meta device and take the memory-mapped tensors as they are, so that loading needs no second
copy. Nothing is ever unpickled.
"""
import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tinytav.errors import InputError
from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.tokenizer import END, Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig

MODELS = dict(unet=(UNet, UNetConfig), vae=(VAE, VAEConfig), text_encoder=(TextEncoder, TextEncoderConfig))
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
STEMS = ("diffusion_pytorch_model", "model")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


@dataclass
class Checkpoint:
    """A Stable Diffusion as it lies on disk. `parts`: {a name of MODELS: (config, tensors, where they come from)}."""
    parts: dict
    schedule: Schedule
    tokenizer: Tokenizer
    fingerprint: str                # of the weights as they are on disk

    def build(self, device="cpu", dtype=torch.float32):
        """{a name of MODELS: the model on `device`}, in eval mode and without gradients.

        dtype: of the weights. Raises InputError naming the file, and the tensors that are missing, unexpected or
        misshapen.
        """
        return {name: build(Model, *self.parts[name], dtype).to(device) for name, (Model, _) in MODELS.items()}


def read(path, tokenizer=None, prediction=None, UNetConfig=UNetConfig):
    """A Stable Diffusion folder or single file -> Checkpoint.

    tokenizer: a folder, or "hub:NAME" to download; by default the checkpoint's own. prediction: "epsilon" or "v", where
    the file does not tell. UNetConfig: reads the config.json of a folder's U-Net. Raises InputError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        parts, schedule = _read_folder(path, prediction, UNetConfig)
    elif path.is_file():
        parts, schedule = _read_single_file(path, prediction)
    else:
        raise InputError(f"No weights at {path}: name a Stable Diffusion folder or a .safetensors file with --weights.")
    text_config = parts["text_encoder"][0]
    tokenizer = _find_tokenizer(path, tokenizer, pad="!" if text_config.hidden_size == 1024 else END)
    if tokenizer.size > text_config.vocab_size or tokenizer.length > text_config.max_position_embeddings:
        raise InputError(f"The tokenizer knows {tokenizer.size} tokens and makes rows of {tokenizer.length}, the text encoder "
                         f"in {path} {text_config.vocab_size} and {text_config.max_position_embeddings}: they do not belong "
                         "together.")
    return Checkpoint(parts, schedule, tokenizer, fingerprint(parts, schedule, tokenizer))


def build(Model, config, tensors, where, dtype=torch.float32):
    """Model(config) holding `tensors` (a dict), which must fit exactly. They are converted to dtype."""
    try:
        with torch.device("meta"):
            model = Model(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:     # torch's words for numbers that clash
        raise InputError(f"{where}: no {Model.__name__} can be built of its config.json: {error}.") from None
    wanted = model.state_dict()
    tensors = modern_names(tensors, wanted)
    problems = _listed("missing", wanted.keys() - tensors.keys()) + _listed("unexpected", tensors.keys() - wanted.keys())
    for name in wanted.keys() & tensors.keys():
        tensor, shape = tensors[name], wanted[name].shape
        if [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]:
            tensor = tensor.reshape(shape)                      # a 1x1 convolution saved as a linear layer, or vice versa
        if tensor.shape != shape:
            problems.append(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is of type {tensor.dtype}, not floating-point")
        elif not tensor.is_meta and not tensor.float().isfinite().all():        # a meta tensor has no values
            problems.append(f"{name} holds NaN or infinite values")
        tensors[name] = tensor.to(dtype)
    if problems:
        raise InputError(f"{where} does not fit this {Model.__name__}: {'; '.join(problems[:6])}"
                         f"{f'; and {len(problems) - 6} problems more' if len(problems) > 6 else ''}.")
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def modern_names(tensors, wanted):
    """Names of older files -> today's: the VAE's attention, CLIP without its prefix, buffers that are constants."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids"):
            continue
        if (prefixed := f"text_model.{name}") in wanted:
            name = prefixed
        elif name not in wanted:
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                name = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.", name)
        out[name] = tensor
    return out


def _listed(what, names):
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what}: {', '.join(names[:3])}{more}"] if names else []


def read_json(path):
    """The JSON object in a file. Raises InputError."""
    try:
        d = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(d, dict):
        raise InputError(f"{path} holds a {type(d).__name__}, not a JSON object.")
    return d


def how_to_convert(path):
    """A sentence for whoever has pickled weights in a file, or in a folder."""
    path = Path(path)
    new = path.with_suffix(".safetensors") if path.suffix in PICKLED else "NEW_FOLDER"
    return ("Only .safetensors files are read. Convert it first, which runs no code in it: "
            f"python -m tinytav convert {path} {new}")


def read_tensors(path):
    """All tensors of one safetensors file, memory-mapped. Raises InputError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}. It may be truncated; fetch it again.") from None


def _component_files(folder):
    """The safetensors of one component: sharded or whole, full precision before fp16."""
    for stem in STEMS:
        for index, whole in ((f"{stem}.safetensors.index.json", f"{stem}.safetensors"),
                             (f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors")):
            if (folder / index).is_file():
                names = read_json(folder / index).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                    raise InputError(f"{folder / index} has no weight_map of file names.")
                return [folder / Path(name).name for name in sorted(set(names.values()))]
            if (folder / whole).is_file():
                return [folder / whole]
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    raise InputError(f"No {' or '.join(stem + '.safetensors' for stem in STEMS)} in {folder}"
                     + (f", only {pickles[0]}. {how_to_convert(folder.parent)}" if pickles else "."))


def read_component(folder, Config):
    """One component's folder -> (config, tensors, where)."""
    if not (folder / "config.json").is_file():
        raise InputError(f"No config.json in {folder}: that is not the folder of a model.")
    tensors = {}
    for file in _component_files(folder):
        tensors |= read_tensors(file)
    try:
        return Config.from_json(read_json(folder / "config.json")), tensors, str(folder)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def _read_folder(path, prediction, UNetConfig):
    missing = [name for name in MODELS if not (path / name).is_dir()]
    if missing:
        raise InputError(f"{path} is not a Stable Diffusion folder: it has no {', '.join(missing)}.")
    configs = {name: Config for name, (_, Config) in MODELS.items()} | {"unet": UNetConfig}
    parts = {name: read_component(path / name, Config) for name, Config in configs.items()}
    file = path / "scheduler" / "scheduler_config.json"
    try:
        schedule = read_json(file) | ({"prediction_type": PREDICTIONS[prediction]} if prediction else {})
        return parts, Schedule.from_json(schedule)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _read_single_file(path, prediction):
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file. {how_to_convert(path)}")
    parts = single_file.components(read_tensors(path), path)
    if parts["unet"][0].cross_attention_dim == 1024 and prediction is None:
        raise InputError(f"{path} is a Stable Diffusion 2.x file, which does not say what it predicts: add --prediction "
                         "epsilon for 2.0-base and 2.1-base (512 pixels), --prediction v for 2.0 and 2.1 (768 pixels).")
    parts = {name: (config, tensors, f"{path} ({name})") for name, (config, tensors) in parts.items()}
    return parts, Schedule(prediction_type=PREDICTIONS[prediction or "epsilon"])


def _find_tokenizer(path, tokenizer, pad):
    if tokenizer is not None:
        if str(tokenizer).startswith("hub:"):
            return Tokenizer.from_hub(tokenizer.removeprefix("hub:"), pad)
        return Tokenizer.from_folder(tokenizer, pad)
    base = path if path.is_dir() else path.parent
    for folder in (base / "tokenizer", base):
        if (folder / "vocab.json").is_file():
            return Tokenizer.from_folder(folder, pad)
    raise InputError(f"No tokenizer beside {path}: put vocab.json and merges.txt there, name their folder with "
                     "--tokenizer, or let --tokenizer hub:openai/clip-vit-large-patch14 download it.")


def fingerprint(parts, schedule, tokenizer):
    """A short hash of what decides the results: settings, vocabulary, and a thousand or two values of every tensor."""
    sha = hashlib.sha256(repr(unusual(schedule)).encode())
    sha.update(repr(sorted(tokenizer.bpe.get_vocab().items())).encode())
    for config, tensors, _ in parts.values():
        sha.update(repr(unusual(config)).encode())
        for name in sorted(tensors):
            tensor = tensors[name]
            values = tensor.flatten()[::max(1, tensor.numel() // 1024)].contiguous()
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def unusual(config):
    """The settings of a config that differ from its defaults. So a new setting does not change old fingerprints."""
    return [(f.name, getattr(config, f.name)) for f in fields(config) if getattr(config, f.name) != f.default]
