"""LoRA: small files that change a Stable Diffusion, merged into its weights. Hu et al., arXiv 2106.09685.

    W' = W + scale * alpha / rank * up @ down

`down` (rank, in) and `up` (out, rank) stand in the file, for a linear layer as for a convolution: a convolution's
`down` has its kernel, (rank, in, 3, 3), and its `up` is a 1x1 convolution, so that the same matrix product gives the
change (out, in, 3, 3). alpha is a tensor of the file, or stands in its header or in an adapter_config.json beside it.

Several tools have written such files, each with names of its own. `spellings` turns the name of one of OUR modules
into all that a file may call it; a file's names are looked up among those. The other way is not safe: kohya's names
have "_" for ".", and the modules' own names hold "_" too.
"""
import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinytav.errors import InputError, check_file
from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.checkpoint import read_file, read_header, read_json, some
from tinytav.stable_diffusion.config import LARGEST, Config

# the end of a key -> what the tensor is
ENDS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up",                           # kohya
    ".lora_A.weight": "down", ".lora_B.weight": "up",                               # PEFT, diffusers
    ".lora.down.weight": "down", ".lora.up.weight": "up",                           # older diffusers
    "_lora.down.weight": "down", "_lora.up.weight": "up",                           # its attention processors
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
# a part of a key -> the kind of file, which is not a plain LoRA
OTHER_KINDS = {
    "hada_": "a LoHa", "lokr_": "a LoKr", "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoRA with a middle tensor (lora_mid, a Tucker decomposition)",
}
# what stands before a layer's name: of kohya; of diffusers, ComfyUI and PEFT. The first files of diffusers held the
# U-Net alone, without its name
FLAT = dict(unet=("lora_unet_",), text_encoder=("lora_te_", "lora_te1_"))
DOTTED = dict(unet=("unet.", "diffusion_model.", "base_model.model.", ""),
              text_encoder=("text_encoder.", "base_model.model."))
BUNDLED = "bundle_emb."             # OneTrainer's learned words
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)           # what a LoRA may hold
SDXL = re.compile(r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]|add_embedding|label_emb")


def merge_lora(sd, path, scale=1.0):
    """Adds a LoRA, `scale` times, to sd.unet and sd.text_encoder, in float32. Returns how many layers it changes.

    Do it before inflation. The weights get new memory, so a memory-mapped checkpoint's file stays as it is. Several
    LoRAs may be merged one after another. Raises InputError, before any weight has changed, for a file that is not a
    LoRA, or is of a kind that is not read (LoHa, LoKr, DoRA), or belongs to another model: it names the keys.
    """
    layers = changeable(sd)
    pairs = pair_up(read_lora(path), spellings(layers), path)
    check_shapes(pairs, layers, path)
    alphas = read_alphas(path)
    merged = {}
    for place, pair in pairs.items():
        factor = strength(scale, place, pair, alphas, path)
        merged[place] = merged_weight(layers[place].weight, pair["down"], pair["up"], factor)
    if broken := [".".join(place) for place, weight in merged.items() if not weight.isfinite().all()]:
        raise InputError(f"{path}, merged {scale} times, gives weights that are NaN or infinite: {some(broken)}.")
    for place, weight in merged.items():
        layers[place].weight.data = weight
    return len(merged)


@dataclass(frozen=True)
class Lora(Config):
    """A LoRA as a run records it: the file, how many times it is merged, and the file's fingerprint."""
    file: str
    scale: float
    fingerprint: str

    LIMITS = dict(scale=(-LARGEST, LARGEST))

    @classmethod
    def from_text(cls, text):
        """FILE or FILE:SCALE -> Lora. Raises InputError if the file cannot be read."""
        # any other colon is a part of the name
        told = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:e[-+]?\d+)?|nan|inf)", text)
        file, scale = (told[1], float(told[2])) if told else (text, 1.0)
        if not abs(scale) <= LARGEST:
            raise InputError(f"The scale of the LoRA {text} is not from -{LARGEST} to {LARGEST}.")
        return cls(file, scale, fingerprint(file))


def merge(sd, loras):
    """merge_lora for several. Raises InputError if a file is not the one that is recorded."""
    for lora in loras:
        if fingerprint(lora.file) != lora.fingerprint:
            raise InputError(f"{lora.file} is another LoRA than the run was made with, whose fingerprint is "
                             f"{lora.fingerprint}.")
        merge_lora(sd, lora.file, lora.scale)


def fingerprint(path):
    """A short hash of the file, and of PEFT's settings beside it. Raises InputError if they cannot be read."""
    sha = hashlib.sha256()
    try:
        check_file(path)
        for part in [path, *adapter_configs(path)]:
            with open(part, "rb") as file:
                while block := file.read(2 ** 20):
                    sha.update(block)
    except OSError as error:
        raise InputError(f"The LoRA {path} cannot be read: {error.strerror}. --lora FILE names it anew.") from None
    return sha.hexdigest()[:16]


# ---- what the layers are called ------------------------------------------------------------------

def changeable(sd):
    """{(part, name): module} of the linear layers and convolutions that a LoRA may change."""
    return {(part, name): module for part in ("unet", "text_encoder")
            for name, module in getattr(sd, part).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def spellings(layers):
    """{what a file may call a layer, without the key's end: its (part, name)} for all `layers`."""
    names = [(part, one, name) for part, name in layers for one in (name, processor_name(name))]
    ldm = ldm_names({name for part, name in layers if part == "unet"})
    names += [("unet", one, name) for one, name in ldm.items()]
    return {spelling: (part, name) for part, one, name in names for spelling in spelled(part, one)}


def spelled(part, name):
    """A layer's name as kohya writes it, with "_" for ".", and as the others do."""
    return [prefix + name.replace(".", "_") for prefix in FLAT[part]] + [prefix + name for prefix in DOTTED[part]]


def processor_name(name):
    """What the attention processors of older diffusers call a layer of attention. Any other name stays as it is."""
    name = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", name)
    return re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", name)


def ldm_names(names):
    """{the single-file layout's name, such as input_blocks.1.1.proj_in: ours} for the U-Net's layers `names`.

    Every name that could stand there is translated by unet_key.
    """
    inner = {name.split(".", 4)[-1] for name in names if ".attentions." in name}
    places = [f"{way}_blocks.{i}.{j}" for way in ("input", "output") for i in range(12) for j in range(3)]
    places += ["middle_block.0", "middle_block.1", "middle_block.2"]
    ldm = [f"{place}.{rest}" for place in places for rest in (*inner, *single_file.RESNET, "op", "conv")]
    found = {one: single_file.unet_key(f"{one}.weight").removesuffix(".weight") for one in (*ldm, *single_file.OUTER)}
    return {one: name for one, name in found.items() if name in names}


# ---- reading and checking ------------------------------------------------------------------------

def read_lora(path):
    """All tensors of a LoRA file. Raises InputError for other kinds of files."""
    tensors = read_file(path, "LoRA")
    if words := {key.split(".")[1] for key in tensors if key.startswith(BUNDLED)}:
        warnings.warn(f"{path} also holds learned words, which are not used: {', '.join(sorted(words))}.")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}
    for key in tensors:
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise InputError(f"{path} is {kind}, because it holds {key}. Only plain LoRA is read: linear layers, "
                                 "1x1 and 3x3 convolutions.")
        if SDXL.search(key) or "attn2" in key and "to_k" in key and 2048 in tensors[key].shape:
            raise InputError(f"{path} is a LoRA for SDXL, because it holds {key}. It does not fit Stable Diffusion 1.x "
                             "or 2.x.")
    return tensors


def pair_up(tensors, table, path):
    """A file's tensors -> {(part, name): {"down", "up" and perhaps "alpha": tensor}}, by the names in `table`."""
    pairs, unknown = {}, []
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        place = table.get(key.removesuffix(end)) if end else None
        if place is None:
            unknown.append(key)
        elif ENDS[end] in pairs.setdefault(place, {}):
            raise InputError(f"{path} holds {'.'.join(place)} twice, under two names, of which one is {key}.")
        else:
            pairs[place][ENDS[end]] = tensor
    if not pairs:
        raise InputError(f"{path} is not a LoRA for this model: it holds {some(unknown) or 'nothing'}.")
    if unknown:
        raise InputError(f"{path} does not fit this model, which has no layer for {some(unknown)}.")
    if alone := [".".join(place) for place, pair in pairs.items() if not {"down", "up"} <= pair.keys()]:
        raise InputError(f"{path} holds only a part of the LoRA for {some(alone)}: each layer needs down and up.")
    return pairs


def check_shapes(pairs, layers, path):
    """Raises InputError where a pair does not fit its layer, or is not of floating-point numbers."""
    wrong = []
    for place, pair in pairs.items():
        weight = layers[place].weight
        if not fits(weight, **pair):
            told = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in pair.items())
            wrong.append(f"{'.'.join(place)} has the shape {tuple(weight.shape)}, the file {told}")
    if wrong:
        raise InputError(f"{path} does not fit this model: {some(wrong, '; ')}. A LoRA holds floating-point numbers, "
                         "and one for Stable Diffusion 1.x does not fit 2.x, nor the other way round.")


def fits(weight, down, up, alpha=None):
    """Is up @ down of the shape of weight? A linear layer may stand in the file as a 1x1 convolution, or vice versa."""
    if min(down.ndim, up.ndim) < 2 or len(down) == 0 or alpha is not None and alpha.numel() != 1:
        return False
    if down.dtype not in NUMBERS or up.dtype not in NUMBERS:                # some tools write alpha as an integer
        return False
    sizes = [[n for n in z.shape[1:] if n != 1] for z in (down, weight)]
    return sizes[0] == sizes[1] and up.shape[:2] == (len(weight), len(down)) and up.numel() == len(weight) * len(down)


def adapter_configs(path):
    """The file beside it in which PEFT keeps its settings: a list of one or none."""
    file = Path(path).parent / "adapter_config.json"
    return [file] if file.is_file() else []


def read_alphas(path):
    """The settings that decide alpha where no tensor says it, {part: a dict in PEFT's words}. Raises InputError.

    diffusers writes them into the header, each name with "unet." or "text_encoder." before it; a U-Net alone without.
    """
    names, header = read_header(path)
    if text := header.get("lora_adapter_metadata"):
        try:
            settings = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path}: lora_adapter_metadata in its header cannot be read as JSON.") from None
        parts = {part: {name.removeprefix(f"{part}."): value for name, value in settings.items()
                        if name.startswith(f"{part}.")} for part in ("unet", "text_encoder")}
        return parts if any(parts.values()) else dict(unet=settings, text_encoder={})
    if any(name.startswith("base_model.model.") for name in names):         # PEFT's own file
        if files := adapter_configs(path):
            return dict.fromkeys(("unet", "text_encoder"), read_json(files[0]))
        warnings.warn(f"{path} has no adapter_config.json beside it, which says alpha: it is taken to be the rank.")
    return dict(unet={}, text_encoder={})


def strength(scale, place, pair, alphas, path):
    """scale * alpha / rank of one layer, as PEFT computes it: LoraConfig's alpha_pattern, lora_alpha and use_rslora."""
    part, name = place
    rank, settings = len(pair["down"]), alphas[part]
    if "alpha" in pair and settings:
        raise InputError(f"{path} says alpha twice: by tensors, and in its settings.")
    if not settings:
        return scale * (float(pair.get("alpha", rank)) or rank) / rank          # absent or 0: as if it were the rank
    try:
        patterns = dict(settings.get("alpha_pattern") or {})
        pattern = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", name)), None)
        alpha = float(patterns[pattern] if pattern is not None else settings.get("lora_alpha", 8))     # PEFT's default
    except (TypeError, ValueError, re.error):
        raise InputError(f"{path}: its settings do not say alpha in PEFT's words.") from None
    return scale * alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def merged_weight(weight, down, up, factor):
    """weight + factor * up @ down (equation 3, section 4.1), computed in float32, in weight's dtype."""
    down, up = (z.to(weight.device, torch.float32).flatten(1) for z in (down, up))
    return (weight.detach().float() + factor * (up @ down).view(weight.shape)).to(weight.dtype)
