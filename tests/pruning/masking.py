"""The oracle for surgery: the unpruned network with the removed channels' outputs set to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv, ConvTranspose, RepConv

_TASKS = {
    "seg": tasks.SegmentationModel,
    "pose": tasks.PoseModel,
    "obb": tasks.OBBModel,
    "cls": tasks.ClassificationModel,
}


def build(name: str, classes: int = 3, width: float = 1.0) -> nn.Module:
    """A task model from its stock yaml, with batch norms that do something (fresh ones are near identities).

    `width`: a factor of all channel numbers, for a test to which their size is nothing; least squares cost its cube.
    """
    torch.manual_seed(0)  # the weights too: an error at the edge of rounding must not come and go
    if name.startswith("rtdetr"):
        model: nn.Module = tasks.RTDETRDetectionModel(f"{name}.yaml", nc=classes, verbose=False)
    elif name.startswith("yoloe"):
        model = tasks.YOLOEModel(f"{name}.yaml", nc=classes, verbose=False)
    elif "world" in name:
        model = tasks.WorldModel(f"{name}.yaml", nc=classes, verbose=False)
    else:
        kind = _TASKS.get(name.rpartition("-")[2], tasks.DetectionModel)
        options = {} if kind is tasks.PoseModel else {"nc": classes}
        content = tasks.yaml_model_load(f"{name}.yaml")
        if width != 1:
            content["scales"][content["scale"]][1] *= width
        model = kind(content, verbose=False, **options)
    randomise_batch_norm(model)
    return model.eval()


def randomise_batch_norm(model: nn.Module, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            shape = norm.weight.shape
            norm.running_mean = torch.randn(shape, generator=g) * 0.2
            norm.running_var = torch.rand(shape, generator=g) + 0.5
            norm.weight.data = torch.rand(shape, generator=g) + 0.5
            norm.bias.data = torch.randn(shape, generator=g) * 0.2


@contextmanager
def masked(model: nn.Module, kept: Mapping[str, tuple[int, ...]]) -> Iterator[nn.Module]:
    """Zero the channels that were not kept, behind batch norm and activation, while the block runs."""
    handles = []
    for name, indices in kept.items():
        conv = model.get_submodule(name)
        mask = torch.zeros(conv.out_channels)  # type: ignore[arg-type]
        mask[list(indices)] = 1
        hook = _zeroing(mask.view(1, -1, 1, 1))
        handles.extend(site.register_forward_hook(hook) for site in _sites(model, name))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _zeroing(mask: torch.Tensor) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    return lambda _module, _inputs, output: output * mask


def _sites(model: nn.Module, name: str) -> list[nn.Module]:
    """The convolution's wrapper and, inside a re-parametrised sum, the sum."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, (Conv, ConvTranspose)):
        return [model.get_submodule(name)]
    outer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return [parent, outer] if isinstance(outer, (RepConv, RepVGGDW)) else [parent]


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a nested output, the head's pass-through feature maps left out (they get narrower)."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for key, value in output.items() if key != "feats" for t in tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def relative_error(
    model: nn.Module, pruned: nn.Module, kept: Mapping[str, tuple[int, ...]], images: torch.Tensor
) -> float:
    """Largest difference between masked and pruned outputs, relative to the largest output, in eval mode."""
    with torch.no_grad(), masked(model, kept):
        expected = raw_outputs(model, images)
    with torch.no_grad():
        got = raw_outputs(pruned, images)
    assert len(expected) == len(got) > 0
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)))
    return worst


def raw_outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The outputs; for RT-DETR what enters its decoder, whose choice of the best queries is not continuous."""
    head = list(model.model)[-1]  # type: ignore[arg-type]
    if type(head).__name__ != "RTDETRDecoder":
        return tensors(model(images))
    seen: list[torch.Tensor] = []
    handles = [p.register_forward_hook(lambda _, __, out: seen.append(out)) for p in head.input_proj]
    model(images)
    for handle in handles:
        handle.remove()
    return seen
