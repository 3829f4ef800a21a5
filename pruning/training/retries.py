"""What a fine-tuning tries by itself, once each: half the batch where memory ran out, a lower rate after a NaN."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from paretoprune.base.errors import first_line
from paretoprune.pruning.errors import NonFiniteError

OnEpoch = Callable[[int, dict[str, float]], bool]

LOWER_RATE = 0.3
_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR", "unable to find an engine",
)  # fmt: skip


@dataclass(frozen=True)
class RetryPolicy:
    """How an attempt differs from what was asked for. `notes`: one line each, for the record."""

    parts: int = 1
    lr_scale: float = 1.0
    notes: tuple[str, ...] = ()

    def against(self, error: Exception) -> RetryPolicy | None:
        """The remedies of a further attempt after `error`; None where there is none, or it was tried already."""
        if is_out_of_memory(error) and self.parts == 1:
            return replace(self, parts=2, notes=(*self.notes, f"half the batch after {_short(error)}"))
        if isinstance(error, NonFiniteError) and self.lr_scale == 1.0:
            note = f"{LOWER_RATE:g} of the learning rate after {_short(error)}"
            return replace(self, lr_scale=LOWER_RATE, notes=(*self.notes, note))
        return None

    def to_state(self) -> dict[str, object]:
        """Plain values, for the state between epochs."""
        return {"parts": self.parts, "lr_scale": self.lr_scale, "notes": list(self.notes)}

    @classmethod
    def from_state(cls, state: dict[str, object] | None) -> RetryPolicy:
        """Inverse of `to_state`; none without a state."""
        if not state:
            return cls()
        return cls(int(str(state["parts"])), float(str(state["lr_scale"])), tuple(state["notes"]))  # type: ignore[arg-type]


class OncePerEpoch:
    """An `on_epoch` that hears of every epoch once, however often it was trained."""

    def __init__(self, on_epoch: OnEpoch | None) -> None:
        self._on_epoch = on_epoch
        self._heard = 0

    def __call__(self, epoch: int, metrics: dict[str, float]) -> bool:
        if self._on_epoch is None or epoch <= self._heard:
            return False
        self._heard = epoch
        return self._on_epoch(epoch, metrics)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device (or the machine) had no memory left: torch's own error, or a library's that means it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY)


def free_memory() -> None:
    """Give back what a failed attempt held; call it outside of the `except` that caught it: its frames hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(error: Exception) -> str:
    """`Type: first line` without the remedy that the line ends with."""
    return f"{type(error).__name__}: {first_line(error).split(';')[0]}"[:200]
