"""The page of the recovery benchmark: what is compared with what, and what is not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.recovery import NETWORKS, SECTIONS, names, seeds
from benchmarks.recovery_table import at_as_much_work, markdown
from benchmarks.store import Store

MADE = {"date": "2026-01-02", "commit": "abc"}


def store(*cells: dict[str, Any]) -> Store:
    found = Store(Path("nowhere.json"))
    found.content["cells"] = [{**cell, **MADE} for cell in cells]
    return found


def size(imgsz: int, map50_95: float) -> dict[str, Any]:
    return {"section": "sizes", "network": "voc", "imgsz": imgsz, "map50_95": map50_95, "images": 800}


def cut(seed: int, **values: Any) -> dict[str, Any]:
    cost = {"choice_cpu_s": 100.2, "recovery_cpu_s": 50.6, "peak_memory_gb": 8.04}
    return {
        "section": "cut",
        "network": "voc",
        "fewer": 50,
        "recover": "refit",
        "seed": seed,
        "macs_kept": 0.51,
        **cost,
        **values,
    }


def test_a_cut_is_compared_at_the_work_that_it_leaves() -> None:
    measured = store(size(320, 0.5), size(160, 0.2))
    assert at_as_much_work(measured, "voc", 1.0) == 0.5
    assert at_as_much_work(measured, "voc", 0.25) == 0.2  # half the side, a quarter of the work
    assert abs(at_as_much_work(measured, "voc", 0.625) - 0.35) < 1e-12  # type: ignore[operator]
    assert at_as_much_work(measured, "voc", 0.2) is None  # smaller than the smallest
    assert at_as_much_work(measured, "coco", 0.5) is None


def test_a_row_holds_both_seeds_in_their_order_and_leaves_empty_what_is_not_measured() -> None:
    rival = {**cut(0, map50_95=0.08), "section": "l2", "fewer": 70}
    cells = store(cut(1, map50_95=0.4), cut(0, map50_95=0.42), rival, size(320, 0.54), size(160, 0.34))
    page = markdown(cells, [{"section": "taylor", "network": "voc", "seed": 0}] * 2)
    assert "| network | unpruned | fewer multiply-adds | `prune --keep-macs` | one ratio, L2 | smaller input |" in page
    assert "| YOLOv8n, VOC, 800 images | 0.540 | 50 % | 0.420 / 0.400 |  | 0.407 |" in page
    assert "| YOLOv8n, VOC, 800 images | 0.540 | 70 % |  | 0.080 | 0.353 |" in page
    assert "| YOLOv8n, VOC | 50 % | 100 / 100 | 51 / 51 | 8.0 / 8.0 |" in page
    assert "Not measured, number of cells: `taylor`: voc 2." in page
    assert "at most 0.210 of the multiply-adds beside\n  it" in page
    assert "All cells are measured" in markdown(cells, [])


def test_no_two_cells_have_one_name() -> None:
    every = [
        str(n)
        for section in SECTIONS
        for network in NETWORKS
        for s in seeds(section)
        for n in names(section, network, s)
    ]
    assert len(set(every)) == len(every) == 4 * (6 + 3 * 2 + 3 * 2 + 3 * 2 + 3 + 3)
