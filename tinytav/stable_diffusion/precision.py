"""Number formats: their names on the command line, and computing in half precision."""
from contextlib import nullcontext

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype):
    """torch.float32 -> "fp32"."""
    return {value: name for name, value in PRECISIONS.items()}[dtype]


def cpu_has_bf16():
    """Does this CPU multiply bf16 numbers by instructions of its own? Others emulate them, more slowly than float32."""
    if not hasattr(torch.cpu, "get_capabilities"):          # an older torch does not tell
        return False
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def autocast(model):
    """The context in which `model` computes: in the format of its weights. For float32 weights it does nothing.

    Frozen weights may be in half precision while the tuned ones stay in float32; autocast casts these on the way. The
    first parameter of every model here is a frozen one.
    """
    weight = next(model.parameters())
    if weight.dtype is torch.float32:
        return nullcontext()
    return torch.autocast(weight.device.type, weight.dtype)
