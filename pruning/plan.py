"""A plan: which fraction of each layer's channels is removed, at which input size and in which precision, and, once
applied, what stayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, Strict, ValidationError

from paretoprune.base.atomic import write_json
from paretoprune.base.image_size import ImageSize, plain_size
from paretoprune.base.stored_size import StoredSize
from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.names import PrecisionName

SCHEMA_VERSION = 1


Ratio = Annotated[float, Strict(), Field(ge=0, lt=1)]
Index = Annotated[int, Strict(), Field(ge=0, lt=2**31)]


def _rising(indices: tuple[int, ...]) -> tuple[int, ...]:
    if any(after <= before for before, after in pairwise(indices)):
        raise ValueError("must rise")
    return indices


class _PlanFile(BaseModel):
    """What a plan's file holds beside its schema version; how its network was made is for people."""

    ratios: dict[str, Ratio]
    kept: dict[str, Annotated[tuple[Index, ...], AfterValidator(_rising)]] = Field(default_factory=dict)
    imgsz: StoredSize | None = None
    branches_removed: tuple[str, ...] = ()
    precision: PrecisionName | None = None
    hash: str | None = None


@dataclass(frozen=True)
class Plan:
    """Layer -> ratio removed, in [0, 1); after surgery also convolution name -> kept output channels.

    Attributes:
        ratios: by layer name (or pattern, before it was resolved against a model; which of several counts says
            `pruning.graph.patterns.governing`).
        kept: by the convolution's name in the model, ascending indices into the unpruned output channels; empty
            before the plan was applied.
        imgsz: size of the input that the network is for, pixels; None: that of whoever applies the plan (a run's own
            size counts as None, so that equal plans are equal).
        branches: names of the branches that are removed whole.
        precision: that the network's file computes in; None: that of whoever applies the plan, as with the size.
    """

    ratios: Mapping[str, float]
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    imgsz: ImageSize | None = None
    branches: tuple[str, ...] = ()
    precision: str | None = None

    def __post_init__(self) -> None:
        for layer, ratio in self.ratios.items():
            check_ratio(layer, ratio)

    @cached_property
    def hash(self) -> str:
        """Stable identity of what is asked for, 16 hex digits.

        Ratios are sorted, rounded to 1e-6, layers at ratio 0 left out; a size, branches and a precision count where
        there are any.
        """
        rows = [[k, f"{v:.6f}"] for k, v in sorted(self.ratios.items()) if f"{v:.6f}" != "0.000000"]
        text = json.dumps([rows, self._beside_ratios()] if self._beside_ratios() else rows)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _beside_ratios(self) -> dict[str, Any]:
        """Size, branches and precision as JSON has them; {} for a plan of widths alone."""
        size = {} if self.imgsz is None else {"imgsz": plain_size(self.imgsz)}
        branches = {"branches_removed": sorted(self.branches)} if self.branches else {}
        return size | branches | ({} if self.precision is None else {"precision": self.precision})

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "hash": self.hash,
            "ratios": dict(self.ratios),  # in their order: among equal patterns the later counts
            **self._beside_ratios(),
            "kept": {k: list(v) for k, v in self.kept.items()},
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the plan") -> Plan:
        """Raises `PlanError` where a key is missing, a ratio is no number, or the hash does not fit the ratios."""
        if not isinstance(data, dict) or not isinstance(data.get("ratios"), dict):
            raise PlanError(f'{where} must be a JSON object with "ratios": {{layer: ratio}}, but has no such key.')
        version = data.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise PlanError(f"{where} has schema_version {version!r:.60}, but this version reads {SCHEMA_VERSION}.")
        try:
            content = _PlanFile(**data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key, *inner = map(str, first["loc"])
            place = key + "".join(f"[{part}]" for part in inner)
            condition = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            said = condition if "but got" in condition else f"{place} {condition}, but got {first['input']!r:.60}"
            raise PlanError(f"{where}: {said}.") from None
        plan = cls(content.ratios, content.kept, content.imgsz, content.branches_removed, content.precision)
        if content.hash is not None and content.hash != plan.hash:
            raise PlanError(
                f"{where} was changed after it was written: its hash is {content.hash:.60}, its "
                f'content gives {plan.hash}. Remove "hash" and "kept" to use the changed plan.'
            )
        return plan

    def save(self, path: str | Path, made_with: Mapping[str, Any] | None = None) -> None:
        """Write as JSON, whole or not at all. `made_with`: how the network beside it was made."""
        write_json(Path(path), self.to_json() | ({"made_with": dict(made_with)} if made_with else {}))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises `PlanError` for a missing file or a text that is no plan."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        except OSError as error:
            raise PlanError(f"the plan {path} cannot be read ({error.strerror}); give the path of one.") from None
        except _DoubleKeyError as error:
            raise PlanError(f"the plan {path} must give every key once, but has {error} twice; keep one.") from None
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deep to be a plan
            raise PlanError(f"the plan {path} is not JSON: {error}.") from None
        return cls.from_json(data, f"the plan {path}")


class _DoubleKeyError(ValueError):
    """A JSON object with a key twice; which of the two was meant, nobody knows. Says the key."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DoubleKeyError(next(repr(key) for key in keys if keys.count(key) > 1))
    return found


def check_ratio(layer: str, ratio: Any) -> None:
    """Raise `PlanError` unless `ratio` is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise PlanError(
            f"a ratio must lie in [0, 1) (0.3 removes 30 % of the channels), but got {ratio!r} for {layer}."
        )
