"""Metrics of an edited clip: frame consistency in its two definitions, textual alignment, reconstruction PSNR.

    python -m tinytav metrics runs/skiing

All but PSNR use CLIP's features: LOVEU-TGVE and V2VBench through openai/clip-vit-large-patch14, FateZero through
ViT-B/32. Values of two CLIPs cannot be compared, nor of two preparations: LOVEU-TGVE squashes frames to a square first,
V2VBench cuts negative cosines to 0 and does not multiply by 100. A run's clips are measured as their mp4 files show
them, in H.264 and, where small, enlarged: whoever has the files finds the same. Sources: the paper, section 4;
LOVEU-TGVE, showlab/loveu-tgve-2023 run_eval.py; FateZero, ChenyangQiQi/FateZero frame_acc_tem_con.py; V2VBench,
wenhao728/awesome-diffusion-v2v v2vbench/.
"""
import argparse
import hashlib
import json
import math
import warnings
from pathlib import Path

import torch
from PIL import Image

from tinytav import cli
from tinytav.errors import InputError
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace_text
from tinytav.files.runs import Run
from tinytav.noise import NOISES
from tinytav.stable_diffusion.checkpoint import build, read_component, read_json
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig, Preprocessor
from tinytav.stable_diffusion.tokenizer import Tokenizer

COLUMNS = ("consistency_all_pairs", "consistency_neighbours", "textual_alignment", "psnr")      # of rows, by name


def consistency_all_pairs(features):
    """100 x the mean cosine over all pairs of different frames, from unit features (f, d); nan for one frame.

    The paper's "frame consistency" (table 1) and LOVEU-TGVE's clip_score_frame.
    """
    different = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    return 100 * (features @ features.T)[different].mean().item()


def consistency_neighbours(features):
    """100 x the mean cosine over pairs of consecutive frames, from unit features (f, d); nan for one frame.

    FateZero's "Tem-Con"; V2VBench's clip_consistency.py, except that it takes features from before their projection.
    """
    return 100 * (features[1:] * features[:-1]).sum(-1).mean().item()


def textual_alignment(features, text):
    """100 x the mean cosine of frames (f, d) with their prompt (d,) or (1, d): unit features, projected.

    The paper's "textual alignment"; LOVEU-TGVE and V2VBench multiply by CLIP's logit scale,
    which is 100 in OpenAI's models.
    """
    return 100 * (features @ text.flatten()).mean().item()


def psnr(x, y):
    """Mean over pictures (n, 3, h, w) in [-1, 1] of 10 log10(4 / mean squared error), in dB."""
    return (10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean().item()


class Features:
    """Unit features of pictures and prompts, by a CLIP folder in transformers' layout. Raises InputError."""

    def __init__(self, folder, device="cpu"):
        folder, self.device = Path(folder), device
        config, tensors, where = read_component(folder, CLIPConfig)
        self.clip, self.tokenizer = build(CLIP, config, tensors, where).to(device), Tokenizer.from_folder(folder)
        self.tokenizer.length = config.text_config.max_position_embeddings
        file, side = folder / "preprocessor_config.json", config.vision_config.image_size
        try:                                        # a blank picture shows whatever may be wrong with the settings
            self.preprocess = Preprocessor.from_json(read_json(file))
            shape = self.preprocess([Image.new("RGB", (side, side))]).shape[2:]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{file} does not say how to prepare a picture: {error}") from None
        if shape != (side, side) or self.tokenizer.size > config.text_config.vocab_size:
            raise InputError(f"{folder}: {file.name} or the tokenizer does not fit the model.")

    @property
    def fingerprint(self):
        """A short hash of what decides the features: of each tensor a thousand values, and the preparation."""
        sha = hashlib.sha256(repr((self.preprocess, sorted(self.tokenizer.bpe.get_vocab().items()))).encode())
        for name, tensor in sorted(self.clip.state_dict().items()):
            values = tensor.flatten()[::max(1, tensor.numel() // 1024)].float().cpu()
            sha.update(name.encode() + values.numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def images(self, pictures):
        """Frames (f, 3, h, w) in [-1, 1], or f PIL pictures -> (f, d)."""
        if isinstance(pictures, torch.Tensor):
            pictures = [Image.fromarray(picture) for picture in frames.to_uint8(pictures).cpu().numpy()]
        parts = [self.preprocess(pictures[i:i + 16]) for i in range(0, len(pictures), 16)]
        return torch.cat([self.clip.encode_image(part.to(self.device)) for part in parts]).cpu()

    @torch.no_grad()
    def texts(self, prompts):
        """n prompts -> (n, d)."""
        return self.clip.encode_text(self.tokenizer(prompts).to(self.device)).cpu()


def of_clip(eye, pictures, prompt):
    """Frames, as Features.images takes them -> {name: value} of the first three COLUMNS; nan where undefined."""
    features = eye.images(pictures)
    alignment = textual_alignment(features, eye.texts([prompt])) if prompt else math.nan
    return dict(zip(COLUMNS, (consistency_all_pairs(features), consistency_neighbours(features), alignment)))


def rows(run, eye):
    """Yields (file, both consistencies, alignment, PSNR) of source.mp4, then of a run's samples; nan where undefined.

    PSNR is that of a sample which should be the source: begun from the clip's own noise, under the run's own prompt.
    What the VAE loses counts too. A file that cannot be read is passed over with a warning.
    """
    source, own = frames.read_all(run.path / "source.mp4"), run.settings.prompt
    for name, details in records.read_samples(run.path):
        if not name.endswith(".mp4"):
            continue
        try:
            x = frames.read_all(run.path / name)
        except InputError as error:
            warnings.warn(f"passed over: {error}")
            continue
        title = details["prompt"] if details["settings"] else frames.title(run.path / name)
        values = of_clip(eye, x, own if name == "source.mp4" else title)
        like_source = is_reconstruction(details, own) and x.shape == source.shape
        yield name, *values.values(), psnr(x, source) if like_source else math.nan


def is_reconstruction(details, own):
    """Does a sample's record say that it should be the source: from the clip's noise, its own prompt, nothing else?"""
    settings = details["settings"]
    kind = NOISES.get(settings.get("noise"))
    if details["prompt"] != own or settings.keys() & {"control", "lora", "negative"}:
        return False
    return kind is not None and kind.needs_clip


def save(folder, clip, measured, conditions=None):
    """metrics.json, which the page shows: the CLIP's path, and {file: {name: value}} without undefined values.

    conditions: what the values depend on, for whoever asks later whether they still hold.
    """
    values = {file: {name: value for name, value in row.items() if math.isfinite(value)}
              for file, row in measured.items()}
    saved = dict(clip=str(clip), conditions=conditions, values=values)
    replace_text(folder / "metrics.json", json.dumps(saved, indent=2) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="a folder that train.py made")
    p.add_argument("--clip", default="weights/toy/clip", metavar="PATH", help="a CLIP folder; else weights/toy/clip")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; else the best there is")
    args = p.parse_args()
    run = Run.open(args.run)
    eye = Features(args.clip, cli.choose_device(args.device))
    found = list(rows(run, eye))
    longest = max(len(name) for name, *_ in found)
    cli.say(f"clip: {args.clip}\n{'':{longest}}{'all pairs':>12}{'neighbours':>12}{'text':>8}{'PSNR':>8}")
    measured = {}
    for name, *values in found:
        measured[name] = dict(zip(COLUMNS, values))
        values = ("-" if math.isnan(value) else f"{value:.2f}" for value in values)
        cli.say(f"{name:{longest}}" + "".join(f"{value:>{width}}" for value, width in zip(values, (12, 12, 8, 8))))
    save(run.path, args.clip, measured)
    cli.say(f"page: {page.write(run.path)}")
    return 0
