"""Is pruning worth it? A larger model pruned to the next smaller one's latency, against that smaller one.

Usage: python -m benchmarks.native train   [--minutes M] [--seeds N] [--device cuda:0] ...
       python -m benchmarks.native compare                (alone on the device: it times)
       python -m benchmarks.native table

For every seed four networks, on bccd/ at 320 px unless said otherwise:
  yolov8s         brought to the dataset by Ultralytics' own training, `--parent-epochs`
  pruned yolov8s  that network, its widths by sensitivity, as wide as yolov8n's measured latency allows; refitted, then
                  fine-tuned fully, `--finetune-epochs`. No search: one plan.
  yolov8n         by Ultralytics' own training in one go, for the sum of both
  yolov8n, twice  as the pruned one: Ultralytics' training, then our full fine-tuning, as many epochs of each
`compare` judges a seed's networks together: the same images for all, and one timing session over all. Every cell is
written to native.json at once, so the same command again goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.native_table import NATIVE, PARENT, PRUNED, SESSION, TWICE, markdown
from benchmarks.store import Store, Task, work
from paretoprune.cluster.environment import describe_environment
from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.latency.group import measure_group
from paretoprune.pruning.latency.pair import measure_pair
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.training.stock_baseline import train_native
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model, model_stats
from paretoprune.pruning.yolo.saving import save_checkpoint

NARROWEST, STEPS = 0.05, 7  # least share of the multiply-adds that a plan leaves; halvings of what lies above it
SECONDS = 6.0  # of a timing during the bisection
SECONDS_EACH = 15.0  # of the session that is published, for each network


@dataclass(frozen=True)
class Setting:
    """What the figures depend on; `weights` holds yolov8s.pt and yolov8n.pt."""

    weights: Path
    data: str
    imgsz: int
    parent_epochs: int
    finetune_epochs: int
    device: str
    threads: int

    def name(self, seed: int, network: str) -> dict[str, Any]:
        """What identifies a cell."""
        epochs = f"{self.parent_epochs}+{self.finetune_epochs}"
        return {"network": network, "seed": seed, "epochs": epochs, "imgsz": self.imgsz, "device": self.device}


class Lineage:
    """The networks of one seed, each a checkpoint in `folder`."""

    def __init__(self, setting: Setting, seed: int, folder: Path) -> None:
        self.setting, self.seed, self.folder = setting, seed, folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, network: str) -> Path:
        return self.folder / f"{network.replace(', ', '-').replace(' ', '-')}.pt"

    def settings(self, epochs: int) -> FinetuneSettings:
        workers = 0 if self.setting.device == "cpu" else 4
        return FinetuneSettings(epochs=epochs, imgsz=self.setting.imgsz, seed=self.seed, workers=workers)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.setting.data, self.setting.imgsz, self.setting.device, workers=0)

    def finish(self, network: str, model: nn.Module, began: float, **more: Any) -> Iterator[dict[str, Any]]:
        """Keep the network, and say what it is."""
        save_checkpoint(model, self.file(network), {"imgsz": self.setting.imgsz})
        accuracy = {key: round(value, 4) for key, value in self.evaluator.run(model).items()}
        stats = asdict(model_stats(model, self.setting.imgsz))
        minutes = round((time.monotonic() - began) / 60, 1)
        yield {**accuracy, **{key: round(value, 3) for key, value in stats.items()}, "minutes": minutes, **more}

    def stock(self, network: str, start: str, epochs: int) -> Iterator[dict[str, Any]]:
        """Ultralytics' own training from the official checkpoint."""
        began, path = time.monotonic(), self.setting.weights / f"{start}.pt"
        settings, scratch = self.settings(epochs), self.scratch(network)
        found = train_native(path, self.setting.data, settings, scratch, self.setting.device)
        yield from self.finish(network, found.model, began, best_epoch=found.best_epoch)

    def tuned(self, network: str, start: nn.Module, began: float, **more: Any) -> Iterator[dict[str, Any]]:
        """Our full fine-tuning, from `start`."""
        settings = self.settings(self.setting.finetune_epochs)
        found = finetune(start, self.setting.data, settings, self.scratch(network), self.setting.device)
        at_start = round(found.start_metrics["map50_95"], 4)
        more = {"best_epoch": found.best_epoch, "map50_95_start": at_start, **more}
        yield from self.finish(network, found.model, began, **more)

    def twice(self) -> Iterator[dict[str, Any]]:
        """The native model with the pruned one's two trainings."""
        began, start = time.monotonic(), self.file(f"{TWICE} start")
        if not start.is_file():
            path, settings = self.setting.weights / "yolov8n.pt", self.settings(self.setting.parent_epochs)
            found = train_native(path, self.setting.data, settings, self.scratch("start"), self.setting.device)
            save_checkpoint(found.model, start, {"imgsz": self.setting.imgsz})
        yield from self.tuned(TWICE, load_model(start), began)

    def pruned(self) -> Iterator[dict[str, Any]]:
        """The parent, as wide as the native model's latency allows."""
        began, start = time.monotonic(), self.file(f"{PRUNED} start")
        plan_file = start.with_suffix(".plan.json")
        if not (start.is_file() and plan_file.is_file()):
            model, plan = self.cut()
            plan.save(plan_file)
            save_checkpoint(model, start, {"imgsz": self.setting.imgsz})
        yield from self.tuned(PRUNED, load_model(start), began, plan_hash=Plan.load(plan_file).hash)

    def cut(self) -> tuple[nn.Module, Plan]:
        """The parent pruned to yolov8n's latency and refitted; only widths count for a latency, so no score does."""
        setting = self.setting
        bench = Workbench(str(self.file(PARENT)), setting.data, setting.imgsz, seed=self.seed, device=setting.device)
        rival = load_model(self.file(NATIVE))

        def pruned(keep: float) -> tuple[nn.Module, Plan]:
            ratios = bench.allocated(keep)
            assert ratios is not None, f"a plan must leave {keep:.2f} of the multiply-adds, but none goes that far"
            return bench.prune(ratios)

        def speedup(keep: float) -> float:
            at = setting.imgsz, setting.device
            return measure_pair(pruned(keep)[0], rival, *at, threads=setting.threads, max_seconds=SECONDS).speedup

        model, plan = pruned(widest(speedup))
        bench.recover(model, plan)
        return model, plan

    def session(self) -> Iterator[dict[str, Any]]:
        """All four judged together, everything against the native model."""
        networks = (NATIVE, TWICE, PRUNED, PARENT)
        models = {network: load_model(self.file(network)) for network in networks}
        seen = {network: self.evaluator.run_by_image(model) for network, model in models.items()}
        setting = self.setting
        times = measure_group(
            models, NATIVE, setting.imgsz, setting.device,
            threads=setting.threads, max_seconds=SECONDS_EACH * len(models), target_halfwidth=0.005,
        )  # fmt: skip
        found: dict[str, Any] = {}
        for network in networks:
            row = {"map50_95": seen[network][0]["map50_95"], "map50": seen[network][0]["map50"]}
            row.update({key: times[network][key] for key in ("median_ms", "speedup", "speedup_ci95")})
            for other, key in ((NATIVE, "over_native"), (TWICE, "over_twice")):
                if other != network:
                    noise = paired_bootstrap(seen[other][1], seen[network][1], resamples=400, seed=self.seed)
                    row[key] = [noise.difference, *noise.ci95]
            found[network] = row
        yield {"networks": found, "images": self.evaluator.images, "threads": setting.threads}

    def scratch(self, network: str) -> Path:
        """Where a training keeps its state: one that was cut off goes on from there."""
        folder = self.file(network).with_suffix(".training")
        folder.mkdir(exist_ok=True)
        return folder


def widest(speedup: Callable[[float], float]) -> float:
    """The largest share of multiply-adds, found by bisection, at which `speedup` of a plan is 1 or more."""
    low, high = NARROWEST, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if speedup(middle) >= 1.0 else (low, middle)
    return low


def trainings(setting: Setting, seeds: int, folder: Path) -> Iterator[Task]:
    """The native model first: the pruned one is cut to its latency."""
    for seed in range(seeds):
        line = Lineage(setting, seed, folder / f"seed{seed}")
        both = setting.parent_epochs + setting.finetune_epochs
        made: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            NATIVE: partial(line.stock, NATIVE, "yolov8n", both),
            PARENT: partial(line.stock, PARENT, "yolov8s", setting.parent_epochs),
            PRUNED: line.pruned,
            TWICE: line.twice,
        }
        yield from (Task((setting.name(seed, network),), make) for network, make in made.items())


def sessions(setting: Setting, seeds: int, folder: Path) -> Iterator[Task]:
    for seed in range(seeds):
        line = Lineage(setting, seed, folder / f"seed{seed}")
        yield Task((setting.name(seed, SESSION),), line.session)


SECTIONS: Mapping[str, Callable[[Setting, int, Path], Iterator[Task]]] = {"train": trainings, "compare": sessions}


def main(arguments: Sequence[str] | None = None) -> None:
    assets = Path(os.environ.get("PARETOPRUNE_ASSETS", "../shared/assets"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("section", choices=[*SECTIONS, "table"])
    parser.add_argument("--weights", type=Path, default=assets / "weights", help="folder of yolov8s.pt and yolov8n.pt")
    parser.add_argument("--data", default=str(assets / "bccd" / "data.yaml"))
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--parent-epochs", type=int, default=50)
    parser.add_argument("--finetune-epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of trainings and timings on a CPU")
    parser.add_argument("--minutes", type=float, default=600, help="no new cell is begun after these")
    parser.add_argument("--work", type=Path, default=Path("runs/native"), help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    store = Store(given.output / "native.json")
    if given.section != "table":
        torch.set_num_threads(given.threads)
        store.content["environment"] = describe_environment()
        setting = Setting(
            given.weights, given.data, given.imgsz, given.parent_epochs, given.finetune_epochs, given.device,
            given.threads,
        )  # fmt: skip
        tasks = SECTIONS[given.section](setting, given.seeds, given.work)
        done = work(store, tasks, given.minutes, partial(print, flush=True))
        print("all cells are there" if done else "the time is up; the same command goes on")
    text = markdown(store.content)
    (given.output / "native.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
