"""Evaluation of sets: both layouts, resuming, broken clips, and ranks, by the command on tiny weights."""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hardening.warm import warm
from PIL import Image
from safetensors.torch import load_file, save_file

from tinytav.errors import InputError
from tinytav.files import frames, records
from tinytav.files.runs import Run
from tinytav.measure import evaluate, metrics

ROOT = Path(__file__).parents[2]
HEADS = ("Video name,Our GT caption,Style Change Caption,Object Change Caption,Background Change Caption,"
         "Multiple Changes Caption")


def call(cwd, *args, status=0):
    """python -m tinytav evaluate, in a fork of a warm interpreter."""
    done = warm()(cwd, "tinytav/__main__.py", "evaluate", *args, limit=300)
    assert done.status == status, done.out + done.err
    return done


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_set(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---- the set -------------------------------------------------------------------------------------

def test_our_layout_has_a_column_for_each_kind_and_an_empty_cell_is_no_edit(tmp_path):
    lines = ["clip,caption,object,Style", "a.mp4, a man ,a dog,", "", "b/a.mp4,\"a, b\",,comic"]
    file = write_set(tmp_path / "set.csv", lines)
    clips, side = evaluate.read_set(file)
    assert side is None and [clip.path for clip in clips] == [tmp_path / "a.mp4", tmp_path / "b/a.mp4"]
    assert [clip.caption for clip in clips] == ["a man", "a, b"] and [clip.folder for clip in clips] == ["a", "a-2"]
    assert [clip.edits for clip in clips] == [(("object", "a dog"),), (("Style", "comic"),)]


def loveu(folder):
    """LOVEU-TGVE-2023's folder and CSV in small: three blocks with headings, a video, and folders of pictures."""
    for block in ("DAVIS_480p", "youtube_480p", "videvo_480p"):
        (folder / block / "480p_videos").mkdir(parents=True)
    tiny.write_clip(folder / "DAVIS_480p/480p_videos/gold-fish.mp4")
    for block, name in (("youtube_480p", "squirrel-climb"), ("videvo_480p", "earth-full-view")):
        pictures = folder / block / "480p_frames" / name
        pictures.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (48, 32), (60 * number, 90, 200)).save(pictures / f"{number:05}.jpg")
    return write_set(folder / "LOVEU-TGVE-2023_Dataset.csv", [
        HEADS + ",", "DAVIS Videos:,,,,,,",
        "gold-fish,Several goldfish swim in a tank.,\"Several goldfish swim in a tank, impressionist style.\","
        "Several sharks swim in a tank.,Several goldfish swim in a pond.,"
        "\"Several koi fish swim in a pond, rainbow color scheme.\",",
        ",,,,,,", "Youtube Videos:,,,,,,", "squirrel-climb,A squirrel climbs.,a,b,c,d,", ",,,,,,",
        "Videvo Videos:,,,,,,",
        "earth-full-view,The earth.,a,b,c,d,", "missing,A clip that is not there.,a,b,c,d,"])


def test_loveu_layout_has_blocks_with_headings_and_four_edits_a_clip(tmp_path):
    clips, side = evaluate.read_set(loveu(tmp_path))
    names = [clip.name for clip in clips]
    assert side == 480 and names == ["gold-fish", "squirrel-climb", "earth-full-view", "missing"]
    assert [clip.path.relative_to(tmp_path).as_posix() for clip in clips] == [
        "DAVIS_480p/480p_videos/gold-fish.mp4", "youtube_480p/480p_frames/squirrel-climb",
        "videvo_480p/480p_frames/earth-full-view", "DAVIS_480p/480p_videos/missing.mp4"]
    assert [kind for kind, _ in clips[0].edits] == ["style", "object", "background", "multiple"]
    assert clips[0].edits[1][1] == "Several sharks swim in a tank."


@pytest.mark.parametrize("lines, message", [
    (["name,text"], "is no set"), ([], "is no set"), (["clip,caption,edit"], "holds no clip"),
    (["clip,caption,edit", "a,,b"], "line 2"), (["clip,caption,edit", "a.mp4,a man,"], "line 2: 'a.mp4' has no edit"),
    ([HEADS, ",a caption,a,b,c,d"], "no video's name")])
def test_a_file_that_is_no_set_is_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        evaluate.read_set(write_set(tmp_path / "set.csv", lines))


def test_the_toys_set_names_its_own_clips_with_their_captions():
    clips, _ = evaluate.read_set(ROOT / "weights/toy/set.csv")
    readme = " ".join((ROOT / "weights/toy/README.md").read_text().split())
    assert len(clips) == 4
    assert all(clip.path.is_file() and clip.caption in readme and len(clip.edits) == 3 for clip in clips)


# ---- measuring -----------------------------------------------------------------------------------

def test_pick_score_is_the_scaled_cosine_and_loveu_squashes_first(tmp_path):
    eye = metrics.Features(tiny.write_judge(tmp_path / "judge"))
    x = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames.write_mp4(tmp_path / "x.mp4", x, fps=8)
    pictures, entry = frames.pictures(tmp_path / "x.mp4"), evaluate.Entry("x", tmp_path, "a dog", (), "x")

    def measured(pick, side):
        evaluation = evaluate.Evaluation(tmp_path, None, {}, None, eye, pick, side)
        return evaluation.measure(Run(tmp_path, None), "x.mp4", "a man", entry)
    told = measured(eye, None)
    scale = eye.clip.logit_scale.exp().item()
    assert told["pick_score"] == pytest.approx(scale * told["textual_alignment"] / 100, abs=1e-3)
    assert told["textual_alignment"] == pytest.approx(
        metrics.textual_alignment(eye.images(pictures), eye.texts(["a man"])), abs=1e-3)
    squashed = measured(None, 480)
    features = eye.images([picture.resize((480, 480)) for picture in pictures])
    assert squashed["consistency_all_pairs"] == pytest.approx(metrics.consistency_all_pairs(features), abs=1e-3)
    assert squashed["consistency_all_pairs"] != told["consistency_all_pairs"] and "pick_score" not in squashed


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with weights, a CLIP, and a set of three clips, which is evaluated once."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_folder(place / "w")
    tiny.write_judge(place / "judge")
    for name in "abc":
        tiny.write_clip(place / f"{name}.mp4", frames=5 + ord(name) % 3)
    write_set(place / "set.csv", ["clip,caption,object,style", "a.mp4,a man,a dog,\"a man, comic\"",
                                  "b.mp4,a man,a cat,", "c.mp4,a fox,a \"\"dog\"\",pencil"])
    call(place, "set.csv", *FLAGS)
    return place


FLAGS = ("--weights", "w", "--clip", "judge")


def test_results_are_a_csv_a_page_and_a_run_for_each_clip(place):
    found = rows(place / "evaluated/set/results.csv")
    assert [(row["clip"], row["kind"], row["prompt"]) for row in found] == [
        ("a.mp4", "object", "a dog"), ("a.mp4", "style", "a man, comic"), ("b.mp4", "object", "a cat"),
        ("c.mp4", "object", 'a ""dog""'), ("c.mp4", "style", "pencil")]
    assert list(found[0]) == list(evaluate.COLUMNS)
    assert all(0 < abs(float(row["textual_alignment"])) <= 100 for row in found)
    measured = metrics.Features(place / "judge")
    features = measured.images(frames.pictures(place / "evaluated/set/a/a-dog.mp4"))
    assert float(found[0]["consistency_all_pairs"]) == pytest.approx(metrics.consistency_all_pairs(features), abs=1e-3)
    page = (place / "evaluated/set/index.html").read_text()
    assert "5 edits of 3 clips" in page and 'href="a/index.html"' in page and 'src="a/a-dog.png"' in page
    assert "a man, comic" in (place / "evaluated/set/a/index.html").read_text()


def test_a_clips_run_equals_that_of_train_and_sample(place):
    done = warm()(place, "train.py", "a.mp4", "a man", "--weights", "w", "--out", "alone", limit=300)
    assert done.status == 0, done.err
    done = warm()(place, "sample.py", "--run", "alone/a", "--prompt", "a dog", limit=300)
    assert done.status == 0, done.err
    evaluated = place / "evaluated/set/a"
    for alone, ours in (("tuned.safetensors",) * 2, ("inversion.safetensors",) * 2, ("a-dog.mp4", "a-dog.mp4")):
        assert (place / "alone/a" / alone).read_bytes() == (evaluated / ours).read_bytes(), ours


def test_a_second_call_tunes_and_edits_nothing_again_and_other_settings_are_refused(place):
    before = {file: file.stat().st_mtime_ns for file in (place / "evaluated/set").rglob("*.mp4")}
    call(place, "set.csv", *FLAGS)
    assert before == {file: file.stat().st_mtime_ns for file in (place / "evaluated/set").rglob("*.mp4")}
    assert "other settings (steps)" in call(place, "set.csv", *FLAGS, "--steps", 5, status=2).err


def test_a_new_edit_is_made_without_tuning_again(place):
    shutil.copytree(place / "evaluated/set", place / "more")
    text = (place / "set.csv").read_text().replace("a.mp4,a man,a dog", "a.mp4,a man,a horse")
    write_set(place / "more.csv", text.splitlines())
    before = (place / "more/a/tuned.safetensors").stat().st_mtime_ns
    done = call(place, "more.csv", *FLAGS, "--out", "more")
    assert "tuning" not in done.err
    assert before == (place / "more/a/tuned.safetensors").stat().st_mtime_ns
    assert rows(place / "more/results.csv")[0]["prompt"] == "a horse"


def test_an_edit_with_other_settings_is_not_taken_for_one_of_the_set(place):
    shutil.copytree(place / "evaluated/set", place / "other")
    done = warm()(place, "sample.py", "--run", "other/b", "--prompt", "a fox", "--guidance", 1.5, limit=300)
    assert done.status == 0, done.err
    write_set(place / "other.csv", ["clip,caption,edit", "b.mp4,a man,a fox"])
    call(place, "other.csv", *FLAGS, "--out", "other")
    samples = dict(records.read_samples(place / "other/b"))
    [name] = json.loads((place / "other/b/metrics.json").read_text())["values"]
    assert samples["a-fox.mp4"]["settings"]["guidance"] == 1.5 and samples[name]["prompt"] == "a fox"
    assert samples[name]["settings"]["guidance"] == samples["a-cat.mp4"]["settings"]["guidance"] != 1.5


def test_a_broken_clip_is_reported_and_does_not_stop_the_rest(place):
    (place / "broken.mp4").write_bytes(b"no video")
    lines = ["clip,caption,edit", "broken.mp4,a man,a dog", "none.mp4,a man,a dog", "a.mp4,a man,a dog"]
    write_set(place / "broken.csv", lines)
    done = call(place, "broken.csv", *FLAGS, status=1)
    assert "error: broken.mp4" in done.err and "error: none.mp4: No such file" in done.err
    assert "Traceback" not in done.err
    assert [row["clip"] for row in rows(place / "evaluated/broken/results.csv")] == ["a.mp4"]
    page = (place / "evaluated/broken/index.html").read_text()
    assert "without results: 2 clips" in page and "No such file" in page
    shutil.copy(place / "a.mp4", place / "none.mp4")                        # mended, it is done in the next call
    done = call(place, "broken.csv", *FLAGS, status=1)
    assert "error: broken.mp4" in done.err and len(rows(place / "evaluated/broken/results.csv")) == 2


def test_outside_a_clips_mask_psnr_is_measured(place):
    pixels = np.zeros((40, 48), np.uint8)
    pixels[:, 24:] = 255
    Image.fromarray(pixels).save(place / "mask.png")
    write_set(place / "masks.csv", ["clip,caption,mask,edit", "a.mp4,a man,mask.png,a dog", "b.mp4,a man,,a cat"])
    call(place, "masks.csv", *FLAGS)
    first, second = rows(place / "evaluated/masks/results.csv")
    assert [first["kind"], first["prompt"]] == ["edit", "a dog"] and second["psnr_outside"] == ""
    source, edit = (frames.read_all(place / f"evaluated/masks/a/{name}.mp4") for name in ("source", "a-dog"))
    half = source.shape[3] // 2
    assert float(first["psnr_outside"]) == pytest.approx(metrics.psnr(edit[..., :half], source[..., :half]), abs=0.1)
    assert "PSNR outside the mask" in (place / "evaluated/masks/a/index.html").read_text()
    Image.fromarray(255 - pixels).save(place / "mask.png")                  # another mask is measured anew
    call(place, "masks.csv", *FLAGS)
    assert float(rows(place / "evaluated/masks/results.csv")[0]["psnr_outside"]) == pytest.approx(
        metrics.psnr(edit[..., half:], source[..., half:]), abs=0.1)
    (place / "mask.png").unlink()
    done = call(place, "masks.csv", *FLAGS, "--out", "unmasked", status=1)
    assert "error: a.mp4: No such file" in done.err and "mask.png" in done.err
    assert not (place / "unmasked/a").exists() and (place / "unmasked/b").exists()      # nothing is tuned in vain


LONG = "a man who is walking through the old town in the style of a painting by"


def test_prompts_that_differ_only_in_their_end_have_a_video_each(place):
    write_set(place / "long.csv", ["clip,caption,style,style", f"a.mp4,a man,{LONG} Van Gogh,{LONG} Monet"])
    call(place, "long.csv", *FLAGS)
    write_set(place / "long.csv", ["clip,caption,style,style", f"a.mp4,a man,{LONG} Klimt,{LONG} Monet"])
    call(place, "long.csv", *FLAGS)
    folder = place / "evaluated/long/a"
    prompts = {name: details["prompt"] for name, details in records.read_samples(folder) if name != "source.mp4"}
    assert sorted(prompt.rpartition(" by ")[2] for prompt in prompts.values()) == ["Klimt", "Monet", "Van Gogh"]
    values = json.loads((folder / "metrics.json").read_text())["values"]
    assert [prompts[name] for name in values] == [f"{LONG} Klimt", f"{LONG} Monet"]


def test_a_clip_that_changed_is_not_taken_for_the_one_before(place):
    tiny.write_clip(place / "changing.mp4")
    write_set(place / "changing.csv", ["clip,caption,edit", "changing.mp4,a man,a dog"])
    call(place, "changing.csv", *FLAGS)
    tiny.write_clip(place / "changing.mp4", frames=9)
    done = call(place, "changing.csv", *FLAGS, status=1)
    assert "was tuned on another clip than changing.mp4 is now" in done.err
    assert rows(place / "evaluated/changing/results.csv") == []


def test_another_caption_is_not_taken_for_the_one_before(place):
    shutil.copytree(place / "evaluated/set", place / "captions")
    write_set(place / "captions.csv", ["clip,caption,edit", "a.mp4,a woman,a dog"])
    done = call(place, "captions.csv", *FLAGS, "--out", "captions", status=1)
    assert "or with another caption" in done.err and rows(place / "captions/results.csv") == []


def test_results_of_another_clip_model_are_measured_again(place):
    shutil.copytree(place / "evaluated/set", place / "judged")
    other = shutil.copytree(place / "judge", place / "other-judge")
    tensors = load_file(other / "model.safetensors")
    tensors["visual_projection.weight"] = -tensors["visual_projection.weight"]
    save_file(tensors, other / "model.safetensors")
    before = rows(place / "judged/results.csv")[0]["textual_alignment"]
    call(place, "set.csv", "--weights", "w", "--clip", other, "--out", "judged")
    assert float(rows(place / "judged/results.csv")[0]["textual_alignment"]) == pytest.approx(-float(before), abs=1e-3)


def test_each_option_decides_what_it_names(place):
    flags = dict(size=16, frames=2, steps=3, lr=0., ddim_steps=2, guidance=0., seed=5)
    call(place, "set.csv", *FLAGS, "--clips", 1, "--out", "told",
         *(word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)))
    told, usual = (json.loads((place / f"{folder}/a/run.json").read_text()) for folder in ("told", "evaluated/set"))
    for name, value in flags.items():
        assert told[name] == value != usual[name], name


def test_files_of_others_are_not_overwritten(place):
    for name in ("results.csv", "index.html"):
        (place / f"mine-{name}").mkdir()
        (place / f"mine-{name}" / name).write_text("mine")
        assert "is there already" in call(place, "set.csv", *FLAGS, "--out", f"mine-{name}", status=2).err
        assert [file.name for file in (place / f"mine-{name}").iterdir()] == [name]
    (place / "taken/a").mkdir(parents=True)
    (place / "taken/a/source.mp4").write_text("mine")
    done = call(place, "set.csv", *FLAGS, "--clips", 1, "--out", "taken", status=1)
    assert "taken/a is there already" in done.err and (place / "taken/a/source.mp4").read_text() == "mine"


def test_a_spreadsheet_gets_no_formula(place):
    write_set(place / "formula.csv", ["clip,caption,edit", 'a.mp4,a man,"=1+1"'])
    call(place, "formula.csv", *FLAGS)
    assert rows(place / "evaluated/formula/results.csv")[0]["prompt"] == "'=1+1"


def test_two_evaluations_in_one_process_do_not_lock_each_other_out(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["evaluate", "set.csv", *FLAGS, "--out", "evaluated/set"])
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        assert evaluate.main() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 1
    run = Run.locked(place / "evaluated/set/a")                 # nobody holds it
    run.close()


def test_loveu_is_evaluated(place):
    loveu(place / "loveu")
    done = call(place, "loveu/LOVEU-TGVE-2023_Dataset.csv", *FLAGS, "--pick", "judge", "--clips", 2, "--out", "tgve")
    found = rows(place / "tgve/results.csv")
    assert len(found) == 8 and float(found[0]["pick_score"]) != 0 and "pick_score" in done.out
    settings = json.loads((place / "tgve/squirrel-climb/run.json").read_text())
    assert settings["frames"] == 3 and settings["prompt"] == "A squirrel climbs."


def test_an_empty_folder_for_pickscore_is_refused(place):
    assert "No config.json in .:" in call(place, "set.csv", *FLAGS, "--pick", "", "--out", "empty-pick", status=2).err


def command(*args):
    return [sys.executable, "-m", *args]


ALONE = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


def test_two_ranks_give_the_same_csv_as_one(place):
    line = command("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tinytav", "evaluate",
                   "set.csv", *FLAGS, "--out", "ranks")
    done = subprocess.run(line, cwd=place, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("rank 0: a.mp4, 1 of 2", "rank 0: c.mp4, 2 of 2", "rank 1: b.mp4, 1 of 1"):
        assert line in done.stdout
    assert (place / "ranks/results.csv").read_bytes() == (place / "evaluated/set/results.csv").read_bytes()


def test_a_killed_evaluation_loses_no_finished_clip(place):
    out = place / "killed"
    process = subprocess.Popen(command("tinytav", "evaluate", "set.csv", *FLAGS, "--out", out), cwd=place, env=ALONE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while not (out / "a/metrics.json").is_file():
        assert time.time() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(60)
    before = (out / "a/a-dog.mp4").stat().st_mtime_ns
    call(place, "set.csv", *FLAGS, "--out", out)
    assert before == (out / "a/a-dog.mp4").stat().st_mtime_ns
    assert (out / "results.csv").read_bytes() == (place / "evaluated/set/results.csv").read_bytes()
