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
import argparse
import csv
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import tinytav
from tinytav import cli, editing, pipeline
from tinytav.errors import InputError
from tinytav.files import frames, page
from tinytav.files.atomic import replace, replace_text
from tinytav.files.runs import Run, Settings, lock, slug
from tinytav.measure import fit, memory, metrics, recompute
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.stable_diffusion.precision import name_of
from tinytav.tuning import Tuner
from tinytav.weights import StableDiffusion

BLOCKS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}    # heading's first word: folder
LOVEU_SIDE = 480                                            # run_eval.py measures frames of 480 x 480
COLUMNS = ("clip", "caption", "kind", "prompt", "consistency_all_pairs", "consistency_neighbours", "textual_alignment")
SAVE_EVERY = 60                                             # seconds of tuning that a killed process may lose


@dataclass(frozen=True)
class Clip:
    """One row of a set. `folder`: the name of its folder among the results. `edits`: (kind, prompt) pairs."""
    name: str
    path: Path
    caption: str
    edits: tuple
    folder: str


# ---- the set -------------------------------------------------------------------------------------

def read_set(path):
    """A CSV -> (list of Clip, side in pixels that frames are squashed to before they are measured, or None).

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
    clips = []
    for number, row, clip_path in found:
        edits = tuple((kind, row[i]) for i, kind in kinds.items() if i < len(row) and row[i])
        if not edits:
            raise InputError(f"{path}, line {number}: {row[0]!r} has no edit.")
        folder = free_name(Path(row[0]).stem, {clip.folder for clip in clips})
        clips.append(Clip(row[0], clip_path, row[1], edits, folder))
    if not clips:
        raise InputError(f"{path} holds no clip.")
    return clips, LOVEU_SIDE if head[0] == "video name" else None


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
    """A value of every rank -> the list of all ranks' values, on every rank. As JSON, so that nothing is unpickled."""
    if not distributed.is_initialized():
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size())]
    distributed.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(length.item() for length in lengths)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    distributed.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[:length].tolist())) for part, length in zip(parts, lengths)]


def deal(clips, finished, rank, size):
    """The unfinished clips that this rank works on: every size-th of them."""
    return [clip for clip in clips if clip.folder not in finished][rank::size]


# ---- measuring -----------------------------------------------------------------------------------

class Judges:
    """What measures: a CLIP, and perhaps PickScore's. side: frames are squashed to it first, or None.

    `settings`: what it was made of; results of other judges do not count.
    """

    def __init__(self, clip, pick, side, device):
        self.name, self.side = str(clip), side
        self.settings = dict(clip=str(clip), pick=pick, side=side)
        self.clip = metrics.Features(clip, device)
        self.pick = metrics.Features(pick, device) if pick else None

    def models(self):
        """The models that lie in memory."""
        return [features.clip for features in (self.clip, self.pick) if features is not None]

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
    args: argparse.Namespace
    judges: Judges
    free: float             # bytes of memory for a step of tuning: what is left beside all other models
    progress: Callable      # as editing.py's functions take it


def evaluate_clip(job, clip, path):
    """Tunes, edits and measures what is not done yet, in the run's folder `path`, and saves the results there."""
    sd, progress = job.sd, job.progress
    run = tuned_run(job, clip, path)
    net, source = editing.net_of(run, sd), editing.clip_of(run, sd)
    noise = editing.noise_of(run, sd, net, source, run.settings.ddim_steps, progress)
    for kind, prompt in clip.edits:
        name = edit_name(kind, prompt)
        if not (path / f"{name}.mp4").is_file():
            x = editing.sample_clip(sd, net, noise, prompt, run.settings.ddim_steps, run.settings.guidance, progress)
            write_edit(sd, run, source, name, prompt, x)
    rows = []
    for kind, prompt in progress(clip.edits, len(clip.edits), "measuring"):
        name = edit_name(kind, prompt)
        row = dict(clip=clip.name, caption=clip.caption, kind=kind, prompt=prompt, page=f"{clip.folder}/index.html",
                   strip=f"{clip.folder}/{name}.png")
        rows.append(row | job.judges.measure(path / f"{name}.mp4", prompt))
    save_results(path, rows, job.judges)


def edit_name(kind, prompt):
    """The name of an edit's files, without what follows the dot."""
    return slug(f"{kind} {prompt}")


def tuned_run(job, clip, path):
    """The clip's run, tuned: begun, gone on with, or as it is. Raises InputError if its caption was another."""
    path.mkdir(parents=True, exist_ok=True)
    lock(path)
    run = Run.open(path) if (path / "run.json").is_file() else new_run(job.sd, clip, path, job.args)
    run.check(job.sd)
    if run.settings.prompt != clip.caption:
        raise InputError(f"{path} was tuned with the caption {run.settings.prompt!r}, not {clip.caption!r}: remove it, "
                         "or name another folder with --out.")
    run.clear()
    if not run.finished:
        tune(job, run)
    return run


def new_run(sd, clip, path, args):
    """A run that nothing is tuned for yet: the clip encoded once, and the settings."""
    size = args.size or sd.defaults.size
    source = frames.read(clip.path, size, sd.multiple, args.frames or sd.defaults.frames, exact=args.frames is not None)
    frames.warn_if_far_apart(source, clip.path)
    encoded = editing.encode_clip(sd, source, clip.caption)
    settings = Settings(
        clip=str(clip.path), prompt=clip.caption,
        weights=str(sd.path), fingerprint=sd.fingerprint, tokenizer=args.tokenizer, prediction=args.prediction,
        precision=name_of(sd.dtype), attention="sparse-causal", norm="clip", **numbers(args, sd),
        size=size, frames=len(source.x), indices=source.indices, total=source.total, fps=str(source.fps),
        versions=dict(tinytav=tinytav.__version__, torch=torch.__version__, python=sys.version.split()[0]))
    run = Run(path, settings)
    run.write("clip", dict(mean=encoded.mean, std=encoded.std))
    frames.write_mp4(path / "source.mp4", source.x, source.fps)
    run.save()
    return run


def numbers(args, sd):
    """The numbers of tuning and sampling: those that are given, and the weights' defaults for the rest."""
    return dict(steps=args.steps or sd.defaults.steps, lr=sd.defaults.lr if args.lr is None else args.lr,
                ddim_steps=args.ddim_steps or sd.defaults.ddim_steps,
                guidance=sd.defaults.guidance if args.guidance is None else args.guidance,
                seed=33 if args.seed is None else args.seed)


def tune(job, run):
    """Tunes from where the run's saved state stands, saving it now and then; then inverts the clip."""
    sd, settings, clip = job.sd, run.settings, editing.clip_of(run, job.sd)
    net = editing.new_net(sd, settings.frames, settings.attention, settings.norm, settings.seed)
    plan = fit.plan_tuning(memory.work_on(sd, net, clip.mean.shape), job.free)
    if plan.warning:
        warnings.warn(plan.warning)
    recompute.switch(net, plan.recomputed)
    tuner = Tuner(net, sd.schedule, clip.mean, clip.std, clip.context, settings.lr, settings.seed)
    if run.has("state"):
        tuner.load_state_dict(run.read("state"))
    left = range(len(tuner.losses), settings.steps)
    save_at = time.time() + SAVE_EVERY
    for _ in job.progress(left, len(left), "tuning"):
        tuner.step()
        if time.time() > save_at:
            run.write("state", tuner.state_dict())
            save_at = time.time() + SAVE_EVERY
    run.write_losses(tuner.losses)
    run.write("tuned", net.tuned())
    noise = editing.invert_clip(sd, net, clip, settings.ddim_steps, job.progress)
    run.write("inversion", dict(noise=noise, steps=torch.tensor(settings.ddim_steps)))
    run.finish()


def write_edit(sd, run, source, name, prompt, x):
    """An edit's strip and record, and last its video, by which it counts as made."""
    columns = frames.strip_columns(len(x))
    frames.write_strip(run.path / f"{name}.png", pipeline.decode(sd.vae, source.mean[:, :, columns]), x[columns])
    settings = run.settings
    page.write_record(run.path, name, prompt, dict(ddim_steps=settings.ddim_steps, guidance=settings.guidance),
                      page.command("python", "sample.py", "--run", run.path, "--prompt", prompt))
    frames.write_mp4(run.path / f"{name}.mp4", x, run.settings.fps, title=prompt)


# ---- results -------------------------------------------------------------------------------------

def save_results(path, rows, judges):
    """results.json, by which the clip counts as finished; metrics.json and the page of its run."""
    values = {}
    for row in rows:
        file = Path(row["strip"]).with_suffix(".mp4").name
        values[file] = {key: row[key] for key in page.NUMBERS if key in row}
    metrics.save(path, judges.name, values)
    page.write(path)
    replace_text(path / "results.json", json.dumps(dict(measured=judges.settings, rows=rows), indent=2) + "\n")


def read_results(path, clip, measured):
    """A clip's rows; None where it is not finished, or its edits or measures were others."""
    if not (path / "results.json").is_file():
        return None
    saved = read_json(path / "results.json")
    rows = saved.get("rows")
    whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not whole or saved.get("measured") != measured:
        return None
    same = [(row.get("caption"), row.get("kind"), row.get("prompt")) for row in rows]
    return rows if same == [(clip.caption, *edit) for edit in clip.edits] else None


def all_results(out, clips, measured):
    """{clip's folder: rows} of the finished clips in the folder `out` as this rank sees it."""
    found = {clip.folder: read_results(out / clip.folder, clip, measured) for clip in clips}
    return {folder: rows for folder, rows in found.items() if rows is not None}


def hold_settings(out, wanted):
    """Writes set.json on the first time; later raises InputError where its settings are others."""
    file = out / "set.json"
    if not file.is_file():
        replace_text(file, json.dumps(wanted, indent=2) + "\n")
        return
    saved = read_json(file)
    if differing := sorted(key for key in wanted.keys() | saved.keys() if wanted.get(key) != saved.get(key)):
        raise InputError(f"{out} was made with other settings ({', '.join(differing)}): name another folder with "
                         "--out.")


def write_results(out, args, clips, results, failures):
    """results.csv and index.html in `out`, replaced whole. results: {clip's folder: its rows}."""
    columns = (*COLUMNS, "pick_score") if args.pick else COLUMNS
    rows = [row for clip in clips for row in results.get(clip.folder, [])]

    def write(file):
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    replace(out / "results.csv", write)
    page.write_set(out, Path(args.set).name, rows, failures, f"CLIP: {args.clip}.")
    return rows


# ---- the command ---------------------------------------------------------------------------------

def arguments():
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("set", help="a CSV: clip, caption and edits, or LOVEU-TGVE-2023's")
    p.add_argument("--out", metavar="PATH", help="folder of the results (default: evaluated/NAME)")
    p.add_argument("--clips", type=cli.number(int, 1), metavar="N", help="only the first N of the set")
    p.add_argument("--clip", default="weights/toy/clip", metavar="PATH", help="the CLIP that measures; else the toy's")
    p.add_argument("--pick", metavar="PATH", help="PickScore's CLIP, in the same layout; else no PickScore")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N", help="of the short side, in pixels; else the weights'")
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="of each clip; else the weights' own number")
    p.add_argument("--steps", type=cli.number(int, 1), metavar="N", help="of tuning; else the weights' own")
    p.add_argument("--lr", type=cli.number(float, 0), metavar="N", help="learning rate; else the weights' own")
    p.add_argument("--ddim-steps", type=cli.number(int, 1, 999), metavar="N", help="of sampling; else the weights' own")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="N", help="else the weights' own")
    return p.parse_args()


def work(job, mine, out, rank):
    """Evaluates this rank's clips. Returns {clip's name: why it has no results}."""
    failures = {}
    for number, clip in enumerate(mine, 1):
        began = time.time()
        try:
            evaluate_clip(job, clip, out / clip.folder)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (InputError, OSError)) and not cli.is_out_of_memory(error):
                raise
            failures[clip.name] = str(error)
            print(f"error: {clip.name}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"rank {rank}: {clip.name}, {number} of {len(mine)}, {time.time() - began:.0f} s", flush=True)
    return failures


def free_for_a_rank(device):
    """Bytes of memory that are free for this rank; on a CPU the ranks of a machine share them."""
    free = fit.free_bytes(device)
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else free


def main():
    args = arguments()
    clips, side = read_set(args.set)
    clips = clips[:args.clips]
    rank, size = join()
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    out = Path(args.out or Path("evaluated") / Path(args.set).stem)
    out.mkdir(parents=True, exist_ok=True)
    free = free_for_a_rank(cli.choose_device(args.device))                  # before models take their part of it
    sd = cli.load_weights(args)
    judges = Judges(args.clip, args.pick, side, sd.device)
    free -= sum(fit.weight_bytes(model) for model in (sd.vae, sd.text_encoder, *judges.models()))
    job = Job(sd, args, judges, free, cli.progress if rank == 0 else editing.no_progress)
    hold_settings(out, dict(fingerprint=sd.fingerprint, precision=name_of(sd.dtype), size=args.size or sd.defaults.size,
                            frames=args.frames or sd.defaults.frames, **numbers(args, sd)))
    before = exchange(all_results(out, clips, judges.settings))
    finished = set().union(*before)
    mine = deal(clips, finished, rank, size)
    print(f"rank {rank} of {size}: {len(clips)} clips, {len(finished)} finished before, {len(mine)} to do", flush=True)
    failures = work(job, mine, out, rank)
    results, all_failures = {}, {}
    for part in exchange(dict(results=all_results(out, clips, judges.settings), failures=failures)):
        results |= part["results"]
        all_failures |= part["failures"]
    if rank == 0:
        report(args, out, write_results(out, args, clips, results, all_failures), all_failures)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 1 if all_failures and rank == 0 else 0


def report(args, out, rows, failures):
    """Prints the means over all edits, what failed, and where the results are."""
    for key in page.NUMBERS:
        mean = page.mean_of(rows, key)
        if mean == mean:
            print(f"{key:24}{mean:8.2f}")
    for name, reason in failures.items():
        print(f"without results: {name}: {reason}")
    print(f"results: {out / 'results.csv'}, {len(rows)} edits\npage: {out / 'index.html'}")
