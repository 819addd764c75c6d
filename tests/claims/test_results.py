"""The claims command: what is made, kept, taken over and refused."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tinytav.claims import pictures, results, studies
from tinytav.errors import InputError
from tinytav.weights import load

TOY = Path(__file__).parents[2] / "weights/toy"


class FakeStudio:
    """Makes frames whose level says what they are, and scores by their level."""
    shown = {}

    def __init__(self, made):
        self.made = made

    def reference(self, name):
        self.made.append(name)
        return torch.zeros(1, 2, 3, 8, 8)

    def edit(self, variant, seed):
        self.made.append((variant, seed))
        return torch.full((1, 2, 3, 8, 8), (seed - 32) / 10)

    def score(self, frames):
        return [{"level": round(frames.mean().item(), 1)}]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Works on clip 0 of the study user with two rows -> (what was made, its folder, work)."""
    made = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)           # would slow the tests after this one
    monkeypatch.setattr(studies.Study, "studio", lambda *args: FakeStudio(made))
    rows = {name: studies.VARIANTS[name] for name in ("full method", "untuned")}
    study = studies.STUDIES["user"]._replace(rows=rows, references=("source",))
    args = Namespace(weights=TOY, settings={}, out=tmp_path)
    return made, tmp_path / "user/0", lambda: results.work(args, (("user", study), 0))


def test_every_row_of_a_clip_is_made_once(made):
    made, folder, work = made
    work()
    full, untuned = studies.VARIANTS["full method"], studies.VARIANTS["untuned"]
    assert made[0] == "source" and sorted(made[1:], key=str) == sorted([(full, 33), (untuned, 33)], key=str)
    assert json.loads((folder / "full method-33.json").read_text()) == [{"level": 0.1}]
    (folder / "untuned-33.json").unlink()           # is scored again from its frames
    (folder / "full method-33.safetensors").unlink()
    work()
    assert len(made) == 3 and (folder / "untuned-33.json").exists()
    assert Image.open(folder / "rows.png").height == 2 * 8          # the source and a row whose frames are there


def test_the_two_kinds_of_captions_and_of_studios():
    settings = vars(load(TOY).defaults)
    names = "user", "full", "place", "pose"
    user, full, place, pose = (studies.STUDIES[name].studio(TOY, 1, settings) for name in names)
    assert user.captions == place.captions == pose.captions == "user" and full.captions == "full"
    assert [edit.name for edit in user.clip.edits] == ["subject", "place", "hat", "time"]
    assert [edit.name for edit in place.clip.edits] == ["place"] and place.clip.motion == user.clip.motion
    assert [edit.name for edit in pose.clip.edits] == ["pose"] and pose.control is not None and user.control is None
    assert pose.asked.views != pose.judge.views
    long, short = (studies.STUDIES[name].studio(TOY, 1, settings) for name in ("long", "short"))
    assert len(long.source) == 32 and len(short.source) == 8 and long.clip.edits == short.clip.edits
    assert [edit.name for edit in long.clip.edits] == ["subject", "place"] and long.clip.scene != user.clip.scene


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
    results.same_settings(file, {"steps": 1, results.CONTROL: "a"})         # pose control is added later
    results.same_settings(file, dict(steps=1))
    with pytest.raises(InputError, match="other weights or settings"):
        results.same_settings(file, {"steps": 1, results.CONTROL: "b"})


def test_known_scores_are_taken_over_and_not_made_again(tmp_path):
    first, later, settings = tmp_path / "first", tmp_path / "later", dict(steps=1)
    (first / "user/0").mkdir(parents=True)
    (first / "user/0/full method-33.json").write_text('[{"success": 1}]')
    results.same_settings(first / "settings.json", settings)
    scores = results.collect(first)
    assert scores == {"user/0/full method-33": [{"success": 1}]}
    assert json.loads((first / "scores.json").read_text()) == dict(settings=settings, scores=scores)
    with pytest.raises(InputError, match="other weights or settings"):
        results.take_over(first / "scores.json", later, dict(steps=2))
    assert not later.exists()
    results.take_over(first / "scores.json", later, settings)
    assert results.collect(later) == scores
    results.keep(later / "user/0", "full method-33", make=None, studio=None)        # would fail if it called make
    (later / "user/0/full method-33.json").write_text("[]")
    results.take_over(first / "scores.json", later, settings)
    assert (later / "user/0/full method-33.json").read_text() == "[]"               # what is there stays
    results.draw(later / "user/0", "x.png", ("full method",), 0)
    assert not (later / "user/0/x.png").exists()                                    # there are no frames


def test_the_picture_shows_one_edit_of_the_rows_that_are_made(tmp_path):
    for level, name in enumerate(("source", "still", "full method", "no inversion")):
        frames = torch.stack([torch.full((8, 3, 16, 16), 50 * level + edit, dtype=torch.uint8) for edit in range(2)])
        save_file(dict(frames=frames), tmp_path / f"{name}-33.safetensors")
    results.draw(tmp_path, "x.png", results.PICTURE_ROWS, 1)
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (pictures.MARGIN + 8 * 16, 3 * 16)                       # "still" is not shown
    assert [picture.getpixel((pictures.MARGIN + 3, y))[0] for y in (3, 19, 35)] == [1, 101, 151]


@pytest.mark.parametrize("flags, folder, made", [
    ((), "claims", {"trial": 24}), (("--quick",), "claims-quick", {"user": 2}),
    (("--quick", "--out", "x"), "x", {"user": 2}), (("--studies", "pose", "sweep"), "claims", {"pose": 6, "sweep": 4}),
    (("--clips", "4", "--variants", "untuned", "full method"), "claims", {"trial": 4})])
def test_flags_choose_studies_clips_and_the_folder(flags, folder, made, monkeypatch):
    """A quick run has a folder of its own, because it makes fewer edits of a clip."""
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


def test_tables_are_written_from_the_shipped_scores_and_a_broken_ordering_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "scores.json").write_text((results.HERE / "scores.json").read_text())
    (tmp_path / "earlier.json").write_text("{}")
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["claims", "--tables", "--weights", str(tmp_path)])
    assert results.main() == 0
    assert (tmp_path / "TABLES.md").read_text() in capsys.readouterr().out and (tmp_path / "chart.png").exists()
    known = json.loads((tmp_path / "scores.json").read_text())["scores"]
    monkeypatch.setattr(results, "make", lambda args: known)
    monkeypatch.setattr("sys.argv", ["claims", "--quick", "--out", str(tmp_path)])
    assert results.main() == 0 and "all robust orderings hold" in capsys.readouterr().out
    for i in range(12):
        known[f"user/{i}/true edit-33"] = known[f"user/{i}/still-33"]
    assert results.main() == 1 and "true edit (0.000) is not at least 0 above" in capsys.readouterr().out


def test_the_shipped_scores_are_those_of_the_shipped_weights():
    sd = load(TOY)
    settings = json.loads((results.HERE / "scores.json").read_text())["settings"]
    assert settings == vars(sd.defaults) | results.fingerprints(sd, sd.path)
