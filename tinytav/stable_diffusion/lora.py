"""LoRA: small files that change a Stable Diffusion, merged into its weights. Hu et al., arXiv 2106.09685.

    W' = W + scale * alpha / rank * up @ down

`down` (rank, in) and `up` (out, rank) stand in the file, for a linear layer as for a convolution: a convolution's
`down` has its kernel, (rank, in, 3, 3), and its `up` is a 1x1 convolution, so that the same matrix product gives the
change (out, in, 3, 3).

Several tools have written such files, each with names of its own. `spellings` turns the name of one of OUR modules
into all that a file may call it; a file's names are looked up among those. The other way is not safe: kohya's names
have "_" for ".", and the modules' own names hold "_" too.
"""
import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tinytav.errors import InputError
from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.checkpoint import how_to_convert, read_tensors
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
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)           # what a LoRA may hold
SDXL = re.compile(r"^lora_te[12]_|^text_encoder_2\.|transformer_blocks[._][1-9]|add_embedding|label_emb")


def merge_lora(sd, path, scale=1.0):
    """Adds a LoRA, `scale` times, to sd.unet and sd.text_encoder, in float32. Returns how many layers it changes.

    Do it before inflation. The weights get new memory, so a memory-mapped checkpoint's file stays as it is. Several
    LoRAs may be merged one after another. Raises InputError, before any weight has changed, for a file that is not a
    LoRA, or is of a kind that is not read (LoHa, LoKr, DoRA), or belongs to another model: it names the keys.
    """
    if not math.isfinite(scale):
        raise InputError(f"A LoRA cannot be merged {scale} times: the scale is a finite number, 1 by default.")
    layers = changeable(sd)
    pairs = pair_up(read_lora(path), spellings(layers, sd.unet.cfg), path)
    check_shapes(pairs, layers, path)
    merged = {place: merged_weight(layers[place].weight, pair, scale) for place, pair in pairs.items()}
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
        file, colon, scale = text.rpartition(":")
        try:
            scale = float(scale) if colon else 1.0
        except ValueError:                          # the colon is a part of the name
            colon = ""
        if not colon:
            file, scale = text, 1.0
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


def same(loras, others):
    """Are these the same LoRAs at the same scales, wherever their files lie?"""
    return [(one.fingerprint, one.scale) for one in loras] == [(one.fingerprint, one.scale) for one in others]


def exchange(net, text_encoder, old, new):
    """Takes the LoRAs `old` out of a tuned net and the text encoder, and puts `new` in. What was tuned stays."""
    inverse = [replace(lora, scale=-lora.scale) for lora in old]
    merge(SimpleNamespace(unet=net, text_encoder=text_encoder), inverse + list(new))


def fingerprint(path):
    """A short hash of the file. Raises InputError if it cannot be read."""
    sha = hashlib.sha256()
    try:
        with open(path, "rb") as file:
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


def spellings(layers, cfg):
    """{what a file may call a layer: its (part, name)} for all `layers`; cfg: the U-Net's."""
    table = {}
    for part, name in layers:
        names = unet_spellings(name, cfg) if part == "unet" else text_spellings(name)
        table |= dict.fromkeys(names, (part, name))
    return table


def unet_spellings(name, cfg):
    """All that files call the U-Net's layer `name`, without the key's end."""
    processor = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", name)
    return [
        "lora_unet_" + name.replace(".", "_"),                      # kohya
        "lora_unet_" + ldm_name(name, cfg).replace(".", "_"),       # kohya, on CompVis's names
        f"unet.{name}", f"unet.{processor}",                        # diffusers and PEFT; older diffusers
        name, processor,                                            # the first of its files held the U-Net alone
    ]


def text_spellings(name):
    """All that files call the text encoder's layer `name`, without the key's end."""
    processor = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", name)
    return ["lora_te_" + name.replace(".", "_"), f"text_encoder.{name}", f"text_encoder.{processor}"]


def ldm_name(name, cfg):
    """A U-Net layer's name in the single-file layout, such as input_blocks.1.1.proj_in: unet_key turned round."""
    for ldm, ours in single_file.OUTER.items():
        if name == ours or name.startswith(f"{ours}."):
            return inner_ldm_name(ldm + name.removeprefix(ours))
    side, stage, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    stage, layer = int(stage), int(layer)
    first = stage * (cfg.layers_per_block + 1)          # as many blocks a stage, on the way down with the downsampler
    if kind == "downsamplers":
        return f"input_blocks.{first + cfg.layers_per_block + 1}.0.op"
    if kind == "upsamplers":                            # in the stage's last block, behind resnet and transformer
        part = 2 if cfg.up_block_types[stage].startswith("CrossAttn") else 1
        return f"output_blocks.{first + cfg.layers_per_block}.{part}.{rest}"
    part = 1 if kind == "attentions" else 0
    block = f"input_blocks.{1 + first + layer}" if side == "down" else f"output_blocks.{first + layer}"
    return inner_ldm_name(f"{block}.{part}.{rest}")


def inner_ldm_name(name):
    """The parts of a resnet by the single-file layout's names."""
    for ldm, ours in single_file.RESNET.items():
        name = re.sub(rf"\.{ours}$", f".{ldm}", name)
    return name


# ---- reading and checking ------------------------------------------------------------------------

def read_lora(path):
    """All tensors of a LoRA file. Raises InputError for other kinds of files."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No LoRA at {path}: name a .safetensors file.")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file. {how_to_convert(path)}")
    tensors = read_tensors(path)
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
    for place, pair in pairs.items():
        for tensor in pair.values():
            if tensor.dtype not in NUMBERS:
                raise InputError(f"{path} holds {tensor.dtype} for {'.'.join(place)}: a LoRA holds floating-point "
                                 "numbers.")
    wrong = []
    for place, pair in pairs.items():
        if not fits(layers[place].weight, **pair):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in pair.items())
            wrong.append(f"{'.'.join(place)} has the shape {tuple(layers[place].weight.shape)}, the file {shapes}")
    if wrong:
        raise InputError(f"{path} does not fit this model: {some(wrong, '; ')}. A LoRA for Stable Diffusion 1.x does "
                         "not fit 2.x, nor the other way round.")


def fits(weight, down, up, alpha=None):
    """Is up @ down of the shape of weight? A linear layer may stand in the file as a 1x1 convolution, or vice versa."""
    if min(down.ndim, up.ndim) < 2 or len(down) == 0 or alpha is not None and alpha.numel() != 1:
        return False
    sizes = [[n for n in z.shape[1:] if n != 1] for z in (down, weight)]
    return sizes[0] == sizes[1] and up.shape[:2] == (len(weight), len(down)) and up.numel() == len(weight) * len(down)


def merged_weight(weight, pair, scale):
    """weight + scale * alpha / rank * up @ down (equation 3, section 4.1), computed in float32, in weight's dtype."""
    down, up = (pair[name].to(weight.device, torch.float32) for name in ("down", "up"))
    rank = len(down)
    alpha = float(pair.get("alpha", rank)) or rank      # absent or 0: as if it were the rank
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return (weight.detach().float() + scale * alpha / rank * change).to(weight.dtype)


def some(names, comma=", "):
    """The first three of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return comma.join(names[:3]) + more
