"""Stable Diffusion 1.5 and 2.1 at full size, of random weights, from disk: loading, a step of tuning, two of sampling.

Writes up to 5 GB into a temporary folder and needs ../shared, so it is marked slow: pytest -m slow -s.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import LAYOUTS, single_file_shapes

ROOT = Path(__file__).parents[1]
CLIP = LAYOUTS.parent / "clips/man-skiing.mp4"
FILES = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")


def random_tensors(shapes, dtype=torch.float32):
    """Small normals; the scales of norms are one."""
    return {name: torch.ones(shape, dtype=dtype) if len(shape) == 1 and name.endswith("weight")
            else (0.02 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def write(path, name, single, dtype=torch.float32):
    keys = json.loads((LAYOUTS / name / "keys.json").read_text())
    path.mkdir()
    for file in (LAYOUTS / "tokenizer").iterdir():
        (path / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(file, path / "tokenizer")
    if single:
        save_file(random_tensors(dict(single_file_shapes(keys)), dtype), path / "model.safetensors")
        return path / "model.safetensors"
    shutil.copytree(LAYOUTS / name, path, dirs_exist_ok=True)
    for part, stem in FILES.items():
        save_file(random_tensors(keys[part], dtype), path / part / f"{stem}.safetensors")
    return path


def write_controlnet(path, dtype):
    keys = json.loads((LAYOUTS / "controlnet-sd15/keys.json").read_text())
    path.mkdir()
    shutil.copy(LAYOUTS / "controlnet-sd15/config.json", path)
    save_file(random_tensors(keys["controlnet"], dtype), path / "diffusion_pytorch_model.fp16.safetensors")
    return path


def run(what, *command):
    """Runs a command; prints and returns its seconds and its peak memory in bytes."""
    began = time.time()
    # a process of its own measures it: the peak of all children only ever grows
    measure = ("import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
               "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", measure, sys.executable, *map(str, command)], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, peak = done.stdout.rpartition("peak ")
    peak = int(peak) * 1024
    if "-c" in command:
        print(said.strip())
    print(f"{what}: {time.time() - began:.1f} s, peak {peak / 2**30:.2f} GiB")
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single-file"])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size(name, single, tmp_path):
    path = write(tmp_path / "w", name, single)
    size = sum(file.stat().st_size for file in (tmp_path / "w").rglob("*.safetensors"))
    print(f"\n{name}, {'single file' if single else 'folder'}, {size / 2**30:.2f} GiB")
    source = ["--weights", path, "--prediction", "v"] if name == "sd21" else ["--weights", path]
    load = f"import tinytav; tinytav.load({str(path)!r}, prediction={'v' if name == 'sd21' else None!r})"
    assert run("load", "-c", load) < 1.3 * size
    run("train", "train.py", CLIP, "a man is skiing", *source, "--out", tmp_path / "runs", "--frames", 2, "--size", 64,
        "--steps", 1)
    run("sample", "sample.py", "--run", tmp_path / "runs/man-skiing", "--prompt", "a panda is skiing", "--steps", 2)
    assert (tmp_path / "runs/man-skiing/a-panda-is-skiing.mp4").exists()
    shutil.rmtree(tmp_path / "w")


# Prints the seconds of one guided step of 2 frames of 64x64 without and with the ControlNet. Arguments: their folders.
GUIDED_STEP = """
import sys, time, torch, tinytav
sd = tinytav.load(sys.argv[1])
net = tinytav.new_net(sd, 2)
context, empty = sd.encode_prompts(["a man is skiing", ""]).split(1)
noise = tinytav.gaussian((1, 4, 2, 8, 8), 33)
control = tinytav.Control(tinytav.load_controlnet(sys.argv[2]), torch.rand(2, 3, 64, 64))
results = []
for name, given in ("warm-up", None), ("without", None), ("with", control):
    began, worked = time.time(), time.process_time()
    results.append(tinytav.last(tinytav.sample(net, sd.schedule, noise, context, empty, 1, 12.5, given)))
    print(f"{name}: {time.time() - began:.2f} s, {time.process_time() - worked:.2f} s of a processor")
assert results[2].isfinite().all() and torch.equal(results[0], results[1])
assert not torch.equal(results[1], results[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="../shared is not here")
def test_full_size_controlnet(tmp_path):
    """Stable Diffusion 1.5 and ControlNet 1.5, read from fp16 files and computed in float32."""
    weights = write(tmp_path / "w", "sd15", single=False, dtype=torch.float16)
    control = write_controlnet(tmp_path / "c", torch.float16)
    (tmp_path / "hints").mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 100).convert("RGB").save(tmp_path / f"hints/{i}.png")
    print("\nsd15 with a ControlNet, one guided step of 2 frames of 64x64")
    run("guided step", "-c", GUIDED_STEP, weights, control)
    source = ["--weights", weights, "--frames", 2, "--size", 64, "--steps", 1, "--out", tmp_path / "samples"]
    run("sample.py", "sample.py", "--prompt", "a man is skiing", *source)
    run("sample.py --control", "sample.py", "--prompt", "a man is skiing", *source, "--control", control,
        "--hint", tmp_path / "hints")
    assert (tmp_path / "samples/a-man-is-skiing-control.mp4").exists()
    shutil.rmtree(tmp_path)
