"""The single-file layout of Stable Diffusion (CompVis, A1111, civitai) told in the folder layout's names.

One renaming per component. Only published shapes exist in this layout: SD 1.x and SD 2.x.
"""
import re

from tinytav.errors import InputError
from tinytav.stable_diffusion.text_encoder import TextEncoderConfig
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.stable_diffusion.vae import VAEConfig

# upcast as 2.1's own config says; 2.0 and 2.1-base lose nothing by it
SD2_UNET = UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
                      upcast_attention=True)
SD2_TEXT = TextEncoderConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                             hidden_act="gelu")
UNET = "model.diffusion_model."                         # what the names of a U-Net's tensors begin with
CONTEXT = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = f"{UNET}input_blocks.0.0.weight"
HINT_CONVOLUTIONS = 8
TEXT_PLACES = ("cond_stage_model", "conditioner.embedders.0")       # CompVis' name, and that of its successor sgm
VAE_PREFIXES = ("first_stage_model.", "vae.")

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
OUTER = {"input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1",
         "time_embed.2": "time_embedding.linear_2", "middle_block.0": "mid_block.resnets.0",
         "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
         "out.0": "conv_norm_out", "out.2": "conv_out"}
# Applied in this order: the norm before the attention that holds it, the numbers of the way up last.
VAE = [(r"down\.(\d)\.block", r"down_blocks.\1.resnets"), (r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0"),
       (r"up\.(\d)\.block", r"up_blocks.\1.resnets"), (r"up\.(\d)\.upsample", r"up_blocks.\1.upsamplers.0"),
       (r"mid\.block_1", "mid_block.resnets.0"), (r"mid\.block_2", "mid_block.resnets.1"),
       (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"), (r"mid\.attn_1", "mid_block.attentions.0"),
       (r"\.([qkv])\.", r".to_\1."), (r"\.proj_out\.", ".to_out.0."), (r"nin_shortcut", "conv_shortcut"),
       (r"\.norm_out", ".conv_norm_out"), (r"up_blocks\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}")]
OPENCLIP = {"token_embedding.": "embeddings.token_embedding.",
            "positional_embedding": "embeddings.position_embedding.weight",
            "transformer.resblocks.": "encoder.layers.", "attn.": "self_attn.", "ln_1.": "layer_norm1.",
            "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
            "ln_final.": "final_layer_norm."}


def components(tensors, where):
    """All tensors of a single file -> {component: (config, its tensors by the folder layout's names)}.

    Some files have no VAE. Raises InputError, naming the file `where`, for anything that is not SD 1.x or SD 2.x.
    """
    sd2 = is_sd2(tensors, CONTEXT, where)
    if FIRST in tensors and tensors[FIRST].shape[1:2] != (4,):
        raise InputError(f"{where} is an inpainting or depth model: {FIRST} has the shape "
                         f"{tuple(tensors[FIRST].shape)}, which is not for 4 channels.")
    unet = {unet_key(key): tensor for key, tensor in _under(tensors, UNET).items()}
    if sd2:
        text = openclip_tensors(_under(tensors, *(f"{place}.model." for place in TEXT_PLACES)))
        parts = dict(unet=(SD2_UNET, unet), text_encoder=(SD2_TEXT, text))
    else:
        text = _under(tensors, *(f"{place}.transformer." for place in TEXT_PLACES))
        parts = dict(unet=(UNetConfig(), unet), text_encoder=(TextEncoderConfig(), text))
    if _under(tensors, *VAE_PREFIXES):
        parts["vae"] = vae(tensors)
    return parts


def is_sd2(tensors, context, where):
    """Is it SD 2.x, not 1.x? The width of the text context tells, `context` names a tensor. Raises InputError."""
    if context not in tensors or tensors[context].ndim < 2:
        raise InputError(f"{where} is not for Stable Diffusion 1.x or 2.x: it has no {context}. A LoRA, a VAE or an "
                         "SDXL file cannot be used alone.")
    width = tensors[context].shape[1]
    if width not in (768, 1024):
        raise InputError(f"{where}: its text context is {width} wide; Stable Diffusion 1.x has 768, 2.x has 1024. If a "
                         "config.json lies beside it, name the folder.")
    return width == 1024


def vae(tensors):
    """The VAE in a single file, or in a file of its own: (config, its tensors by the folder layout's names)."""
    tensors = _under(tensors, *VAE_PREFIXES) or tensors
    if any(".up_blocks." in key for key in tensors):            # the folder layout's names already
        return VAEConfig(), tensors
    return VAEConfig(), {vae_key(key): tensor for key, tensor in tensors.items()}


def _under(tensors, *prefixes):
    """The tensors whose names have the first of these prefixes that any name has, without it."""
    for prefix in prefixes:
        if found := {key.removeprefix(prefix): z for key, z in tensors.items() if key.startswith(prefix)}:
            return found
    return {}


def unet_key(key):
    """CompVis numbers the U's blocks through, a resampler among them: three a stage, stage by stage."""
    for old, new in OUTER.items():
        if key.startswith(old + "."):
            key = new + key.removeprefix(old)
    if match := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", key):
        way, number, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        stage, layer = divmod(number - (way == "input"), 3)
        side = "down" if way == "input" else "up"
        if rest.startswith(("op.", "conv.")):
            key = f"{side}_blocks.{stage}.{side}samplers.0.conv.{rest.partition('.')[2]}"
        else:
            key = f"{side}_blocks.{stage}.{'attentions' if part else 'resnets'}.{layer}.{rest}"
    for old, new in RESNET.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def controlnet_tensors(tensors):
    """A ControlNet's single file, perhaps with the prefix `control_model.` -> its tensors by the folder's names."""
    tensors = _under(tensors, "control_model.") or tensors
    return {controlnet_key(key): tensor for key, tensor in tensors.items()}


def controlnet_key(key):
    """The U-Net's names, and those of the 1x1 convolutions and of the hint's: SiLU takes every other number there."""
    if match := re.match(r"zero_convs\.(\d+)\.0\.(.+)", key):
        return f"controlnet_down_blocks.{match[1]}.{match[2]}"
    if match := re.match(r"middle_block_out\.0\.(.+)", key):
        return f"controlnet_mid_block.{match[1]}"
    if match := re.match(r"input_hint_block\.(\d+)\.(.+)", key):
        number = int(match[1]) // 2
        layer = {0: "conv_in", HINT_CONVOLUTIONS - 1: "conv_out"}.get(number, f"blocks.{number - 1}")
        return f"controlnet_cond_embedding.{layer}.{match[2]}"
    return unet_key(key)


def vae_key(key):
    for pattern, new in VAE:
        key = re.sub(pattern, new, key)
    return key


def openclip_tensors(tensors):
    """OpenCLIP's text tower. It fuses q, k and v; Stable Diffusion 2 does not use its last layer."""
    out = {}
    for key, tensor in tensors.items():
        if ".resblocks.23." in key or key in ("text_projection", "logit_scale"):
            continue
        for old, new in OPENCLIP.items():
            key = key.replace(old, new)
        if "in_proj_" in key:
            for name, third in zip("qkv", tensor.chunk(3)):
                out[key.replace("in_proj_", f"{name}_proj.")] = third
        else:
            out[key] = tensor
    return out
