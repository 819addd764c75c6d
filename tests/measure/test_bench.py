"""That the table of times is there and whole; what stands in it is the machine's affair."""
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import tiny
from tinytav.measure import bench

ROOT = Path(__file__).parents[2]
PARTS = ["loading", "VAE, encoding a frame", "VAE, decoding a frame", "inverting, a step", "sampling with guidance, a step",
         "tuning, a step"]


def call(*args):
    return subprocess.run([sys.executable, "-m", "tinytav", "bench", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_every_part_is_timed_at_the_weights_own_size_or_the_one_asked_for(tmp_path):
    weights = tiny.write_folder(tmp_path / "w")
    for args, clip in (([], "3 frames of 32x32, cpu, fp32"),
                       (["--frames", 2, "--size", 16, "--precision", "bf16"], "2 frames of 16x16, cpu, bf16")):
        done = call("--weights", weights, "--device", "cpu", "--repeats", 1, *args)
        assert done.returncode == 0, done.stderr
        first, second, _, *lines = done.stdout.splitlines()
        assert first == f"weights: {weights}" and second.startswith(clip)
        rows = [re.fullmatch(r"(.*?) +(\d+\.\d{3}) +(\d+\.\d{2}) GiB", line).groups() for line in lines]
        assert [name for name, _, _ in rows] == PARTS
        assert all(0.05 < float(peak) < 16 for _, _, peak in rows)
    done = call("--weights", weights, "--size", 17)
    assert done.returncode == 2 and "use a multiple of" in done.stderr and "Traceback" not in done.stderr


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    clock = iter([0, 100, 200, 201, 300, 302, 400, 450])                    # the warm-up takes 100, the others 1, 2, 50
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench.seconds(lambda: calls.append(1), repeats=3, device=torch.device("cpu")) == 2
    assert len(calls) == 4
