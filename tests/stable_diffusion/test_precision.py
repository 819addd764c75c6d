"""Number formats."""
import pytest
import torch

from tinytav.stable_diffusion.precision import cpu_has_bf16


@pytest.mark.parametrize("able, expected", [
    ({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
    ({"avx512_bf16": False, "amx_bf16": False}, False), ({"avx512_f": True, "amx_fp16": True}, False)])
def test_either_kind_of_instruction_makes_bf16_fast(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert cpu_has_bf16() is expected


def test_an_older_torch_tells_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not cpu_has_bf16()
