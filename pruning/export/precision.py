"""Which formats, precisions and devices go together: what can be written, and what can be run here."""

from __future__ import annotations

import importlib.util

from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.openvino_session import half_type, openvino_core
from paretoprune.pruning.names import PRECISIONS, listed

# Format -> the packages that write and run it, and where they come from. Others: Ultralytics' exporter says what lacks.
_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "onnx": (("onnx", "onnxslim", "onnxruntime"), "pip install 'paretoprune[onnx]'"),
    "openvino": (("openvino",), "pip install 'paretoprune[openvino]'"),
    "ncnn": (("ncnn", "pnnx"), "pip install 'paretoprune[ncnn]'"),
    # Its converter calls pip by itself for a package that sends usage data, where that is missing
    "mnn": (("MNN", "aliyun"), "pip install MNN aliyun-log-python-sdk, which MNN's converter cannot do without"),
    "engine": (("tensorrt", "onnx", "onnxslim"), "pip install tensorrt 'paretoprune[onnx]'"),
    "litert": (("litert_torch", "ai_edge_litert", "ai_edge_quantizer"), "see Ultralytics' page on LiteRT"),
    "executorch": (("executorch",), "see Ultralytics' page on ExecuTorch"),
}
_QUANTISERS: dict[str, tuple[tuple[str, ...], str]] = {
    "openvino": (("nncf",), "pip install 'paretoprune[openvino]'"),
}
RUNNABLE = ("torchscript", "onnx", "openvino", "engine", "ncnn")
"""Formats that are named where it is said what is possible."""


def check_precision(target: str, precision: str, device: str, run: bool = True, remedy: str = "") -> None:
    """Raise PruningError where `target` is not written in `precision` or, with `run`, `device` does not compute in it.

    Costs an import of the runtime, no network. It says what is possible on `device`, and `remedy` for the latter.
    """
    if precision not in PRECISIONS:
        raise PruningError(f"the precision must be one of {', '.join(PRECISIONS)}, but got '{precision}'")
    written = written_precisions(target, device)
    if precision not in written:
        works = f"it is written in {listed(written)}" if written else "it needs a GPU"
        raise PruningError(f"{target} is not written in {precision} on {device}: {works}; {possible(device)}")
    packages, remedy = _PACKAGES.get(target, ((), ""))
    quantisers, its_remedy = _QUANTISERS.get(target, ((), "")) if precision == "int8" else ((), "")
    for names, how in ((packages, remedy), (quantisers, its_remedy)):
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise PruningError(f"{target} in {precision} needs the package {missing[0]}, which is not here; {how}")
    if run and precision not in run_precisions(target, device):
        raise PruningError(f"{target} does not compute in {precision} on {device}; {possible(device)}{remedy}")


def written_precisions(target: str, device: str) -> tuple[str, ...]:
    """What Ultralytics' exporter writes of a format on `device`; empty where it needs another one.

    OpenVINO's file is in fp32 also for bf16: the runtime is told what to compute in.
    """
    from ultralytics.engine.exporter import FP16_FORMATS, FP32_UNSUPPORTED_FORMATS, INT8_FORMATS

    gpu = torch_device(device).type == "cuda"
    if target == "engine" and not gpu:
        return ()
    can = {
        "fp32": target not in FP32_UNSUPPORTED_FORMATS,
        "fp16": target in FP16_FORMATS and (gpu or target != "torchscript"),
        "bf16": target == "openvino",
        "int8": target in INT8_FORMATS,
    }
    return tuple(name for name in PRECISIONS if can[name])


def run_precisions(target: str, device: str) -> tuple[str, ...]:
    """Of those that can be written, what `device` computes in natively, as far as the runtime says."""
    written = written_precisions(target, device)
    gpu = torch_device(device).type == "cuda"
    if target == "onnx":  # on a CPU it converts fp16 to fp32 and back; its CUDA provider runs int8 in fp32
        return tuple(name for name in written if name != ("int8" if gpu else "fp16"))
    if target == "openvino" and importlib.util.find_spec("openvino") is not None:
        native = half_type(openvino_core())
        return tuple(name for name in written if name in ("fp32", "int8", {"f16": "fp16"}.get(native or "", native)))
    return written


def possible(device: str) -> str:
    """For people: the formats whose packages are here, with their precisions on `device`."""
    found = []
    for target in RUNNABLE:
        if all(importlib.util.find_spec(name) is not None for name in _PACKAGES.get(target, ((), ""))[0]):
            quantised = all(importlib.util.find_spec(name) is not None for name in _QUANTISERS.get(target, ((), ""))[0])
            able = [name for name in run_precisions(target, device) if name != "int8" or quantised]
            found += [f"{target} {', '.join(able)}"] if able else []
    return f"possible here: {'; '.join(found)}"
