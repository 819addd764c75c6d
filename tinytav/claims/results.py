"""Puts the paper's claims to the test in the toy world, where the true answer to every edit can be drawn.

    python -m tinytav claims --processes 2

Every clip of a study is edited by every variant of the method, and the judge says what came out (studies.py). What is
finished stays in the folder, so a run that was stopped goes on. Writes scores.json, TABLES.md and pictures.
"""
import argparse
import hashlib
import json
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tinytav.claims import pictures, tables, tour
from tinytav.claims.studies import STUDIES
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.atomic import replace, replace_text
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.weights import load

HERE = Path(__file__).parent
EYE = "clip/model.safetensors"      # in the weights' folder: the CLIP that three of the scores ask


def work(args, job):
    """One clip of a study by every row: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    (name, study), i = job
    studio, folder = study.studio(args.weights, i, args.settings), args.out / name / str(i)
    for reference in study.references:
        keep(folder, reference, lambda: studio.reference(reference), studio)
    rows = sorted(study.rows.items(), key=lambda row: str(row[1].net))      # those that share a net stand together
    for row, variant in rows:
        keep(folder, row, lambda: studio.edit(variant), studio)
    draw(folder, (*study.references, *study.rows))
    return name, i


def keep(folder, name, make, studio):
    """make() -> frames (edits, f, 3, h, w), kept in name.safetensors, and what is said of them in name.json.

    What is there is not made again. If the scores are there, no frames are made. To score the frames again, delete the
    .json. Raises InputError for frames that are not finite.
    """
    clips, scores = folder / f"{name}.safetensors", folder / f"{name}.json"
    if scores.exists():
        return
    if not clips.exists():
        made = make()
        if not made.isfinite().all():
            raise InputError(f"{name} of {folder} has values that are not finite: the tuning has probably diverged.")
        results = torch.stack([frames.to_uint8(x).permute(0, 3, 1, 2) for x in made]).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        replace(clips, lambda file: save_file(dict(frames=results), file))
    replace_text(scores, json.dumps(studio.score(load_file(clips)["frames"] / 127.5 - 1)))


def draw(folder, names):
    """Draws rows.png: some frames of a clip's first edit, by each of these rows whose frames are in its folder."""
    files = {name: folder / f"{name}.safetensors" for name in names}
    rows = {name: load_file(file)["frames"][0] / 127.5 - 1 for name, file in files.items() if file.exists()}
    if rows:
        frames.write_picture(folder / "rows.png", np.asarray(tour.rows(rows)))


# ---- scores and what they were made with ---------------------------------------------------------

def made_with(sd):
    """The weights' own settings, and fingerprints of the weights and of EYE. Raises InputError if EYE is missing."""
    eye = sd.path / EYE
    if not eye.is_file():
        raise InputError(f"{eye} is missing: the scores need it.")
    return vars(sd.defaults) | {"fingerprint": sd.fingerprint, EYE: hashlib.sha256(eye.read_bytes()).hexdigest()[:16]}


def same_settings(file, settings):
    """Writes a folder's settings. Raises InputError if what lies in the folder was made with others."""
    if file.exists() and read_json(file) != settings:
        raise InputError(f"{file.parent} holds results of other weights or settings: name another folder with --out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(settings, indent=2) + "\n")


def collect(folder):
    """Writes scores.json: all scores under a folder, and the settings that they were made with. Returns the scores."""
    paths = sorted(folder.glob("*/*/*.json"))
    scores = {str(path.relative_to(folder).with_suffix("")): json.loads(path.read_text()) for path in paths}
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in scores.items()]
    settings = json.dumps(read_json(folder / "settings.json"))
    replace_text(folder / "scores.json", f'{{"settings": {settings}, "scores": {{\n' + ",\n".join(lines) + "\n}}\n")
    return scores


# ---- the command ---------------------------------------------------------------------------------

def parse():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help="the toy's folder; else weights/toy")
    p.add_argument("--out", type=Path, help="folder for what is made; else claims, or claims-quick with --quick")
    p.add_argument("--studies", nargs="+", metavar="NAME", choices=STUDIES,
                   help=f"which studies to make, of {', '.join(STUDIES)}; else trial")
    p.add_argument("--variants", nargs="+", metavar="NAME", help="makes only these rows; else all")
    p.add_argument("--clips", type=int, help="makes only so many clips of each study")
    p.add_argument("--processes", type=int, default=1, help="how many clips are worked on at once, a core each; else 1")
    p.add_argument("--quick", action="store_true",
                   help="makes the study quick, and fails if the order of its variants is not the known one")
    p.add_argument("--tables", action="store_true",
                   help="makes nothing, but writes TABLES.md and its charts from the project's own scores")
    args = p.parse_args()
    if args.quick and (args.studies or args.variants or args.clips):
        p.error("--quick makes edits of its own: leave out --studies, --variants and --clips.")
    args.out = args.out or Path("claims-quick" if args.quick else "claims")
    args.plan = {}
    for name in ["quick"] if args.quick else args.studies or ["trial"]:
        study = STUDIES[name]
        unknown = set(args.variants or ()) - study.rows.keys()
        if unknown:
            p.error(f"the study {name} has no row {unknown.pop()!r}. It has {', '.join(map(repr, study.rows))}.")
        args.plan[name] = study._replace(rows={row: study.rows[row] for row in args.variants or study.rows},
                                         clips=args.clips or study.clips)
    return args


def make(args):
    """Makes all clips of the plan. Returns their scores, and those of earlier runs in the folder."""
    sd = load(args.weights)
    args.settings = vars(sd.defaults)
    same_settings(args.out / "settings.json", made_with(sd))
    jobs = [(study, i) for study in args.plan.items() for i in range(study[1].clips)]
    with get_context("spawn").Pool(args.processes) as pool:
        for name, i in pool.imap_unordered(partial(work, args), jobs):
            scores = collect(args.out)
            print(f"{name}: clip {i} is done", flush=True)
    return scores


def show(scores, file, folder):
    """Writes the tables, and pictures of the trial and the strength into a folder. Prints the tables."""
    text = tables.text(scores)
    replace_text(file, text)
    if rows := tables.shares(scores, "trial"):
        pictures.chart(folder / "chart.png", rows)
    if rows := tables.shares(scores, "strength", ("unsaid", "edited")):
        pictures.frontier(folder / "strength.png", rows)
    print(text)


def main():
    args = parse()
    if args.tables:
        show(read_json(HERE / "scores.json")["scores"], HERE / "TABLES.md", args.weights)
        return 0
    scores = make(args)
    show(scores, args.out / "TABLES.md", args.out)
    if not args.quick:
        return 0
    broken = list(tables.broken_orderings(scores))
    print("\n".join(broken) or "all robust orderings hold")
    return 1 if broken else 0
