"""What lies as JSON in a run folder: parsed with bounded depth, checked by pydantic, one line for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, Strict, ValidationError

from paretoprune.results.errors import RecordError
from paretoprune.results.store.accuracy import LABELS

INTERVALS = ("speedup_ci95", "speedup_pi95")
NUMBERS = frozenset(
    {
        *LABELS, "map50", "precision", "recall", "top5", "latency_ms", "latency_ratio", "latency_measured_ms",
        "latency_p90_ms", "baseline_latency_measured_ms", "speedup", "params_m", "gflops", "size_mb", "energy_j",
        "map50_95_all", "top1_all", "val_images", "val_images_all",
    }
)  # fmt: skip
"""Metrics that are a number wherever they are there: figures, tables and selections compute with them."""


def parse_json(text: str | bytes) -> Any:
    """JSON of any origin as plain data. Raises ValueError, also for text nested so deep that Python cannot hold it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


class Persisted(BaseModel):
    """Base of the types that are written as JSON. Immutable; raises RecordError, naming the field, for wrong content.

    Numbers are finite numbers and nothing else: no text, no bool, no list of one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecordError(*_explained(error)) from None

    def changed(self, **values: Any) -> Any:
        """A copy with other values, checked like the first."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})


def _explained(error: ValidationError) -> tuple[str, str]:
    """The field of the first thing that is wrong, and a sentence about it."""
    first = error.errors(include_url=False)[0]
    head, *rest = first["loc"] or ("content",)
    field = str(head) + "".join(f"[{part}]" for part in rest)
    if first["type"] == "missing":
        return field, f"the field {field!r} is missing"
    if first["type"] == "extra_forbidden":
        return field, f"there is no field {field!r}"
    if first["type"] == "value_error":
        own = first["ctx"]["error"]
        return own.field if isinstance(own, RecordError) else field, str(own)
    condition = str(first["msg"]).replace("Input should be", "must be").replace("Input should", "must")
    return field, f"{field} {condition}, but got {shortened(first['input'])}"


def shortened(value: object) -> str:
    """``value`` for an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def finite(name: str, value: object) -> float:
    """``value`` as a Python float. Raises RecordError where it is no finite number (or too large for a float)."""
    is_number = type(value) is not bool and isinstance(value, Real)
    try:
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]  # mypy does not follow is_number
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    if math.isfinite(number):
        return number
    raise RecordError(name, f"{name} must be a finite number, but got {shortened(value)}")


def metric(name: str, value: object) -> Any:
    """A metric as JSON has it: a finite number, text, a list of those, or a mapping of such (in it None, too).

    Numbers become plain Python ones (numpy scalars are not JSON). Raises RecordError with the place.
    """
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [metric(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Mapping):  # circumstances; None: could not be read
        return {text(name, k): None if v is None else metric(f"{name}[{k}]", v) for k, v in value.items()}
    number = finite(name, value)
    return int(number) if isinstance(value, int) else number


def metrics(value: object) -> dict[str, Any]:
    """All metrics of one network by name; those of NUMBERS are numbers, those of INTERVALS two that rise."""
    if not isinstance(value, Mapping):
        raise RecordError("metrics", f"metrics must be a mapping, but got {type(value).__name__}")
    checked = {text("metrics", name): metric(f"metrics[{name}]", item) for name, item in value.items()}
    for name in NUMBERS & checked.keys():
        finite(f"metrics[{name}]", checked[name])
    for name in INTERVALS:
        bounds = checked.get(name, [0.0, 0.0])
        numbers = isinstance(bounds, list) and all(isinstance(bound, (int, float)) for bound in bounds)
        if not numbers or len(bounds) != 2 or bounds[0] > bounds[1]:
            raise RecordError(name, f"metrics[{name}] must be two numbers that rise, but got {shortened(bounds)}")
    return checked


def text(name: str, key: object) -> str:
    """``key`` where it is text. Raises RecordError."""
    if not isinstance(key, str):
        raise RecordError(name, f"the names in {name} must be text, but got {shortened(key)}")
    return key


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own; anything else is left to the type's own check."""
    return value.item() if hasattr(value, "dtype") and not getattr(value, "ndim", 1) else value


Number = Annotated[float, BeforeValidator(_plain), Strict(), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_plain), Strict(), Field(ge=0, le=2**53)]  # what a float holds exactly
Ratio = Annotated[Number, Field(ge=0, lt=1)]
Metrics = Annotated[dict[str, Any], PlainValidator(metrics)]
