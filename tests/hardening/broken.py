"""Kinds of broken, hostile and unlucky input, each a function of a seeded random generator.

`KINDS` maps each kind to (function, what may come of it). The function spoils something in `place`, a folder with the
weights w, the clip clip.mp4, a finished run runs/done and an unfinished one runs/half, and returns the command to try.
The kinds stand in broken_clips, broken_weights and broken_runs.
"""
import random
from pathlib import Path
from typing import NamedTuple

OK, ERROR, EITHER = "right result", "error sentence", "either"
KINDS = {}
MODULE = "tinytav/__main__.py"          # python -m tinytav
MEMORY = 1500                           # MB that a case may reach: the interpreter with torch takes 300 of them


class Case(NamedTuple):
    """What to try, and what may come of it."""
    argv: list                  # the script and its arguments
    outcome: str                # OK, ERROR or EITHER
    job: dict = {}              # how the process is started, as Warm takes it
    memory: int = MEMORY


def kind(outcome):
    """A decorator for a function(rng, place) -> the command, or (command, outcome), or a Case."""
    def keep(function):
        KINDS[function.__name__.replace("_", " ")] = (function, outcome)
        return function
    return keep


def make(name, seed, place):
    """Spoils `place` -> Case."""
    function, outcome = KINDS[name]
    result = function(random.Random(f"{name} {seed}"), Path(place))
    if isinstance(result, Case):
        return result
    return Case(*result) if isinstance(result, tuple) else Case(result, outcome)


def train(clip, prompt="a man", *more):
    return ["train.py", clip, prompt, "--weights", "w", "--out", "out", *more]


def sample(*more):
    """The untuned net draws two small frames."""
    return ["sample.py", "--prompt", "a man", "--weights", "w", "--frames", "2", "--steps", "1", "--out", "out", *more]


def sample_run(*more):
    return ["sample.py", "--run", "runs/done", "--prompt", "a man", *more]


def flip(rng, data, low, high, count):
    """Bytes with `count` random bits turned over between low and high."""
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(low, max(low + 1, min(high, len(data))))] ^= 1 << rng.randrange(8)
    return bytes(data)
