"""How numbers are written for people: units, signs, dashes for what is missing."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "–"
MINUS = "\N{MINUS SIGN}"


def readable(text: str) -> str:
    """A name that is not UTF-8, as Python hands it out (surrogates), with a sign in place of what cannot be written."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def plain(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, always with its sign; what rounds to zero is written as ±0."""
    if value is None:
        return DASH
    text = f"{value:+.{digits}f}"
    return f"±{text[1:]}" if float(text) == 0 else text.replace("-", MINUS)


def milliseconds(value: float | None) -> str:
    """Three significant digits: 0.84 ms, 12.3 ms, 104 ms."""
    if value is None:
        return DASH
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def factor(value: float | None) -> str:
    """A speed-up: 1.61×."""
    return DASH if value is None else f"{value:.2f}×"


def times(value: float) -> str:
    """A speed-up in a sentence: 1.61 times as fast."""
    return f"{value:.2f} times as fast"


def interval(bounds: tuple[float, float] | None) -> str:
    """A speed-up's 95 % interval: 1.58–1.64."""
    return "" if bounds is None else f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def change(value: float | None, before: float | None) -> str:
    """Relative change in per cent: −53 %."""
    if value is None or not before:
        return DASH
    percent = round(100 * (value / before - 1))
    return "±0 %" if percent == 0 else f"{percent:+d} %".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """48 s, 12 min, 3.4 h, 2.1 days."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def count(number: int, noun: str, nouns: str = "") -> str:
    """1 trial, 5,000 trials."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names and how many more: t0001, t0004, t0007 and 12 more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
