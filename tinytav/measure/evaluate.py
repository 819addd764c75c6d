"""Evaluation of a whole set: tune on each clip, make each edit, measure. Results as a CSV and a page.

    python -m tinytav evaluate weights/toy/set.csv
    torchrun --nproc-per-node 2 -m tinytav evaluate weights/toy/set.csv

A set is a CSV in one of two layouts.

1. Ours. The columns are `clip` (a video or a folder of pictures, beside the CSV), `caption`, and one column for each kind of
   edit, whose heading names the kind. An empty cell is no edit.
2. LOVEU-TGVE-2023's (showlab/loveu-tgve-2023): `Video name`, `Our GT caption`, `Style Change Caption`, ..., with rows of
   headings ("DAVIS Videos:") between blocks. Clips are {DAVIS,youtube,videvo}_480p/480p_videos/NAME.mp4 or the folder
   480p_frames/NAME beside the CSV. There, frames are squashed to 480 x 480 before they are measured, as in run_eval.py.

Each clip's folder is a run like train.py's, with a results.json once the clip is finished. The same command goes on where it
was stopped. Under torchrun clips are dealt to ranks, and rank 0 gathers: a rank is a process, on this machine or on another.
"""
import csv
import json
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tinytav import cli
from tinytav.files import frames, page
from tinytav.files.runs import slug
from tinytav.measure import metrics
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.stable_diffusion.config import InputError

BLOCKS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}    # heading's first word: folder
LOVEU_SIDE = 480                                            # run_eval.py measures frames of 480 x 480
COLUMNS = ("clip", "caption", "kind", "prompt", "consistency_all_pairs", "consistency_neighbours", "textual_alignment")
SETTINGS = ("size", "frames", "steps", "lr", "ddim_steps", "guidance")


@dataclass(frozen=True)
class Clip:
    """One row of a set. `folder`: the name of its folder among the results. `edits`: (kind, prompt) pairs."""
    name: str
    path: Path
    caption: str
    edits: tuple
    folder: str


# ---- the set -----------------------------------------------------------------------------------------------------------

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
        clips.append(Clip(row[0], clip_path, row[1], edits, free_name(Path(row[0]).stem, {clip.folder for clip in clips})))
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


# ---- ranks -------------------------------------------------------------------------------------------------------------

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


# ---- measuring ---------------------------------------------------------------------------------------------------------

class Judges:
    """What measures: a CLIP, and perhaps PickScore's. side: frames are squashed to it first, or None."""

    def __init__(self, clip, pick, side, device):
        self.clip, self.side = metrics.Features(clip, device), side
        self.pick = metrics.Features(pick, device) if pick else None

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


# ---- results -----------------------------------------------------------------------------------------------------------

def read_results(folder, clip, settings):
    """A finished clip's rows; None where it is not finished. Raises InputError where they are of other settings."""
    file = folder / clip.folder / "results.json"
    if not file.is_file():
        return None
    saved = read_json(file)
    wanted = settings | dict(caption=clip.caption, edits=[list(edit) for edit in clip.edits])
    if saved.get("settings") != wanted:
        kept = saved.get("settings") if isinstance(saved.get("settings"), dict) else {}
        differing = ", ".join(sorted(key for key in wanted.keys() | kept.keys() if wanted.get(key) != kept.get(key)))
        raise InputError(f"{file} was made with other settings ({differing}): name another folder with --out.")
    return saved["rows"]


def write_results(folder, title, clips, rows, failures, pick, note):
    """results.csv and index.html in `folder`, replaced whole. rows: {clip's folder: its rows}."""
    columns = (*COLUMNS, "pick_score") if pick else COLUMNS
    ordered = [row for clip in clips for row in rows.get(clip.folder, [])]

    def write(file):
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(ordered)
    frames.replace(folder / "results.csv", write)
    page.write_set(folder, title, ordered, failures, note)
