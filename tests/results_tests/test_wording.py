"""Numbers as people read them."""

from __future__ import annotations

import pytest

from results import wording


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (wording.plain(None), "–"),
        (wording.plain(-0.5, 1), "−0.5"),
        (wording.signed(0.014), "+0.014"),
        (wording.signed(-0.014), "−0.014"),
        (wording.signed(-0.0001), "±0.000"),
        (wording.milliseconds(0.8449), "0.84 ms"),
        (wording.milliseconds(12.44), "12.4 ms"),
        (wording.milliseconds(104.4), "104 ms"),
        (wording.factor(1.612), "1.61×"),
        (wording.interval((1.5, 1.75)), "1.50–1.75"),
        (wording.interval(None), ""),
        (wording.change(47.0, 100.0), "−53 %"),
        (wording.change(112.0, 100.0), "+12 %"),
        (wording.change(100.2, 100.0), "±0 %"),
        (wording.change(1.0, 0.0), "–"),
        (wording.duration(4.21), "4.2 s"),
        (wording.duration(100), "100 s"),
        (wording.duration(600), "10 min"),
        (wording.duration(3600 * 3.4), "3.4 h"),
        (wording.duration(86400 * 4), "4.0 days"),
        (wording.count(1, "trial"), "1 trial"),
        (wording.count(5000, "trial"), "5,000 trials"),
    ],
)
def test_wording(found: str, expected: str) -> None:
    assert found == expected
