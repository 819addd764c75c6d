"""Broken input, the quick part: one case of each kind, and each kind of failure that the whole has found, by name."""
import json
import os
import random
import re
import warnings

import pytest
import torch
from hardening import broken, broken_clips, fuzz, trial
from hardening.warm import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from tinytav import cli
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.stable_diffusion.checkpoint import build, read_json
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig, VisionConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.lora import Lora
from tinytav.stable_diffusion.text_encoder import TextEncoderConfig
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.weights import load


@pytest.mark.parametrize("name", broken.KINDS)
def test_broken_input_gives_a_sentence_or_a_right_result(warm, stock, name):
    _, problem, answer = trial.trial(warm, stock, name, seed=1000)
    assert not problem, f"{problem}\n{answer.err}"


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_mutated_pictures_and_videos_are_read_or_refused(warm, tmp_path, name):
    read, refused, problems = fuzz.run(warm, tmp_path, name, 1000, 1040)
    assert not problems and read + refused == 40 and read and refused


def test_the_fuzzer_changes_what_it_says_and_mends_the_sums_of_a_png(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = fuzz.original("png")
    assert fuzz.mended(whole) == whole
    at = whole.index(b"IDAT") + 20
    broken_sum = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    assert fuzz.mended(broken_sum) != broken_sum
    cases = [fuzz.mutated(random.Random(i), whole) for i in range(50)]
    assert len(set(cases)) > 45 and cases == [fuzz.mutated(random.Random(i), whole) for i in range(50)]


def test_the_harness_sees_a_traceback_a_hang_a_touched_file_and_an_unpickling(warm, tmp_path):
    (tmp_path / "in").mkdir()
    bad = tmp_path / "bad.py"

    def verdict(code, limit=60):
        bad.write_text(code)
        answer = warm(tmp_path, str(bad), limit=limit, allowed=str(tmp_path / "in"))
        return trial.judge(answer, tmp_path, broken.Case(["train.py"], broken.EITHER), trial.ERROR)
    assert "ends with 1: KeyError" in verdict("{}['x']")
    assert "hangs" in verdict("while True: pass", limit=1)
    assert "hangs" in verdict("import time; time.sleep(60)", limit=0.2)
    assert "hangs" not in verdict("import time; time.sleep(1)", limit=0.2)          # a busy machine
    assert "without a sentence" in verdict("import sys; sys.exit(2)")
    sentence = "; import sys; print('error: x', file=sys.stderr); sys.exit(2)"
    assert "for writing" in verdict("open('out', 'w')" + sentence)
    assert "pickle.find_class" in verdict("import pickle; pickle.loads(b'cos\\ngetcwd\\n)R.')" + sentence)
    assert "MB of memory" in verdict("x = b'x' * 2 ** 31" + sentence)
    assert "control character" in verdict("print('\\x1b[31m')" + sentence)
    for name in ("a; touch b", "in b", "'in"):              # "in" is there
        assert "suggests" in verdict(f'print("go on with python train.py --resume {name}")' + sentence)
    (tmp_path / "in/a\nb").mkdir()
    for name in ("in", "\\'in/a\\nb\\' --prompt x"):
        assert verdict(f"print('go on with python train.py --resume {name}.')" + sentence) == ""
    assert verdict("open('in/out', 'w')" + sentence) == ""


def test_the_harness_sees_touched_files_and_permissions(tmp_path):
    place, out = tmp_path / "place", tmp_path / "place/out"
    out.mkdir(parents=True)
    (out / "index.html").write_text("mine"), (place / "w").write_text("w")
    case = broken.Case(["train.py"], broken.EITHER)
    before = {path: trial.state(path) for path in tmp_path.rglob("*")}
    (out / "new").write_text("x")
    assert trial.touched(before, tmp_path, place, case) == "" and trial.too_private(before, place, None) == ""
    (out / "new").chmod(0o600)
    assert "permissions 600" in trial.too_private(before, place, 0o022)
    (place / "beside").touch()
    assert "beside" in trial.touched(before, tmp_path, place, case)
    (place / "beside").unlink(), (out / "index.html").write_text("ours")
    assert "index.html" in trial.touched(before, tmp_path, place, case)
    (place / "linked").mkdir(), out.rename(tmp_path / "old"), out.symlink_to("linked")
    before = {path: trial.state(path) for path in tmp_path.rglob("*")}
    (place / "linked/new").touch()
    assert trial.touched(before, tmp_path, place, case) == ""
    (tmp_path / "beside").touch()
    assert "beside" in trial.touched(before, tmp_path, place, case)


# ---- found by the whole --------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(8192, 16), (16, 8192)])
def test_a_picture_that_is_long_and_thin_is_refused_and_not_enlarged_for_minutes(size):
    with pytest.raises(InputError, match="too long and thin"):
        frames.fit(Image.new("RGB", size), 512, 64)


def test_names_within_a_video_that_are_no_text_are_a_sentence(tmp_path):
    path = broken_clips.video(tmp_path / "in.mp4")
    assert b"VideoHandler" in (data := path.read_bytes())
    path.write_bytes(data.replace(b"VideoHandler", b"Video\xc8\xffdler"))
    with pytest.raises(InputError, match="cannot be read as a video"):
        frames.read(path, 16, 4, 4)


def test_frames_beyond_reason_are_refused_before_their_memory_is_taken(warm, place):
    answer = warm(place, "sample.py", "--weights", "w", "--prompt", "a", "--frames", 1_000_000)
    assert answer.status == 2 and "not from 1 to 1000" in answer.err


def test_a_size_beyond_reason_is_refused_before_its_memory_is_taken(tmp_path):
    with pytest.raises(InputError, match="not from 4 to 4096"):
        frames.read(tmp_path, 100_000, 4, 2)


@pytest.mark.parametrize("settings", [
    dict(model_max_length=10 ** 30), dict(model_max_length="77"), dict(model_max_length=78), dict(model_max_length=1),
    dict(pad_token=5), dict(pad_token=None)])
def test_a_tokenizers_settings_of_wrong_types_are_refused(place, settings):
    (place / "w/tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="is not CLIP's|do not belong together"):
        load(place / "w")


def test_a_vocabulary_with_a_number_beyond_the_text_encoder_is_refused(place):
    file = place / "w/tokenizer/vocab.json"
    vocab = json.loads(file.read_text())
    file.write_text(json.dumps(vocab | {"a</w>": 10 ** 6}))
    with pytest.raises(InputError, match="do not belong together"):
        load(place / "w")


def test_a_prompt_of_bytes_that_are_no_text_is_refused_before_a_run_is_made(warm, place):
    with pytest.raises(InputError, match="not UTF-8"):
        Tokenizer.from_folder(place / "w/tokenizer")(["\udcff"])
    answer = warm(place, *broken.train("clip.mp4", "\udcff"))
    assert answer.status == 2 and not (place / "out").exists()


def test_a_clip_whose_name_is_no_text_is_read_and_its_name_printed_escaped(warm, place):
    (place / "clip.mp4").rename(place / "\udcff.mp4")
    answer = warm(place, *broken.train("\udcff.mp4"))
    assert answer.status == 0 and "clip: \\udcff.mp4" in answer.out, answer.err


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_a_sentence_and_any_other_error_of_torch_a_bug(error, capsys, monkeypatch):
    def fail(error):
        raise error
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)      # run() sets it
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: fail(error))
    assert capsys.readouterr().err.startswith(f"error: the memory is too small: {error}")
    for bug in ("shapes differ", "CUDA error: an illegal memory access was encountered"):
        with pytest.raises(RuntimeError, match=bug):
            cli.run(lambda: fail(RuntimeError(bug)))


@pytest.mark.parametrize("Config, settings", [
    (UNetConfig, dict(block_out_channels=[0, 16])), (UNetConfig, dict(layers_per_block=10 ** 9)),
    (UNetConfig, dict(block_out_channels=[None, 16])), (UNetConfig, dict(attention_head_dim=["2"] * 4)),
    (UNetConfig, dict(attention_head_dim=7)), (TextEncoderConfig, dict(num_hidden_layers=2 ** 20)),
    (Schedule, dict(beta_start=-1.)), (Schedule, dict(beta_end=float("nan"))),
    (Schedule, dict(num_train_timesteps=10 ** 12))])
def test_a_number_in_a_config_that_no_model_has_is_refused(Config, settings):
    with pytest.raises(InputError, match="is not|must be|do not divide"):
        Config.from_json(settings)


@pytest.mark.parametrize("part, clash, message", [
    ("unet", dict(norm_num_groups=7), "no UNet can be built"),
    ("text_encoder", dict(num_attention_heads=5), "no TextEncoder can be built .* 5 heads do not divide")])
def test_numbers_in_a_config_that_clash_are_refused(place, part, clash, message):
    file = place / "w" / part / "config.json"
    config = file.read_text()
    file.write_text(json.dumps(json.loads(config) | clash))
    with pytest.raises(InputError, match=f"w/{part}: {message}"):
        load(place / "w")
    file.write_text(config)


def test_heads_that_clash_in_clips_vision_tower_are_refused():
    with pytest.raises(InputError, match="here: no CLIP can be built .* 5 heads do not divide"):
        build(CLIP, CLIPConfig(vision_config=VisionConfig(num_attention_heads=5)), {}, "here")


def test_json_nested_beyond_the_stack_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("change", [lambda z: z.int(), lambda z: z / 0, lambda z: z[..., :1], lambda z: z[0]])
@pytest.mark.parametrize("name", ["clip", "tuned", "inversion"])
def test_a_runs_tensors_of_another_type_or_shape_are_refused(warm, place, name, change):
    file = place / f"runs/done/{name}.safetensors"
    tensors = {key: z.clone() for key, z in load_file(file).items()}
    key = "noise" if name == "inversion" else sorted(tensors)[-1]
    save_file(tensors | {key: change(tensors[key]).contiguous()}, file)
    answer = warm(place, "sample.py", "--run", "runs/done", "--prompt", "a")
    assert answer.status == 2 and re.search("does not fit this run|does not hold", answer.err)
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("path", [".", "..", "/", "", "./.", "w/", "a\0b", "pipe", "/dev/zero"])
def test_a_path_without_a_name_or_of_no_regular_file_is_no_lora(place, monkeypatch, path):
    monkeypatch.chdir(place)
    os.mkfifo("pipe")
    for text in (path, f"{path}:0.5"):
        with pytest.raises(InputError, match="LoRA .* cannot be read: no regular file is there"):
            Lora.from_text(text)


READERS = """
import sys
from pathlib import Path
from tinytav.files import frames, records
from tinytav.measure import evaluate
from tinytav.stable_diffusion import checkpoint, lora
name = sys.argv[1]
for read, path in ((checkpoint.read_json, name), (checkpoint.read_tensors, name), (lora.fingerprint, name),
                   (evaluate.read_set, name), (frames.open_clip, name), (frames.fingerprint, name),
                   (frames.fingerprint, "in"), (lambda path: frames.read(path, 16, 4, 1), "in")):
    try:
        read(path)
    except (ValueError, OSError) as error:
        print(error)
print(records.read_losses(Path(".")))
"""


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_no_reader_waits_for_a_pipe_or_reads_a_device_without_end(warm, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in").mkdir()
    for link in ("in/0.png", "loss.csv"):
        (tmp_path / link).symlink_to(tmp_path / name)
    (tmp_path / "readers.py").write_text(READERS)
    answer = warm(tmp_path, str(tmp_path / "readers.py"), name, limit=5)
    assert not answer.hang, answer.out
    *sentences, losses = answer.out.splitlines()
    assert len(sentences) == 8 and all("regular file" in sentence for sentence in sentences) and losses == "[]"


def test_weights_of_an_empty_name_are_not_those_that_lie_in_weights(warm, place):
    answer = warm(place, *broken.sample("--weights", ""))
    assert answer.status == 2 and ". is not a Stable Diffusion folder" in answer.err


# ---- trust ---------------------------------------------------------------------------------------

def test_no_line_of_the_core_unpickles_or_opens_a_connection():
    for path in (*(ROOT / "tinytav").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|allow_pickle=True|(?<!\.)\beval\(|\bexec\(", text), path
        assert not re.search(r"torch\.load\(|weights_only", text) or path.name == "convert.py", path
        assert not re.search(r"import (socket|urllib|http|requests)|from (urllib(?!\.parse)|http|requests)", text), path
        assert ("huggingface_hub" in text) == (path.name == "hub.py") and "from_pretrained" not in text, path


@pytest.mark.parametrize("file", [
    "w/unet/diffusion_pytorch_model.safetensors", "w/tokenizer/vocab.json", "w/tokenizer/merges.txt", "w/defaults.json",
    "clip.mp4", "runs/done/clip.safetensors", "runs/done/run.json", "runs/done/tuned.safetensors",
    "runs/done/inversion.safetensors"])
def test_a_pickle_in_the_place_of_any_file_is_not_run(warm, place, file):
    (place / file).write_bytes(b"cos\nsystem\n(S'touch " + str(place / "pwned").encode() + b"'\ntR.")
    argv = ["sample.py", "--run", "runs/done", "--prompt", "a"] if "runs" in file else broken.train("clip.mp4")
    answer = warm(place, *argv)
    assert answer.status == 2 and "error: " in answer.err and not answer.broken and not (place / "pwned").exists()


def test_an_ordinary_run_asks_no_network(warm, place):
    calls = warm(place, *broken.train("clip.mp4"))
    assert calls.status == 0 and "socket" not in calls.broken


def test_a_run_is_sampled_from_another_folder_by_naming_the_weights(warm, place, tmp_path):
    (tmp_path / "other").mkdir()
    answer = warm(tmp_path / "other", "sample.py", "--run", place / "runs/done", "--prompt", "a", allowed=str(tmp_path))
    assert answer.status == 2 and "No weights at w: name" in answer.err
    argv = ("sample.py", "--run", place / "runs/done", "--prompt", "a", "--weights", place / "w")
    assert warm(tmp_path / "other", *argv, allowed=str(tmp_path)).status == 0
