"""One broken input, tried: what the command did, and whether it may."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import tiny
from hardening import broken, broken_clips, broken_runs, broken_weights  # noqa: F401
from hardening.broken import EITHER, ERROR, OK
from hardening.warm import ONE_THREAD, PATIENCE, ROOT
from safetensors.torch import load_file

SECONDS = 60
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")       # what could command a terminal
NO_READER = (120, 141, -13)     # how a process may end whose words nobody reads


def stock(folder, warm):
    """What every case begins with: weights, a CLIP, a clip, a finished and an unfinished run, a file to leave alone."""
    tiny.write_folder(folder / "w")
    tiny.save_json(folder / "w/defaults.json", tiny.DEFAULTS | dict(size=16, frames=2, steps=2, ddim_steps=1))
    tiny.write_judge(folder / "judge")
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


def state(path):
    """What would show that a file was touched."""
    status = path.lstat()
    return "" if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)


def trial(warm, stock, name, seed, real=False):
    """-> (outcome: OK or ERROR, what is wrong with it or "", the answer). The place is removed again."""
    above = Path(tempfile.mkdtemp(prefix="broken-", dir=stock.parent))
    place = above / "place"
    try:
        shutil.copytree(stock, place, symlinks=True)
        case = broken.make(name, seed, place)
        before = {path: state(path) for path in above.rglob("*")}
        answer = (command if real else in_process)(warm, place, case)
        outcome = OK if answer.status == 0 else ERROR
        problem = judge(answer, place, case, outcome) or touched(before, above, place, case)
        if not problem and outcome == OK:
            problem = missing_result(answer, place, case.argv) or too_private(before, place, case.job.get("umask"))
        return outcome, problem, answer
    finally:
        shutil.rmtree(above)


def in_process(warm, place, case):
    return warm(place, *case.argv, limit=SECONDS, allowed=str(place), **case.job)


def command(warm, place, case):
    """The same as a user types it."""
    streams = {name: case.job.get("streams", {}).get(name) for name in ("out", "err")}
    closing = "".join(f" {number}>&-" for number, name in ((1, "out"), (2, "err")) if streams[name] == "closed")
    words = ["bash", "-c", f'exec "$0" "$@"{closing}', sys.executable, str(ROOT / case.argv[0]), *case.argv[1:]]
    pipes = {f"std{name}": end_of(fault) for name, fault in streams.items()}
    try:
        done = subprocess.run([os.fsencode(word) for word in words], cwd=place, timeout=PATIENCE * SECONDS, **pipes,
                              umask=case.job.get("umask", -1), env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    except subprocess.TimeoutExpired:
        return SimpleNamespace(status=1, hang=True, err="", out="", broken="", peak=0, seconds=PATIENCE * SECONDS)
    out, err = ((data or b"").decode(errors="replace") for data in (done.stdout, done.stderr))
    return SimpleNamespace(status=done.returncode, hang=False, out=out, err=err, broken="", peak=0, seconds=0)


def end_of(fault):
    """What a stream of a real command leads to."""
    if fault == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if fault == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return subprocess.PIPE


# ---- judging -------------------------------------------------------------------------------------

def judge(answer, place, case, outcome):
    """What is wrong with an answer, in words; "" if nothing is."""
    last = (answer.err.strip().splitlines()[-1:] or [""])[0][:300]
    if answer.hang:
        return f"hangs: no end within {SECONDS} seconds of computing, or {PATIENCE} times as many by the clock"
    if answer.status not in may_end_with(case) or "Traceback" in answer.err:
        return f"ends with {answer.status}: {last}"
    if answer.status in (1, 2) and "error: " not in answer.err and not case.job.get("streams"):
        return f"ends with {answer.status} without a sentence: {last}"
    if answer.broken:
        return answer.broken.splitlines()[0]
    if answer.peak > case.memory:
        return f"takes {answer.peak} MB of memory"
    if control := CONTROL.search(answer.out + answer.err):
        return f"prints the control character {control[0]!r}"
    if badly_quoted := [word for word in suggested(answer) if not (place / word).exists()]:
        return f"suggests a command on {badly_quoted[0]!r}, which is not there"
    if case.outcome not in (EITHER, outcome):
        return f"gives {'a result' if outcome == OK else last}, where the {case.outcome} was due"
    return ""


def may_end_with(case):
    """The exit statuses of this case that are no bug."""
    return (0, 2) + NO_READER * bool(case.job.get("streams")) + (1,) * ("evaluate" in case.argv)


def suggested(answer):
    """The runs that suggested commands name, as a shell would read them."""
    _, *found = re.split(r"python (?:train|sample)\.py --(?:run|resume) ", answer.out + answer.err)
    for text in map(command_of, found):
        words = shell_words(text) or []
        if not re.search(r"\\[xnu]", text):             # it is shown with an escape for a control character
            yield words[0] if len(words) == 1 else text


def command_of(text):
    """The beginning of a text up to the end of the line, or of the line in which a quotation that it opens ends."""
    lines = text.split("\n")
    ends = [re.sub(r"(?: --prompt.*)?[.)]*$", "", "\n".join(lines[:i + 1])) for i in range(len(lines))]
    return next((end for end in ends if shell_words(end) is not None), ends[0])


def shell_words(text):
    """A line's words, as a shell would read them; None where a quotation does not end."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return None


def touched(before, above, place, case):
    """Names the files that were made or changed where the command may not; "" if there is none."""
    mine = [place / f"runs/{run}" for run in ("half", "done") if f"runs/{run}" in case.argv]
    out = place / "out", Path(os.path.realpath(place / "out"))           # a link to a folder, which may get new files
    changed = [path for path, old in before.items() if not os.path.lexists(path) or state(path) != old]
    changed = [path for path in changed if not any(path.is_relative_to(run) for run in mine)]
    made = [path for path in above.rglob("*") if path not in before
            and not any(path.is_relative_to(folder) for folder in [*mine, *out])]
    return f"touched {sorted(map(str, changed + made))[:3]}" if changed + made else ""


def too_private(before, place, umask):
    """Names a new file that the umask would let others read; "" if there is none."""
    mask = os.umask(0)
    os.umask(mask)
    mask = mask if umask is None else umask
    for path in set(place.rglob("*")) - set(before):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        if not path.is_symlink() and path.stat().st_mode & 0o777 != wanted:
            return f"gives {path.relative_to(place)} the permissions {path.stat().st_mode & 0o777:o}, not {wanted:o}"
    return ""


def missing_result(answer, place, argv):
    """A command that ends well has made what it says."""
    if argv[0] == "sample.py":
        paths = [line for line in answer.out.splitlines() if line.endswith((".mp4", ".png"))]
        there = all((place / path).stat().st_size for path in paths if not re.search(r"\\[xnu]", path))
        return "" if (paths and there) or not answer.out else "names no result"
    if "evaluate" in argv:
        return "" if any((place / "out").glob("*.csv")) else "writes no results"
    try:
        if "convert" in argv:
            files = files_made(place / argv[-1])
            return "" if all(load_file(file) for file in files) else "leaves a file without tensors"
        runs = [file.parent for file in (place / "out").rglob("run.json")]
        runs = [place / "runs/half"] if "--resume" in argv else runs
        whole = any(is_whole(run) for run in runs)
    except Exception as error:                          # whatever a broken file makes its reader say
        return f"leaves a file that cannot be read: {error}"
    return "" if whole else "leaves a run that is not finished"


def is_whole(run):
    if (run / "run.json").read_text() == "mine":
        return False
    finite = all(z.isfinite().all() for z in load_file(run / "tuned.safetensors").values())
    return finite and json.loads((run / "run.json").read_text())["finished"]


def files_made(target):
    """What convert says it has made: one file, or those of a folder, which are at least one."""
    return [target] if target.is_file() else list(target.rglob("*.safetensors")) or [target]


def many(warm, stock, seeds, names=None, real=False, report=print):
    """Tries every kind with every seed -> {kind: Counter of cases, OK, ERROR, failures}."""
    counts = {name: Counter() for name in names or broken.KINDS}
    for seed in seeds:
        for name in counts:
            outcome, problem, _ = trial(warm, stock, name, seed, real)
            counts[name].update(["cases", "failures" if problem else outcome])
            if problem:
                report(f"FAILURE {name!r} seed {seed}: {problem}")
        report(f"up to seed {seed}: {dict(sum(counts.values(), Counter()))}")
    return counts
