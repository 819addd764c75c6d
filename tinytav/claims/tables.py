"""Tables and verdicts, from the scores of edits alone: means over clips, how sure they are, and whether rows differ."""
import numpy as np

from tinytav.claims.clips import said
from tinytav.claims.judge import MOTIONS
from tinytav.claims.studies import NAMES, POINTS, ROBUST, STUDIES
from tinytav.toy.world import ATTRIBUTES

RESAMPLES = 10_000      # of the bootstrap
EXACT = 14              # clips: up to so many, every combination of signs is tried
LEVEL = 0.05            # of all claims together, by Holm's correction
CHART = ("success", "edited", "unsaid", "agreement", "motion")      # the panels, which the claims are about
COMPARED = (*CHART, "psnr")                                         # shown of differences from the full method


def text(scores):
    """TABLES.md. scores: {"STUDY/CLIP/ROW": [the scores of an edit, ...]}."""
    parts = ["# Tables", "`python -m tinytav claims --tables` writes this file. README.md says how to read it."]
    for name, study in STUDIES.items():
        rows = finished(scores, name)
        if rows:
            parts += [f"## {study.title}", table(rows, study), by_attribute(rows), verdicts(rows, study.claims),
                      verdicts(rows, study.separate), against_full_method(rows, study)]
    return "\n\n".join(filter(None, parts)) + "\n"


def finished(scores, study):
    """{row: clips} of a study's rows that all its clips have, in the study's order.

    clips, as `means` takes it: for each clip the scores of its edits, with "unsaid".
    """
    found = {}
    for key, edits in scores.items():
        folder, clip, name = key.split("/")
        if folder == study:
            found.setdefault(name, {})[int(clip)] = [unsaid(edit, STUDIES[study].captions) for edit in edits]
    everywhere, rows = set().union(*found.values()), {}
    for name, clips in found.items():
        if clips.keys() == everywhere:
            rows[name] = [clips[i] for i in sorted(clips)]
    return {row: rows[row] for row in (*STUDIES[study].references, *STUDIES[study].rows) if row in rows}


def unsaid(edit, captions):
    """Adds the mean over the attributes that the edit's caption does not name; NaN if it names all."""
    shares = [edit[name] for name in ATTRIBUTES if name not in said(captions, (edit["name"],))]
    return edit | dict(unsaid=np.mean(shares) if shares else np.nan)


def grid(heads, rows):
    """A Markdown table of texts."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def table(rows, study):
    """One line a row: means over clips and edits, shares with their 95 % intervals, and the number of edits."""
    lines = []
    for name, clips in rows.items():
        cells = [cell(key, *interval(means(clips, key))) for key in study.columns]
        lines.append([name, *cells, str(sum(map(len, clips)))])
    first, *_ = rows.values()                               # every row has the same edits
    chance = np.mean([1 / len(ATTRIBUTES[edit["name"]]) for clip in first for edit in clip])
    # Of what is not edited guessing is no fair bound.
    lines.append(["chance", *(f"{100 * chance:.0f} %" if key == "edited" else "" for key in study.columns), ""])
    return grid(["", *(NAMES[key] for key in study.columns), "edits"], lines)


def cell(key, mean, low, high):
    """A score with its interval, as a table shows it."""
    if np.isnan(mean):
        return ""
    return f"{mean:.2f}" if key in POINTS else f"{100 * mean:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def differences(rows, better, worse, key):
    """For each clip the mean of one row less that of the other."""
    return np.subtract(*(means(rows[name], key) for name in (better, worse)))


def with_interval(found, key):
    """The mean of clips' differences and its 95 % bootstrap interval as text, in the score's unit; "" for NaN."""
    mean, low, high = (1 if key in POINTS else 100) * np.array(interval(found))
    return "" if np.isnan(mean) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def verdicts(rows, claims):
    """For each claim whose rows are made its difference on the same clips, p and a verdict; "" without any.

    p is corrected for all of `claims`, also for those whose rows are not made.
    """
    made = [claim for claim in claims if claim[1] in rows and claim[2] in rows]
    found = [differences(rows, *claim[1:]) for claim in made]
    p_values = holm([*map(p_value, found), *[1.] * (len(claims) - len(made))])
    lines = []
    for (claim, better, worse, key), differs, p in zip(made, found, p_values):
        says = "undecided" if p > LEVEL else "holds" if differs.mean() > 0 else "does not hold"
        shown = f"{p:.3f}" if p >= 0.001 else "below 0.001"
        lines.append([claim, better, worse, NAMES[key], with_interval(differs, key), shown, says])
    return lines and grid(["claim", "better", "worse", "score", "difference", "p", ""], lines)


def against_full_method(rows, study):
    """The study's compared rows that are made, less the full method, on the same clips; "" without any.

    The intervals are not corrected for their number.
    """
    keys = (*COMPARED, "outside") if "outside" in study.columns else COMPARED
    lines = [[name, *(with_interval(differences(rows, name, "full method", key), key) for key in keys)]
             for name in study.compared if {name, "full method"} <= rows.keys()]
    return lines and grid(["less the full method", *(NAMES[key] for key in keys)], lines)


def by_attribute(rows):
    """How often the full method's edits of each kind, and to triples never trained on, are right; "" without any."""
    edits = [edit for clip in rows.get("full method", ()) for edit in clip]
    kinds = {attribute: [edit for edit in edits if edit["name"] == attribute] for attribute in ATTRIBUTES}
    kinds["held out"] = [edit for edit in edits if edit["held_out"]]
    shown = ("edited", "agreement", *MOTIONS, "success")
    lines = [[kind, str(len(found)), *(f"{100 * np.mean([edit[key] for edit in found]):.0f} %" for key in shown)]
             for kind, found in kinds.items() if found]
    return lines and grid(["full method, by edit", "edits", *(NAMES[key] for key in shown)], lines)


def shares(scores, study, keys=CHART):
    """{row: {name of a score: (mean, low, high)}} of a study's rows, the most successful first."""
    rows = {name: clips for name, clips in finished(scores, study).items() if name in STUDIES[study].rows}
    order = sorted(rows, key=lambda name: -means(rows[name], "success").mean())
    return {name: {NAMES[key]: interval(means(rows[name], key)) for key in keys} for name in order}


def broken_orderings(scores):
    """A sentence for each ordering of ROBUST that these clips break."""
    rows = finished(scores, "quick")
    for better, worse, key, margin in ROBUST:
        high, low = (means(rows[name], key).mean() for name in (better, worse))
        if high < low + margin:
            yield f"{better} ({high:.3f}) is not at least {margin} above {worse} ({low:.3f}) in {NAMES[key]}"


# ---- statistics ----------------------------------------------------------------------------------

def means(clips, key):
    """The mean over a clip's edits for which the score is defined, for each clip."""
    found = [[scores[key] for scores in clip if not np.isnan(scores[key])] for clip in clips]
    return np.array([np.mean(values) if values else np.nan for values in found])


def interval(values):
    """Of one value a clip: (mean, low, high), a 95 % bootstrap interval. Clips are drawn again and again."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return values.mean(), low, high


def p_value(found):
    """Of a mean difference over clips, two-sided: the sign-flip test.

    If two rows did not differ, each clip's difference would be as likely to have the other sign. p is the share of all
    2^n combinations of signs that give a mean as far from zero. It is exact also for few clips, where p-values from a
    bootstrap are too small. For more than EXACT clips 2^EXACT combinations are drawn.
    """
    n = len(found)
    if n <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(2 ** EXACT, n))
        signs[0] = 1
    tolerance = 1e-9        # sums of the same numbers in another order
    return np.mean(abs(signs @ found) >= abs(found.sum()) - tolerance)


def holm(p_values):
    """p-values corrected for their number, in the given order: Holm, Scandinavian Journal of Statistics 6, 1979."""
    order = np.argsort(p_values)
    steps = (len(order) - np.arange(len(order))) * np.asarray(p_values)[order]
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(steps).clip(max=1)
    return corrected
