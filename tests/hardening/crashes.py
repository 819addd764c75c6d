"""Ends train.py and sample.py at random moments, looks at what lies on the disk, and goes on.

Half of the moments are spread over the whole time of the command, the others over the calls that touch a file: before,
after and in the midst of each, where a file that is not replaced whole would be torn.
"""
import json
import random
import shutil
import signal
from collections import Counter

import tiny
from safetensors.torch import load_file

TRAIN = ("train.py", "clip.mp4", "a man", "--weights", "w", "--steps", 6)
SAMPLE = ("sample.py", "--run", "runs/clip", "--prompt", "a dog", "a cat")
SAME = ("tuned.safetensors", "inversion.safetensors", "clip.safetensors", "loss.csv", "source.mp4")


def stock(folder, warm):
    """Weights, a clip, and what the two commands make of them unless they are stopped -> (seconds, touches) of each."""
    tiny.write_folder(folder / "w")
    tiny.save_json(folder / "w/defaults.json", tiny.DEFAULTS | dict(size=16, ddim_steps=2))
    tiny.write_clip(folder / "clip.mp4")
    times = {}
    for command in (TRAIN, SAMPLE):
        seconds = warm(folder, *command).seconds            # of the second time, with what the first has made
        shutil.rmtree(folder / "runs") if command is TRAIN else [f.unlink() for f in (folder / "runs/clip").glob("a-*")]
        answer = warm(folder, *command, count=True)
        assert answer.status == 0, answer.err
        times[command[0]] = seconds, int(answer.touches)
    return times


def moment(rng, seconds, touches, number):
    """What ends the process, as the warm interpreter is told it."""
    if rng.random() < 0.5:
        return dict(signal=(number, rng.uniform(0.05, seconds)))
    later = rng.choice([0, 0, 1e-5, 1e-4, 1e-3]) if number == signal.SIGKILL else 0
    return dict(kill=(number, rng.randint(1, touches), later))


def torn(run, whole):
    """The files of a run that are neither whole nor the other run's; "" if there is none."""
    for file in sorted(file for file in run.glob("*") if not file.name.endswith(".part")):
        other = whole / file.name
        try:
            if file.name == "run.json":
                fine = json.loads(file.read_text()).keys() == json.loads(other.read_text()).keys()
            elif file.name == "state.safetensors":
                fine = 0 < len(load_file(file)["losses"]) <= 6
            elif file.name == "loss.csv":
                fine = other.read_text().startswith(file.read_text()) and file.read_text().endswith("\n")
            elif file.name == "index.html":
                fine = file.read_text().endswith("</html>\n")
            else:
                fine = file.read_bytes() == other.read_bytes()
        except Exception as error:                          # whatever a torn file makes its reader say
            fine, other = False, error
        if not fine:
            return f"{file.name} is torn or unknown ({other})"
    return ""


def crash_train(warm, stock, place, how):
    """Ends one tuning, resumes it. -> what is wrong, or ""."""
    for name in ("w", "clip.mp4"):
        (place / name).symlink_to(stock / name)
    ended, run, whole = warm(place, *TRAIN, **how), place / "runs/clip", stock / "runs/clip"
    number = how.get("signal", how.get("kill"))[0]
    if ended.status not in {0, -number, 128 + number, -signal.SIGALRM} or "Traceback" in ended.err:
        return f"ends with {ended.status}: {ended.err[-300:]}"
    if ended.status == 128 + number and (run / "state.safetensors").exists() and "--resume runs/clip" not in ended.out:
        return "does not say how to resume"
    if problem := torn(run, whole):
        return problem
    again = warm(place, "train.py", "--resume", "runs/clip")
    if not (run / "run.json").exists():
        return "" if "is not a run" in again.err else "there is no run, which resuming does not say"
    if again.status != 0 and "is finished" not in again.err:
        return f"cannot be resumed: {again.err[-300:]}"
    if changed := [name for name in SAME if (run / name).read_bytes() != (whole / name).read_bytes()]:
        return f"resumed, it differs in {changed}"
    if left := [file.name for file in run.iterdir() if not (whole / file.name).exists()]:
        return f"leaves {left}"
    return torn(run, whole)


def crash_sample(warm, stock, place, how):
    """Ends one sampling, samples again. -> what is wrong, or ""."""
    for name in ("w", "clip.mp4"):
        (place / name).symlink_to(stock / name)
    shutil.copytree(stock / "runs", place / "runs")
    run, whole = place / "runs/clip", stock / "runs/clip"
    for file in run.glob("a-*"):
        file.unlink()
    ended = warm(place, *SAMPLE, **how)
    number = how.get("signal", how.get("kill"))[0]
    if ended.status not in {0, -number, 128 + number, -signal.SIGALRM} or "Traceback" in ended.err:
        return f"ends with {ended.status}: {ended.err[-300:]}"
    if problem := torn(run, whole):
        return problem
    before = {file: file.read_bytes() for file in run.glob("a-*")}
    if (again := warm(place, *SAMPLE)).status != 0:
        return f"cannot sample again: {again.err[-300:]}"
    if any(file.read_bytes() != data for file, data in before.items()):
        return "overwrites an earlier result"
    results = [place / line for line in again.out.splitlines() if line.endswith(".mp4")]
    return "" if all(result.is_file() for result in results) else "lacks a result"


def many(warm, stock, times, seeds, report=print):
    """Ends both commands at every seed's moment, at every fifth by Ctrl-C too -> {kind: Counter}."""
    counts = {}
    for seed in seeds:
        for script, crash in (("train.py", crash_train), ("sample.py", crash_sample)):
            for number in (signal.SIGKILL, signal.SIGTERM) + (signal.SIGINT,) * (seed % 5 == 0):
                rng = random.Random(f"{script} {number} {seed}")
                place = stock.parent / f"{script}-{number}-{seed}"
                place.mkdir()
                problem = crash(warm, stock, place, moment(rng, *times[script], number))
                shutil.rmtree(place)
                kind = f"{script}: {signal.Signals(number).name}"
                counts.setdefault(kind, Counter()).update(["cases", "failures" if problem else "right result"])
                if problem:
                    report(f"FAILURE {kind}, seed {seed}: {problem}")
        report(f"up to moment {seed}: {dict(sum(counts.values(), Counter()))}") if report is print else None
    return counts
