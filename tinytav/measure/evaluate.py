"""Evaluation of a whole set: tune on each clip, make each edit, measure. Results as a CSV and a page.

README.md says how a set is written. The CSV of LOVEU-TGVE-2023 (showlab/loveu-tgve-2023) has the columns `Video name`,
`Our GT caption`, `Style Change Caption`, ..., and rows of headings ("DAVIS Videos:") between blocks. Its clips are
{DAVIS,youtube,videvo}_480p/480p_videos/NAME.mp4, or the folder 480p_frames/NAME, beside the CSV. Its frames are
squashed to 480 x 480 before they are measured, as in run_eval.py.

Each clip's folder is a run like train.py's. Under torchrun clips are dealt to ranks, and rank 0 gathers their results.
A rank is a process, on this machine or on another.
"""
import csv
import io
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tinytav import cli, editing
from tinytav.errors import InputError, check_file
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace_text
from tinytav.files.runs import Run, free_name, slug
from tinytav.measure import metrics
from tinytav.memory import is_out_of_memory
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.stable_diffusion.precision import name_of
from tinytav.weights import StableDiffusion

BLOCKS = ("DAVIS_480p", "youtube_480p", "videvo_480p")      # LOVEU-TGVE's folders
LOVEU_SIDE = 480                                            # run_eval.py measures frames of 480 x 480
COLUMNS = ("clip", "caption", "kind", "prompt", *metrics.OF_CLIP, "psnr_outside", "pick_score")     # of results.csv
SETTINGS = ("size", "frames", "window", "steps", "lr", "ddim_steps", "guidance", "seed")      # those of editing.begin


@dataclass(frozen=True)
class Entry:
    """One clip of a set. `folder`: the name of its folder among the results. `edits`: (kind, prompt) pairs. `mask`: a
    file, or None.
    """
    name: str
    path: Path
    caption: str
    edits: tuple
    folder: str
    mask: Path | None = None


# ---- the set -------------------------------------------------------------------------------------

def read_set(path):
    """A CSV -> (list of Entry, side in pixels that frames are squashed to before they are measured, or None).

    Raises InputError where the file is no set; not where a clip is missing.
    """
    path = Path(path)
    (_, head), *rows = read_rows(path)
    names = [name.lower() for name in head]
    is_loveu = names[:2] == ["video name", "our gt caption"]
    if is_loveu:
        kinds = [name.split()[0] if name.endswith("caption") else "" for name in names[2:]]
    elif names[:2] == ["clip", "caption"]:
        kinds = ["" if name == "mask" else kind for name, kind in zip(names[2:], head[2:])]
    else:
        raise InputError(f"{path} is no set: its first line is neither `clip,caption,...` nor LOVEU-TGVE's "
                         "`Video name,Our GT caption,...`.")
    entries = []
    for number, (name, caption, *cells) in rows:
        if is_loveu and not caption:                        # a heading, or nothing
            continue
        if not name or not caption:
            raise InputError(f"{path}, line {number}: there is no video's name, or no caption.")
        edits = tuple((kind, prompt) for kind, prompt in zip(kinds, cells) if kind and prompt)
        if not edits:
            raise InputError(f"{path}, line {number}: {name!r} has no edit.")
        clip = loveu_path(path.parent, name) if is_loveu else path.parent / name
        mask = dict(zip(names[2:], cells)).get("mask")
        taken = {entry.folder for entry in entries}
        folder = free_name(slug(Path(name).stem), lambda name: name in taken)
        entries.append(Entry(name, clip, caption, edits, folder, path.parent / mask if mask else None))
    if not entries:
        raise InputError(f"{path} holds no clip.")
    return entries, LOVEU_SIDE if is_loveu else None


def read_rows(path):
    """A CSV -> [(line's number, cells)] of the lines that are not empty, at least one. Each has two cells or more."""
    try:
        check_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from None
    rows = [(number, row + [""] * (2 - len(row))) for number, row in enumerate(lines, 1) if any(row)]
    return rows or [(1, ["", ""])]


def loveu_path(base, name):
    """The clip's video or folder of pictures; where there is none, a path that reading then reports."""
    paths = [base / block / place for block in BLOCKS for place in (f"480p_videos/{name}.mp4", f"480p_frames/{name}")]
    return next((path for path in paths if path.exists()), paths[0])


# ---- ranks ---------------------------------------------------------------------------------------

def join():
    """(rank, number of ranks): torchrun's, or (0, 1) without it. A rank waits for the slowest however long it takes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    return distributed.get_rank(), distributed.get_world_size()


def exchange(found):
    """A dict of every rank -> a dict of all ranks' items, on every rank."""
    parts = [found]
    if distributed.is_initialized():
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def leave():
    """Ends the group, after every rank has come here: a rank that ended earlier could take the others with it."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


# ---- one clip ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Evaluation:
    """What a rank evaluates its clips with, and the folder of all results."""
    out: Path
    sd: StableDiffusion
    settings: dict                  # of tuning and sampling, as editing.begin takes them
    progress: Callable              # as editing.py's functions take it
    eye: metrics.Features           # the CLIP that measures
    pick: metrics.Features | None   # PickScore's, if it is asked for
    side: int | None                # pixels: frames are squashed to this square before they are measured

    def evaluate(self, entry):
        """Tunes and edits, where that is not done yet, and measures. Saves the numbers, and returns the clip's rows."""
        if entry.mask:
            frames.open_clip(entry.mask)            # raises before the tuning if there is none
        session = self.tuned_session(entry)
        with closing(session.run):
            noise = session.make_noise(progress=self.progress)
            values, rows = {}, []
            for kind, prompt in entry.edits:
                made = made_edit(session, noise, prompt)
                name = made or session.edit(prompt, noise, progress=self.progress).file.name
                values[name] = self.measure(session.run, name, prompt, entry)
                rows.append(dict(clip=entry.name, caption=entry.caption, kind=kind, prompt=prompt, **values[name],
                                 page=f"{entry.folder}/index.html", strip=f"{entry.folder}/{Path(name).stem}.png"))
            metrics.save(session.run.path, self.eye.folder, values)
            page.write(session.run.path)
        return rows

    def measure(self, run, name, prompt, entry):
        """An edited video's finite numbers: {name: value}, rounded to four decimals."""
        pictures = frames.pictures(run.path / name)
        if self.side:
            pictures = [picture.resize((self.side, self.side)) for picture in pictures]
        values = metrics.of_clip(self.eye, pictures, prompt, entry.caption)
        if self.pick:
            # LOVEU-TGVE's run_eval.py, pick_score; Kirstain et al., arXiv 2305.01569
            cosines = self.pick.images(pictures) @ self.pick.texts([prompt]).flatten()
            values["pick_score"] = (self.pick.clip.logit_scale.exp().cpu() * cosines).mean().item()
        if entry.mask:
            values["psnr_outside"] = metrics.outside(run, frames.read_all(run.path / name), entry.mask)
        return {name: round(value, 4) for name, value in values.items() if math.isfinite(value)}

    def tuned_session(self, entry):
        """The clip's run, tuned and locked -> editing.Session. It is begun, or gone on with, or taken as it is.

        Raises InputError if there is a run of another clip than this one is now, or with another caption.
        """
        path = self.out / entry.folder
        if (path / "run.json").is_file():
            known = Run.open(path).settings
            if (known.prompt, known.clip_fingerprint) != (entry.caption, frames.fingerprint(entry.path)):
                raise InputError(f"{path} was tuned on another clip than {entry.path} is now, or with another caption: "
                                 "remove this folder, or name another one with --out.")
            run = Run.locked(path)
            session = editing.open_run(self.sd, run) if run.finished else editing.resume(self.sd, run)
        else:
            session = editing.begin(self.sd, entry.path, entry.caption, folder=path, **self.settings)
        if not session.run.finished:
            steps = session.tune()
            for _ in self.progress(steps, session.run.settings.steps - len(session.tuner.losses), "tuning"):
                pass
            session.finish(self.progress)
        return session


def made_edit(session, noise, prompt):
    """The file's name of an edit that was made before, by its record: the same prompt and settings. Or None."""
    wanted = prompt, session.record(noise, session.defaults.guidance)
    found = records.read_samples(session.run.path)
    return next((name for name, details in found if (details["prompt"], details["settings"]) == wanted), None)


def work(evaluation, mine, rank):
    """Evaluates this rank's clips. Returns {a clip's folder: its rows} and {a clip's name: why it has no results}."""
    results, failures = {}, {}
    for number, entry in enumerate(mine, 1):
        began = time.monotonic()
        try:
            results[entry.folder] = evaluation.evaluate(entry)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (InputError, OSError)) and not is_out_of_memory(error):
                raise
            failures[entry.name] = str(error)
            cli.complain(f"error: {entry.name}: {error}")
            continue
        cli.say(f"rank {rank}: {entry.name}, {number} of {len(mine)}, {time.monotonic() - began:.0f} s")
    return results, failures


# ---- all results ---------------------------------------------------------------------------------

def hold_settings(out, wanted):
    """Writes set.json on the first time; later raises InputError where its settings are others.

    Raises InputError, too, for a folder that holds results of somebody else.
    """
    file = out / "set.json"
    if not file.is_file():
        for path in (out / "results.csv", out / "index.html"):
            if path.exists():
                raise InputError(f"{path} is there already: name another folder with --out.")
        replace_text(file, json.dumps(wanted, indent=2) + "\n")
    saved = read_json(file)
    if differing := sorted(name for name in wanted if saved.get(name) != wanted[name]):
        raise InputError(f"{out} was made with other settings ({', '.join(differing)}): name another folder "
                         "with --out.")


def no_formula(value):
    """A text that a spreadsheet does not take for a formula: an apostrophe stands before a sign that begins one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def report(args, out, rows, failures):
    """Writes results.csv and the page. Prints the means over all edits, what failed, and where both files are."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    replace_text(out / "results.csv", text.getvalue())
    shown = page.write_set(out, Path(args.set).name, f"CLIP: {args.clip}.", rows, failures)
    for key, mean in page.means(rows).items():
        print(f"{key:24}{mean:8.2f}")
    for name, reason in failures.items():
        cli.say(f"without results: {name}: {reason}")
    cli.say(f"results: {out / 'results.csv'}, {len(rows)} edits\npage: {shown}")


# ---- the command ---------------------------------------------------------------------------------

def arguments():
    parser = cli.parser(__doc__.splitlines()[0])
    parser.add_argument("set", help="a CSV: clip, caption and a column for each kind of edit, or LOVEU-TGVE's")
    parser.add_argument("--out", metavar="PATH", help="write the results here (default: evaluated/NAME)")
    parser.add_argument("--clips", type=cli.number(int, 1), metavar="N", help="evaluate only the first N clips")
    parser.add_argument("--clip", default="weights/toy/clip", metavar="PATH",
                        help="measure by this CLIP (default: the toy's)")
    parser.add_argument("--pick", metavar="PATH", help="measure PickScore, too, by its CLIP in the same layout")
    parser.set_defaults(seed=33)
    group = parser.add_argument_group("tuning and sampling", "Without a flag the weights' own value holds.")
    group.add_argument("--size", type=cli.number(int, 8), metavar="N", help="pixels of the short side")
    group.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="frames of each clip")
    group.add_argument("--window", type=cli.number(int, 1), metavar="N", help="frames that the net sees at a time")
    group.add_argument("--steps", type=cli.number(int, 1), metavar="N", help="steps of tuning")
    group.add_argument("--lr", type=cli.number(float, 0), metavar="X", help="learning rate")
    group.add_argument("--ddim-steps", type=cli.number(int, 1, 999), metavar="N", help="steps of sampling")
    group.add_argument("--guidance", type=cli.number(float, 0), metavar="X", help="how closely edits follow the prompt")
    return parser.parse_args()


def main():
    args = arguments()
    entries, side = read_set(args.set)
    entries = entries[:args.clips]
    rank, size = join()
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    out = Path(args.out or Path("evaluated") / Path(args.set).stem)
    out.mkdir(parents=True, exist_ok=True)
    sd = cli.load_weights(args)
    eye, pick = (None if folder is None else metrics.Features(folder, sd.device) for folder in (args.clip, args.pick))
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    hold_settings(out, asdict(sd.defaults) | given | dict(fingerprint=sd.fingerprint, precision=name_of(sd.dtype)))
    evaluation = Evaluation(out, sd, given, cli.progress if rank == 0 else editing.no_progress, eye, pick, side)
    results, failures = map(exchange, work(evaluation, entries[rank::size], rank))
    if rank == 0:
        report(args, out, [row for entry in entries for row in results.get(entry.folder, ())], failures)
    leave()
    return 1 if failures and rank == 0 else 0
