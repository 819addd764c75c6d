"""Tiny checkpoints with weights from fill.py, written as files: what the scripts and the loader are tested on."""
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
LAYOUTS = DATA.parents[2] / "shared/sd-layouts"     # ../shared/sd-layouts: real configs and keys, for extra tests
sys.path.insert(0, str(DATA))
import fill  # noqa: E402

UNET = dict(json.loads((DATA / "unet-sd1.config.json").read_text()), block_out_channels=[16, 32], layers_per_block=1,
            norm_num_groups=8, attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
VAE = dict(json.loads((DATA / "vae.config.json").read_text()), block_out_channels=[8, 16], layers_per_block=1)
TEXT = dict(json.loads((DATA / "clip-sd1.config.json").read_text()), vocab_size=650, num_hidden_layers=1)
SCHEDULER = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 num_train_timesteps=1000, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
DEFAULTS = dict(size=32, frames=3, steps=6, lr=1e-3, ddim_steps=3, guidance=2.0, precision="fp32")


def reference(name):
    """A recorded case: (config, tensors)."""
    config = DATA / f"{name}.config.json"
    return json.loads(config.read_text()) if config.exists() else None, load_file(DATA / f"{name}.safetensors")


def filled(model):
    """The model with fill.py's weight in every floating-point tensor but the scalar ones."""
    state = {name: torch.from_numpy(fill.weight(name, tuple(p.shape))) if p.ndim else p
             for name, p in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def close(a, b, tolerance=1e-5):
    """The references' measure: max|a - b| <= tolerance * max(1, max|b|)."""
    return (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def save_json(path, d):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(d))


def write_folder(path, dtype=torch.float32):
    """A whole Stable Diffusion folder of about 0.2 M parameters, 3 frames of 32x32 by default."""
    from tinytav.stable_diffusion.checkpoint import MODELS
    configs = dict(unet=UNET, vae=VAE, text_encoder=TEXT)
    for name, (Model, Config) in MODELS.items():
        save_json(path / name / "config.json", configs[name])
        model = filled(Model(Config.from_json(configs[name])))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
        save_file(tensors, path / name / f"{stem}.safetensors")
    shutil.copytree(DATA / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    save_json(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_json(path / "model_index.json", dict(_class_name="StableDiffusionPipeline"))
    save_json(path / "defaults.json", DEFAULTS)
    return path


def write_clip(path, frames=6, size=(48, 40)):
    """A short mp4 of coloured bars on the move."""
    import numpy as np

    from tinytav.files.frames import write_mp4
    i, y, x = np.mgrid[:frames, :size[1], :size[0]]
    colours = np.stack([np.sin(x / 5 + i), np.cos(y / 7 - i), np.sin((x + y) / 9 + 2 * i)], axis=1)
    write_mp4(path, torch.from_numpy(colours).float(), fps=12)
    return path


def write_judge(path):
    """A small CLIP of both towers, in the layout that metrics read."""
    from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
    config, _ = reference("clip-full")
    config["text_config"] |= dict(vocab_size=650, eos_token_id=2)
    save_json(path / "config.json", config)
    save_file(filled(CLIP(CLIPConfig.from_json(config))).state_dict(), path / "model.safetensors")
    prepared, _ = reference("clip-preprocessor")
    save_json(path / "preprocessor_config.json", prepared["half"] | dict(size=64, crop_size=64))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / "tokenizer" / name, path)
    return path


def single_file_shapes(keys):
    """The single file's own keys and shapes, from those of the folder."""
    shapes = keys["unet"] | keys["vae"] | keys["text_encoder"]
    for old, new in keys["single_file"].items():
        shape = [3 * shapes[new[0]][0], *shapes[new[0]][1:]] if isinstance(new, list) else shapes[new]
        yield old, shape + [1, 1] if ".attn_1." in old and len(shape) == 2 else shape
