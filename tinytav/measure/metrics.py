"""Metrics of an edited clip: frame consistency in two definitions, textual alignment, success rate, two PSNRs.

    python -m tinytav metrics runs/skiing
    python -m tinytav metrics runs/skiing --mask mask.png

All but the PSNRs use CLIP's features: LOVEU-TGVE and V2VBench through openai/clip-vit-large-patch14, FateZero through
ViT-B/32. Values of two CLIPs cannot be compared, nor of two preparations: LOVEU-TGVE squashes frames to a square first,
V2VBench cuts negative cosines to 0 and does not multiply by 100. A run's clips are measured as their mp4 files show
them, in H.264 and, where small, enlarged: whoever has the files finds the same. Sources: the paper, section 4;
LOVEU-TGVE, showlab/loveu-tgve-2023 run_eval.py; FateZero, ChenyangQiQi/FateZero frame_acc_tem_con.py; V2VBench,
wenhao728/awesome-diffusion-v2v v2vbench/; EditBoard, arXiv 2409.09668; FiVE, arXiv 2503.13684.
"""
import argparse
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
from tinytav.keep import read_mask
from tinytav.noise import NOISES
from tinytav.stable_diffusion.checkpoint import build, read_component, read_json
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig, Preprocessor
from tinytav.stable_diffusion.tokenizer import Tokenizer

OF_CLIP = ("consistency_all_pairs", "consistency_neighbours", "textual_alignment", "success_rate")
ELSE = {"control", "lora", "negative", "mask", "mask_word", "first_frame"}      # with it there is no reconstruction


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


def success_rate(features, text, own):
    """The share of frames, in %, that are nearer to the edit's prompt than to the source's caption. EditBoard.

    features (f, d), text and own (d,) or (1, d): unit features of frames, prompt and caption. nan for equal texts.
    """
    if torch.equal(text, own):
        return math.nan
    return 100 * (features @ text.flatten() > features @ own.flatten()).float().mean().item()


def psnr(x, y):
    """Mean over pictures (n, 3, h, w) in [-1, 1] of 10 log10(4 / mean squared error), in dB."""
    return (10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean().item()


def psnr_outside(x, y, changed):
    """As `psnr`, but only of the pixels outside a mask: changed (n, h, w) bool. FiVE's background preservation.

    Pictures that the mask covers do not count; nan if it covers all.
    """
    outside = ~changed
    counts = outside.sum((1, 2))
    errors = ((x - y).square().mean(1) * outside).sum((1, 2))[counts > 0] / counts[counts > 0]
    return (10 * torch.log10(4 / errors)).mean().item()


class Features:
    """Unit features of pictures and prompts, by a CLIP folder in transformers' layout. Raises InputError."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = Path(folder), device
        config, tensors, where = read_component(self.folder, CLIPConfig)
        self.clip, self.tokenizer = build(CLIP, config, tensors, where).to(device), Tokenizer.from_folder(self.folder)
        self.tokenizer.length = config.text_config.max_position_embeddings
        file, side = self.folder / "preprocessor_config.json", config.vision_config.image_size
        try:                                        # a blank picture shows whatever may be wrong with the settings
            self.preprocess = Preprocessor.from_json(read_json(file))
            shape = self.preprocess([Image.new("RGB", (side, side))]).shape[2:]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{file} does not say how to prepare a picture: {error}") from None
        if shape != (side, side) or self.tokenizer.size > config.text_config.vocab_size:
            raise InputError(f"{self.folder}: {file.name} or the tokenizer does not fit the model.")

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


def of_clip(eye, pictures, prompt, own):
    """Frames, as Features.images takes them -> {name: value} of OF_CLIP; nan where undefined.

    prompt, own: the edit's prompt, perhaps an empty one, and the source's caption.
    """
    features, (text, caption) = eye.images(pictures), eye.texts([prompt, own])
    by_text = (textual_alignment(features, text), success_rate(features, text, caption)) if prompt else (math.nan,) * 2
    return dict(zip(OF_CLIP, (consistency_all_pairs(features), consistency_neighbours(features), *by_text)))


def rows(run, eye, mask=None):
    """Yields (file, values) for source.mp4, then for a run's samples: as of_clip, with psnr and psnr_outside.

    PSNR is that of a sample which should be the source: begun from the clip's own noise, under the run's own prompt.
    PSNR outside is that of all samples, outside the mask of this file. What the VAE loses counts too. A file that
    cannot be read is passed over with a warning. Raises InputError for a mask that does not fit the run.
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
        known = details["prompt"] if details["settings"] else ""            # of a video without a record nobody knows
        prompt = own if name == "source.mp4" else known
        values = of_clip(eye, x, prompt, own)
        values["psnr"] = psnr(x, source) if x.shape == source.shape and is_reconstruction(details, own) else math.nan
        values["psnr_outside"] = math.nan if mask is None else outside(run, x, mask)
        yield name, values


def outside(run, x, mask):
    """`psnr_outside` of frames x to a run's source, by the mask of this file; nan for frames of another shape.

    It is infinite for the source itself. Raises InputError for a mask that does not fit the run.
    """
    source, (mean, _) = frames.read_all(run.path / "source.mp4"), run.latents()
    changed = read_mask(mask, run.settings, *source.shape[2:], cell=source.shape[2] // mean.shape[3])
    return psnr_outside(x, source, changed) if x.shape == source.shape else math.nan


def is_reconstruction(details, own):
    """Does a sample's record say that it should be the source: from the clip's noise, its own prompt, nothing else?"""
    settings = details["settings"]
    begun = any(name == settings.get("noise") and kind.needs_clip for name, kind in NOISES.items())
    return begun and details["prompt"] == own and not settings.keys() & ELSE


def save(folder, clip, measured):
    """metrics.json, which the page shows: the CLIP's path, and the finite ones of {file: {name: value}}."""
    values = {file: {name: value for name, value in row.items() if math.isfinite(value)}
              for file, row in measured.items()}
    replace_text(folder / "metrics.json", json.dumps(dict(clip=str(clip), values=values), indent=2) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="a folder that train.py made")
    p.add_argument("--clip", default="weights/toy/clip", metavar="PATH", help="a CLIP folder; else weights/toy/clip")
    p.add_argument("--mask", metavar="PATH",
                   help="measure PSNR where this is black, too: a picture, or a video or a folder with one a frame")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; else the best there is")
    args = p.parse_args()
    run = Run.open(args.run)
    eye = Features(args.clip, cli.choose_device(args.device))
    measured = dict(rows(run, eye, args.mask))
    longest = max(map(len, measured))
    heads = "all pairs", "neighbours", "text", "success", "PSNR", "outside"
    cli.say(f"clip: {args.clip}\n{'':{longest}}" + "".join(f"{head:>12}" for head in heads))
    for name, values in measured.items():
        texts = (f"{value:.2f}" if math.isfinite(value) else "-" for value in values.values())
        cli.say(f"{name:{longest}}" + "".join(f"{text:>12}" for text in texts))
    save(run.path, args.clip, measured)
    cli.say(f"page: {page.write(run.path)}")
    return 0
