"""What a comparison does inside a worker: one strategy from the baseline to its checkpoint; then all are measured."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.file_names import EVENTS
from paretoprune.results.analysis.strategy_comparison import ComparisonFolder
from paretoprune.results.store.accuracy import accuracies
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.trial.context import TrialOperations
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.trial import ITSELF, latency_metrics
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.worker import tools_of

if TYPE_CHECKING:
    from paretoprune.pruning.strategies.base import Outcome
    from paretoprune.search.config.run_config import RunConfig

LOG = "strategy.log"

OnStage = Callable[[str, int, int, Mapping[str, float]], None]
"""Called after every epoch: the stage's name, the epoch in it, the stage's epochs, the metrics."""


@dataclass(frozen=True)
class StrategyJob:
    """One strategy to run: its name, ratios by layer or pattern, and its total of fine-tuning epochs."""

    strategy: str
    ratios: dict[str, float]
    epochs: int


@dataclass(frozen=True)
class StrategyRun:
    """What a strategy made, and its accuracy by name before any epoch (none: no epoch was run, so it is the final)."""

    outcome: Outcome
    before_epochs: Mapping[str, float]


class ComparingTools(TrialOperations, Protocol):
    """A trial's tools that can also run a strategy."""

    baseline: Any

    def load(self, path: Path, trust: bool | None = None) -> Any:
        """A network from its checkpoint."""
        ...

    def run_strategy(self, job: StrategyJob, folder: Path, on_stage: OnStage) -> StrategyRun:
        """Run one strategy in ``folder``, which also holds what it needs to go on after an interruption."""
        ...


class StrategyTools(PruningOperations):
    """The pruning room's strategies with the run's own fine-tuning."""

    def run_strategy(self, job: StrategyJob, folder: Path, on_stage: OnStage) -> StrategyRun:
        """See :class:`ComparingTools`. Every epoch is spent: nothing stops a strategy before its share is used up."""
        from paretoprune.pruning.strategies import get_strategy

        strategy = get_strategy(job.strategy)
        starts: list[dict[str, float]] = []

        def tune(network: Any, epochs: int, place: Path) -> Any:
            if not epochs:
                return network
            section = self._config.finetune.model_copy(update={"epochs": epochs})

            def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
                on_stage(place.name, epoch, epochs, metrics)
                return False

            place.mkdir(parents=True, exist_ok=True)
            tuned = self._tune(network, place, on_epoch, section, patience=0)
            starts.append(accuracies(tuned.start_metrics))
            return tuned.model

        how = self._config.recover.method
        outcome = strategy.run(self._bench, job.ratios, job.epochs, folder, tune, how)
        if not outcome.sessions:
            return StrategyRun(outcome, starts[0] if starts else {})
        # Between sessions there is no network with all its channels gone and no epoch yet: it is made for this figure.
        with tempfile.TemporaryDirectory(prefix="paretoprune-untuned-") as scratch:
            untuned = strategy.run(self._bench, job.ratios, 0, Path(scratch), tune, how).model
        return StrategyRun(outcome, accuracies(self.evaluate(untuned)))


def make_strategy_tools(config: RunConfig, device: str, gate: DeviceGate) -> StrategyTools:
    """The tools of one worker; loads the baseline."""
    return StrategyTools(config, device, gate)


def run_strategy(context: WorkerContext, job: StrategyJob, settings: Mapping[str, Any]) -> None:
    """In a worker: from the baseline to ``strategies/<name>/best.pt``; result.json, written last, says it is done."""
    folder = ComparisonFolder(context.folder.path)
    place = folder.strategy_dir(job.strategy)
    tools, _ = tools_of(context)
    clock = PhaseClock(place / EVENTS)

    def on_stage(stage: str, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        clock.event("epoch", stage=stage, epoch=epoch, epochs=epochs, **accuracies(metrics))

    began = time.monotonic()
    try:
        with tools.logging(place / LOG), clock.phase("strategy"):
            clock.step("removing channels and recovering")
            done = tools.run_strategy(job, place, on_stage)
            tools.save(done.outcome.model, folder.checkpoint(job.strategy))
            done.outcome.plan.save(folder.plan(job.strategy))
    except Exception:
        with (place / LOG).open("a", encoding="utf-8", errors="surrogateescape") as log:
            traceback.print_exc(file=log)
        raise  # the driver shows one line of it
    finally:
        tools.release()
    outcome = done.outcome
    content = {
        "settings": dict(settings),
        "layers": list(outcome.layers),
        "skipped": [{"layer": layer, "reason": reason} for layer, reason in outcome.skipped],
        "epochs": outcome.epochs,
        "before_epochs": dict(done.before_epochs),
        "sessions": [path.name for path in outcome.sessions],
        "notes": dict(outcome.notes),
        "seconds": round(time.monotonic() - began, 3),
    }
    folder.write_result(job.strategy, content)
    clock.event("finished", epochs=outcome.epochs, seconds=content["seconds"])


def measure_strategies(context: WorkerContext, names: Sequence[str]) -> dict[str, Any]:
    """In a worker: evaluate and time the unpruned network and all ``names`` in one session, from their files.

    Returns ``device``, ``environment``, ``baseline`` (metrics) and ``strategies`` (name -> metrics).
    """
    from paretoprune.cluster.environment import describe_environment

    tools, _ = tools_of(context)
    folder = ComparisonFolder(context.folder.path)
    clock = PhaseClock(folder.strategies / EVENTS)
    found: dict[str, dict[str, Any]] = {}
    with tools.logging(folder.strategies / "measuring.log"):
        clock.step("unpruned")
        baseline = _measured(tools, tools.baseline, None)
        clock.event("measured", strategy="unpruned", speedup=1.0, **accuracies(baseline))
        for name in names:
            clock.step(name)
            model = tools.load(folder.checkpoint(name))  # the file itself, as others will load it
            found[name] = _measured(tools, model, baseline["latency_ms"])
            clock.event("measured", strategy=name, speedup=found[name]["speedup"], **accuracies(found[name]))
    tools.release()
    return {
        "device": tools.device,
        "environment": describe_environment(),
        "baseline": baseline,
        "strategies": found,
    }


def _measured(tools: Any, model: Any, baseline_ms: float | None) -> dict[str, Any]:
    """Accuracy, size and latency; ``baseline_ms`` None: the unpruned network itself, whose speed-up is 1."""
    metrics: dict[str, Any] = {**tools.deployed(model, tools.evaluate(model)), **tools.stats(model)}
    measured = tools.start_measure(model).result()
    if baseline_ms is None:
        measured, baseline_ms = {**measured, **ITSELF}, float(measured["median_ms"])
    return {**metrics, **latency_metrics(measured, baseline_ms)}
