"""What is decided and said when memory is short, and how much is free."""
import re

import pytest
import tiny
import torch

from tinytav.measure import fit, memory
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.stable_diffusion.vae import VAEConfig

UNET, VAE = UNetConfig.from_json(tiny.UNET), VAEConfig.from_json(tiny.VAE)
WORK = memory.Work(12, 24, 24, unet=UNET, vae=VAE)


def settings_in(warning):
    """The frames and the size that a warning names."""
    return [int(number) for number in re.search(r"use --frames (\d+) or --size (\d+)\.$", warning).groups()]


def test_small_work_is_not_simulated(monkeypatch):
    monkeypatch.setattr(memory, "tuning", None)
    monkeypatch.setattr(memory, "sampling", None)
    assert fit.plan_tuning(WORK, 100 * fit.GIB) == fit.plan_sampling(WORK, 100 * fit.GIB, 7.5) == fit.Plan()


@pytest.mark.parametrize("attention", ["sparse-causal", "full"])
@pytest.mark.parametrize("frames, upcast, dtype", [(2, False, torch.float32), (16, True, torch.float16)])
def test_what_surely_fits_does_fit(attention, frames, upcast, dtype):
    unet = UNetConfig.from_json(tiny.UNET | dict(upcast_attention=upcast))
    work = memory.Work(frames, 16, 16, dtype, unet=unet, attention=attention)
    for cost, maps in ((memory.tuning(work), fit.TUNING_MAPS), (memory.sampling(work), fit.SAMPLING_MAPS)):
        assert not fit.surely_fits(work, cost.peak, maps)


def test_auto_recomputes_only_what_it_must_and_on_and_off_are_obeyed():
    all_blocks = fit.every_name(WORK)
    plain, least = memory.tuning(WORK).peak, memory.tuning(WORK, all_blocks).peak
    enough, tight = 1.2 * plain, 1.2 * (plain + least) / 2
    assert fit.plan_tuning(WORK, enough).recomputed == set()
    plan = fit.plan_tuning(WORK, tight)
    assert 0 < len(plan.recomputed) < len(all_blocks) and plan.warning == ""
    assert f"{len(plan.recomputed)} of {len(all_blocks)} blocks are computed again" in plan.note
    assert fit.plan_tuning(WORK, enough, "on").recomputed == all_blocks
    off = fit.plan_tuning(WORK, tight, "off")
    assert off.recomputed == set() and "It may fail" in off.warning


def test_too_little_memory_is_a_warning_with_settings_that_fit():
    least = memory.tuning(WORK, fit.every_name(WORK)).peak
    base = memory.tuning(memory.Work(1, 1, 1, unet=UNET)).peak
    free = (base + 0.5 * (least - base)) / (1 - fit.RESERVE)
    frames, size = settings_in(fit.plan_tuning(WORK, free).warning)
    assert 3 <= frames < 12 and 96 <= size < 8 * 24
    assert fit.plan_tuning(memory.Work(frames, 24, 24, unet=UNET), 1.1 * free).warning == ""
    assert fit.plan_tuning(memory.Work(12, size // 8, size // 8, unet=UNET), 1.1 * free).warning == ""
    assert fit.plan_tuning(WORK, 0).warning.endswith("use a machine that has more.")


def test_sampling_counts_the_decoding_and_the_other_models():
    need = max(memory.sampling(WORK).peak, memory.sampling(WORK).weights + memory.decoding(WORK).peak)
    free = 1.01 * need / (1 - fit.RESERVE)
    assert fit.plan_sampling(WORK, free, 7.5).warning == ""
    warning = fit.plan_sampling(WORK, free, 7.5, others=int(0.5 * need)).warning
    frames, _ = settings_in(warning)
    assert warning.startswith("Sampling needs about") and frames < 12


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    def group(folder, limit, used):
        (tmp_path / folder).mkdir(parents=True)
        names = ("limit_in_bytes", "usage_in_bytes") if folder.startswith("memory") else ("max", "current")
        for name, value in zip(names, (limit, used)):
            (tmp_path / folder / f"memory.{name}").write_text(f"{value}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 5\nactive_file 30\ninactive_file 4\n")
    (tmp_path / "mine").write_text("4:memory:/a/b\n2:cpu:/x\n0::/s/t\n")

    def free():
        return fit.group_bytes(tmp_path, tmp_path / "mine")

    assert free() == float("inf")
    group("s", 5000, 1000)
    group("s/t", "max", 10)
    assert free() == 4034
    group("memory/a/b", 2000, 1000)
    assert free() == 1034
    assert fit.group_bytes(tmp_path, tmp_path / "none") == float("inf")
    monkeypatch.setattr(fit, "group_bytes", lambda: 5)
    assert fit.free_bytes(torch.device("cpu")) == 5
