"""A folder of edited clips and what is said of them: made a clip at a time, kept, and shown as tables and pictures."""
import argparse
import hashlib
import json
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from tinytav.claims.significance import interval, means
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.atomic import replace, replace_text
from tinytav.stable_diffusion.checkpoint import read_json

MARGIN = 150        # pixels before a picture's rows, for their names
EYE = "clip/model.safetensors"      # in the weights' folder: the CLIP that three of the scores ask


def parser(description, out, clips):
    """The flags that claims, sweep, pose and place have in common."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help=" ")
    p.add_argument("--out", type=Path, default=Path(out), help="folder for what is made")
    p.add_argument("--clips", type=int, default=clips, help=" ")
    p.add_argument("--processes", type=int, default=1, help="clips worked on at once, a core each")
    return p


def every_clip(work, args, sd, known=None, files=(EYE,)):
    """work(args, i) for each clip, with the weights' own settings as args.settings.

    All scores are kept in scores.json too. known: such a file of an earlier run; its scores are not made again. files: what is
    used of the weights' folder beside Stable Diffusion's own parts. Results of other such files are not gone on with.
    """
    args.settings = vars(sd.defaults)
    made_with = args.settings | fingerprints(sd, args.weights, files)
    same_settings(args.out / "settings.json", made_with)
    if known:
        take_over(known, args.out, made_with)
    with get_context("spawn").Pool(args.processes) as pool:
        for i in pool.imap_unordered(partial(work, args), range(args.clips)):
            collect(args.out, args.out / "scores.json")
            print(f"clip {i} is done", flush=True)


def fingerprints(sd, weights, files=(EYE,)):
    """Of the weights and of further files in their folder: {name: hash}. Raises InputError if a file is missing."""
    found = dict(fingerprint=sd.fingerprint)
    for file in files:
        if not (weights / file).is_file():
            raise InputError(f"{weights / file} is missing: the scores need it.")
        found[file] = hashlib.sha256((weights / file).read_bytes()).hexdigest()[:16]
    return found


def same_settings(file, settings):
    """Raises InputError if what lies in the folder was made with others."""
    if file.exists() and read_json(file) != settings:
        raise InputError(f"{file.parent} holds results of other weights or settings: name another folder with --out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(settings, indent=2) + "\n")


def write(folder, name, make, studio):
    """make() -> frames (edits, f, 3, h, w), kept in name.safetensors, and what is said of them in name.json.

    What is there is not made again. If the scores are there, no frames are made. To score the frames again, delete the
    .json. Raises InputError for frames that are not finite.
    """
    clips, scores = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not clips.exists() and not scores.exists():
        made = make()
        if not made.isfinite().all():
            raise InputError(f"{name} of {folder} has values that are not finite: the tuning has probably diverged.")
        results = torch.stack([frames.to_uint8(x).permute(0, 3, 1, 2) for x in made]).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        replace(clips, lambda file: save_file(dict(frames=results), file))
    if not scores.exists():
        found = json.dumps(studio.score(load_file(clips)["frames"] / 127.5 - 1))
        replace_text(scores, found)


def collect(folder, file):
    """Writes one file of all scores under a folder, and of the settings that they were made with."""
    paths = sorted(folder.glob("*/**/*.json"))
    scores = {str(path.relative_to(folder).with_suffix("")): json.loads(path.read_text()) for path in paths}
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in scores.items()]
    settings = json.dumps(read_json(folder / "settings.json"))
    replace_text(file, f'{{"settings": {settings}, "scores": {{\n' + ",\n".join(lines) + "\n}}\n")


def take_over(file, folder, settings):
    """Puts the scores of a file by `collect` into a folder, but for those that are there or can be made from its frames.

    Raises InputError if they were made with other settings.
    """
    known = read_json(file)
    if known.get("settings") != settings:
        raise InputError(f"{file} holds scores of other weights or settings: leave out --known, or name another file.")
    for name, found in known["scores"].items():
        path = folder / f"{name}.json"
        if path.exists() or path.with_suffix(".safetensors").exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found))


def row(name, values):
    return f"| {name} | " + " | ".join(values) + " |"


def table_of(folder, clips, names, columns):
    """One row a name: means of folder/i/name.json over clips, with their 95 % intervals. columns: {key: what it is called}.

    All scores are shares, but PSNR.
    """
    lines = [row("", columns.values()), "|---|" + "---|" * len(columns)]
    for name in names:
        found = [json.loads((folder / f"{i}/{name}.json").read_text()) for i in range(clips)]
        cells = []
        for key in columns:
            mean, low, high = interval(means(found, key))
            cells.append(f"{mean:.2f}" if key == "psnr" else f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})")
        lines.append(row(name, cells))
    return "\n".join(lines)


def labelled(path, rows):
    """{name: pictures (n, 3, h, w) uint8} -> PNG, a row each, its name before it."""
    strips = np.stack([x.permute(2, 0, 3, 1).flatten(1, 2).numpy() for x in rows.values()])        # (rows, h, n w, 3)
    height = strips.shape[1]
    image = Image.new("RGB", (MARGIN + strips.shape[2], len(rows) * height), "white")
    for i, (name, strip) in enumerate(zip(rows, strips)):
        image.paste(Image.fromarray(strip), (MARGIN, i * height))
        ImageDraw.Draw(image).text((4, i * height + height // 2 - 6), name, "black")
    frames.write_picture(path, np.asarray(image))
