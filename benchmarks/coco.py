"""Accuracy of COCO's networks by the work that is left of them, before any training and after a full fine-tuning.

Usage: python -m benchmarks.coco --data coco.yaml [--device 0] [--epochs N] ...     the same again goes on
       python -m benchmarks.coco table

For every network, input size and share of the multiply-adds: what `paretoprune prune --keep-macs` makes of it, without
a gradient step; with `--epochs`, that network after the full fine-tuning by labels, too (`--device 0,1`: on several
GPUs), which goes on from its last epoch where it was cut off. All are judged on the whole validation split, the
unpruned networks as well; of a training's epochs the best one on it counts, as Ultralytics has it. Every cell is
written to coco.json at once; `table`, and the end of every run, writes coco.md from what is there, beside what others
published. `--keep 0.73 0.59 0.43` has torch-dag's shares, `--keep 1` the unpruned networks alone, as at smaller inputs.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import paretoprune
from benchmarks.recovery_table import table
from benchmarks.store import Cell, Store, Task, work
from paretoprune.cluster.devices import default_device
from paretoprune.pruning.data.dataset import check_dataset
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.loading import load_model, model_stats

NETWORKS = ("yolov8n", "yolov8s", "yolo11n", "yolo26n")
SIZES = (320, 640)  # pixels
KEPT = (0.7, 0.5)  # of the multiply-adds
VAL2017 = 5000  # images
_SHOWN = ("cpu_model", "cpu_usable", "gpu0_name", "python", "torch", "ultralytics")
_HEAD = (
    "network", "input, px", "judged on", "GFLOPs", "left", "parameters left", "mAP50-95", "left", "training of the cut",
)  # fmt: skip
_AT_640 = 0.64**2  # GFLOPs of thousands of FLOPs per pixel
_PUBLISHED = (  # network, judged on, GFLOPs, mAP50-95 and parameters in millions unpruned and pruned, training
    ("YOLOv8n, torch-dag [1]", "COCO", (21.5 * _AT_640, 15.7 * _AT_640), (0.373, 0.349), (3.16, 2.65), "200 epochs"),
    ("YOLOv8n, torch-dag [1]", "COCO", (21.5 * _AT_640, 12.6 * _AT_640), (0.373, 0.333), (3.16, 2.0), "200 epochs"),
    ("YOLOv8n, torch-dag [1]", "COCO", (21.5 * _AT_640, 9.2 * _AT_640), (0.373, 0.299), (3.16, 1.2), "200 epochs"),
    ("YOLOv5m, PAGCP [2]", "val2017", (51.3, 23.5), (0.436, 0.415), (21.4, 7.7), "yes, epochs not stated"),
    ("YOLOv5l, PAGCP [2]", "val2017", (115.4, 49.1), (0.470, 0.455), (46.7, 16.1), "yes, epochs not stated"),
    ("YOLOv5x, PAGCP [2]", "val2017", (218.8, 81.0), (0.488, 0.472), (87.4, 29.3), "yes, epochs not stated"),
)
_CUT = (
    '"left": of the unpruned one at the same input. Training "none": as `paretoprune prune --keep-macs` leaves it, '
    "chosen and refitted on at most 512 training images (fewer where these take more memory), no gradient step."
)
_SAMPLE = (
    ", not the 5,000 of val2017: mAP is not comparable with the published figures, the share of the unpruned network's "
    "only roughly"
)
_SOURCES = """\
[1] https://github.com/TCLResearchEurope/torch-dag/blob/main/resources/pruning_results.md (commit fbe2010; its section
"yolov8s", whose rows are yolov8n): pruned, then trained for 200 epochs by YOLOv8's own recipe. FLOPs are given per
pixel, here of 640 px: neither input size nor split is named, but the unpruned network's 37.3 is that of 640 px on
val2017.

[2] https://github.com/HankYe/PAGCP (README, commit 4a81b86; arXiv:2303.11923): `val.py --data coco.yaml --img 640`,
pruned and unpruned networks trained with `hyp.scratch.yaml`. YOLOv5 is another family.
"""


@dataclass(frozen=True)
class Setting:
    """Where networks and data are, and what with: `device` may be several of them for the training."""

    data: str
    weights: Path
    device: str
    batch: int
    work: Path

    @property
    def first(self) -> str:
        """Where a network is cut and judged."""
        return self.device.split(",")[0]

    @property
    def dataset(self) -> str:
        """Its name in the table: `coco` of coco.yaml, the folder's of a data.yaml."""
        path = Path(self.data)
        return path.absolute().parent.name if path.stem == "data" else path.stem

    def name(self, network: str, imgsz: int, keep: float, epochs: int) -> dict[str, Any]:
        """What identifies a cell."""
        return {"data": self.dataset, "network": network, "imgsz": imgsz, "keep": keep, "epochs": epochs}

    def model(self, network: str) -> str:
        """The checkpoint; an official one's bare name, by which it is fetched, where no folder was given."""
        return str(self.weights / f"{network}.pt")

    def check(self, networks: Sequence[str], sizes: Sequence[int], kept: Sequence[float], epochs: int) -> None:
        """Raise `UserError` for what cannot be done, before anything is."""
        for size in sizes:
            FinetuneSettings(epochs=epochs or 1, imgsz=size, batch=self.batch)
        for share in kept:
            paretoprune.Budget(share)
        for network in networks:
            for remark in check_dataset(self.data, load_model(self.model(network))):
                print(remark, flush=True)

    def cell(self, network: str, imgsz: int, keep: float, epochs: int) -> Iterator[dict[str, Any]]:
        """Make one network and judge it."""
        began = time.monotonic()
        folder = self.work / "-".join(map(str, self.name(network, imgsz, keep, epochs).values()))
        cut = self.work / f"{self.dataset}-{network}-{imgsz}-{keep}.pt"
        figures: dict[str, Any] = {}
        if keep == 1:
            model: nn.Module = load_model(self.model(network))
        elif epochs and cut.is_file():
            model = load_model(cut)
        else:
            pruned = paretoprune.prune(
                self.model(network), keep_macs=keep, data=self.data, imgsz=imgsz, device=self.first
            )
            self.work.mkdir(parents=True, exist_ok=True)
            model, figures = load_model(pruned.save(cut)), {"macs_kept": pruned.figures["macs_kept"]}
        if epochs:
            settings = FinetuneSettings(epochs=epochs, imgsz=imgsz, batch=self.batch)
            folder.mkdir(parents=True, exist_ok=True)
            found = finetune(model, self.data, settings, folder, self.device)
            model, figures = found.model, {"batch": self.batch, "best_epoch": found.best_epoch}
        evaluator = Evaluator(self.data, imgsz, self.first, workers=0 if self.first == "cpu" else 4)
        figures |= {"map50_95": round(evaluator.run(model)["map50_95"], 4), "images": evaluator.images}
        evaluator.close()
        stats = model_stats(model, imgsz)
        figures |= {"gflops": round(stats.gflops, 3), "params_m": round(stats.params_m, 3)}
        figures["minutes"] = round((time.monotonic() - began) / 60, 1)
        figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
        yield figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("section", choices=["table"], nargs="?", help="write coco.md from what is there, and no more")
    parser.add_argument("--data", help="data.yaml of COCO or of a sample of it")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--weights", type=Path, default=Path(), help="folder of the checkpoints; else they are fetched")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the input, pixels")
    parser.add_argument("--keep", nargs="+", type=float, default=KEPT, help="shares of the multiply-adds")
    parser.add_argument("--epochs", type=int, default=0, help="of a full fine-tuning of every cut; 0: none")
    parser.add_argument("--batch", type=int, default=16, help="images of a step of the fine-tuning, all GPUs together")
    parser.add_argument("--device", default=default_device(), help="cpu, 0, cuda:1, ...; 0,1 train together")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new cell is begun after these")
    parser.add_argument("--work", type=Path, default=Path("runs/coco"), help="folder of the networks")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    store = Store(given.output / "coco.json")
    if given.section is None:
        if given.data is None:
            parser.error("give --data, or `table`")
        try:
            device = ",".join(str(torch_device(name)) for name in given.device.split(","))  # cuda:0 of 0
            setting = Setting(given.data, given.weights, device, given.batch, given.work)
            setting.check(given.networks, given.sizes, given.keep, given.epochs)
            cells = [(n, s, k, e) for e in sorted({0, given.epochs}) for s in given.sizes for n in given.networks
                     for k in (1.0, *given.keep) if not e or k < 1]  # fmt: skip
            tasks = [Task((setting.name(*cell),), partial(setting.cell, *cell)) for cell in cells]
            done = work(store, tasks, given.minutes, partial(print, flush=True))
        except paretoprune.UserError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        print("all cells are there" if done else "the time is up; the same command goes on", flush=True)
    text = markdown(store)
    (given.output / "coco.md").write_text(text, encoding="utf-8")
    print(text)


def markdown(store: Store) -> str:
    """The page: every cell a row, then the published ones."""
    cells = sorted(store.cells, key=lambda c: (c["data"], c["network"], -c["imgsz"], -c["keep"], c["epochs"]))
    rows = [_row(cell, store) for cell in cells]
    for network, split, flops, accuracy, parameters, training in _PUBLISHED:
        shares = [f"{after / before:.2f}" for before, after in (flops, parameters, accuracy)]
        rows.append([network, "640", split, f"{flops[1]:.1f}", *shares[:2], f"{accuracy[1]:.3f}", shares[2], training])
    known = {(c["network"], c["imgsz"], c["keep"]) for c in cells}
    wanted = [(n, s, k) for n in NETWORKS for s in SIZES for k in (1.0, *KEPT)]
    missing = dict.fromkeys(f"{n} at {s} px" for n, s, k in wanted if (n, s, k) not in known)
    sets = {c["data"]: c["images"] for c in cells}
    about = [f"{name}: {images:,} images{_SAMPLE if images < VAL2017 else ''}." for name, images in sets.items()]
    about += [] if any(c["epochs"] for c in cells) else ["No network of ours is trained after its cut; theirs all are."]
    about += [f"Not measured, in whole or in part: {', '.join(missing)}."] if missing else []
    environment = store.content["environment"]
    made = f"{', '.join(sorted({c['date'] for c in cells}))}; commit {', '.join(sorted({c['commit'] for c in cells}))}"
    shown = ", ".join(f"{key} {environment[key]}" for key in _SHOWN if key in environment)
    first = f"{made}; {shown}. Written by `python -m benchmarks.coco`; every cell is in coco.json."
    bullets = [f"- {line}" for line in (_CUT, *about, *store.content["notes"])]
    return "\n".join(
        ["# COCO: accuracy by the work that is left", "", first, "", *bullets, "", *table(_HEAD, rows), _SOURCES]
    )


def _row(cell: Cell, store: Store) -> list[str]:
    whole = next(store.find(**{k: cell[k] for k in ("data", "network", "imgsz")}, keep=1.0, epochs=0), None)
    shares = [f"{cell[k] / whole[k]:.2f}" if whole and whole[k] else "" for k in ("gflops", "params_m", "map50_95")]
    training = f"{cell['epochs']} epochs" if cell["epochs"] else "none" if cell["keep"] < 1 else ""
    about = [cell["network"], str(cell["imgsz"]), cell["data"], f"{cell['gflops']:.1f}"]
    return [*about, *shares[:2], f"{cell['map50_95']:.3f}", shares[2], training]


if __name__ == "__main__":
    main()
