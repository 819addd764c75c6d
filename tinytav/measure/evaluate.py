"""Evaluation of a whole set: tune on each clip, make each edit, measure. Results as a CSV and a page.

    python -m tinytav evaluate weights/toy/set.csv
    torchrun --nproc-per-node 2 -m tinytav evaluate weights/toy/set.csv

A set is a CSV in one of two layouts.

1. Ours. The columns are `clip` (a video or a folder of pictures, beside the CSV), `caption`, and one column for each
   kind of edit, whose heading names the kind. An empty cell is no edit.
2. LOVEU-TGVE-2023's (showlab/loveu-tgve-2023): `Video name`, `Our GT caption`, `Style Change Caption`, ..., with rows
   of headings ("DAVIS Videos:") between blocks. Clips are {DAVIS,youtube,videvo}_480p/480p_videos/NAME.mp4, or the
   folder 480p_frames/NAME, beside the CSV. Frames of such a set are squashed to 480 x 480 before they are measured,
   as in run_eval.py.

Each clip's folder is a run like train.py's, with a results.json once the clip is finished. The same command goes on
where it was stopped. Under torchrun clips are dealt to ranks, and rank 0 gathers their results. A rank is a process, on
this machine or on another.
"""
import csv
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tinytav import cli, editing
from tinytav.errors import InputError
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace, replace_text
from tinytav.files.runs import Run, slug
from tinytav.measure import metrics
from tinytav.memory import is_out_of_memory
from tinytav.noise import NOISES
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.stable_diffusion.precision import name_of
from tinytav.weights import StableDiffusion

BLOCKS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}    # heading's first word: folder
LOVEU_SIDE = 480                                            # run_eval.py measures frames of 480 x 480
COLUMNS = ("clip", "caption", "kind", "prompt", "consistency_all_pairs", "consistency_neighbours", "textual_alignment")


@dataclass(frozen=True)
class Entry:
    """One clip of a set. `folder`: the name of its folder among the results. `edits`: (kind, prompt) pairs."""
    name: str
    path: Path
    caption: str
    edits: tuple
    folder: str


# ---- the set -------------------------------------------------------------------------------------

def read_set(path):
    """A CSV -> (list of Entry, side in pixels that frames are squashed to before they are measured, or None).

    Raises InputError where the file is no set; not where a clip is missing.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(file), 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from None
    rows = [(number, row) for number, row in rows if any(row)]
    head = [cell.lower() for cell in rows[0][1]] if rows else []
    if head[:2] == ["clip", "caption"]:
        kinds = {i: rows[0][1][i] for i in range(2, len(head)) if head[i]}
        found = list(plain_rows(path, rows[1:]))
    elif head[:2] == ["video name", "our gt caption"]:
        kinds = {i: head[i].split()[0] for i in range(2, len(head)) if head[i].endswith("caption")}
        found = list(loveu_rows(path, rows[1:]))
    else:
        raise InputError(f"{path} is no set: its first line is neither `clip,caption,...` nor LOVEU-TGVE's "
                         "`Video name,Our GT caption,...`.")
    entries = []
    for number, row, clip_path in found:
        edits = tuple((kind, row[i]) for i, kind in kinds.items() if i < len(row) and row[i])
        if not edits:
            raise InputError(f"{path}, line {number}: {row[0]!r} has no edit.")
        folder = free_name(Path(row[0]).stem, {entry.folder for entry in entries})
        entries.append(Entry(row[0], clip_path, row[1], edits, folder))
    if not entries:
        raise InputError(f"{path} holds no clip.")
    return entries, LOVEU_SIDE if head[0] == "video name" else None


def plain_rows(path, rows):
    """Yields (line's number, row, the clip's path) in our layout."""
    for number, row in rows:
        if len(row) < 2 or not row[0] or not row[1]:
            raise InputError(f"{path}, line {number}: a clip and its caption are needed.")
        yield number, row, path.parent / row[0]


def loveu_rows(path, rows):
    """Yields (line's number, row, the clip's path) in LOVEU-TGVE's layout. A row without a caption is a heading."""
    blocks = list(BLOCKS.values())
    for number, row in rows:
        if len(row) < 2 or not row[1]:
            block = BLOCKS.get(row[0].split()[0].lower()) if row[0] else None
            blocks = [block] if block else blocks
        elif not row[0]:
            raise InputError(f"{path}, line {number}: the caption {row[1]!r} has no video's name.")
        else:
            yield number, row, loveu_path(path.parent, blocks, row[0])


def loveu_path(base, blocks, name):
    """The clip's video or folder of pictures; where there is none, the video's path, which reading then reports."""
    for block in blocks:
        for candidate in (base / block / "480p_videos" / f"{name}.mp4", base / block / "480p_frames" / name):
            if candidate.exists():
                return candidate
    return base / blocks[0] / "480p_videos" / f"{name}.mp4"


def free_name(stem, taken):
    """A folder's name made of a clip's, which no clip before it has."""
    name, number = slug(stem), 2
    while name in taken:
        name, number = f"{slug(stem)}-{number}", number + 1
    return name


# ---- ranks ---------------------------------------------------------------------------------------

def join():
    """(rank, number of ranks): torchrun's, or (0, 1) without it. A rank waits for the slowest however long it takes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    return distributed.get_rank(), distributed.get_world_size()


def exchange(value):
    """A value of every rank -> the list of all ranks' values, on every rank."""
    values = [value]
    if distributed.is_initialized():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


def leave():
    """Ends the group, after every rank has come here: a rank that ended earlier could take the others with it."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def deal(entries, finished, rank, size):
    """The unfinished clips that this rank works on: every size-th of them."""
    return [entry for entry in entries if entry.folder not in finished][rank::size]


# ---- measuring -----------------------------------------------------------------------------------

class Judges:
    """What measures: a CLIP, and perhaps PickScore's. side: frames are squashed to it first, or None.

    `settings`: what it was made of; results of other judges do not count.
    """

    def __init__(self, clip, pick, side, device):
        self.name, self.side = str(clip), side
        self.clip = metrics.Features(clip, device)
        self.pick = metrics.Features(pick, device) if pick else None
        self.settings = dict(clip=self.clip.fingerprint, pick=self.pick.fingerprint if pick else None, side=side)

    def measure(self, path, prompt):
        """A video's numbers: {name: value}, rounded to four decimals; without a value where it is not defined."""
        pictures = frames.pictures(path)
        if self.side:
            pictures = [picture.resize((self.side, self.side)) for picture in pictures]
        features, text = self.clip.images(pictures), self.clip.texts([prompt])
        values = dict(consistency_all_pairs=metrics.consistency_all_pairs(features),
                      consistency_neighbours=metrics.consistency_neighbours(features),
                      textual_alignment=metrics.textual_alignment(features, text))
        if self.pick:
            values["pick_score"] = pick_score(self.pick, pictures, prompt)
        return {name: round(value, 4) for name, value in values.items() if value == value}


def pick_score(judge, pictures, prompt):
    """Mean over frames of PickScore: exp(logit scale) x cosine with the prompt. LOVEU-TGVE's run_eval.py, pick_score.

    Kirstain et al., arXiv 2305.01569; judge: Features of the folder of PickScore_v1, a CLIP ViT-H/14.
    """
    cosines = judge.images(pictures) @ judge.texts([prompt]).flatten()
    return (judge.clip.logit_scale.exp().cpu() * cosines).mean().item()


# ---- one clip ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """What a rank evaluates all its clips with."""
    sd: StableDiffusion
    settings: dict          # of tuning and sampling, as editing.begin takes them
    judges: Judges
    progress: Callable      # as editing.py's functions take it


def evaluate_entry(job, entry, path):
    """Tunes, edits and measures what is not done yet, in the run's folder `path`, and saves the results there."""
    session = tuned_session(job, entry, path)
    with closing(session.run):
        noise = session.make_noise(progress=job.progress)
        files = [made_edit(session, prompt) or session.edit(prompt, noise, progress=job.progress).file
                 for _, prompt in entry.edits]
        rows = []
        for (kind, prompt), file in job.progress(list(zip(entry.edits, files)), len(files), "measuring"):
            row = dict(clip=entry.name, caption=entry.caption, kind=kind, prompt=prompt, file=file.name,
                       page=f"{entry.folder}/index.html", strip=f"{entry.folder}/{file.stem}.png")
            rows.append(row | job.judges.measure(file, prompt))
        save_results(session.run, rows, job.judges)


def tuned_session(job, entry, path):
    """The clip's run, tuned and locked -> editing.Session. It is begun, or gone on with, or taken as it is."""
    if not (path / "run.json").is_file():
        try:
            session = editing.begin(job.sd, entry.path, entry.caption, folder=path, **job.settings)
        except FileExistsError:
            raise InputError(f"{path} is there already, and is no run's folder: remove it, or name another folder with "
                             "--out.") from None
    else:
        run = Run.locked(path)
        check_same(run, entry)
        session = editing.open_run(job.sd, run) if run.finished else editing.resume(job.sd, run)
    if not session.run.finished:
        steps = session.tune()
        left = session.run.settings.steps - len(session.tuner.losses)
        for _ in job.progress(steps, left, "tuning"):
            pass
        session.finish(job.progress)
    return session


def check_same(run, entry):
    """Raises InputError unless the run was tuned on this clip, as it is now, with this caption."""
    if run.settings.prompt != entry.caption:
        raise InputError(f"{run.path} was tuned with the caption {run.settings.prompt!r}, not {entry.caption!r}: remove it, "
                         "or name another folder with --out.")
    if run.settings.clip_fingerprint != frames.fingerprint(entry.path):
        raise InputError(f"{entry.path} is not the clip any more that {run.path} was tuned on: remove this folder, or name "
                         "another one with --out.")


def made_edit(session, prompt):
    """The video of an edit that was made before, by its record: the same prompt and settings. None if there is none."""
    noise = NOISES["inverted"](session.defaults.ddim_steps)
    wanted = json.loads(json.dumps(session.record(noise, session.defaults.guidance)))
    for name, details in records.read_samples(session.run.path):
        if details.get("prompt") == prompt and details.get("settings") == wanted:
            return session.run.path / name
    return None


# ---- results -------------------------------------------------------------------------------------

def save_results(run, rows, judges):
    """results.json, by which the clip counts as finished; metrics.json and the page of its run."""
    values = {row["file"]: {key: row[key] for key in page.NUMBERS if key in row} for row in rows}
    metrics.save(run.path, judges.name, values)
    page.write(run.path)
    saved = dict(measured=judges.settings, source=run.settings.clip_fingerprint, rows=rows)
    replace_text(run.path / "results.json", json.dumps(saved, indent=2) + "\n")


def read_results(path, entry, measured):
    """A clip's rows; None where it is not finished, or its clip, caption, edits or measures were others."""
    if not (path / "results.json").is_file() or not entry.path.exists():
        return None
    saved = read_json(path / "results.json")
    rows = saved.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    same = [(row.get("caption"), row.get("kind"), row.get("prompt")) for row in rows]
    wanted = [(entry.caption, *edit) for edit in entry.edits]
    if saved.get("measured") != measured or saved.get("source") != frames.fingerprint(entry.path) or same != wanted:
        return None
    return rows


def all_results(out, entries, measured):
    """{clip's folder: rows} of the finished clips in the folder `out` as this rank sees it."""
    found = {entry.folder: read_results(out / entry.folder, entry, measured) for entry in entries}
    return {folder: rows for folder, rows in found.items() if rows is not None}


def hold_settings(out, wanted):
    """Writes set.json on the first time; later raises InputError where its settings are others.

    Raises InputError, too, for a folder that holds results of somebody else.
    """
    file = out / "set.json"
    if not file.is_file():
        if foreign := [name for name in ("results.csv", "index.html") if (out / name).exists()]:
            raise InputError(f"{out / foreign[0]} is there already, and would be overwritten: name another folder with --out.")
        replace_text(file, json.dumps(wanted, indent=2) + "\n")
        return
    saved = read_json(file)
    if differing := sorted(key for key in wanted.keys() | saved.keys() if wanted.get(key) != saved.get(key)):
        raise InputError(f"{out} was made with other settings ({', '.join(differing)}): name another folder with "
                         "--out.")


def write_results(out, args, entries, results, failures):
    """results.csv and index.html in `out`, replaced whole. results: {clip's folder: its rows}. Returns all rows, and the page."""
    columns = (*COLUMNS, "pick_score") if args.pick else COLUMNS
    rows = [row for entry in entries for row in results.get(entry.folder, [])]

    def write(file):
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    replace(out / "results.csv", write)
    return rows, page.write_set(out, Path(args.set).name, rows, failures, f"CLIP: {args.clip}.")


def no_formula(value):
    """A text that a spreadsheet does not take for a formula: an apostrophe stands before a sign that begins one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


# ---- the command ---------------------------------------------------------------------------------

def arguments():
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("set", help="a CSV with the columns clip, caption and one for each kind of edit, or LOVEU-TGVE-2023's")
    p.add_argument("--out", metavar="PATH", help="write the results here (default: evaluated/NAME)")
    p.add_argument("--clips", type=cli.number(int, 1), metavar="N", help="evaluate only the first N clips of the set")
    p.add_argument("--clip", default="weights/toy/clip", metavar="PATH", help="measure by this CLIP (default: the toy's)")
    p.add_argument("--pick", metavar="PATH", help="measure PickScore, too, by its CLIP in the same layout")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N", help="pixels of the short side (default: the weights' own)")
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="frames of each clip (default: the weights' own)")
    p.add_argument("--steps", type=cli.number(int, 1), metavar="N", help="steps of tuning (default: the weights' own)")
    p.add_argument("--lr", type=cli.number(float, 0), metavar="X", help="learning rate (default: the weights' own)")
    p.add_argument("--ddim-steps", type=cli.number(int, 1, 999), metavar="N",
                   help="steps of sampling (default: the weights' own)")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="X",
                   help="how strongly the edits follow their prompts (default: the weights' own)")
    return p.parse_args()


def settings_of(args):
    """The settings of tuning and sampling, as editing.begin takes them: None stands for the weights' own."""
    return dict(size=args.size, frames=args.frames, steps=args.steps, lr=args.lr, ddim_steps=args.ddim_steps,
                guidance=args.guidance, seed=33 if args.seed is None else args.seed)


def work(job, mine, out, rank):
    """Evaluates this rank's clips. Returns {clip's name: why it has no results}."""
    failures = {}
    for number, entry in enumerate(mine, 1):
        began = time.monotonic()
        try:
            evaluate_entry(job, entry, out / entry.folder)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (InputError, OSError)) and not is_out_of_memory(error):
                raise
            failures[entry.name] = str(error)
            cli.complain(f"error: {entry.name}: {error}")
            continue
        cli.say(f"rank {rank}: {entry.name}, {number} of {len(mine)}, {time.monotonic() - began:.0f} s")
    return failures


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
    judges = Judges(args.clip, args.pick, side, sd.device)
    job = Job(sd, settings_of(args), judges, cli.progress if rank == 0 else editing.no_progress)
    used = {name: editing.chosen(value, getattr(sd.defaults, name, None)) for name, value in job.settings.items()}
    hold_settings(out, used | dict(fingerprint=sd.fingerprint, precision=name_of(sd.dtype)))
    before = exchange(all_results(out, entries, judges.settings))
    finished = set().union(*before)
    mine = deal(entries, finished, rank, size)
    cli.say(f"rank {rank} of {size}: {len(entries)} clips, {len(finished)} finished before, {len(mine)} to do")
    failures = work(job, mine, out, rank)
    results, all_failures = {}, {}
    for part in exchange(dict(results=all_results(out, entries, judges.settings), failures=failures)):
        results |= part["results"]
        all_failures |= part["failures"]
    if rank == 0:
        rows, shown = write_results(out, args, entries, results, all_failures)
        report(out, rows, shown, all_failures)
    leave()
    return 1 if all_failures and rank == 0 else 0


def report(out, rows, shown, failures):
    """Prints the means over all edits, what failed, and where the results are."""
    for key in page.NUMBERS:
        mean = page.mean_of(rows, key)
        if mean == mean:
            print(f"{key:24}{mean:8.2f}")
    for name, reason in failures.items():
        cli.say(f"without results: {name}: {reason}")
    cli.say(f"results: {out / 'results.csv'}, {len(rows)} edits\npage: {shown}")
