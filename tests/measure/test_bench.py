"""That the table is there and whole, and what it counts; the times are the machine's affair."""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import tiny
import torch

from tinytav.measure import bench
from tinytav.stable_diffusion.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"(.*?) +(\d+\.\d{3}) +(\d+\.\d\d|-) +(\d+\.\d\d|-) +(\d+|-) +(\d+|-) +(\d+%|-)( .*)?")
CASE = bench.Case("tuning", 2, 32, "cpu", "fp32", None, "w", None, None, 1, "auto")


def call(*args):
    return subprocess.run([sys.executable, "-m", "tinytav", "bench", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows(output):
    return [match.groups() for match in map(ROW.fullmatch, output.splitlines()) if match]


def test_parts_are_measured_at_the_weights_own_size(tmp_path):
    weights, parts = tiny.write_folder(tmp_path / "w"), ["loading", "decoding", "sampling"]
    done = call("--weights", weights, "--device", "cpu", "--repeats", 1, "--parts", *parts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"weights: {weights}\ndevice cpu") and "3 frames of 32x32" in done.stdout
    found = rows(done.stdout)
    assert [name for name, *_ in found] == [bench.PARTS[part][1] for part in parts]
    assert all(0.05 < float(peak) < 16 for _, _, peak, *_ in found)
    assert [share == "-" for *_, share, _ in found] == [True, False, False]


def test_several_sizes_are_compared_and_written_as_json(tmp_path):
    weights = tiny.write_folder(tmp_path / "w")
    done = call("--weights", weights, "--device", "cpu", "--repeats", 1, "--frames", 1, 2, "--size", 16, "--parts",
                "tuning", "--precision", "bf16", "--checkpointing", "on", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert len(rows(done.stdout)) == 2
    assert "2 frames of 16x16:" in done.stdout and "x the row above" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["precision"] == "bf16"
    assert [(result["part"], result["frames"]) for result in written["results"]] == [("tuning", 1), ("tuning", 2)]
    for result in written["results"]:
        assert result["rate"] == pytest.approx(result["flops"] / result["seconds"])
        assert result["share"] == pytest.approx(result["rate"] / result["matrix_rate"])
        assert result["recomputed"] == 12


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path):
    done = call("--weights", tiny.write_folder(tmp_path / "w"), "--size", 17)
    assert done.returncode == 2 and "use a multiple of" in done.stderr and "Traceback" not in done.stderr


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    clock = iter([0, 100, 200, 201, 300, 302, 400, 450])    # the warm-up takes 100, the others 1, 2, 50
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench.seconds(lambda: calls.append(1), repeats=3, device=torch.device("cpu")) == 2
    assert len(calls) == 4


def test_a_system_that_does_not_tell_the_peak_gives_a_dash(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "STATUS", tmp_path / "none")
    monkeypatch.setattr(bench, "FORGET", tmp_path / "none")
    bench.forget_peak(torch.device("cpu"))
    peak = bench.peak_bytes(torch.device("cpu"))
    assert peak is None
    _, _, shown, simulated, *_ = ROW.fullmatch(bench.row(bench.Result("tuning", 2, 32, 1.5, peak, 2 ** 30))).groups()
    assert shown == "-" and simulated == "1.00"


@pytest.mark.parametrize("error, message", [(BrokenProcessPool(), "was ended"), (MemoryError(), "too small")])
def test_a_part_without_enough_memory_is_a_line_and_the_others_go_on(monkeypatch, error, message):
    def fails(case):
        raise error
    monkeypatch.setattr(bench, "measure", fails)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    result = bench.measure_apart(CASE)
    assert message in result.error and message in bench.row(result)


class Here:
    """Stands for a pool of processes, and calls in this one."""

    def __init__(self, count, mp_context):
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, case):
        function(case)


def test_what_does_not_depend_on_frames_is_measured_once_for_each_size():
    args = argparse.Namespace(parts=None, size=[64, 128], frames=[8, 16], random=None, tokenizer=None, prediction=None,
                              repeats=1, checkpointing="auto")
    cases = list(bench.cases(args, None, "cpu", torch.float32, "w"))
    count = {part: [(case.frames, case.size) for case in cases if case.part == part] for part in bench.PARTS}
    assert count["tuning"] == count["sampling"] == [(8, 64), (16, 64), (8, 128), (16, 128)]
    assert count["decoding"] == [(8, 64), (8, 128)] and count["loading"] == [(8, 64)]


def test_random_weights_give_finite_answers():
    unet = bench.with_random_weights(UNet, UNetConfig.from_json(tiny.UNET), torch.device("cpu"), torch.bfloat16)
    assert unet.conv_in.weight.dtype is torch.bfloat16 and not unet.conv_in.weight.requires_grad
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    answer = unet(x, torch.tensor([5, 900]), torch.randn(2, 7, 24, dtype=torch.bfloat16))
    assert answer.isfinite().all() and answer.std() > 0


def test_the_default_models_of_random_are_stable_diffusion_1_5s():
    unet, vae = bench.RANDOM["sd15"]
    assert unet.block_out_channels == (320, 640, 1280, 1280) and vae.factor == 8
