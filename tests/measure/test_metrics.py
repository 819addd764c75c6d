"""Metrics against their definitions written out, and the pictures' preparation against transformers' recorded one."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tinytav.errors import InputError
from tinytav.files import frames, records
from tinytav.files.runs import Run, Settings
from tinytav.measure import metrics
from tinytav.stable_diffusion.checkpoint import read_json
from tinytav.stable_diffusion.clip import Preprocessor

ROOT = Path(__file__).parents[2]
RUN = Settings(clip="clip.mp4", prompt="a man", weights="w", fingerprint="0", frames=3, fps="8", size=64, norm="clip",
               attention="sparse-causal", steps=1, lr=1e-3, seed=33, ddim_steps=2, guidance=2., precision="fp32",
               finished=1.)


def unit(f, d=5):
    return torch.nn.functional.normalize(torch.randn(f, d, generator=torch.Generator().manual_seed(f)), dim=-1)


@pytest.mark.parametrize("f", [2, 3, 8])
def test_the_three_of_clip_are_their_definitions(f):
    z, text = unit(f).tolist(), unit(1)[0].tolist()
    cosine = lambda a, b: sum(x * y for x, y in zip(a, b))
    pairs = [cosine(z[i], z[j]) for i in range(f) for j in range(i)]
    assert metrics.consistency_all_pairs(unit(f)) == pytest.approx(100 * sum(pairs) / len(pairs), abs=1e-4)
    near = [cosine(z[i], z[i + 1]) for i in range(f - 1)]
    assert metrics.consistency_neighbours(unit(f)) == pytest.approx(100 * sum(near) / len(near), abs=1e-4)
    aligned = 100 * sum(cosine(a, text) for a in z) / f
    assert metrics.textual_alignment(unit(f), unit(1)) == pytest.approx(aligned, abs=1e-4)
    assert metrics.textual_alignment(unit(f), unit(1)[0]) == pytest.approx(aligned, abs=1e-4)


def test_success_rate_is_the_share_of_frames_nearer_to_the_prompt_than_to_the_caption():
    features = torch.tensor([[1., 0.], [0.8, 0.6], [0.6, 0.8], [0., 1.]])
    prompt, caption = torch.eye(2)
    assert metrics.success_rate(features[:3], prompt, caption) == pytest.approx(200 / 3)
    assert metrics.success_rate(features, caption, prompt[None]) == 50
    assert metrics.success_rate(features[1:], prompt, caption) == pytest.approx(100 / 3)
    assert math.isnan(metrics.success_rate(features, prompt, prompt))


def test_psnr_outside_leaves_out_what_the_mask_covers():
    x, changed = torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
    y = x + torch.tensor([0.2, 0.02, 0.5]).view(3, 1, 1, 1)
    changed[:2, :, :2], changed[2] = True, True
    y[:2, :, :, :2] = 1.
    assert metrics.psnr_outside(x, y, changed) == pytest.approx((20 + 40) / 2)      # the third is covered
    assert math.isnan(metrics.psnr_outside(x, y, torch.ones_like(changed)))
    assert metrics.psnr_outside(x, y, ~changed) == pytest.approx((2 * 10 * math.log10(4) + 10 * math.log10(16)) / 3)


def test_a_single_frame_has_no_consistency():
    assert math.isnan(metrics.consistency_all_pairs(unit(1))) and math.isnan(metrics.consistency_neighbours(unit(1)))


def test_psnr_is_the_mean_of_the_frames_own():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])      # a tenth, a hundredth of the range
    assert metrics.psnr(x, y) == pytest.approx((20 + 40) / 2)


PREPARED, RECORDED = tiny.reference("clip-preprocessor")


@pytest.mark.parametrize("picture", ["wide", "tall"])
@pytest.mark.parametrize("case", PREPARED)
def test_pictures_are_prepared_as_by_transformers(case, picture):
    got = Preprocessor.from_json(PREPARED[case])([Image.fromarray(RECORDED[picture].numpy())])[0]
    assert (got - RECORDED[f"{case}.{picture}"]).abs().max() < 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP folder, and its net."""
    folder = tiny.write_judge(tmp_path_factory.mktemp("clip"))
    return folder, metrics.Features(folder).clip


def test_features_of_frames_pictures_and_prompts(folder):
    eye, (_, clip) = metrics.Features(folder[0]), folder
    x = torch.randint(256, (18, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    wanted = clip.encode_image(x)
    assert tiny.close(eye.images(x), wanted) and tiny.close(eye.images(1.001 * x), wanted, 0.01)
    pictures = [Image.fromarray(((z + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for z in x]
    assert torch.equal(eye.images(pictures), eye.images(x))
    assert tiny.close(eye.texts(["a man", "a dog"])[1:], clip.encode_text(eye.tokenizer(["a dog"])))
    assert eye.texts([""]).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(resample=2), "resample = 2 is not implemented"), (dict(size={"longest_edge": 64}), "'width'"),
    (dict(crop_size=32), "does not fit the model"), (dict(image_mean=[0.5]), "does not fit|how to prepare"),
    (dict(do_normalize=False), "do_normalize"), (dict(size=0), "how to prepare")])
def test_a_preparation_that_cannot_be_right_is_refused(folder, tmp_path, changes, message):
    shutil.copytree(folder[0], tmp_path / "clip")
    tiny.save_json(tmp_path / "clip/preprocessor_config.json", PREPARED["half"] | dict(size=64, crop_size=64) | changes)
    with pytest.raises(InputError, match=message):
        metrics.Features(tmp_path / "clip")


def test_a_folder_without_both_towers_is_no_clip(folder, tmp_path):
    shutil.copytree(folder[0], tmp_path / "clip")
    config = json.loads((tmp_path / "clip/config.json").read_text())
    del config["vision_config"]
    tiny.save_json(tmp_path / "clip/config.json", config)
    with pytest.raises(InputError, match="clip/config.json: CLIPConfig: .* text_config and vision_config is expected"):
        metrics.Features(tmp_path / "clip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with the source and samples of it, which differ from it by their number."""
    run = Run(tmp_path_factory.mktemp("run"), RUN)
    run.save()
    x = 1.4 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).round() - 0.7
    frames.write_mp4(run.path / "source.mp4", x, 8)
    samples = dict(same=("a man", dict(noise="inverted")), friendly=("a man", dict(noise="edit-friendly")),
                   random=("a man", dict(noise="random")), shared=("a man", dict(noise="shared")),
                   posed=("a man", dict(noise="inverted", control="pose")), dog=("a dog", dict(noise="inverted")),
                   short=("a man", dict(noise="inverted")), kept=("a man", dict(noise="inverted", mask="m.png")),
                   word=("a man", dict(noise="inverted", mask_word="man")),
                   begun=("a man", dict(noise="inverted", first_frame="f.png")))
    for number, (name, (prompt, settings)) in enumerate(samples.items(), 1):
        sample = (1 - 0.1 * number) * x[:2 if name == "short" else 3]
        frames.write_mp4(run.path / f"{name}.mp4", sample, 8, title=prompt)
        records.write_record(run.path, name, prompt, settings, "")
    frames.write_mp4(run.path / "untitled.mp4", x, 8)
    frames.write_strip(run.path / "still.png", x[:1])                   # of a single frame: it has no video
    records.write_record(run.path, "still", "a man", dict(noise="random"), "")
    for number, name in enumerate(("source", *samples, "untitled")):
        os.utime(run.path / f"{name}.mp4", (number, number))
    return run


def test_every_clip_of_a_run_has_a_row(run, folder):
    eye = metrics.Features(folder[0])
    found = {name.removesuffix(".mp4"): values for name, values in metrics.rows(run, eye)}
    assert list(found) == ["source", "same", "friendly", "random", "shared", "posed", "dog", "short", "kept", "word",
                           "begun", "untitled"]

    def defined(key):
        return [name for name, values in found.items() if not math.isnan(values[key])]
    assert defined("psnr") == ["same", "friendly"] and defined("psnr_outside") == []
    assert found["same"]["psnr"] == pytest.approx(29.1, abs=1.5)                    # 10 log10(4 / 0.07^2)
    assert defined("success_rate") == ["dog"]                                       # of another prompt
    assert defined("textual_alignment") == list(found)[:-1]                         # all but the untitled one
    for name, prompt in (("source", "a man"), ("dog", "a dog")):
        features = eye.images(frames.pictures(run.path / f"{name}.mp4"))
        wanted = dict(consistency_all_pairs=metrics.consistency_all_pairs(features),
                      consistency_neighbours=metrics.consistency_neighbours(features),
                      textual_alignment=metrics.textual_alignment(features, eye.texts([prompt])))
        if name == "dog":
            success = metrics.success_rate(features, eye.texts(["a dog"]), eye.texts(["a man"]))
            assert found[name]["success_rate"] == success
        assert {key: found[name][key] for key in wanted} == pytest.approx(wanted, abs=1e-4)
        assert abs(wanted["textual_alignment"] - metrics.textual_alignment(features, eye.texts(["a panda"]))) > 1e-3


def test_with_a_mask_psnr_outside_it_is_that_of_all_samples_of_the_sources_size(run, folder, tmp_path):
    """Latents of 16x16, so a latent is 16 x 16 pixels of the enlarged video."""
    z = torch.zeros(1, 4, 3, 16, 16)
    run.write("clip", dict(mean=z, std=z + 1))
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    eye, source = metrics.Features(folder[0]), frames.read_all(run.path / "source.mp4")
    found = {name: values["psnr_outside"] for name, values in metrics.rows(run, eye, tmp_path / "mask.png")}
    assert [name for name, value in found.items() if math.isnan(value)] == ["short.mp4"]
    assert [name for name, value in found.items() if math.isinf(value)] == ["source.mp4", "untitled.mp4"]   # the same
    dog = frames.read_all(run.path / "dog.mp4")
    assert found["dog.mp4"] == pytest.approx(metrics.psnr(dog[..., :128], source[..., :128]), abs=0.1)
    Image.fromarray(pixels[:32]).save(tmp_path / "flat.png")
    with pytest.raises(InputError, match="flat.png is 64x32 pixels"):
        list(metrics.rows(run, eye, tmp_path / "flat.png"))


def call(*args):
    return subprocess.run([sys.executable, "-m", "tinytav", "metrics", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_file_that_is_no_video_is_passed_over(run, folder):
    eye = metrics.Features(folder[0])
    (run.path / "zz.mp4").write_text("junk")
    try:
        with pytest.warns(UserWarning, match="passed over: .*zz.mp4 cannot be read"):
            names = [name for name, _ in metrics.rows(run, eye)]
    finally:
        (run.path / "zz.mp4").unlink()
    assert "source.mp4" in names and not {"zz.mp4", "still.png"} & set(names)


def test_the_command_prints_the_rows_and_its_errors_are_sentences(run, folder, tmp_path):
    z = torch.zeros(1, 4, 3, 16, 16)
    run.write("clip", dict(mean=z, std=z + 1))
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    done = call(run.path, "--clip", folder[0], "--device", "cpu", "--mask", tmp_path / "mask.png")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 15, done.stderr
    assert lines[-1] == f"page: {run.path / 'index.html'}"
    values = dict(metrics.rows(run, metrics.Features(folder[0]), tmp_path / "mask.png"))["same.mp4"]
    texts = ("-" if math.isnan(value) else f"{value:.2f}" for value in values.values())
    assert lines[3].split() == ["same.mp4", *texts]
    assert lines[2].split()[0] == "source.mp4" and lines[2].split()[-1] == "-"
    stored = read_json(run.path / "metrics.json")["values"]
    del values["success_rate"]                              # undefined: the prompt is the source's
    assert stored["same.mp4"] == pytest.approx(values, abs=1e-3)
    assert "psnr" not in stored["source.mp4"] and "psnr_outside" not in stored["source.mp4"]
    assert f"{values['consistency_all_pairs']:.2f}" in (run.path / "index.html").read_text()
    for args, message in (([tmp_path], "is not a run"), ([run.path, "--clip", tmp_path], "No config.json"),
                          ([run.path, "--clip", folder[0], "--device", "toaster"], "toaster cannot be used")):
        done = call(*args)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
