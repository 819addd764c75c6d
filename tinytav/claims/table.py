"""Puts the paper's claims to the test in the toy world, where the true answer to every edit can be drawn.

    python -m tinytav claims --out claims --processes 2

Every test clip is edited in four ways by every variant of the method, and the judge says what came out. What is finished
stays in the folder, so a run that was stopped goes on. Writes the tables claims.md and the picture claims.png.
"""
import json

import numpy as np
import torch
from safetensors.torch import load_file

from tinytav.claims import card, cost
from tinytav.claims.experiment import FRAMES, Studio, Variant, make_clip
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.claims.results import every_clip, labelled, parser, row, write
from tinytav.measure import metrics
from tinytav.stable_diffusion import checkpoint
from tinytav.toy.world import ATTRIBUTES

VARIANTS = {
    "full method": Variant(),
    "untuned": Variant(tuned=None),
    "spatial attention": Variant(attention="spatial"),
    "no inversion": Variant(inverted=False),
    "all tensors tuned": Variant(tuned="all"),
    "down blocks not tuned": Variant(tuned="official"),
    "norm per frame": Variant(norm="frame"),
    "frame by frame": Variant(tuned=None, attention="spatial", norm="frame"),
    **{f"untuned noise, {attention}": Variant(tuned=None, attention=attention, norm="frame", inverted=False)
       for attention in ("spatial", "first", "sparse-causal", "full")},
}
QUICK = ("full method", "no inversion")
QUICK_EDITS = 2         # of each clip: the subject's and the place's
# What bounds the variants, all through the VAE: no edit, the right one, one frame of it held still, and the right one
# in the next clip's motion.
REFERENCES = ("source", "true edit", "still", "other motion")
SEEDS = (33, 34, 35)                        # of the full method; the others have the first alone
# What the paper says: (claim, better, worse, scores in which it should show)
CLAIMS = (
    ("frames that attend to each other agree", "untuned noise, sparse-causal", "untuned noise, spatial", ("look", "all_pairs")),
    ("tuning teaches the motion", "full method", "untuned", ("phase", "neighbours")),
    ("without ST-Attn frames differ", "full method", "spatial attention", ("look", "all_pairs")),
    ("without inversion the motion is lost", "full method", "no inversion", ("phase", "x", "camera")),
    ("tuning all destroys knowledge", "full method", "all tensors tuned", ("edited", "success")),
    ("the down blocks need tuning too", "full method", "down blocks not tuned", ("phase", "success")),
    ("norms over the clip", "full method", "norm per frame", ("look", "success")),
    ("better than frame by frame", "full method", "frame by frame", ("look", "neighbours", "success")))
# Orderings that hold on any clips, however few: (better, worse, score, margin). A run that breaks one fails.
ROBUST = (("full method", "no inversion", "x", 0.2), ("full method", "no inversion", "phase", 0.1),
          ("full method", "source", "edited", 0.3), ("full method", "source", "text", 3),
          ("true edit", "full method", "success", 0), ("true edit", "full method", "psnr", 2),
          ("full method", "still", "success", 0.1), ("full method", "other motion", "success", 0.1))
COLUMNS = dict(success="success", edited="edit right", kept="rest kept", phase="limbs", x="position", camera="camera",
               look="look agrees", psnr="PSNR", all_pairs="all pairs", neighbours="neighbours", text="text")
PERCENT = ("success", "edited", "kept", *MOTIONS, "look")


def work(args, i):
    """Test clip i by every variant: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    clip = make_clip("test", i)
    clip = clip._replace(edits=clip.edits[:args.edits])
    studio, folder = Studio(args.weights, clip, args.settings), args.out / str(i)
    other = Judge(studio.sd.vae, make_clip("test", i + 1).motion)
    scenes = [edit.scene for edit in studio.clip.edits]
    true = torch.stack([studio.judge.draw(scene)[1] for scene in scenes])
    made = {"source": lambda: torch.stack([studio.judge.draw(studio.clip.scene)[1]] * len(scenes)), "true edit": lambda: true,
            "still": lambda: true[:, FRAMES // 2, None].expand_as(true),
            "other motion": lambda: torch.stack([other.draw(scene)[1] for scene in scenes])}
    for name in REFERENCES:
        write(folder, f"{name}-{SEEDS[0]}", made[name], studio)
    jobs = [(VARIANTS[name], seed, name) for name, seeds in args.plan.items() if name in VARIANTS for seed in seeds]
    for variant, seed, name in sorted(jobs, key=str):           # so that those which share a net stand together
        write(folder, f"{name}-{seed}", lambda: studio.edit(variant, seed), studio)
    return i


# ---- Tables and the picture -------------------------------------------------------------------------------------------

def read(args, name, seeds=None):
    """The scores of a variant's edits, all its seeds or these together: [[{...}, ...] of a clip, ...]."""
    return [[scores for seed in seeds or args.plan[name] for scores in json.loads((args.out / f"{i}/{name}-{seed}.json").read_text())]
            for i in range(args.clips)]


def interval(clips, key):
    """Mean over edits, and its 95 % bootstrap interval over clips: (mean, low, high)."""
    return bootstrap(means(clips, key))


def means(clips, key):
    return np.array([np.mean([scores[key] for scores in clip]) for clip in clips])


def bootstrap(means):
    resampled = means[np.random.default_rng(0).integers(len(means), size=(2000, len(means)))].mean(1)
    return means.mean(), *np.percentile(resampled, (2.5, 97.5))


def table(args):
    """One row a variant: means over clips, seeds and edits, shares with their 95 % intervals."""
    lines = [row("", COLUMNS.values()), "|---|" + "---|" * len(COLUMNS)]
    for name in args.plan:
        values = {key: interval(read(args, name), key) for key in COLUMNS}
        lines.append(row(name, (f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})" if key in PERCENT else f"{mean:.2f}"
                                for key, (mean, low, high) in values.items())))
    asked = [scores["name"] for clip in read(args, "source") for scores in clip]
    chance = dict(edited=np.mean([1 / len(ATTRIBUTES[name]) for name in asked]),
                  kept=np.mean([1 / len(ATTRIBUTES[other]) for name in asked for other in ATTRIBUTES if other != name]))
    return "\n".join([*lines, row("chance", (f"{100 * chance[key]:.0f} %" if key in chance else "" for key in COLUMNS))])


def verdicts(args):
    """For each claim the difference it is about, over clips with the same seed: an interval above 0 says that it holds."""
    lines = [row("claim", ("better", "worse", "score", "difference", "")), "|---|" + "---|" * 5]
    for claim, better, worse, keys in CLAIMS:
        for key in keys:
            difference = np.subtract(*(means(read(args, name, SEEDS[:1]), key) for name in (better, worse)))
            mean, low, high = (100 if key in PERCENT else 1) * np.array(bootstrap(difference))
            says = "holds" if low > 0 else "the opposite holds" if high < 0 else "inconclusive"
            lines.append(row(claim, (better, worse, COLUMNS[key], f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", says)))
    return "\n".join(lines)


def by_attribute(args, name="full method"):
    """How often each kind of edit is right, and edits to triples that were never trained on; each seed counts."""
    edits = [scores for clip in read(args, name) for scores in clip]
    kinds = {attribute: [e for e in edits if e["name"] == attribute] for attribute in ATTRIBUTES}
    kinds |= {"held out": [e for e in edits if e["held_out"]]}
    lines = [row(f"{name}, by edit", ("edits", "edit right", "success")), "|---|---|---|---|"]
    lines += [row(kind, (f"{len(found)}", f"{100 * np.mean([e['edited'] for e in found]):.0f} %",
                         f"{100 * np.mean([e['success'] for e in found]):.0f} %")) for kind, found in kinds.items() if found]
    return "\n".join(lines)


def picture(args, clip=0, edit=0):
    """One edit of one clip: a row of frames for the source, the truth and each variant -> claims.png."""
    labelled(args.out / "claims.png", {name: load_file(args.out / f"{clip}/{name}-{seeds[0]}.safetensors")["frames"][edit]
                                       for name, seeds in args.plan.items()})


def costs(sd):
    """What attention costs in operations, in what a tuning step keeps, and in time for one call of the net."""
    kinds = [f"{attention}, {unit}" for unit in ("GFLOP", "MB", "s") for attention in ("ST-Attn", "full")]
    return "\n".join([row("frames", kinds), "|---|" + "---|" * len(kinds),
                      *(row(count, (f"{x:.2f}" for x in found)) for count, *found in cost.rows(sd))])


def verbs(folder, sd, count=200):
    """Do single images of the image net show what their captions say? Asked of CLIP, beside drawings, which are its ceiling."""
    eye, (scenes, drawn) = metrics.Features(folder / "clip"), card.renders(count, "verbs")
    sampled = card.sample(sd, scenes, sd.defaults.ddim_steps, sd.defaults.guidance)
    lines = [row("single images, seen by CLIP", ATTRIBUTES), "|---|" + "---|" * len(ATTRIBUTES)]
    return "\n".join(lines + [row(what, (f"{100 * card.accuracy(eye, name, scenes, x):.0f} %" for name in ATTRIBUTES))
                              for what, x in (("drawings", drawn), ("the U-Net's", sampled))])


def main():
    p = parser(__doc__.partition("\n")[0], "claims", 12)
    p.add_argument("--quick", action="store_true", help="two clips with two edits, with and without inversion, in some minutes")
    args = p.parse_args()
    sd = checkpoint.load(args.weights)
    args.plan = dict.fromkeys((*REFERENCES, *(QUICK if args.quick else VARIANTS)), SEEDS[:1])
    args.edits = QUICK_EDITS if args.quick else None            # None: all
    if args.quick:
        args.clips = 2
    else:
        args.plan["full method"] = SEEDS
    every_clip(work, args, sd)
    text = "\n\n".join([table(args), by_attribute(args)] + ([] if args.quick else [
        verdicts(args), verbs(args.weights, sd), costs(sd)]))
    (args.out / "claims.md").write_text(text + "\n")
    picture(args)
    print(text)
    broken = [f"{better} is not above {worse} by {margin} in {key}" for better, worse, key, margin in ROBUST
              if interval(read(args, better), key)[0] < interval(read(args, worse), key)[0] + margin]
    print("\n".join(broken) or f"all {len(ROBUST)} robust orderings hold")
    return 1 if broken else 0
