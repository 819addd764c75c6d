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

import torch
from safetensors.torch import load_file, save_file

from tinytav.claims import pictures, tables
from tinytav.claims.studies import QUICK, SEED, STUDIES
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.atomic import replace, replace_text
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.weights import load

HERE = Path(__file__).parent
PICTURE_ROWS, PICTURE_OF = ("source", "true edit", "full method", "untuned", "no inversion"), (3, 0)    # clip and edit
EYE = "clip/model.safetensors"      # in the weights' folder: the CLIP that three of the scores ask
CONTROL = "controlnet/diffusion_pytorch_model.safetensors"                  # what pose control uses as well


def work(args, job):
    """One clip of a study by every row: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    (name, study), i = job
    studio, folder = study.studio(args.weights, i, args.settings), args.out / name / str(i)
    for reference in study.references:
        keep(folder, f"{reference}-{SEED}", lambda: studio.reference(reference), studio)
    rows = sorted(study.rows.items(), key=lambda row: str(row[1].net))      # those that share a net stand together
    for row, variant in rows:
        keep(folder, f"{row}-{SEED}", lambda: studio.edit(variant, SEED), studio)
    draw(folder, "rows.png", (*study.references, *study.rows), 0, studio.shown)
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


def draw(folder, picture, names, edit, shown=()):
    """One edit by each of these rows whose frames are in a clip's folder -> a picture in it, below the rows `shown`."""
    files = {name: folder / f"{name}-{SEED}.safetensors" for name in names}
    rows = dict(shown) | {name: load_file(file)["frames"][edit] for name, file in files.items() if file.exists()}
    if rows:                # of scores that were taken over there are no frames
        pictures.labelled(folder / picture, rows)


# ---- scores of this run and of earlier ones ------------------------------------------------------

def fingerprints(sd, weights, files=(EYE,)):
    """Of the weights and of further files in their folder: {name: hash}. Raises InputError if a file is missing."""
    found = dict(fingerprint=sd.fingerprint)
    for file in files:
        if not (weights / file).is_file():
            raise InputError(f"{weights / file} is missing: the scores need it.")
        found[file] = hashlib.sha256((weights / file).read_bytes()).hexdigest()[:16]
    return found


def agree(known, settings):
    """Were results with the settings `known` made as these are? A ControlNet counts where both name one."""
    return all(known.get(key) == value or (key == CONTROL and key not in known) for key, value in settings.items())


def same_settings(file, settings):
    """Adds settings to a folder's. Raises InputError if what lies in the folder was made with others."""
    known = read_json(file) if file.exists() else {}
    if known and not agree(known, settings):
        raise InputError(f"{file.parent} holds results of other weights or settings: name another folder with --out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(known | settings, indent=2) + "\n")


def take_over(file, folder, settings):
    """Puts the scores of a scores.json into a folder, but for those that are there or whose frames are there.

    Raises InputError if they were made with other settings.
    """
    known = read_json(file)
    if not agree(known.get("settings", {}), settings):
        raise InputError(f"{file} holds scores of other weights or settings: leave out --known, or name another file.")
    same_settings(folder / "settings.json", known["settings"])
    for name, found in known["scores"].items():
        path, clips = folder / f"{name}.json", folder / f"{name}.safetensors"
        if not path.exists() and not clips.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(found))


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
    p.add_argument("--known", type=Path, metavar="FILE",
                   help="takes over the scores in this scores.json of an earlier run and makes only what is missing")
    p.add_argument("--quick", action="store_true",
                   help="makes two clips, two edits and five variants, and fails if their order is not the known one")
    p.add_argument("--tables", action="store_true",
                   help="makes nothing, but writes TABLES.md and its charts from the project's own scores")
    args = p.parse_args()
    if args.quick and (args.known or args.studies or args.variants or args.clips):
        p.error("--quick makes edits of its own: leave out --known, --studies, --variants and --clips.")
    args.out = args.out or Path("claims-quick" if args.quick else "claims")     # clips of --quick have fewer edits
    args.plan = {"user": QUICK} if args.quick else {}
    for name in () if args.quick else args.studies or ["trial"]:
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
    posed = any(study.kind == "pose" for study in args.plan.values())
    made_with = args.settings | fingerprints(sd, args.weights, (EYE, CONTROL) if posed else (EYE,))
    same_settings(args.out / "settings.json", made_with)
    if args.known:
        take_over(args.known, args.out, made_with)
    jobs = [(study, i) for study in args.plan.items() for i in range(study[1].clips)]
    with get_context("spawn").Pool(args.processes) as pool:
        for name, i in pool.imap_unordered(partial(work, args), jobs):
            scores = collect(args.out)
            print(f"{name}: clip {i} is done", flush=True)
    return scores


def show(scores, file, folder, earlier=None):
    """Writes the tables, and pictures of the trial, the recipes and the strength into a folder. Prints the tables."""
    text = tables.text(scores, earlier)
    replace_text(file, text)
    if rows := tables.shares(scores, "trial"):
        pictures.chart(folder / "chart.png", rows)
    for study, picture in (("recipes", "frontier.png"), ("strength", "strength.png")):
        if rows := tables.shares(scores, study, ("unsaid", "edited")):
            pictures.frontier(folder / picture, rows)
    print(text)


def main():
    args = parse()
    if args.tables:
        show(read_json(HERE / "scores.json")["scores"], HERE / "TABLES.md", args.weights,
             read_json(HERE / "earlier.json"))
        return 0
    scores = make(args)
    show(scores, args.out / "TABLES.md", args.out)
    clip, edit = PICTURE_OF if (args.out / f"user/{PICTURE_OF[0]}").exists() else (0, 0)
    draw(args.out / f"user/{clip}", "../../claims.png", PICTURE_ROWS, edit)
    if not args.quick:
        return 0
    broken = list(tables.broken_orderings(scores))
    print("\n".join(broken) or "all robust orderings hold")
    return 1 if broken else 0
