"""Whether a function works on every element of a tensor by itself, and what it makes of zero: found by evaluating it.

An activation of which this holds keeps channels apart, and where it maps 0 to 0, a removed channel is a zero channel on
both sides of it. No list of names knows the activations that people write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

_SHAPE = (2, 3, 4, 5)  # no two sides equal, none of them 1: what turns or mixes dimensions shows
_FIRST = 40  # of the 120 elements


def value_at_zero(function: Callable[[torch.Tensor], Any]) -> float | None:
    """What an elementwise function makes of 0; None where it is not elementwise, draws at random, or fails.

    Such a function cares neither how its elements are arranged nor which others there are.
    """
    probe = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)) * 3
    probe.view(-1)[::7] = 0.0
    first, rest = probe.flatten().split([_FIRST, probe.numel() - _FIRST])
    answers = []
    for given in (probe, first.reshape(-1, 1, 1, 1), rest.reshape(1, 1, 1, -1)):
        try:
            with torch.no_grad():
                answer = function(given.clone())
        except Exception:  # noqa: BLE001  anybody's code, given a shape that it may not expect: then it is not elementwise
            return None
        if not isinstance(answer, torch.Tensor) or answer.shape != given.shape:
            return None
        answers.append(answer.double().flatten())
    if not torch.allclose(answers[0], torch.cat(answers[1:]), rtol=1e-5, atol=1e-7, equal_nan=True):
        return None
    value = float(answers[0][0])
    return value if math.isfinite(value) else None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is elementwise in inference and in training and maps 0 to 0; it may own single numbers."""
    if type(module).forward is nn.Module.forward or any(p.numel() != 1 for p in module.parameters()):
        return False
    own = deepcopy(module)  # its forward pass may write into it
    return all(value_at_zero(own.train(training)) == 0.0 for training in (False, True))
