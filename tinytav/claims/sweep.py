"""How steps, learning rate and guidance were chosen: on four clips of their own, none of them a test clip.

    python -m tinytav sweep --out sweep --processes 2

Writes the table sweep.md and the picture sweep.png, in which an edit goes from ignored to collapsed.
"""
import json

import numpy as np
import torch
from safetensors.torch import load_file

from tinytav.claims.experiment import Studio, make_clip
from tinytav.claims.results import every_clip, labelled, parser, row, write
from tinytav.stable_diffusion import checkpoint

STEPS, RATES, GUIDANCES = (20, 80), (3e-4, 3e-3), (1., 3., 6., 12.)


def work(args, i):
    """Clip i at every setting: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    studio = Studio(args.weights, make_clip("choice", i), args.settings)
    for rate in RATES:
        net = studio.inflated()
        for step, _ in studio.tune(net, "the paper's", rate, seed=33, steps=max(STEPS)):
            if step in STEPS:
                noise = studio.invert(net)
                for guidance in GUIDANCES:
                    write(args.out / str(i), name(rate, step, guidance), lambda: studio.sample(net, noise, guidance), studio)
    return i


def name(rate, step, guidance):
    return f"{rate:g}-{step}-{guidance:g}"


def table(folder, clips):
    """Success, and after it the share of frames in which the edit is right, over all clips and edits."""
    lines = [row("learning rate, steps", (f"guidance {guidance:g}" for guidance in GUIDANCES)),
             "|---|" + "---|" * len(GUIDANCES)]
    for rate in RATES:
        for step in STEPS:
            found = [[s for i in range(clips) for s in json.loads((folder / f"{i}/{name(rate, step, guidance)}.json").read_text())]
                     for guidance in GUIDANCES]
            lines.append(row(f"{rate:g}, {step}", (" / ".join(f"{100 * np.mean([s[key] for s in scores]):.0f} %"
                                                             for key in ("success", "edited")) for scores in found)))
    return "\n".join(lines)


def picture(folder, clip=0, edit=2, frame=4):
    """A frame of one edit: a row for each learning rate and number of steps, a column for each guidance."""
    labelled(folder / "sweep.png", {f"{rate:g}, {step} steps": torch.stack(
        [load_file(folder / f"{clip}/{name(rate, step, guidance)}.safetensors")["frames"][edit, frame] for guidance in GUIDANCES])
        for rate in RATES for step in STEPS})


def main():
    args = parser(__doc__.partition("\n")[0], "sweep", 4).parse_args()
    every_clip(work, args, checkpoint.load(args.weights))
    text = table(args.out, args.clips)
    (args.out / "sweep.md").write_text(text + "\n")
    picture(args.out)
    print(text)
