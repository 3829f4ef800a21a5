"""What settings and options choose from, as plain words: a command line knows them without loading torch."""

from __future__ import annotations

from typing import Final, Literal, get_args

StrategyName = Literal["structural", "sequential", "adapter", "skip", "mask"]
RecoveryName = Literal["none", "bn", "refit", "refit+bn", "refit+distill"]
RuntimeName = Literal["torch", "torch-cuda-graph", "onnx", "openvino", "tensorrt"]
DeployFormat = Literal["torch", "torchscript", "onnx", "openvino", "engine", "ncnn"]
PrecisionName = Literal["fp32", "fp16", "bf16", "int8"]
SpanName = Literal["network", "predict"]

STRATEGY_NAMES: tuple[StrategyName, ...] = get_args(StrategyName)
RECOVERIES: tuple[RecoveryName, ...] = get_args(RecoveryName)
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
SPANS: tuple[SpanName, ...] = get_args(SpanName)

STRUCTURAL: Final = "structural"
SEQUENTIAL: Final = "sequential"


def listed(names: tuple[str, ...]) -> str:
    """``a, b or c``."""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} or {names[-1]}"
