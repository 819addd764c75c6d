"""Folders that the official Tune-A-Video code wrote: a Stable Diffusion whose U-Net is inflated and tuned already.

Its U-Net is stored as a UNet3DConditionModel: the image U-Net's config with "3D" for "2D", the image U-Net's tensors,
and in each transformer block T-Attn and its norm, `attn_temp.*` and `norm_temp.*`.
"""
import torch

from tinytav.errors import InputError

TEMPORAL = "_temp."                 # T-Attn's tensors and those of its norm have it in their names
BLOCK_TYPES = ("down_block_types", "up_block_types", "mid_block_type")


def image_config(config):
    """The parsed config.json of the official U-Net -> that of the image U-Net. Any other config stays as it is."""
    if config.get("_class_name") != "UNet3DConditionModel":
        return config
    return config | {name: in_2d(config[name]) for name in BLOCK_TYPES if name in config}


def in_2d(kind):
    """"CrossAttnDownBlock3D", or a list of such names -> the image U-Net's names."""
    if isinstance(kind, list):
        return [in_2d(one) for one in kind]
    return kind.replace("3D", "2D") if isinstance(kind, str) else kind


def split(tensors, where):
    """All tensors of a U-Net -> (the image U-Net's, the temporal ones in float32). Of an image U-Net these are none.

    Raises InputError, naming the folder `where`, if the temporal tensors are not exactly T-Attn's.
    """
    image = {name: tensor for name, tensor in tensors.items() if TEMPORAL not in name}
    temporal = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if TEMPORAL in name}
    if temporal:
        check(temporal, expected(image), where)
    return image, temporal


def expected(image):
    """{name: shape} of the temporal tensors: those of the same block's self-attention and of the norm before it."""
    shapes = {}
    for name, tensor in image.items():
        if ".attn1." in name:
            shapes[name.replace(".attn1.", ".attn_temp.")] = tensor.shape
        elif ".transformer_blocks.0.norm1." in name:
            shapes[name.replace(".norm1.", ".norm_temp.")] = tensor.shape
    return shapes


def check(temporal, shapes, where):
    """Raises InputError unless the temporal tensors are of these names and shapes, and finite."""
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - temporal.keys())]
    problems += [f"{name} is unexpected" for name in sorted(temporal.keys() - shapes.keys())]
    for name in sorted(temporal.keys() & shapes.keys()):
        if temporal[name].shape != shapes[name]:
            problems.append(f"{name} has the shape {tuple(temporal[name].shape)}, not {tuple(shapes[name])}")
        elif not temporal[name].is_meta and not temporal[name].isfinite().all():
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        more = f"; and {len(problems) - 3} problems more" if len(problems) > 3 else ""
        raise InputError(f"{where} is not a net that the official Tune-A-Video code tuned: "
                         f"{'; '.join(problems[:3])}{more}.")
