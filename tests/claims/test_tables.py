"""The claims' arithmetic on scores written by hand, and the tables that the project holds."""
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tinytav.claims import tables
from tinytav.claims.studies import CLAIMS, NAMES, ROBUST, STUDIES
from tinytav.claims.studio import Variant
from tinytav.toy.world import ATTRIBUTES

CLAIMS_FOLDER = Path(tables.__file__).parent
SCORE = dict.fromkeys((*NAMES, *ATTRIBUTES), 0.5) | dict(name="place", held_out=False)
# Each in its own column: exchanged columns would show.
DISTINCT = dict(agreement=0.51, look=0.52, phase=0.53, x=0.54, camera=0.55, kept=0.56, edited=0.57, hat=0.8)
TRIAL, KEEP, QUICK = STUDIES["trial"], STUDIES["keep"], STUDIES["quick"]


def rows_of(scores, study="trial"):
    return tables.finished(scores, study)


def of_clips(row, clips, study="trial"):
    """{key: scores} of a row. clips: for each clip the changes to SCORE of each edit."""
    return {f"{study}/{i}/{row}": [SCORE | edit for edit in edits] for i, edits in enumerate(clips)}


@pytest.fixture
def scores():
    """Two clips of two edits each: in the first clip one succeeds, in the second none."""
    clips = [[DISTINCT | dict(success=success, held_out=held_out) for success in pair]
             for held_out, pair in ((False, (1, 0)), (True, (0, 0)))]
    return of_clips("full method", clips) | of_clips("source", clips)


# ---- statistics ----------------------------------------------------------------------------------

def test_a_mean_is_over_clips_and_its_interval_spans_them(scores):
    clips = rows_of(scores)["full method"]
    assert tables.interval(tables.means(clips, "success")) == (0.25, 0, 0.5)
    assert tables.interval(tables.means(clips, "psnr")) == (0.5, 0.5, 0.5)


def test_a_mean_leaves_out_what_is_not_defined():
    clips = [[dict(outside=20.), dict(outside=float("nan")), dict(outside=30.)], [dict(outside=float("nan"))]]
    assert tables.means(clips, "outside")[0] == 25 and np.isnan(tables.means(clips, "outside")[1])


def test_an_interval_ends_at_the_percentiles_of_the_exact_bootstrap():
    """Of four values all 4^4 samples with replacement are listed: 2.5 % of their means lie beyond each end."""
    values = np.array([0., 1., 2., 10.])
    exact = np.sort([np.mean(drawn) for drawn in product(values, repeat=4)])
    mean, low, high = tables.interval(values)
    assert mean == 3.25
    assert np.mean(exact < low) <= 0.025 <= np.mean(exact <= low)
    assert np.mean(exact > high) <= 0.025 <= np.mean(exact >= high)


def test_p_of_sign_flips_is_the_share_of_signs_that_differ_as_much():
    assert tables.p_value(np.array([1., 2., 3.])) == 2 / 8
    assert tables.p_value(np.array([3., -1., 1.])) == 6 / 8          # the sums are 5, 3, 3, 1 and -1, -3, -3, -5
    many = np.random.default_rng(1).normal(0.2, 1, 16)
    exact = np.mean([abs(np.dot(signs, many)) >= abs(many.sum()) for signs in product((1, -1), repeat=16)])
    assert tables.p_value(many) == pytest.approx(exact, abs=0.02)


def test_holm_corrects_for_the_number_of_claims():
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.6, 0.5]) == pytest.approx([1, 1])


# ---- tables --------------------------------------------------------------------------------------

def test_rows_that_all_clips_have_are_shown_in_the_studys_order(scores):
    scores |= of_clips("untuned", [[{}]])
    scores |= {"keep/0/source": [SCORE]}           # of another study; and of "untuned" there is one clip alone
    rows = rows_of(scores)
    assert list(rows) == ["source", "full method"]
    assert [[edit["success"] for edit in clip] for clip in rows["full method"]] == [[1, 0], [0, 0]]


def test_the_table_has_a_row_a_variant_and_the_level_of_chance(scores):
    heads, _, source, full, chance = tables.table(rows_of(scores), TRIAL).splitlines()
    assert heads.count("|") == source.count("|") == full.count("|") == chance.count("|")
    assert heads.split(" | ")[1:10] == ["success", "edit right", "rest kept", "unsaid kept", "agreement", "look agrees",
                                        "limbs", "position", "camera"]
    means = [cell.partition(" %")[0] for cell in full.split(" | ")[1:10]]
    unsaid = (0.8 + 3 * 0.5) / 4                    # hat; clothes, time and style: the caption names the rest
    assert means == ["25", "57", "56", f"{100 * unsaid:.0f}", "51", "52", "53", "54", "55"]
    assert full.startswith("| full method | 25 % (0–50) |") and full.endswith("| 4 |")
    assert chance.startswith("| chance |  | 17 % |")                    # place: one of six
    assert tables.unsaid(SCORE, "full")["unsaid"] is np.nan


def test_a_claim_holds_where_the_difference_on_the_same_clips_is_significant():
    full, source = [], []
    for i in range(12):
        values = (0.5 + 0.01 * i, 0.25)
        full.append([dict(success=i % 2, phase=value, psnr=0.25) for value in values])
        source.append([dict(success=1 - i % 2, phase=value - 0.25) for value in values])
    claims = [("moving wins", "full method", "source", key) for key in ("success", "phase", "psnr")]
    rows = rows_of(of_clips("full method", full) | of_clips("source", source))
    *_, success, phase, psnr = tables.verdicts(rows, claims).splitlines()
    assert "| success | +0.0 (" in success and success.endswith("| 1.000 | undecided |")
    assert phase.endswith("| limbs | +25.0 (+25.0 to +25.0) | 0.001 | holds |")             # 3 * 2 / 4096
    assert psnr.endswith("| PSNR | -0.2 (-0.2 to -0.2) | 0.001 | does not hold |")


def test_a_small_p_is_not_called_zero(scores, monkeypatch):
    claims = [("moving wins", "full method", "source", "psnr")]
    for p, text in ((0.0009, "| below 0.001 |"), (0.001, "| 0.001 |")):
        monkeypatch.setattr(tables, "p_value", lambda found: p)
        assert text in tables.verdicts(rows_of(scores), claims)


def test_two_clips_prove_nothing(scores):
    scores |= of_clips("full method", [[dict(psnr=0.75)]] * 2)
    line = tables.verdicts(rows_of(scores), [("moving wins", "full method", "source", "psnr")]).splitlines()[-1]
    assert line.endswith("| 0.500 | undecided |")


def test_p_is_corrected_for_claims_that_are_not_made_too(scores, monkeypatch):
    claims = [("moving wins", "full method", "source", "psnr"), ("not made", "untuned", "source", "look")]
    monkeypatch.setattr(tables, "p_value", lambda found: 0.03)
    assert tables.verdicts(rows_of(scores), claims).splitlines()[-1].endswith("| 0.060 | undecided |")
    assert not tables.verdicts(rows_of(scores), claims[1:])                                     # none is made


def test_other_rows_are_compared_with_the_full_method_on_the_same_clips(scores):
    values, made = ((0.5, 0.25), (0.75, 0.5)), {}
    for row, more in (("full method", 0), ("edit-friendly noise", 0.2)):
        made |= of_clips(row, [[dict(hat=value + more) for value in pair] for pair in values], "keep")
    rows = rows_of(made, "keep")                    # of the other rows none is made
    heads, _, line = tables.against_full_method(rows, KEEP).splitlines()
    assert heads.split(" | ")[3] == "unsaid kept" and heads.endswith("| PSNR | PSNR outside |")
    heads, *_ = tables.against_full_method(rows, KEEP._replace(columns=("psnr",))).splitlines()
    assert heads.endswith("| motion | PSNR |")
    assert tables.with_interval(np.array([np.nan, np.nan]), "unsaid") == ""         # captions that name everything
    assert not tables.against_full_method(rows_of(scores), TRIAL)                   # the recipe is not made
    cells = line.split(" | ")
    assert cells[0] == "| edit-friendly noise" and cells[3] == "+5.0 (+5.0 to +5.0)"            # one attribute of four


def test_each_kind_of_edit_is_counted_apart(scores):
    lines = tables.by_attribute(rows_of(scores)).splitlines()
    shares = "57 % | 51 % | 53 % | 54 % | 55 %"             # edit right, agreement, and the three motions
    assert lines[2:] == [f"| place | 4 | {shares} | 25 % |", f"| held out | 2 | {shares} | 0 % |"]


def test_the_text_has_the_studies_that_are_made_in_their_order():
    made = of_clips("source", [[{}]], "keep") | of_clips("source", [[{}]])
    text = tables.text(made)
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["# Tables", f"## {TRIAL.title}", f"## {KEEP.title}"]
    assert text.endswith(f"\n\n## {KEEP.title}\n\n{tables.table(rows_of(made, 'keep'), KEEP)}\n")


def test_the_chart_has_the_rows_of_the_trial_the_most_successful_first():
    def clips(**score):
        return [[SCORE | score]] * 2
    scores = of_clips("full method", clips(success=0.25, edited=0.57))
    scores |= of_clips("untuned", clips(success=1)) | of_clips("true edit", clips(success=1))
    found = tables.shares(scores, "trial")
    assert list(found) == ["untuned", "full method"]
    assert list(found["untuned"]) == ["success", "edit right", "unsaid kept", "agreement", "motion"]
    assert found["full method"]["success"] == (0.25, 0.25, 0.25)
    assert found["full method"]["edit right"][0] == pytest.approx(0.57)


def test_an_ordering_that_is_broken_is_named():
    scores = {}
    for row in (*QUICK.references, *QUICK.rows):
        good = dict.fromkeys(SCORE, 5.) | dict(name="place", held_out=False)
        scores |= of_clips(row, [[good if row in ("full method", "true edit") else {}]], "quick")
    assert list(tables.broken_orderings(scores)) == [
        "no inversion (0.500) is not at least 0.03 above no inversion, spatial attention (0.500) in agreement",
        "true edit (5.000) is not at least 2 above full method (5.000) in PSNR"]


# ---- the studies ---------------------------------------------------------------------------------

def test_each_study_names_rows_and_scores_that_there_are():
    for study in STUDIES.values():
        claims = (*study.claims, *study.separate)
        named = {name for _, *pair, _ in claims for name in pair} | set(study.compared)
        assert named <= study.rows.keys() and "full method" in (study.rows if study.compared else ("full method",))
        assert {*study.columns, *(key for *_, key in claims)} <= set(NAMES)


def test_the_trial_is_the_one_that_was_planned():
    plan, trial = (CLAIMS_FOLDER / "PLAN.md").read_text(), TRIAL
    planned = [line.strip("| ").split(" | ") for line in plan.splitlines() if line.startswith("| ")][1:]
    assert planned == [[*words, NAMES[key]] for *words, key in CLAIMS] and trial.claims == CLAIMS
    (_, recipe, *rest), = trial.separate
    assert rest == ["full method", "success"] and "on success, on the same 24 clips" in plan
    assert trial.rows[recipe] == Variant(noise="edit-friendly", strength=0.75)
    assert trial.clips == 24 and trial.kind == "trial" and trial.captions == "user" and trial.edits is None


def test_quick_makes_what_its_orderings_compare():
    for better, worse, key, _ in ROBUST:
        assert {better, worse} <= {*QUICK.references, *QUICK.rows} and key in NAMES
    assert QUICK.clips == 2 and QUICK.edits == ("subject", "place")


# ---- what the project holds ----------------------------------------------------------------------

def test_tables_md_is_that_of_the_shipped_scores():
    """No line of it is missing or from an earlier run."""
    scores = json.loads((CLAIMS_FOLDER / "scores.json").read_text())["scores"]
    assert (CLAIMS_FOLDER / "TABLES.md").read_text() == tables.text(scores)
