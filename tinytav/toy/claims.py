"""Puts the paper's claims to the test in the toy world, where the true answer to every edit can be drawn.

    python -m tinytav.toy.claims --out claims --processes 2

Every test clip is edited in four ways by every variant of the method, and the judge says what came out. What is finished
stays in the folder, so a run that was stopped goes on. Writes the tables claims.md and the picture claims.png.
"""
import argparse
import json
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tinytav import frames, memory, weights
from tinytav.inflation import VideoUNet, inflate
from tinytav.toy.experiment import Studio, Variant, make_clip
from tinytav.toy.judge import MOTIONS
from tinytav.toy.world import ATTRIBUTES

VARIANTS = {
    "full method": Variant(),
    "untuned": Variant(tuned=None),
    "spatial attention": Variant(attention="spatial"),
    "no inversion": Variant(inverted=False),
    "all tensors tuned": Variant(tuned="all"),
    "70 of 112 tuned": Variant(tuned="official"),
    "norm per frame": Variant(norm="frame"),
    "frame by frame": Variant(tuned=None, attention="spatial", norm="frame"),
    **{f"untuned noise, {attention}": Variant(tuned=None, attention=attention, inverted=False)
       for attention in ("spatial", "first", "sparse-causal", "full")},
}
QUICK = ("full method", "untuned", "no inversion", "frame by frame")
REFERENCES = ("true edit", "source")        # what bounds the variants, both through the VAE
SEEDS = {"full method": (33, 34, 35)}       # of the others only the first
COLUMNS = dict(success="success", edited="edit right", kept="rest kept", phase="limbs", x="position", camera="camera",
               look="look agrees", psnr="PSNR", all_pairs="all pairs", neighbours="neighbours", text="text")
PERCENT = ("success", "edited", "kept", *MOTIONS, "look")


def work(args, i):
    """Test clip i by every variant: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    studio = Studio(args.weights, make_clip("test", i), args.settings)
    true = [studio.judge.draw(scene)[1] for scene in (studio.clip.scene, *(edit.scene for edit in studio.clip.edits))]
    write(args.out / f"{i}/true edit-33", lambda: torch.stack(true[1:]), studio)
    write(args.out / f"{i}/source-33", lambda: torch.stack(true[:1] * len(studio.clip.edits)), studio)
    jobs = [(VARIANTS[name], seed, name) for name in args.variants for seed in SEEDS.get(name, (33,))]
    for variant, seed, name in sorted(jobs, key=str):           # so that those which share a net stand together
        write(args.out / f"{i}/{name}-{seed}", lambda: studio.edit(variant, seed), studio)
    return i


def write(path, make, studio):
    if path.with_suffix(".json").exists():
        return
    results = make()
    scores = json.dumps(studio.score(results))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = torch.stack([((x + 1) * 127.5).round().to(torch.uint8) for x in results])
    frames.replace(path.with_suffix(".safetensors"), lambda file: save_file(dict(frames=pictures), file))
    frames.replace(path.with_suffix(".json"), lambda file: Path(file).write_text(scores))


# ---- Tables and the picture -------------------------------------------------------------------------------------------

def read(folder, clips, name):
    """The scores of a variant's edits, all seeds together: [[{...}, ...] of a clip, ...]."""
    return [[scores for seed in SEEDS.get(name, (33,)) for scores in json.loads((folder / f"{i}/{name}-{seed}.json").read_text())]
            for i in range(clips)]


def interval(clips, key):
    """Mean over edits, and its 95 % bootstrap interval over clips: (mean, low, high)."""
    means, rng = np.array([np.mean([scores[key] for scores in clip]) for clip in clips]), np.random.default_rng(0)
    resampled = means[rng.integers(len(means), size=(2000, len(means)))].mean(1)
    return means.mean(), *np.percentile(resampled, (2.5, 97.5))


def row(name, values):
    return f"| {name} | " + " | ".join(values) + " |"


def table(folder, clips, variants):
    """One row a variant: means over clips, seeds and edits, with 95 % intervals where a share of frames is meant."""
    lines = [row("", COLUMNS.values()), "|---|" + "---|" * len(COLUMNS)]
    for name in (*REFERENCES, *variants):
        values = {key: interval(read(folder, clips, name), key) for key in COLUMNS}
        lines.append(row(name, (f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})" if key in PERCENT else f"{mean:.2f}"
                                for key, (mean, low, high) in values.items())))
    asked = [scores["name"] for clip in read(folder, clips, "source") for scores in clip]
    chance = dict(edited=np.mean([1 / len(ATTRIBUTES[name]) for name in asked]),
                  kept=np.mean([1 / len(ATTRIBUTES[other]) for name in asked for other in ATTRIBUTES if other != name]),
                  **{part: 1 / len(offsets) for part, offsets in MOTIONS.items()})
    return "\n".join([*lines, row("chance", (f"{100 * chance[key]:.0f} %" if key in chance else "" for key in COLUMNS))])


def by_attribute(folder, clips, name="full method"):
    """How often each kind of edit is right, and edits to triples that were never trained on."""
    edits = [scores for clip in read(folder, clips, name) for scores in clip]
    kinds = {attribute: [e for e in edits if e["name"] == attribute] for attribute in ATTRIBUTES}
    kinds |= {"held out": [e for e in edits if e["held_out"]]}
    lines = [row(f"{name}, by edit", ("edits", "edit right", "success")), "|---|---|---|---|"]
    lines += [row(kind, (f"{len(found)}", f"{100 * np.mean([e['edited'] for e in found]):.0f} %",
                         f"{100 * np.mean([e['success'] for e in found]):.0f} %")) for kind, found in kinds.items() if found]
    return "\n".join(lines)


def picture(folder, variants, clip=0, edit=0):
    """One edit of one clip: a row of frames for the source, the truth and each variant -> claims.png."""
    rows = [load_file(folder / f"{clip}/{name}-33.safetensors")["frames"][edit] for name in ("source", "true edit", *variants)]
    frames.write_strip(folder / "claims.png", *(x / 127.5 - 1 for x in rows), shown=64)


def cost(sd):
    """What attention costs: multiply-adds of its two products, and the net's memory for a tuning step and seconds."""
    lines = [row("frames", ("ST-Attn, GFLOP", "full, GFLOP", "ST-Attn, MB", "full, MB", "ST-Attn, s", "full, s")), "|---|" + "---|" * 6]
    for count in (4, 8, 16, 32, 64):
        found = [measured(sd, count, attention) for attention in ("sparse-causal", "full")]
        lines.append(row(count, (f"{x:.2f}" for pair in zip(*found) for x in pair)))
    return "\n".join(lines)


def measured(sd, count, attention):
    net, inputs = inflate(sd.unet, count, attention), (torch.randn(1, 4, count, 16, 16), torch.zeros(1), sd.encode_prompts([""]))
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        VideoUNet(net.cfg, count, attention)(*(x.to("meta") for x in inputs))
    products = sum(ops.get(torch.ops.aten.bmm, 0) for name, ops in counter.get_flop_counts().items() if name.endswith("attn1"))
    start = time.time()
    with torch.no_grad():
        net(*inputs)
    return products / 1e9, memory.training_bytes(net, inputs[0].shape, inputs[2].shape) / 1e6, time.time() - start


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help=" ")
    p.add_argument("--out", type=Path, default=Path("claims"), help="folder for what is made")
    p.add_argument("--clips", type=int, default=12, help=" ")
    p.add_argument("--processes", type=int, default=1, help="clips worked on at once, a core each")
    p.add_argument("--quick", action="store_true", help="two clips by the main variants, in three minutes")
    args = p.parse_args()
    args.settings = vars(weights.load(args.weights).defaults)
    args.variants = QUICK if args.quick else tuple(VARIANTS)
    args.clips = 2 if args.quick else args.clips
    with get_context("spawn").Pool(args.processes) as pool:
        for i in pool.imap_unordered(partial(work, args), range(args.clips)):
            print(f"clip {i} is done", flush=True)
    text = "\n\n".join([table(args.out, args.clips, args.variants), by_attribute(args.out, args.clips)]
                        + ([] if args.quick else [cost(weights.load(args.weights))]))
    (args.out / "claims.md").write_text(text + "\n")
    picture(args.out, args.variants)
    print(text)


if __name__ == "__main__":
    main()
