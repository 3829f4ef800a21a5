"""The 16-bit types that a device computes in natively; everything else computes in 32 bits."""

from __future__ import annotations

import torch
from torch import nn

from paretoprune.pruning.device import torch_device
from paretoprune.pruning.yolo.tasks import kind_of

__all__ = ["half_of_cpu", "training_precision"]


def half_of_cpu() -> torch.dtype | None:
    """The 16-bit type that this CPU infers in natively, fp16 before bf16; None where PyTorch knows of none."""
    if _cpu_has("avx512_fp16", "amx_fp16"):
        return torch.float16
    return torch.bfloat16 if _cpu_has("avx512_bf16", "amx_bf16") else None


def training_precision(model: nn.Module, device: str, wanted: bool = True) -> str:
    """ "bf16" where mixed precision is `wanted`, the model bears it and the device gains by it, else "fp32".

    fp16 is left out: it is where NaN comes from. A CPU gains by its matrix units (AMX) alone: a step of yolov8n (320
    px, 16 images, one thread of an Intel Xeon) takes 0.55 s with them and 1.09 s in fp32, but 1.28 s with AVX-512's
    bf16 instructions instead, and 12.9 s with neither.
    """
    if not wanted or kind_of(model) == "rtdetr":  # RT-DETR's matching of boxes does not bear it
        return "fp32"
    kind = torch_device(device).type
    on_gpu = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if on_gpu or (kind == "cpu" and _cpu_has("amx_bf16")) else "fp32"


def _cpu_has(*flags: str) -> bool:
    """Any of these instruction sets; False where PyTorch does not say (older versions)."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask is not None else {}
    return any(found.get(flag) for flag in flags)
