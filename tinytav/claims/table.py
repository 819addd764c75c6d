"""Puts the paper's claims to the test in the toy world, where the true answer to every edit can be drawn.

    python -m tinytav claims --out claims --processes 2

Every test clip is edited in four ways by every variant of the method, and the judge says what came out. The main captions
are short, as users write them: subject, activity, place and what is edited. Some variants are measured with captions that
name everything, too. What is finished stays in the folder, so a run that was stopped goes on. Writes the tables claims.md,
the picture claims.png and the chart chart.png.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tinytav.claims import card, chart, cost
from tinytav.claims.experiment import FRAMES, Studio, make_clip, said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.claims.results import every_clip, labelled, parser, row, write
from tinytav.claims.significance import holm, interval, means, p_value
from tinytav.claims.variants import BEYOND, CLAIMS, FURTHER, ROBUST, SEEDS, VARIANTS, claimed, plan
from tinytav.measure import metrics
from tinytav.toy.world import ATTRIBUTES
from tinytav.weights import load

PICTURE_ROWS = ("source", "true edit", "full method", "untuned", "no inversion")       # the rows of claims.png
PICTURE_OF = 3, 0                                    # its clip and edit
QUICK_EDITS = 2         # of each clip: the subject's and the place's
LEVEL = 0.05            # of all claims together, by Holm's correction
COLUMNS = dict(success="success", edited="edit right", kept="rest kept", unsaid="unsaid kept", agreement="agreement",
               look="look agrees", phase="limbs", x="position", camera="camera", psnr="PSNR", all_pairs="all pairs",
               neighbours="neighbours", text="text")
CHART = dict(success="success", edited="edit right", unsaid="unsaid kept", agreement="agreement", motion="motion")
NAMES = COLUMNS | CHART
PERCENT = ("success", "edited", "kept", "unsaid", "agreement", "motion", "look", *MOTIONS)


def work(args, i):
    """Test clip i by every variant: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    clip = make_clip("test", i)
    clip = clip._replace(edits=clip.edits[:args.edits])
    for captions, named in args.plan.items():
        studio, folder = Studio(args.weights, clip, args.settings, captions), args.out / captions / str(i)
        for name, make in references(studio, i).items():
            write(folder, f"{name}-{SEEDS[0]}", make, studio)
        variants = VARIANTS | BEYOND
        jobs = [(variants[name], seed, name) for name, seeds in named.items() if name in variants for seed in seeds]
        jobs.sort(key=lambda job: (str(job[0].net), job[1]))        # those that share a net stand together
        for variant, seed, name in jobs:
            write(folder, f"{name}-{seed}", lambda: studio.edit(variant, seed), studio)
    return i


def references(studio, i):
    """{name: what makes its frames (edits, f, 3, h, w)} for test clip i."""
    scenes = [edit.scene for edit in studio.clip.edits]
    other = Judge(make_clip("test", i + 1).motion)

    def drawn(judge, scenes):
        return torch.stack([studio.through_vae(judge.draw(scene)) for scene in scenes])

    def still():
        true = drawn(studio.judge, scenes)
        return true[:, FRAMES // 2, None].expand_as(true)

    return {"source": lambda: drawn(studio.judge, [studio.clip.scene] * len(scenes)),
            "true edit": lambda: drawn(studio.judge, scenes), "still": still,
            "other motion": lambda: drawn(other, scenes)}


# ---- Tables and pictures -------------------------------------------------------------------------

def read(args, name, captions="user"):
    """The scores of a variant's edits, all its seeds together: [[{...}, ...] of a clip, ...].

    "unsaid" is added: the mean share of frames in which an attribute that the caption does not name has the source's value.
    """
    return [[scores | dict(unsaid=unsaid_kept(scores, captions)) for seed in args.plan[captions][name]
             for scores in json.loads((args.out / captions / f"{i}/{name}-{seed}.json").read_text())]
            for i in range(args.clips)]


def unsaid_kept(scores, captions):
    """Of one edit's scores the mean over the attributes that its caption does not name; NaN if it names all."""
    unsaid = [scores[name] for name in ATTRIBUTES if name not in said(captions, (scores["name"],))]
    return np.mean(unsaid) if unsaid else np.nan


def cell(key, mean, low, high):
    """A score with its interval, as a table shows it."""
    if np.isnan(mean):
        return ""
    return f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})" if key in PERCENT else f"{mean:.2f}"


def table(args, captions="user"):
    """One row a variant: means over clips, seeds and edits, shares with their 95 % intervals, and the number of edits."""
    lines = [row("", (*COLUMNS.values(), "edits")), "|---|" + "---|" * (len(COLUMNS) + 1)]
    for name in args.plan[captions]:
        clips = read(args, name, captions)
        cells = [cell(key, *interval(means(clips, key))) for key in COLUMNS]
        lines.append(row(name, (*cells, str(sum(map(len, clips))))))
    asked = [scores["name"] for clip in read(args, "source", captions) for scores in clip]
    # Of what is not edited this is no fair bound: a net that follows the caption draws what is usual.
    chance = dict(edited=np.mean([1 / len(ATTRIBUTES[name]) for name in asked]))
    cells = [f"{100 * chance[key]:.0f} %" if key in chance else "" for key in COLUMNS]
    return "\n".join([*lines, row("chance", (*cells, ""))])


def compared(args):
    """(claim, better, worse, score) of each claim whose two variants are made."""
    made = args.plan["user"]
    return [(claim, better, worse, key) for claim, better, worse, keys in CLAIMS if better in made and worse in made
            for key in keys]


def differences(args, better, worse, key):
    """For each clip the mean of one variant less that of the other."""
    return np.subtract(*(means(read(args, name), key) for name in (better, worse)))


def with_interval(found, key):
    """The mean of clips' differences and its 95 % bootstrap interval as text, in the score's unit."""
    scale = 100 if key in PERCENT else 1
    mean, low, high = interval(found)
    return f"{scale * mean:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"


def verdicts(args):
    """For each claim the difference it is about, on the same clips: its interval, its corrected p-value and a verdict.

    p is corrected for all of CLAIMS, also for those whose variants are not made.
    """
    claims = compared(args)
    found = [differences(args, better, worse, key) for _, better, worse, key in claims]
    not_made = sum(len(keys) for *_, keys in CLAIMS) - len(claims)
    p_values = holm([*map(p_value, found), *[1.] * not_made])
    lines = [row("claim", ("better", "worse", "score", "difference", "p", "")), "|---|" + "---|" * 6]
    for (claim, better, worse, key), differs, p in zip(claims, found, p_values):
        says = "undecided" if p > LEVEL else "holds" if differs.mean() > 0 else "does not hold"
        lines.append(row(claim, (better, worse, NAMES[key], with_interval(differs, key), f"{p:.3f}", says)))
    return "\n".join(lines)


def against_full_method(args, names):
    """Each of these variants that is made less the full method, on the same clips; "" if none is made.

    The intervals are not corrected for their number.
    """
    made = [name for name in names if {name, "full method"} <= set(args.plan["user"])]
    shown = (*CHART, "psnr")
    lines = [row("less the full method", (NAMES[key] for key in shown)), "|---|" + "---|" * len(shown)]
    for name in made:
        lines.append(row(name, (with_interval(differences(args, name, "full method", key), key) for key in shown)))
    return "\n".join(lines) if made else ""


def by_attribute(args, captions="user"):
    """How often each kind of edit is right, and edits to triples that were never trained on; each seed counts."""
    edits = [scores for clip in read(args, "full method", captions) for scores in clip]
    kinds = {attribute: [e for e in edits if e["name"] == attribute] for attribute in ATTRIBUTES}
    kinds |= {"held out": [e for e in edits if e["held_out"]]}
    shown = ("edited", "agreement", *MOTIONS, "success")
    lines = [row("full method, by edit", ("edits", *(NAMES[key] for key in shown))), "|---|" + "---|" * (len(shown) + 1)]
    lines += [row(kind, (f"{len(found)}", *(f"{100 * np.mean([e[key] for e in found]):.0f} %" for key in shown)))
              for kind, found in kinds.items() if found]
    return "\n".join(lines)


def picture(args):
    """One edit of one clip: a row of frames for each of PICTURE_ROWS that is made -> claims.png."""
    clip, edit = PICTURE_OF if args.clips > PICTURE_OF[0] else (0, 0)
    rows = {}
    for name, seeds in args.plan["user"].items():
        file = args.out / f"user/{clip}/{name}-{seeds[0]}.safetensors"
        if name in PICTURE_ROWS and file.exists():          # of known scores there are no frames
            rows[name] = load_file(file)["frames"][edit]
    if rows:
        labelled(args.out / "claims.png", rows)


def draw_chart(args):
    """The scores that the claims are about, a row each variant on which one rests -> chart.png, if any is made."""
    found = {name: {NAMES[key]: interval(means(read(args, name), key)) for key in CHART}
             for name in args.plan["user"] if name in claimed()}
    if found:
        chart.write(args.out / "chart.png", found)


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


def parts(args, sd):
    """The texts of claims.md, one after the other."""
    yield "Captions as users write them:\n\n" + table(args)
    if "full method" in args.plan["user"]:
        yield by_attribute(args)
    if compared(args) and not args.quick:
        yield verdicts(args)
    for names in (FURTHER, BEYOND):
        differs = against_full_method(args, names)
        if differs:
            yield differs
    if "full" in args.plan:
        yield "Captions that name everything:\n\n" + table(args, "full")
        yield by_attribute(args, "full")
        yield verbs(args.weights, sd)
        yield costs(sd)


def broken_orderings(args):
    """A sentence for each ordering of ROBUST that these clips break."""
    made = args.plan["user"]
    for better, worse, key, margin in ROBUST:
        if better not in made or worse not in made:
            continue
        high, low = (means(read(args, name), key).mean() for name in (better, worse))
        if high < low + margin:
            yield f"{better} ({high:.3f}) is not at least {margin} above {worse} ({low:.3f}) in {NAMES[key]}"


def main():
    p = parser(__doc__.partition("\n")[0], "claims", 12)
    p.add_argument("--quick", action="store_true", help="two clips, two edits, five variants, in some minutes")
    p.add_argument("--variants", nargs="+", metavar="NAME", choices=[*VARIANTS, *BEYOND],
                   help="only these rows, with short captions")
    p.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS),
                   help="for each row on which a claim rests")
    p.add_argument("--known", type=Path, metavar="FILE", help="scores.json of an earlier run: what is in it is not made again")
    args = p.parse_args()
    if args.quick and args.known:
        p.error("--quick makes fewer edits of each clip: leave out --known.")
    sd = load(args.weights)
    args.plan = plan(args.quick, args.variants, args.seeds)
    args.edits = None           # all
    if args.quick:
        args.clips, args.edits = 2, QUICK_EDITS
        if args.out == Path("claims"):
            args.out = Path("claims-quick")             # its clips have fewer edits
    every_clip(work, args, sd, args.known)
    text = "\n\n".join(parts(args, sd))
    (args.out / "claims.md").write_text(text + "\n")
    picture(args)
    draw_chart(args)
    print(text)
    if not args.quick:
        return 0
    broken = list(broken_orderings(args))
    print("\n".join(broken) or "all robust orderings hold")
    return 1 if broken else 0
