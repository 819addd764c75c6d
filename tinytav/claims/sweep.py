"""How steps, learning rate and guidance are chosen: on four clips of their own, none of them a test clip.

    python -m tinytav sweep --out sweep --processes 2

Captions are short, as users write them. Writes the table sweep.md and the picture sweep.png, in which an edit goes from
ignored to collapsed. The last rows tune all tensors: the claims table needs a learning rate that suits them.
"""
import json

import numpy as np
import torch
from safetensors.torch import load_file

from tinytav.claims.experiment import Studio, make_clip
from tinytav.claims.results import every_clip, labelled, parser, row, write
from tinytav.weights import load

STEPS, GUIDANCES = (20, 80), (1., 3., 6., 12.)
# Learning rates, for each choice of tensors.
RATES = {"the paper's": (1e-4, 3e-4, 1e-3), "all": (3e-5, 1e-4)}
SHOWN = dict(success="success", edited="edit right", agreement="agreement")


def work(args, i):
    """Clip i at every setting: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    studio = Studio(args.weights, make_clip("choice", i), args.settings)
    for tuned, rates in RATES.items():
        for rate in rates:
            net = studio.inflated()
            for step, _ in studio.tune(net, tuned, rate, seed=33, steps=max(STEPS)):
                if step in STEPS:
                    noise = studio.invert(net, studio.empty)
                    for guidance in GUIDANCES:
                        write(args.out / str(i), name(tuned, rate, step, guidance),
                              lambda: studio.sample(net, noise, guidance), studio)
    return i


def name(tuned, rate, step, guidance):
    return f"{'all' if tuned == 'all' else 'few'}-{rate:g}-{step}-{guidance:g}"


def settings():
    """Every (tuned, rate, step)."""
    return [(tuned, rate, step) for tuned, rates in RATES.items() for rate in rates for step in STEPS]


def table(folder, clips):
    """The shares of SHOWN at every setting, over all clips and edits."""
    lines = [row("tensors, learning rate, steps", (f"guidance {guidance:g}" for guidance in GUIDANCES)),
             "|---|" + "---|" * len(GUIDANCES)]
    for tuned, rate, step in settings():
        cells = []
        for guidance in GUIDANCES:
            files = [folder / f"{i}/{name(tuned, rate, step, guidance)}.json" for i in range(clips)]
            found = [scores for file in files for scores in json.loads(file.read_text())]
            cells.append(" / ".join(f"{100 * np.mean([scores[key] for scores in found]):.0f} %" for key in SHOWN))
        lines.append(row(f"{tuned}, {rate:g}, {step}", cells))
    return "\n".join([f"{' / '.join(SHOWN.values())}:", "", *lines])


def picture(folder, clip=0, edit=2, frame=4):
    """A frame of one edit: a row for each learning rate and number of steps, a column for each guidance."""
    rows = {}
    for tuned, rate, step in settings():
        files = [folder / f"{clip}/{name(tuned, rate, step, guidance)}.safetensors" for guidance in GUIDANCES]
        rows[f"{tuned}, {rate:g}, {step}"] = torch.stack([load_file(file)["frames"][edit, frame] for file in files])
    labelled(folder / "sweep.png", rows)


def main():
    args = parser(__doc__.partition("\n")[0], "sweep", 4).parse_args()
    every_clip(work, args, load(args.weights))
    text = table(args.out, args.clips)
    (args.out / "sweep.md").write_text(text + "\n")
    picture(args.out)
    print(text)
