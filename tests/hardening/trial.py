"""One broken input, tried: what the command did, and whether it may."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import tiny
from hardening import broken
from hardening.broken import EITHER, ERROR, OK
from hardening.warm import ROOT
from safetensors.torch import load_file

MEMORY = 1500               # MB that a case may reach: the interpreter with torch takes 300 of them
SECONDS = 60


def stock(folder, warm):
    """What every case begins with: weights, a clip, a finished and an unfinished run, and a file nobody may touch."""
    tiny.write_folder(folder / "w")
    tiny.save_json(folder / "w/defaults.json", tiny.DEFAULTS | dict(size=16, frames=2, steps=2, ddim_steps=1))
    tiny.write_clip(folder / "clip.mp4")
    (folder / "precious.txt").write_text("mine")
    for name in ("done", "half"):
        done = warm(folder, "train.py", "clip.mp4", "a man", "--weights", "w", "--out", "runs", "--steps", 4)
        assert done.status == 0, done.err
        (folder / "runs/clip").rename(folder / "runs" / name)
    half = folder / "runs/half"
    settings = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps(settings | dict(finished=0)))
    (half / "tuned.safetensors").unlink(), (half / "inversion.safetensors").unlink()
    return folder


def files_of(place, but):
    """{file: its size and time} of all in `place` that does not lie in the folders `but`."""
    return {str(path): "" if path.is_dir() else (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in place.rglob("*") if not any(path.is_relative_to(folder) for folder in but)}


def trial(warm, stock, name, seed, real=False):
    """-> (outcome: OK or ERROR, what is wrong with it or "", the answer). The place is removed again."""
    above = Path(tempfile.mkdtemp(prefix="broken-", dir=stock.parent))
    place = above / "place"
    try:
        shutil.copytree(stock, place, symlinks=True)
        argv, expected = broken.make(name, seed, place)
        mine = ["out"] + [f"runs/{run}" for run in ("half", "done") if f"runs/{run}" in argv]
        before = files_of(above, [place / folder for folder in mine])
        answer = (command if real else in_process)(warm, place, argv, mine)
        outcome = OK if answer.status == 0 else ERROR
        problem = judge(answer, place, argv, expected, outcome)
        if changed := before.items() ^ files_of(above, [place / folder for folder in mine]).items():
            problem = problem or f"touched {sorted(path for path, _ in changed)[:3]}"
        return outcome, problem, answer
    finally:
        shutil.rmtree(above)


def in_process(warm, place, argv, mine):
    return warm(place, *argv, limit=SECONDS, allowed=str(place))


def command(warm, place, argv, mine):
    """The same as a user types it."""
    try:
        done = subprocess.run([sys.executable, str(ROOT / argv[0]), *map(os.fsencode, argv[1:])], cwd=place, timeout=3 * SECONDS,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    except subprocess.TimeoutExpired:
        return SimpleNamespace(status=1, hang=True, err="", out="", broken="", peak=0, seconds=3 * SECONDS)
    return SimpleNamespace(status=done.returncode, hang=False, err=done.stderr.decode(errors="replace"), broken="",
                           out=done.stdout.decode(errors="replace"), peak=0, seconds=0)


def judge(answer, place, argv, expected, outcome):
    """What is wrong with an answer, in words; "" if nothing is."""
    last = answer.err.strip().splitlines()[-1:] or [""]
    if answer.hang:
        return f"hangs: no end within {SECONDS} seconds"
    if answer.status not in (0, 2) or "Traceback" in answer.err:
        return f"ends with {answer.status}: {last[0][:300]}"
    if answer.status == 2 and "error: " not in answer.err:
        return f"ends with 2 without a sentence: {last[0][:300]}"
    if answer.broken:
        return answer.broken.splitlines()[0]
    if answer.peak > MEMORY:
        return f"takes {answer.peak} MB of memory"
    if expected not in (EITHER, outcome):
        return f"gives {'a result' if outcome == OK else last[0][:300]}, where the {expected} was due"
    return "" if outcome == ERROR else missing_result(answer, place, argv)


def missing_result(answer, place, argv):
    """A command that ends well has made what it says."""
    if argv[0] == "sample.py":
        paths = [line for line in answer.out.splitlines() if line.endswith((".mp4", ".png"))]
        return "" if paths and all((place / path).stat().st_size for path in paths) else "names no result"
    if argv[0] == broken.MODULE:
        return "" if all(load_file(file) for file in files_made(place / argv[-1])) else "leaves a file without tensors"
    run = place / "runs/half" if "--resume" in argv else next((place / "out").iterdir())
    tuned = load_file(run / "tuned.safetensors")
    finite = all(z.isfinite().all() for z in tuned.values())
    return "" if finite and json.loads((run / "run.json").read_text())["finished"] else "leaves a run that is not finished"


def files_made(target):
    """What convert says it has made: one file, or those of a folder, which are at least one."""
    return [target] if target.is_file() else list(target.rglob("*.safetensors")) or [target]


def many(warm, stock, seeds, names=tuple(broken.KINDS), real=False, report=print):
    """Tries every kind with every seed -> {kind: Counter of cases, OK, ERROR, failures}."""
    counts = {name: Counter() for name in names}
    for seed in seeds:
        for name in names:
            outcome, problem, _ = trial(warm, stock, name, seed, real)
            counts[name].update(["cases", "failures" if problem else outcome])
            if problem:
                report(f"FAILURE {name!r} seed {seed}: {problem}")
        report(f"up to seed {seed}: {dict(sum(counts.values(), Counter()))}")
    return counts
