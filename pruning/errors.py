"""Errors of the pruning room: each is one line that says condition, got and remedy."""

from __future__ import annotations

from paretoprune.base.errors import UserError


class PruningError(UserError):
    """Something about a model, a plan, a dataset or a checkpoint is not usable; the message is for people."""


class PlanError(PruningError):
    """A plan does not fit: a ratio outside [0, 1), a layer that is not there or not prunable, ratios in conflict."""


class NotEquivalentError(PruningError):
    """A pruned network does not compute what the unpruned one computes with the removed channels masked."""


class ModelError(PruningError):
    """A model file is missing, unreadable, or not an Ultralytics model."""


class NonFiniteError(PruningError):
    """A training's loss or weights, or a network's weights, became NaN or infinite."""


class RefusedNameError(ModelError):
    """A checkpoint would do something other than rebuild a network. `name`: what it named, empty where it is broken."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name
