"""Figures in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from paretoprune.results.store.accuracy import trade_off_text

UNPRUNED = {"map50_95": 0.624, "latency_ms": 10.0}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"map50_95": 0.612, "speedup": 1.874}, "1.87 times as fast, mAP50-95 0.012 lower"),
        ({"map50_95": 0.63, "speedup": 0.9}, "0.90 times as fast, mAP50-95 0.006 higher"),
        ({"map50_95": 0.6242, "speedup": 1.0}, "1.00 times as fast, mAP50-95 unchanged"),
        # evaluated beside the unpruned one, which had another accuracy then
        ({"map50_95": 0.612, "map50_95_change": -0.02, "speedup": 2.0}, "2.00 times as fast, mAP50-95 0.020 lower"),
        ({"map50_95": 0.612}, "mAP50-95 0.012 lower"),
        ({"top1": 0.5, "speedup": 1.5}, "1.50 times as fast"),
    ],
)
def test_a_trade_off_in_plain_words(metrics: dict[str, Any], words: str) -> None:
    unpruned = UNPRUNED if "map50_95" in metrics else {}
    assert trade_off_text(metrics, unpruned) == words
