"""Numbers as people read them."""

from __future__ import annotations

import pytest

from paretoprune.base import formatting


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (formatting.plain(None), "–"),
        (formatting.plain(-0.5, 1), "−0.5"),
        (formatting.signed(0.014), "+0.014"),
        (formatting.signed(-0.014), "−0.014"),
        (formatting.signed(-0.0001), "±0.000"),
        (formatting.milliseconds(0.8449), "0.84 ms"),
        (formatting.milliseconds(12.44), "12.4 ms"),
        (formatting.milliseconds(104.4), "104 ms"),
        (formatting.factor(1.612), "1.61×"),
        (formatting.interval((1.5, 1.75)), "1.50–1.75"),
        (formatting.interval(None), ""),
        (formatting.change(47.0, 100.0), "−53 %"),
        (formatting.change(112.0, 100.0), "+12 %"),
        (formatting.change(100.2, 100.0), "±0 %"),
        (formatting.change(1.0, 0.0), "–"),
        (formatting.duration(4.21), "4.2 s"),
        (formatting.duration(100), "100 s"),
        (formatting.duration(600), "10 min"),
        (formatting.duration(3600 * 3.4), "3.4 h"),
        (formatting.duration(86400 * 4), "4.0 days"),
        (formatting.count(1, "trial"), "1 trial"),
        (formatting.count(5000, "trial"), "5,000 trials"),
    ],
)
def test_wording(found: str, expected: str) -> None:
    assert found == expected
