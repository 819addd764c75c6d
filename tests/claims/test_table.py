"""The claims' arithmetic, on scores written by hand, and what attention costs."""
import json
import re
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file

from tinytav.claims import chart, cost, results, significance, table, variants
from tinytav.claims.experiment import TUNED
from tinytav.errors import InputError
from tinytav.inflation import VideoUNet, inflate
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.toy.world import ATTRIBUTES
from tinytav.weights import load

CLAIMS = Path(table.__file__).parent
SCORE = dict.fromkeys((*table.NAMES, *ATTRIBUTES), 0.5) | dict(name="place", held_out=False)

# Each in its own column: exchanged columns would show.
DISTINCT = dict(agreement=0.51, look=0.52, phase=0.53, x=0.54, camera=0.55, kept=0.56, edited=0.57, hat=0.8)


@pytest.fixture
def args(tmp_path):
    """Two clips of two edits each: in the first clip one succeeds, in the second none."""
    for i, successes in enumerate([(1, 0), (0, 0)]):
        (tmp_path / "user" / str(i)).mkdir(parents=True)
        for name in ("source", "full method"):
            scores = [SCORE | DISTINCT | dict(success=success, held_out=i == 1) for success in successes]
            (tmp_path / f"user/{i}/{name}-33.json").write_text(json.dumps(scores))
    return Namespace(out=tmp_path, clips=2, plan={"user": {"source": (33,), "full method": (33,)}})


def test_a_mean_is_over_clips_and_its_interval_spans_them(args):
    mean, low, high = significance.interval(significance.means(table.read(args, "full method"), "success"))
    assert (mean, low, high) == (0.25, 0, 0.5)
    assert significance.interval(significance.means(table.read(args, "full method"), "psnr")) == (0.5, 0.5, 0.5)


def test_the_table_has_a_row_a_variant_and_the_level_of_chance(args):
    heads, _, source, full, chance = table.table(args).splitlines()
    assert heads.count("|") == full.count("|") == chance.count("|")
    assert heads.split(" | ")[1:9] == ["success", "edit right", "rest kept", "unsaid kept", "agreement", "look agrees", "limbs", "position"]
    means = [cell.partition(" %")[0] for cell in full.split(" | ")[1:10]]
    unsaid = (0.8 + 3 * 0.5) / 4                    # hat; clothes, time and style: the caption names the rest
    assert means == ["25", "57", "56", f"{100 * unsaid:.0f}", "51", "52", "53", "54", "55"]
    assert chance.startswith("| chance |  | 17 % |")                    # place: one of six


def test_a_claim_holds_where_the_difference_on_the_same_clips_is_significant(args, monkeypatch):
    monkeypatch.setattr(table, "CLAIMS", (("moving wins", "full method", "source", ("success", "phase", "psnr")),))
    args.clips = 12
    for i in range(args.clips):
        (args.out / f"user/{i}").mkdir(exist_ok=True)
        values = (0.5 + 0.01 * i, 0.25)
        full = [SCORE | dict(success=i % 2, phase=value, psnr=0.25) for value in values]
        source = [SCORE | dict(success=1 - i % 2, phase=value - 0.25) for value in values]
        (args.out / f"user/{i}/full method-33.json").write_text(json.dumps(full))
        (args.out / f"user/{i}/source-33.json").write_text(json.dumps(source))
    *_, success, phase, psnr = table.verdicts(args).splitlines()
    assert "| success | +0.0 (" in success and success.endswith("| 1.000 | undecided |")
    assert phase.endswith("| limbs | +25.0 (+25.0 to +25.0) | 0.001 | holds |")             # 3 * 2 / 4096
    assert psnr.endswith("| PSNR | -0.2 (-0.2 to -0.2) | 0.001 | does not hold |")


def test_two_clips_prove_nothing(args, monkeypatch):
    monkeypatch.setattr(table, "CLAIMS", (("moving wins", "full method", "source", ("psnr",)),))
    for i in range(2):
        (args.out / f"user/{i}/full method-33.json").write_text(json.dumps([SCORE | dict(psnr=0.75)]))
    assert table.verdicts(args).splitlines()[-1].endswith("| 0.500 | undecided |")


def test_p_of_sign_flips_is_the_share_of_signs_that_differ_as_much():
    assert significance.p_value(np.array([1., 2., 3.])) == 2 / 8
    assert significance.p_value(np.array([3., -1., 1.])) == 6 / 8          # the sums are 5, 3, 3, 1 and -1, -3, -3, -5
    many = np.random.default_rng(1).normal(0.2, 1, 16)
    exact = np.mean([abs(np.dot(signs, many)) >= abs(many.sum()) for signs in product((1, -1), repeat=16)])
    assert significance.p_value(many) == pytest.approx(exact, abs=0.02)


def test_p_is_corrected_for_claims_that_are_not_made_too(args, monkeypatch):
    claim = ("moving wins", "full method", "source", ("psnr",))
    monkeypatch.setattr(table, "CLAIMS", (claim, ("not made", "untuned", "source", ("psnr", "look"))))
    monkeypatch.setattr(table, "p_value", lambda found: 0.03)
    assert table.verdicts(args).splitlines()[-1].endswith("| 0.090 | undecided |")


def test_what_is_not_in_the_paper_is_compared_with_the_full_method_on_the_same_clips(args):
    for i, values in enumerate([(0.5, 0.25), (0.75, 0.5)]):
        (args.out / f"user/{i}/full method-33.json").write_text(json.dumps([SCORE | dict(hat=value) for value in values]))
        (args.out / f"user/{i}/edit-friendly noise-33.json").write_text(json.dumps([SCORE | dict(hat=value + 0.2) for value in values]))
    args.plan["user"]["edit-friendly noise"] = (33,)
    heads, _, line = table.against_full_method(args, variants.BEYOND).splitlines()
    assert heads.split(" | ")[3] == "unsaid kept"
    assert table.against_full_method(args, variants.FURTHER) == ""                  # none of them is made
    assert line.split(" | ")[0] == "| edit-friendly noise" and line.split(" | ")[3] == "+5.0 (+5.0 to +5.0)"       # one of four


def test_each_kind_of_edit_is_counted_apart(args):
    lines = table.by_attribute(args).splitlines()
    shares = "57 % | 51 % | 53 % | 54 % | 55 %"             # edit right, agreement, and the three motions
    assert lines[2:] == [f"| place | 4 | {shares} | 25 % |", f"| held out | 2 | {shares} | 0 % |"]


def test_results_of_other_settings_are_not_gone_on_with(tmp_path):
    results.same_settings(tmp_path / "out/settings.json", dict(steps=1))
    results.same_settings(tmp_path / "out/settings.json", dict(steps=1))
    with pytest.raises(InputError, match="other weights or settings"):
        results.same_settings(tmp_path / "out/settings.json", dict(steps=2))


def test_known_scores_are_taken_over_and_not_made_again(args, tmp_path_factory):
    settings, folder = dict(steps=1), tmp_path_factory.mktemp("later")
    results.same_settings(args.out / "settings.json", settings)
    results.collect(args.out, args.out / "scores.json")
    with pytest.raises(InputError, match="other weights or settings"):
        results.take_over(args.out / "scores.json", folder, dict(steps=2))
    assert not list(folder.iterdir())
    results.take_over(args.out / "scores.json", folder, settings)
    later = Namespace(**vars(args) | dict(out=folder))
    assert table.read(later, "full method") == table.read(args, "full method")
    results.write(folder / "user/0", "full method-33", make=None, studio=None)      # would fail if it called make
    (folder / "user/0/full method-33.json").write_text("[]")
    results.take_over(args.out / "scores.json", folder, settings)
    assert (folder / "user/0/full method-33.json").read_text() == "[]"              # what is there stays
    table.picture(later)
    assert not (folder / "claims.png").exists()


@pytest.mark.parametrize("flags, folder", [((), "claims"), (("--quick",), "claims-quick"), (("--quick", "--out", "x"), "x")])
def test_a_quick_run_has_a_folder_of_its_own_because_it_makes_fewer_edits(flags, folder, monkeypatch):
    class Called(Exception):
        pass

    def every_clip(work, args, *rest):
        raise Called(str(args.out))

    monkeypatch.setattr(table, "every_clip", every_clip)
    monkeypatch.setattr("sys.argv", ["claims", "--weights", str(CLAIMS.parents[1] / "weights/toy"), *flags])
    with pytest.raises(Called, match=f"^{folder}$"):
        table.main()


def test_a_clip_that_is_not_finite_is_not_scored(tmp_path):
    with pytest.raises(InputError, match="not finite"):
        results.write(tmp_path, "diverged", lambda: torch.full((1, 8, 3, 4, 4), float("nan")), studio=None)
    assert not list(tmp_path.iterdir())


def test_the_official_code_tunes_70_tensors_of_stable_diffusion_for_112():
    with torch.device("meta"):
        net = VideoUNet(UNetConfig(), 8)
    assert {name: len(tensors(net)) for name, tensors in TUNED.items()} == {"the paper's": 112, "official": 70, "all": 686 + 112}


def test_holm_corrects_for_the_number_of_claims():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.5]) == pytest.approx([1, 1])


def test_each_claim_is_about_variants_that_are_made_with_three_seeds_where_seeds_change_them():
    made = variants.plan()["user"]
    always_alike = {"untuned", "frame by frame"}
    for _, better, worse, keys in variants.CLAIMS:
        for name in (better, worse):
            assert made[name] == (variants.SEEDS[:1] if name in always_alike else variants.SEEDS)
        assert set(keys) <= set(table.NAMES)
    assert made["norm per frame"] == made["edit-friendly noise"] == made["true edit"] == variants.SEEDS[:1]
    assert variants.plan(only=["full method"], seeds=2)["user"]["full method"] == variants.SEEDS[:2]
    assert set(variants.plan(only=["untuned"])["user"]) == {*variants.REFERENCES, "untuned"}
    quick = variants.plan(quick=True)["user"]
    for better, worse, key, _ in variants.ROBUST:
        assert better in quick and worse in quick and key in table.NAMES


def test_rows_chosen_by_name_need_neither_the_full_method_nor_a_claim(args):
    args.plan, args.quick = {"user": {"source": (33,)}}, False
    text, = table.parts(args, sd=None)
    assert "| source |" in text
    assert not list(table.broken_orderings(args))


def test_the_chart_puts_a_dot_where_the_mean_is(tmp_path):
    chart.write(tmp_path / "chart.png", {"a": dict(success=(0.5, 0.25, 0.75)), "b": dict(success=(1.0, 1.0, 1.0))})
    picture = Image.open(tmp_path / "chart.png")
    rows = [chart.TOP + chart.ROW * j + chart.ROW // 2 for j in (0, 1)]
    dot, bar = ImageColor.getrgb(chart.DOT), ImageColor.getrgb(chart.BAR)
    assert picture.getpixel((chart.LABELS + chart.PANEL // 2, rows[0])) == dot
    assert picture.getpixel((chart.LABELS + chart.PANEL * 0.3, rows[0])) == bar
    assert picture.getpixel((chart.LABELS + chart.PANEL * 0.1, rows[0])) == (255, 255, 255)
    assert picture.getpixel((chart.LABELS + chart.PANEL, rows[1])) == dot


def test_the_picture_shows_one_edit_of_a_clip_that_is_made(args):
    names = ("source", "still", "full method", "no inversion")
    args.plan["user"] = dict.fromkeys(names, (33,))
    for level, name in enumerate(names):
        for clip in range(2):
            frames = torch.full((2, 8, 3, 16, 16), 10 * level + clip, dtype=torch.uint8)     # two edits of a clip
            save_file(dict(frames=frames), args.out / f"user/{clip}/{name}-33.safetensors")
    table.picture(args)
    picture = Image.open(args.out / "claims.png")
    assert picture.size == (results.MARGIN + 8 * 16, 3 * 16)                                # "still" is not shown
    assert [picture.getpixel((results.MARGIN + 3, y))[0] for y in (3, 19, 35)] == [0, 20, 30]


def test_a_picture_has_a_named_row_for_each_variant(tmp_path):
    rows = {"a": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "b": torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)}
    results.labelled(tmp_path / "x.png", rows)
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (results.MARGIN + 16, 16)
    assert [picture.getpixel((results.MARGIN + 15, y)) for y in (7, 8)] == [(0, 0, 0), (200, 200, 200)]


def test_sparse_causal_attention_grows_with_the_frames_and_full_attention_with_their_square():
    net = UNet(UNetConfig.from_json(json.loads((Path(__file__).parents[2] / "weights/toy/unet/config.json").read_text())))
    gflop = {(count, attention): cost.gflop(inflate(net, count, attention), (1, 4, count, 16, 16), (1, 77, net.cfg.cross_attention_dim))
             for count in (4, 8) for attention in ("sparse-causal", "full")}
    assert 0 < gflop[8, "sparse-causal"] == 2 * gflop[4, "sparse-causal"] and gflop[8, "full"] == 4 * gflop[4, "full"]
    assert gflop[4, "full"] == 2 * gflop[4, "sparse-causal"]                # four frames' keys for two


def test_the_chart_has_a_row_for_each_variant_on_which_a_claim_rests(args):
    table.draw_chart(args)
    assert Image.open(args.out / "chart.png").height == chart.TOP + chart.ROW + 10          # the full method; not the source
    (args.out / "chart.png").unlink()
    args.plan["user"] = {"source": (33,)}
    table.draw_chart(args)
    assert not (args.out / "chart.png").exists()


def test_a_panel_of_the_chart_in_which_all_is_high_begins_at_50_per_cent(tmp_path):
    chart.write(tmp_path / "chart.png", {"a": dict(agreement=(0.75, 0.5, 1.0))})
    picture, row = Image.open(tmp_path / "chart.png"), chart.TOP + chart.ROW // 2
    assert picture.getpixel((chart.LABELS + chart.PANEL // 2, row)) == ImageColor.getrgb(chart.DOT)
    assert picture.getpixel((chart.LABELS + 8, row)) == ImageColor.getrgb(chart.BAR)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The scores that are shipped with the project, as a finished run: each row that all twelve clips have."""
    known = json.loads((CLAIMS / "scores.json").read_text())
    folder = tmp_path_factory.mktemp("shipped")
    results.take_over(CLAIMS / "scores.json", folder, known["settings"])
    finished = {captions: {name: seeds for name, seeds in rows.items() if everywhere(known["scores"], captions, name, seeds)}
                for captions, rows in variants.plan().items()}
    return Namespace(out=folder, clips=12, plan=finished, quick=False, made_with=known["settings"])


def everywhere(scores, captions, name, seeds):
    return all(f"{captions}/{clip}/{name}-{seed}" in scores for clip in range(12) for seed in seeds)


def test_the_shipped_scores_are_those_of_the_shipped_weights(shipped):
    sd = load(CLAIMS.parents[1] / "weights/toy")
    assert shipped.made_with == vars(sd.defaults) | results.fingerprints(sd, sd.path)


@pytest.mark.parametrize("section, tables", [
    ("Main results", lambda run: [table.table(run), table.by_attribute(run), table.verdicts(run)]),
    ("Other variants", lambda run: [table.against_full_method(run, variants.FURTHER)]),
    ("Captions that name everything", lambda run: [table.table(run, "full"), table.by_attribute(run, "full")]),
    ("Beyond the paper", lambda run: [table.against_full_method(run, variants.BEYOND)])])
def test_the_tables_of_readme_are_those_of_the_shipped_scores(section, tables, shipped):
    """No line of them is missing or from an earlier run."""
    _, found, after = (CLAIMS / "README.md").read_text().partition(f"\n## {section}\n")
    assert found
    lines = re.split("\n##+ ", after)[0].splitlines()
    assert [line for line in lines if line.startswith("|")] == "\n".join(tables(shipped)).splitlines()
