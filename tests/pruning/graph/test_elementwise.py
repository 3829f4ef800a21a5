"""What counts as an activation: decided by evaluating it, for torch's, for people's own, and for what only looks so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paretoprune.pruning.graph.elementwise import is_activation, value_at_zero
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from tests.pruning.masking import relative_error
from tests.pruning.tiny import tiny_model


@torch.jit.script
def scripted_swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Made(nn.Module):
    """A module out of a function, with a number of its own to learn."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], slope: float = 1.0) -> None:
        super().__init__()
        self.function, self.slope = function, nn.Parameter(torch.tensor([slope]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) * self.slope


@pytest.mark.parametrize(
    ("function", "at_zero"),
    [
        (F.celu, 0.0),
        (F.selu, 0.0),
        (lambda x: F.leaky_relu(x, -0.3), 0.0),
        (lambda x: F.hardtanh(x, 0.2, 2.0), 0.2),
        (torch.cos, 1.0),
        (scripted_swish, 0.0),
        (lambda x: x.softmax(1), None),
        (lambda x: x - x.mean(), None),
        (lambda x: x / x.abs().amax((1, 2, 3), keepdim=True), None),
        (lambda x: x.flip(1), None),
        (lambda x: F.dropout(x, 0.5, True), None),
        (lambda x: x.view(x.shape[0], 3, 20), None),
        (torch.reciprocal, None),
    ],
)
def test_an_elementwise_function_is_known_by_what_it_does(
    function: Callable[[torch.Tensor], torch.Tensor], at_zero: float | None
) -> None:
    assert value_at_zero(function) == (None if at_zero is None else pytest.approx(at_zero))


def test_a_module_that_is_not_still_in_training_is_none() -> None:
    assert is_activation(nn.Hardswish())
    assert not is_activation(nn.RReLU())
    assert not is_activation(nn.Dropout(0.2))
    assert not is_activation(nn.Sigmoid())
    assert not is_activation(nn.MaxPool2d(3, 1, 1))


@pytest.mark.parametrize(
    "activation",
    [
        nn.CELU(), nn.SELU(), nn.LeakyReLU(-0.2), nn.Softsign(), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(0.2, 2.0),
        Made(torch.sin, 0.7), Made(lambda x: scripted_swish(x)), Made(SwishFunction.apply),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_whatever_the_activation_a_convolution_can_lose_channels(activation: nn.Module) -> None:
    model: Any = tiny_model()
    for block in (model.model[0], model.model[1], model.model[2].m[0].cv1):
        block.act = activation
    table = build_layer_table(model)
    assert {"model.0", "model.1", "model.2.m.0.cv1"} <= table.group_of.keys()
    pruned, plan = prune(model, table, resolve(table, {"*": 0.5}, 1), torch.rand(table.class_count).numpy())
    assert relative_error(model, pruned, plan.kept, torch.rand(2, 3, 64, 64)) < 1e-5


@pytest.mark.parametrize("kind", [nn.Sigmoid, lambda: nn.Hardtanh(0.2, 2.0), lambda: Made(torch.exp)])
def test_what_moves_zeros_is_only_a_convolutions_own(kind: Callable[[], nn.Module]) -> None:
    model: Any = tiny_model()
    model.model[1].act = nn.Sequential(nn.SiLU(), kind())
    layer = build_layer_table(model).by_name["model.1"]
    assert not layer.prunable
    assert layer.reason
