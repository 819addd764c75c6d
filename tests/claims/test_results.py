"""The claims command: what is made, kept and refused."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tinytav.claims import pictures, results, studies, tables, tour
from tinytav.claims.clips import make_clip
from tinytav.errors import InputError
from tinytav.toy.world import ATTRIBUTES
from tinytav.weights import load

TOY = Path(__file__).parents[2] / "weights/toy"
QUICK = studies.STUDIES["quick"]


class FakeStudio:
    """Makes frames whose level says what they are, and scores by their level."""

    def __init__(self, made):
        self.made = made

    def reference(self, name):
        self.made.append(name)
        return torch.zeros(1, 2, 3, 8, 8)

    def edit(self, variant):
        self.made.append(variant)
        return torch.full((1, 2, 3, 8, 8), 0.1)

    def score(self, frames):
        return [{"level": round(frames.mean().item(), 1)}]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Works on clip 0 of the trial with two rows -> (what was made, its folder, work)."""
    made = []

    def one_thread(count):                      # in earnest it would slow the tests after this one
        assert count == 1
    monkeypatch.setattr(torch, "set_num_threads", one_thread)
    monkeypatch.setattr(studies.Study, "studio", lambda *args: FakeStudio(made))
    rows = {name: studies.TRIAL[name] for name in ("full method", "untuned")}
    study = studies.STUDIES["trial"]._replace(rows=rows, references=("source",))
    args = Namespace(weights=TOY, settings={}, out=tmp_path)
    return made, tmp_path / "trial/0", lambda: results.work(args, (("trial", study), 0))


def test_every_row_of_a_clip_is_made_once(made):
    made, folder, work = made
    work()
    full, untuned = studies.TRIAL["full method"], studies.TRIAL["untuned"]
    assert made[0] == "source" and sorted(made[1:], key=str) == sorted([full, untuned], key=str)
    assert json.loads((folder / "full method.json").read_text()) == [{"level": 0.1}]
    (folder / "untuned.json").unlink()              # is scored again from its frames
    (folder / "full method.safetensors").unlink()
    work()
    assert len(made) == 3 and (folder / "untuned.json").exists()
    assert Image.open(folder / "rows.png").height == 2 * (8 + tour.LINE + 4)    # the source and a row with its frames


def test_the_two_kinds_of_captions_and_the_clips_of_a_study():
    settings = vars(load(TOY).defaults)
    names = "trial", "trial-full", "quick", "long", "short"
    trial, full, quick, long, short = (studies.STUDIES[name].studio(TOY, 1, settings) for name in names)
    assert trial.captions == quick.captions == "user" and full.captions == "full"
    assert [edit.name for edit in trial.clip.edits] == ["subject", "place", "hat", "time"]
    assert full.clip == trial.clip and trial.clip == make_clip("trial", 1)
    assert quick.clip == make_clip("test", 1)._replace(edits=quick.clip.edits)
    assert len(long.source) == 32 and len(short.source) == 8 and long.clip.edits == short.clip.edits
    assert short.clip.scene == make_clip("long", 1).scene
    for studio in (quick, long, short):
        assert [edit.name for edit in studio.clip.edits] == ["subject", "place"]


def test_a_clip_that_is_not_finite_is_not_scored(tmp_path):
    with pytest.raises(InputError, match="not finite"):
        results.keep(tmp_path, "diverged", lambda: torch.full((1, 8, 3, 4, 4), float("nan")), studio=None)
    assert not list(tmp_path.iterdir())


def test_results_of_other_settings_are_not_gone_on_with(tmp_path):
    file = tmp_path / "out/settings.json"
    results.same_settings(file, dict(steps=1))
    results.same_settings(file, dict(steps=1))
    for other in (dict(steps=2), dict(steps=1, lr=2)):
        with pytest.raises(InputError, match="other weights or settings"):
            results.same_settings(file, other)
    assert json.loads(file.read_text()) == dict(steps=1)


def test_the_scores_of_a_folder_are_collected_with_their_settings(tmp_path):
    (tmp_path / "trial/0").mkdir(parents=True)
    (tmp_path / "trial/0/full method.json").write_text('[{"success": 1}]')
    results.same_settings(tmp_path / "settings.json", dict(steps=1))
    scores = results.collect(tmp_path)
    assert scores == {"trial/0/full method": [{"success": 1}]}
    assert json.loads((tmp_path / "scores.json").read_text()) == dict(settings=dict(steps=1), scores=scores)
    results.keep(tmp_path / "trial/0", "full method", make=None, studio=None)       # would fail if it called make
    results.draw(tmp_path / "trial/0", ["full method"])
    assert not (tmp_path / "trial/0/rows.png").exists()                             # there are no frames


def test_the_picture_shows_the_first_edit_of_the_rows_that_are_made(tmp_path):
    for level, name in enumerate(("source", "still", "full method", "no inversion")):
        frames = torch.stack([torch.full((8, 3, 16, 16), 50 * level + edit, dtype=torch.uint8) for edit in range(2)])
        save_file(dict(frames=frames), tmp_path / f"{name}.safetensors")
    results.draw(tmp_path, ("source", "no inversion", "full method", "untuned"))
    picture, height = Image.open(tmp_path / "rows.png"), 16 + tour.LINE + 4
    assert picture.height == 3 * height                                             # "still" is not shown
    assert [picture.getpixel((3, height * row + height - 8))[0] for row in range(3)] == [0, 150, 100]


@pytest.mark.parametrize("flags, folder, made", [
    ((), "claims", {"trial": 24}), (("--quick",), "claims-quick", {"quick": 2}),
    (("--quick", "--out", "x"), "x", {"quick": 2}), (("--studies", "keep", "long"), "claims", {"keep": 8, "long": 8}),
    (("--clips", "4", "--variants", "untuned", "full method"), "claims", {"trial": 4})])
def test_flags_choose_studies_clips_and_the_folder(flags, folder, made, monkeypatch):
    """A quick run has a folder of its own."""
    monkeypatch.setattr("sys.argv", ["claims", *flags])
    args = results.parse()
    assert args.out == Path(folder) and {name: study.clips for name, study in args.plan.items()} == made
    if "--variants" in flags:
        assert list(args.plan["trial"].rows) == ["untuned", "full method"]


@pytest.mark.parametrize("flags, sentence", [
    (("--variants", "tuned"), "the study trial has no row 'tuned'"), (("--quick", "--clips", "1"), "leave out"),
    (("--studies", "x"), "invalid choice")])
def test_what_cannot_be_made_is_refused(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claims", *flags])
    with pytest.raises(SystemExit):
        results.parse()
    assert sentence in capsys.readouterr().err


def quick_scores():
    """Scores of a quick run in which all orderings hold: all scores of a row are the same, and lower in worse rows."""
    levels, scores = {"true edit": 10, "full method": 5, "no inversion": 1}, {}
    for row in (*QUICK.references, *QUICK.rows):
        edit = dict.fromkeys((*studies.NAMES, *ATTRIBUTES), levels.get(row, 0)) | dict(name="place", held_out=False)
        scores |= {f"quick/{i}/{row}": [edit] for i in range(2)}
    return scores


def test_tables_are_written_from_the_shipped_scores_and_a_broken_ordering_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "scores.json").write_text((results.HERE / "scores.json").read_text())
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["claims", "--tables", "--weights", str(tmp_path)])
    assert results.main() == 0
    assert (tmp_path / "TABLES.md").read_text() in capsys.readouterr().out and (tmp_path / "chart.png").exists()
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    pictures.frontier(tmp_path / "wanted.png", tables.shares(scores, "strength", ("unsaid", "edited")))
    assert (tmp_path / "strength.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    known = quick_scores()
    monkeypatch.setattr(results, "make", lambda args: known)
    monkeypatch.setattr("sys.argv", ["claims", "--quick", "--out", str(tmp_path)])
    assert results.main() == 0 and "all robust orderings hold" in capsys.readouterr().out
    for i in range(2):
        known[f"quick/{i}/true edit"] = known[f"quick/{i}/still"]
    assert results.main() == 1 and "true edit (0.000) is not at least 0 above" in capsys.readouterr().out


def test_the_shipped_scores_are_those_of_the_shipped_weights():
    sd = load(TOY)
    settings = json.loads((results.HERE / "scores.json").read_text())["settings"]
    assert settings == results.made_with(sd)
