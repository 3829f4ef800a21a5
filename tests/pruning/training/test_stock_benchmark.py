"""The comparison with the next smaller model: how wide the pruned one may be, and what its page says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.native import STEPS, widest
from benchmarks.native_table import NATIVE, PARENT, PRUNED, SESSION, TWICE, markdown


@pytest.mark.parametrize("limit", [0.07, 0.31, 0.9])
def test_the_widest_plan_that_is_fast_enough_is_found(limit: float) -> None:
    asked: list[float] = []

    def speedup(keep: float) -> float:
        asked.append(keep)
        return limit / keep

    found = widest(speedup)
    assert found <= limit < found + 0.95 / 2**STEPS
    assert found in asked, "what is cut was measured"


def cells(seed: int, lead: float) -> list[dict[str, Any]]:
    at = {"seed": seed, "epochs": "2+3", "imgsz": 64, "device": "cpu", "date": "2026-01-02", "commit": "abc"}
    figures = {"map50_95": 0.5, "map50": 0.7, "params_m": 3.0, "gflops": 1.0}
    of_pruned = {"over_native": [lead, lead - 0.01, lead + 0.01], "over_twice": [lead + 0.01, -0.1, 0.2]}
    rows: dict[str, Any] = {PARENT: of_pruned, PRUNED: of_pruned}
    rows |= {NATIVE: {"over_twice": [0.01, 0.0, 0.02]}, TWICE: {"over_native": [-0.01, -0.02, 0.0]}}
    times = {"median_ms": 8.0, "speedup": 1.02, "speedup_ci95": [0.98, 1.06]}
    timed = {name: {**row, **times} for name, row in rows.items()}
    networks = [{**at, **figures, "network": name} for name in (NATIVE, PARENT, PRUNED, TWICE)]
    return [*networks, {**at, "network": SESSION, "networks": timed, "images": 9}]


def page(found: list[dict[str, Any]]) -> str:
    return markdown({"environment": {"cpu_model": "thing"}, "notes": [], "cells": found})


def test_one_seed_is_not_taken_for_more() -> None:
    text = page(cells(0, 0.02))
    assert f"| {PRUNED} |" in text
    assert "| 5 | 0.500 | 0.700 | 3.00 | 1.00 | 8.0 | 1.02 (0.98 to 1.06) | +0.020 (+0.010 to +0.030) |" in text
    assert f"Against '{NATIVE}': +0.020, better by these images; one seed" in text
    assert f"Against '{TWICE}': +0.030, not told apart by these images; one seed" in text
    assert "2026-01-02 (commit abc)" in text


def test_several_seeds_give_an_interval() -> None:
    text = page([*cells(0, 0.01), *cells(1, 0.02), *cells(2, 0.03)])
    # Student's t with two degrees of freedom: 4.303 * 0.01 / sqrt(3) = 0.025
    assert f"Against '{NATIVE}': +0.020 on average over 3 seeds (95 % interval -0.005 to +0.045)." in text


def test_what_is_not_measured_is_left_empty() -> None:
    text = page([cell for cell in cells(0, 0.02) if cell["network"] not in (SESSION, PRUNED)])
    assert "Not timed and not compared yet." in text
    assert PRUNED not in text.split("## ")[1]
