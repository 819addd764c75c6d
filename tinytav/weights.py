"""The weights that everything here starts from: a Stable Diffusion, and what belongs to its use on video.

These are the values that the scripts take by default, and T-Attn's tensors where the official Tune-A-Video code has
tuned the U-Net. It stores such a net as a UNet3DConditionModel: the image U-Net's config with "3D" for "2D", the
image U-Net's tensors, and in each transformer block T-Attn and its norm, `attn_temp.*` and `norm_temp.*`.
"""
import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from tinytav.errors import InputError
from tinytav.files import hub
from tinytav.stable_diffusion import checkpoint, single_file
from tinytav.stable_diffusion.checkpoint import PICKLED, how_to_convert, read_json
from tinytav.stable_diffusion.config import LARGEST, Config
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.precision import PRECISIONS, autocast
from tinytav.stable_diffusion.text_encoder import TextEncoder
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE

TOY = Path(__file__).parents[1] / "weights/toy"
TEMPORAL = "_temp."                 # T-Attn's tensors and those of its norm have it in their names


@dataclass(frozen=True)
class Defaults(Config):
    """What the scripts use when not told otherwise: Stable Diffusion's values (official configs/man-skiing.yaml).

    A folder may hold its own in defaults.json.
    """
    size: int = 512             # pixels of the short side
    frames: int = 24
    steps: int = 500            # of tuning
    lr: float = 3e-5
    ddim_steps: int = 50
    guidance: float = 12.5
    precision: str | None = None    # None: what suits the device

    LIMITS = dict(guidance=(0, LARGEST))
    ONLY = dict(precision=(None, *PRECISIONS))

    @classmethod
    def from_json(cls, d):
        if unknown := d.keys() - {f.name for f in fields(cls)}:
            raise InputError(f"defaults.json: {', '.join(sorted(unknown))} is not known.")
        return super().from_json(d)


@dataclass
class StableDiffusion:
    """The five parts, and where they come from. A part that has done its work may be set to None to free its memory."""
    tokenizer: Tokenizer
    text_encoder: TextEncoder | None
    vae: VAE | None
    unet: UNet | None
    schedule: Schedule
    path: Path
    fingerprint: str                # of the weights as they are on disk
    device: torch.device
    dtype: torch.dtype
    multiple: int                   # frames need sides that are multiples of it, in pixels
    defaults: Defaults = field(default_factory=Defaults)
    temporal: dict = field(default_factory=dict)    # T-Attn's tensors, if the official code has tuned the U-Net
    source: dict = field(default_factory=dict)      # what `load` was told: run.json keeps it
    before: list = field(default_factory=list)      # fingerprints with fewer learned words

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """n prompts -> context (n, length, d), float32."""
        ids = self.tokenizer(prompts).to(self.device)
        with autocast(self.text_encoder):
            return self.text_encoder(ids).float()


def load(path, tokenizer=None, prediction=None, device="cpu", dtype=torch.float32, vae=None, embedding=None,
         connect=True):
    """A Stable Diffusion folder or single file -> StableDiffusion on `device`, in eval mode and without gradients.

    tokenizer: a folder or a tokenizer.json; by default the checkpoint's own. prediction: "epsilon" or "v", where the
    file does not tell. dtype: of the weights. vae: another VAE's folder or file. embedding: files of learned words.
    path and tokenizer may be "hub:OWNER/NAME", which is downloaded; with connect=False it must have been downloaded
    before. Raises InputError naming the file, and the tensors that are missing, unexpected or misshapen.
    """
    source = dict(weights=str(path), tokenizer=tokenizer and str(tokenizer), prediction=prediction,
                  vae=vae and str(vae), embedding=tuple(map(str, embedding or ())) or None)
    half = hub.is_name(path) and dtype is torch.float16
    if hub.is_name(path):
        path = hub.folder(path, half, connect)
    if hub.is_name(tokenizer):
        tokenizer = hub.tokenizer_file(tokenizer, connect)
    parts, schedule, tokenizer, fingerprints = checkpoint.read(path, tokenizer, prediction, vae, embedding or (), half,
                                                               OfficialConfig)
    config, tensors, where = parts["unet"]
    image, temporal = split(tensors, where)
    parts["unet"] = config, image, where
    models = {name: checkpoint.build(Model, *parts[name], dtype).to(device)
              for name, (Model, _) in checkpoint.MODELS.items()}
    size = 768 if schedule.prediction_type == "v_prediction" else 512       # the models of these pixels predict v
    return StableDiffusion(tokenizer, schedule=schedule, path=Path(path), fingerprint=fingerprints[-1],
                           device=torch.device(device), dtype=dtype, multiple=models["vae"].cfg.factor,
                           defaults=read_defaults(path, size), temporal=temporal, source=source,
                           before=fingerprints[:-1], **models)


# ---- Defaults ------------------------------------------------------------------------------------

def default_path(folder=None):
    """The Stable Diffusion that lies in weights/, else the toy. Raises InputError if there are several.

    Without `folder` it is weights/ of the current folder, or where there is none, the one beside this package.
    """
    folder = Path(folder or "weights")
    if not folder.is_dir():
        folder = TOY.parent
    found = []
    for path in sorted(folder.glob("*")):
        if path.name != "toy" and is_stable_diffusion(path):
            found.append(path)
        elif path.suffix in PICKLED:
            warnings.warn(f"{path} is ignored. {how_to_convert(path)}")
    if len(found) > 1:
        raise InputError(f"{folder} holds {', '.join(p.name for p in found)}: name one with --weights.")
    toy = folder / "toy"
    return found[0] if found else toy if toy.is_dir() else TOY


def is_stable_diffusion(path):
    """Is it a folder as the hub has it, or a single file? A LoRA, a ControlNet, a VAE alone or an embedding is not."""
    if path.is_file() and path.suffix == ".safetensors":
        return any(name.startswith(single_file.UNET) for name in checkpoint.read_header(path)[0])
    return (path / "model_index.json").is_file()


def read_defaults(path, size=512):
    """The defaults.json of the weights' folder, else Stable Diffusion's, for this size. Raises InputError."""
    file = Path(path) / "defaults.json"
    return Defaults.from_json(read_json(file)) if file.is_file() else Defaults(size=size)


# ---- A U-Net that the official code has tuned ----------------------------------------------------

class OfficialConfig(UNetConfig):
    """Not a config but a reader: from_json gives a UNetConfig, also for the official code's file."""

    @classmethod
    def from_json(cls, d):
        if d.get("_class_name") == "UNet3DConditionModel":
            d = json.loads(json.dumps(d).replace("3D", "2D"))       # "CrossAttnDownBlock3D", for one
        return UNetConfig.from_json(d)


def split(tensors, where):
    """All tensors of a U-Net -> (the image U-Net's, the temporal ones in float32). Of an image U-Net these are none.

    Raises InputError, naming the folder `where`, if the temporal tensors are not exactly T-Attn's.
    """
    image = {name: tensor for name, tensor in tensors.items() if TEMPORAL not in name}
    temporal = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if TEMPORAL in name}
    if temporal and (problems := checkpoint.misfits(temporal, expected(image))):
        raise InputError(f"{where} is not a net that the official Tune-A-Video code tuned: {problems}.")
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
