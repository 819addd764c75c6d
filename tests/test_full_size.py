"""Stable Diffusion 1.5 and 2.1 at full size, of random weights, from disk: loading, one step of tuning, two of sampling.

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
from safetensors.torch import save_file

from tiny import LAYOUTS, single_file_shapes

ROOT = Path(__file__).parents[1]
CLIP = LAYOUTS.parent / "clips/man-skiing.mp4"
FILES = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")


def random_tensors(shapes):
    """Small normals; the scales of norms are one."""
    return {name: torch.ones(shape) if len(shape) == 1 and name.endswith("weight") else 0.02 * torch.randn(shape)
            for name, shape in shapes.items()}


def write(path, name, single):
    keys = json.loads((LAYOUTS / name / "keys.json").read_text())
    path.mkdir()
    for file in (LAYOUTS / "tokenizer").iterdir():
        (path / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(file, path / "tokenizer")
    if single:
        save_file(random_tensors(dict(single_file_shapes(keys))), path / "model.safetensors")
        return path / "model.safetensors"
    shutil.copytree(LAYOUTS / name, path, dirs_exist_ok=True)
    for part, stem in FILES.items():
        save_file(random_tensors(keys[part]), path / part / f"{stem}.safetensors")
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
    peak = int(done.stdout.rpartition("peak ")[2]) * 1024
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
