"""Tables of the recovery benchmark from its cells; what is not measured yet is an empty cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.store import Store

_SHOWN = ("cpu_model", "cpu_usable", "python", "torch", "ultralytics")
_TITLES = {
    "coco": "YOLOv8n, COCO",
    "voc": "YOLOv8n, VOC",
    "bccd": "YOLOv8n, blood cells",
    "voc-s": "YOLOv8s, VOC",
}
_CUTS = {  # column -> which cells
    "`prune --keep-macs`": {"section": "cut"},
    "with `--recover refit+distill`": {"section": "distilled"},
    "one ratio, L2, no recovery": {"section": "l2", "recover": "none"},
    "one ratio, L2": {"section": "l2", "recover": "refit"},
    "Taylor": {"section": "taylor"},
    "one ratio, random": {"section": "random"},
}
_INTRODUCTION = """\
mAP50-95 on the whole validation split at 320 px (COCO: 600 images that show a person). Networks look at training images
only: 512 (of COCO 128 and of the blood cells 205 are there; augmented ones make up the number). "/": two choices of
these images (seeds 0 and 1).

- `prune --keep-macs`: the command's defaults, no gradient step. With `--recover refit+distill`: the same channels, then
  at most 300 steps towards the unpruned network's outputs, without labels.
- One ratio, L2: every layer loses the same share of its channels, the weakest by group L2. Taylor: widths and channels
  by that criterion, which looks at labels. One ratio, random: channels at random. All with the same refit except where
  it says "no recovery"; one ratio leaves what comes nearest to the goal, at most {off:.3f} of the multiply-adds beside
  it.
- Smaller input: the unpruned network at as much work, on the straight line between the sizes of the second table.
"""
_COST = """\
Seconds of one CPU thread. The first cut of a network reads the images and scores the unpruned network, further ones use
that again. The peak is the process's resident memory, the images and PyTorch included; validation is not counted in
the seconds. Other processes used the machine, too.
"""


def markdown(store: Store, missing: Sequence[Mapping[str, Any]]) -> str:
    """The whole report; `missing`: the names of the cells that are still to be measured."""
    environment, cells = store.content["environment"], store.cells
    shown = ", ".join(f"{key} {environment[key]}" for key in _SHOWN if key in environment)
    counts: dict[str, Counter[str]] = {}
    for name in missing:
        section = f"`{name['section']}`{' with seed 1' if name.get('seed') else ''}"
        counts.setdefault(section, Counter())[name["network"]] += 1
    left = "; ".join(f"{section}: {', '.join(f'{n} {c}' for n, c in of.items())}" for section, of in counts.items())
    off = max((abs(c["macs_kept"] - 1 + c["fewer"] / 100) for c in cells if "macs_kept" in c), default=0.0)
    made = f"{', '.join(sorted({c['date'] for c in cells}))}; commit {', '.join(sorted({c['commit'] for c in cells}))}"
    return "\n".join([
        "# Accuracy after removal and recovery", "",
        f"{made}; no GPU; {shown}. Written by `python -m benchmarks.recovery`; every cell is in recovery.json.", "",
        f"Not measured, number of cells: {left}." if left else "All cells are measured.", "",
        "## Accuracy by multiply-adds removed", "", _INTRODUCTION.format(off=off), *accuracy(store),
        "## The unpruned networks at smaller inputs", "", *sizes(store),
        "## What it costs", "", _COST, *cost(store),
    ])  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns that are empty in every row are left out."""
    filled = [k for k in range(len(head)) if any(row[k] for row in rows)]
    shown = [[row[k] for k in filled] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in shown] + [""]


def accuracy(store: Store) -> list[str]:
    """A row for every network and cut."""
    rows = []
    for network, title in _TITLES.items():
        for fewer in sorted({c["fewer"] for c in store.find(network=network) if "fewer" in c}):
            of = {"network": network, "fewer": fewer}
            unpruned = store.value("map50_95", section="sizes", network=network, imgsz=320)
            images = store.value("images", section="sizes", network=network, imgsz=320)
            row = [f"{title}, {images} images" if images else title, _three(unpruned), f"{fewer} %"]
            row += [_both(store, "map50_95", 3, **of, **which) for which in _CUTS.values()]
            rows.append([*row, _three(at_as_much_work(store, network, 1 - fewer / 100))])
    return table(("network", "unpruned", "fewer multiply-adds", *_CUTS, "smaller input"), rows)


def at_as_much_work(store: Store, network: str, share: float) -> float | None:
    """mAP50-95 of the unpruned network where it has this share of its multiply-adds, between the sizes measured."""
    found = sorted((c["imgsz"] ** 2, c["map50_95"]) for c in store.find(section="sizes", network=network))
    if not found or share * 320**2 < found[0][0]:
        return None
    return float(np.interp(share * 320**2, *zip(*found, strict=True)))


def sizes(store: Store) -> list[str]:
    widths = sorted({c["imgsz"] for c in store.find(section="sizes")}, reverse=True)
    rows = [
        [title, *(_three(store.value("map50_95", section="sizes", network=network, imgsz=w)) for w in widths)]
        for network, title in _TITLES.items()
        if store.value("map50_95", section="sizes", network=network) is not None
    ]
    shares = [f"{w} px ({w**2 / 320**2:.0%} of the work)" for w in widths]
    return table(("network", *shares), rows)


def cost(store: Store) -> list[str]:
    rows = []
    for network, title in _TITLES.items():
        for fewer in sorted({c["fewer"] for c in store.find(section="cut", network=network)}):
            of = {"network": network, "fewer": fewer}
            names = ("choice_cpu_s", "recovery_cpu_s")
            row = [title, f"{fewer} %", *(_both(store, name, 0, section="cut", **of) for name in names)]
            row.append(_both(store, "recovery_cpu_s", 0, section="distilled", **of))
            rows.append([*row, *(_both(store, "peak_memory_gb", 1, section=s, **of) for s in ("cut", "distilled"))])
    return table(
        (
            "network", "fewer multiply-adds", "choosing channels, s", "refit, s", "refit and distillation, s",
            "peak memory, GB", "with distillation, GB",
        ), rows
    )  # fmt: skip


def _both(store: Store, name: str, digits: int, **wanted: Any) -> str:
    """What the seeds have, in their order."""
    found = sorted((c["seed"], c[name]) for c in store.find(**wanted))
    return " / ".join(f"{value:.{digits}f}" for _, value in found)


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
