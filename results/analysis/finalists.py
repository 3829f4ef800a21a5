"""The finished networks side by side: the unpruned model, the picks, the native rivals; and picks against rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretoprune.results.analysis.figures import FrontFigure, Point
from paretoprune.results.store.accuracy import accuracy_name
from paretoprune.results.store.run_files import UNPRUNED_AT, Native, Selected

Interval = tuple[float, float]
NATIVE = "native:"


@dataclass(frozen=True)
class FinishedRow:
    """One network. kind: "baseline", "pick", "native" or "free move". before: a pick as its trial left it.

    at: where it stands now, or None for a pick that waits for its full fine-tuning. change_ci95: of its accuracy
    against the baseline's over the same validation images. test: the accuracy on the test split, None without one.
    """

    name: str
    kind: str
    chosen_as: str
    before: Point | None
    at: Point | None
    change: float | None = None
    change_ci95: Interval | None = None
    test: float | None = None
    test_change_ci95: Interval | None = None
    epochs: int = 0
    beaten_by_free_move: str = ""


def finished_rows(
    figure: FrontFigure, selected: Sequence[Selected], natives: Sequence[Native], tuned_moves: Sequence[Native] = ()
) -> tuple[FinishedRow, ...]:
    """The baseline, the picks (suggested ones where none is finished), slowest first, the natives, and the free moves
    that were fine-tuned."""
    after = {item.trial_id: item for item in selected}
    finished: list[Selected | Native] = [*selected, *natives, *tuned_moves]
    tested = (item.baseline.get(f"test_{accuracy_name(item.baseline)}") for item in finished)
    test = next((value for value in tested if value is not None), None)
    rows = [FinishedRow("baseline", "baseline", "unpruned", None, figure.finished_baseline, test=test)]
    for move in figure.picks:
        item = after.get(move.trial_id)
        measured = item.after if item else {}
        beaten = (figure.beaten_picks if move.after else figure.beaten).get(move.trial_id, "")
        accuracy = _accuracy(measured, move.epochs)
        rows.append(
            FinishedRow(
                move.trial_id, "pick", move.chosen_as, move.before, move.after, **accuracy, beaten_by_free_move=beaten
            )
        )
    places = {item.name: item for item in (*figure.natives, *figure.tuned_moves)}
    for rival in (*natives, *tuned_moves):
        kind, accuracy = "native" if rival in natives else "free move", _accuracy(rival.after, rival.epochs)
        rows.append(FinishedRow(rival.name, kind, rival.recipe, None, places.get(rival.name), **accuracy))
    return tuple(rows)


def _accuracy(after: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    name = accuracy_name(after)
    return {
        "change": after.get(f"{name}_change"),
        "change_ci95": _interval(after.get(f"{name}_change_ci95")),
        "test": after.get(f"test_{name}"),
        "test_change_ci95": _interval(after.get(f"test_{name}_change_ci95")),
        "epochs": epochs,
    }


def _interval(bounds: Any) -> Interval | None:
    return (float(bounds[0]), float(bounds[1])) if isinstance(bounds, Sequence) and len(bounds) == 2 else None


@dataclass(frozen=True)
class PairwiseComparison:
    """A pick against a native model, both of the same session. Differences are the pick's minus the native's."""

    pick: str
    native: str
    accuracy: float
    accuracy_ci95: Interval
    speedup: float
    speedup_ci95: Interval

    @property
    def verdict(self) -> str:
        """In words, from the two 95 % intervals."""
        faster = _side(self.speedup_ci95, 1.0, ("faster", "slower", "as fast"))
        better = _side(self.accuracy_ci95, 0.0, ("more accurate", "less accurate", "as accurate"))
        return f"{better}, {faster}"


def _side(interval: Interval, middle: float, words: tuple[str, str, str]) -> str:
    low, high = interval
    return words[0] if low > middle else words[1] if high < middle else words[2]


def rivalries(session: Mapping[str, Any]) -> tuple[PairwiseComparison, ...]:
    """Every pick against every rival (native, free move) of session.json that it was compared with there."""
    found = []
    for pick, others in (session.get("map50_95_over") or {}).items():
        for other, (difference, low, high) in others.items():
            times = (session.get("speedup_over") or {}).get(pick, {}).get(other)
            if times and other.startswith((NATIVE, UNPRUNED_AT)):
                ratio = (float(times[1]), float(times[2]))
                name = other.removeprefix(NATIVE)
                found.append(
                    PairwiseComparison(pick, name, float(difference), (float(low), float(high)), float(times[0]), ratio)
                )
    return tuple(found)
