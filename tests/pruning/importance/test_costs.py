"""Parameters and GFLOPs of pruned networks, against what the widths say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.yolo.loading import model_stats
from tests.pruning.masking import build

FAMILIES = "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n".split()
TASKS = "yolov8n-seg yolo11n-pose yolo26n-obb yolo11n-cls".split()
IMGSZ = 128


def kept_shares(table: LayerTable, widths: Mapping[int, int]) -> np.ndarray:
    """Fraction of each class that stays, on average over its part, from the widths alone."""
    shares = np.ones(table.class_count)
    for group in table.groups:
        kept = group.kept_per_part(widths.get(group.id, group.channels))
        for part, count in zip(group.parts, kept, strict=True):
            shares[part] = count / len(part)
    return shares


def positions(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Places at which each module computes in one forward pass of one image, over all its calls."""
    found = dict.fromkeys(names, 0)

    def count(name: str, output: torch.Tensor) -> None:
        found[name] += output.shape[2] * output.shape[3] if output.ndim == 4 else 1

    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, __, out, n=n: count(n, out))  # type: ignore[misc]
        for n in names
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, IMGSZ, IMGSZ))
    for handle in handles:
        handle.remove()
    return found


def removed_by_widths(model: nn.Module, table: LayerTable, widths: Mapping[int, int]) -> tuple[float, float]:
    """Parameters and floating-point operations that go, in closed form.

    A convolution has out x in x area weights, used once per output position (per input position where transposed), two
    operations each; a batch norm has two weights per channel and four multiply-adds per channel and position, as
    Ultralytics' counter (THOP) has it.
    """
    shares = kept_shares(table, widths)
    places = positions(model, [*table.convs, *table.norms])
    parameters = operations = 0.0
    for name, channels in table.convs.items():
        conv = model.get_submodule(name)
        left = shares[channels.outputs].mean() * (1 if channels.depthwise else shares[channels.inputs].mean())
        gone = conv.weight.numel() * (1 - left)  # type: ignore[operator, union-attr]
        bias = 0 if conv.bias is None else len(channels.outputs) * (1 - shares[channels.outputs].mean())
        parameters += gone + bias
        area = conv.stride[0] * conv.stride[1] if isinstance(conv, nn.ConvTranspose2d) else 1  # type: ignore[operator]
        operations += 2 * gone * places[name] / area
    for name, classes in table.norms.items():
        gone = len(classes) - shares[classes].sum()
        parameters += 2 * gone
        operations += 2 * 4 * gone * places[name]
    for name, classes in table.linears.items():
        gone = model.get_submodule(name).weight.numel() * (1 - shares[classes].mean())  # type: ignore[operator, union-attr]
        parameters += gone
        operations += 2 * gone
    return parameters, operations


def products(model: nn.Module) -> int:
    """Floating-point operations of an attention's products of activations, which no weight shows, as torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, IMGSZ, IMGSZ))
    return sum(count for kind, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(kind))


@pytest.mark.parametrize("name", FAMILIES + TASKS)
def test_costs_fall_as_the_widths_say(name: str) -> None:
    model = build(name)
    table = build_layer_table(model)
    widths = resolve(table, {group.name: (0.5, 0.25)[group.id % 2] for group in table.groups})
    pruned, _ = prune(model, table, widths, np.random.default_rng(0).random(table.class_count))
    before, after = model_stats(model, IMGSZ), model_stats(pruned, IMGSZ)
    parameters, operations = removed_by_widths(model, table, widths)
    operations += products(model) - products(pruned)
    assert before.params_m - after.params_m == pytest.approx(parameters / 1e6, rel=1e-9)
    assert parameters > 0.4e6 * before.params_m
    # what has no weights (pooling, bilinear upsampling) is not in the closed form
    assert before.gflops - after.gflops == pytest.approx(operations / 1e9, rel=2e-3)
    assert operations > 0.3e9 * before.gflops
