"""Stand-ins for what a trial does to a network: quick, deterministic, importable in Ray workers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.pruning.plan import Plan
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.errors import ConfigError
from paretoprune.search.space.space import Space, build_space
from paretoprune.search.sweep.preflight import ValidatedRun
from paretoprune.search.trial.context import Measured, Tuned


@dataclass(frozen=True)
class FakeLayer:
    name: str
    block: int


@dataclass(frozen=True)
class FakeGroup:
    id: int
    name: str
    block: int
    layers: tuple[str, ...]
    channels: int

    def widths(self, round_to: int) -> tuple[int, ...]:
        return (self.channels, *(w for w in range(self.channels - 1, 0, -1) if w % round_to == 0))


@dataclass(frozen=True)
class FakeTable:
    groups: tuple[FakeGroup, ...]

    @property
    def layers(self) -> tuple[FakeLayer, ...]:
        named = [FakeLayer(name, group.block) for group in self.groups for name in group.layers]
        return (*named, FakeLayer("model.9.head", 9))  # one that cannot be pruned


def make_table(count: int = 6, channels: int = 64) -> FakeTable:
    """Groups ``model.B.cv1`` (two layers each), two per block."""
    groups = (
        FakeGroup(
            i, f"model.{i // 2}.c{i % 2}", i // 2, (f"model.{i // 2}.c{i % 2}", f"model.{i // 2}.d{i % 2}"), channels
        )
        for i in range(count)
    )
    return FakeTable(tuple(groups))


def accuracy_of(ratios: Mapping[str, float]) -> float:
    """Falls with every ratio, the earlier layers' most."""
    cost = sum(ratio**2 / (1 + index) for index, ratio in enumerate(ratios[name] for name in sorted(ratios)))
    return 0.6 / (1 + cost)


@dataclass
class FakeTools:
    """A network is its ratios. ``calls`` notes the order of what was done; ``hook`` may raise or kill at a phase."""

    device: str = "cpu"
    measures_here: bool = True
    calls: list[str] = field(default_factory=list)
    hook: Callable[[str, Mapping[str, float]], None] = lambda phase, ratios: None
    speedup_of: Callable[[Mapping[str, float]], float] = lambda ratios: 1.0 + sum(ratios.values()) / 8
    baseline: Any = field(default_factory=dict)
    epochs: int = 1

    def logging(self, path: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, imgsz: int | None, precision: str | None = None) -> FakeTools:
        return self

    def use_sample(self, run: Path) -> None:
        """Looks at no images."""

    def on_all_images(self, model: Any, say: Callable[[str], None]) -> dict[str, float]:
        return {}

    def prune(self, plan: Plan) -> tuple[Any, Plan]:
        self._note("prune", plan.ratios)
        return dict(plan.ratios), plan

    def recover(self, model: Any, plan: Any) -> None:
        self._note("recover", model)

    def keep_scores(self, run: Path) -> None:
        """Has none."""

    def recall_scores(self, run: Path) -> None:
        """Needs none."""

    def stats(self, model: Any) -> dict[str, float]:
        params_m = 3.0 - 0.1 * sum(model.values())
        return {"params_m": params_m, "gflops": 8.0, "size_mb": 4 * params_m}

    def evaluate(self, model: Any) -> dict[str, float]:
        self._note("evaluate", model)
        return {"map50_95": accuracy_of(model), "map50": 0.8, "precision": 0.7, "recall": 0.6}

    def deployed(self, model: Any, metrics: Mapping[str, float]) -> dict[str, float]:
        return dict(metrics)

    def finetune(self, model: Any, folder: Path, on_epoch: Any, start: Mapping[str, float]) -> Tuned:
        """Every epoch brings 0.05 more, until ``on_epoch`` ends it."""
        self._note("finetune", model)
        after = dict(start)
        for epoch in range(1, self.epochs + 1):
            after["map50_95"] += 0.05
            if on_epoch(epoch, after):
                break
        return Tuned(model, epoch, epoch, start, after)

    def finetune_fully(self, model: Any, folder: Path, on_epoch: Any) -> Tuned:
        return self.finetune(model, folder, on_epoch, self.evaluate(model))

    def load(self, path: Path, trust: bool | None = None) -> Any:
        return json.loads(path.read_text())

    def save(self, model: Any, path: Path) -> None:
        self._note("save", model)
        path.write_text(json.dumps(model))

    def start_measure(
        self, model: Any, keep: Callable[[Mapping[str, Any]], None] | None = None, device: str = ""
    ) -> Measured:
        values = self.measure(model)
        if keep is not None:
            keep(values)
        return Measured(values)

    def measure(self, model: Any) -> dict[str, Any]:
        self._note("measure", model)
        speedup = self.speedup_of(model)
        low_high = [0.98 * speedup, 1.02 * speedup]
        return {
            "median_ms": 20.0 / speedup, "p90_ms": 22.0 / speedup, "baseline_median_ms": 20.0,
            "speedup": speedup, "speedup_ci95": low_high,
        }  # fmt: skip

    def train_native(self, path: str, folder: Path, on_epoch: Any, trust: bool = False) -> tuple[Tuned, str]:
        on_epoch(1, {"map50_95": 0.4})
        return Tuned({"native": 0.5}, 2, 1, {}, {}), "as pretended"

    def evaluate_together(
        self, models: Mapping[str, Any], sizes: Mapping[str, int | None], say: Any, precisions: Any, variants: Any
    ) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, model in models.items():
            found[name] = {**self.evaluate(model), "test_map50_95": accuracy_of(model) - 0.1}
            change = accuracy_of(model) - accuracy_of(models["baseline"])
            if name != "baseline":
                found[name].update(map50_95_change=change, map50_95_change_ci95=[change - 0.01, change + 0.01])
        return found

    def measure_together(self, models: Mapping[str, Any], sizes: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
        over = {name: {other: [1.0, 0.9, 1.1] for other in models if other != name} for name in models}
        return {name: {**self.measure(model), "over": over[name]} for name, model in models.items()}

    def release(self) -> None:
        self.calls.append("release")

    def describe(self, say: Any) -> dict[str, Any]:
        return {"layers": [], "groups": []}

    def _note(self, phase: str, ratios: Mapping[str, float]) -> None:
        self.calls.append(phase)
        self.hook(phase, ratios)


class NoGate:
    def using(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measuring(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_config(**settings: Any) -> RunConfig:
    """A configuration with dotted keys, without touching any file."""
    from paretoprune.search.config.run_config import nest

    return build_config(nest({"model.path": "model.pt", "data.path": "data.yaml", **settings}))


def make_prepared(run: Path, **settings: Any) -> ValidatedRun:
    """A run over the fake table that may start."""
    config = make_config(**{"search.sampler": "random", "trial.epochs": 0, **settings})
    return ValidatedRun(RunFolder(run), config, make_space())


def make_space() -> Space:
    return build_space(make_table(), make_config().space)


# Factories for workers: importable functions, since they cross processes.


class ProfiledTools(FakeTools):
    """Finds one plan by sensitivity, and leaves a line in ``profiles`` beside the model whenever it looks for it."""

    profiles: Path

    def describe(self, say: Any) -> dict[str, Any]:
        with self.profiles.open("a") as file:
            file.write("profiled\n")
        ratios = dict.fromkeys(("model.0.c0", "model.0.d0"), 0.25)
        return {**super().describe(say), "sensitivity": [{"keep": 0.9, "ratios": ratios}]}


def profiled_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """See :class:`ProfiledTools`."""
    tools = ProfiledTools()
    tools.profiles = Path(config.model.path).parent / "profiles"
    return tools


def quick_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """Trials of some milliseconds."""
    return FakeTools()


def slow_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """Trials of a third of a second."""

    def hook(phase: str, ratios: Mapping[str, float]) -> None:
        if phase == "prune":
            time.sleep(0.3)

    return FakeTools(hook=hook)


def node_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """Trials whose device is the Ray node that they run on; they wait for each other, unlike the baseline: see meet."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def hook(phase: str, ratios: Mapping[str, float]) -> None:
        if phase == "evaluate" and ratios:  # not under the device's lock: the next one needs it to begin
            meet(node)

    return FakeTools(device=node, hook=hook)


def meet(node: str) -> None:
    """Wait until $MEETING_SIZE processes have come by: where workers start slowly, the first would do all."""
    place = Path(os.environ["MEETING"])
    (place / f"{node}-{os.getpid()}").touch()
    end = time.monotonic() + 300
    while len(list(place.iterdir())) < int(os.environ["MEETING_SIZE"]) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(0.5)


def faulty_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """By trial of this worker: the second raises, the third kills its process."""
    count = [0]

    def hook(phase: str, ratios: Mapping[str, float]) -> None:
        if phase != "prune":
            return
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("out of luck\nsecond line")
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    return FakeTools(hook=hook)


def hopeless_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """Every trial fails the same way."""

    def hook(phase: str, ratios: Mapping[str, float]) -> None:
        if phase == "recover":
            raise OSError("the disk is full")

    return FakeTools(hook=hook)


def no_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """The worker cannot even load the model."""
    raise ConfigError("the model is gone; bring it back")


def process_tools(config: RunConfig, device: str, gate: DeviceGate) -> FakeTools:
    """Says in the device's name which process it is, and how many tools that process has made."""
    made = globals()["_MADE"] = globals().get("_MADE", 0) + 1
    return FakeTools(device=f"{os.getpid()}:{made}")
