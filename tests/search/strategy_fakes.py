"""Strategies without networks: quick, deterministic, importable in Ray workers.

What was run lies in the run folder as ``ran.txt``; a file ``fail-<strategy>`` there makes that strategy fail half-way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.pruning.plan import Plan
from paretoprune.search.comparison.operations import OnStage, StrategyJob, StrategyRun
from paretoprune.search.config.run_config import RunConfig
from tests.search.fakes import FakeTools

FIRST_SESSION = "session-1.pt"


@dataclass(frozen=True)
class FakeOutcome:
    strategy: str
    model: dict[str, float]
    plan: Plan
    layers: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    epochs: int
    sessions: tuple[Path, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


class FakeStrategyTools(FakeTools):
    """``mask`` changes nothing; the others cut two layers; ``sequential`` leaves a session and goes on after it."""

    def run_strategy(self, job: StrategyJob, folder: Path, on_stage: OnStage) -> StrategyRun:
        run = folder.parent.parent
        resumed = (folder / FIRST_SESSION).is_file()
        with (run / "ran.txt").open("a") as log:
            log.write(f"{job.strategy} {'again' if resumed else 'anew'}\n")
        (folder / FIRST_SESSION).write_text("first block")
        if (run / f"fail-{job.strategy}").is_file():
            raise RuntimeError("out of luck\nsecond line")
        for epoch in range(1, job.epochs + 1):
            on_stage("tuning", epoch, job.epochs, {"map50_95": 0.4})
        ratio = 0.0 if job.strategy == "mask" else next(iter(job.ratios.values()))
        model = {"model.0": ratio, "model.1": ratio}
        outcome: Any = FakeOutcome(
            job.strategy, model, Plan(model), tuple(model), (("model.2", "feeds an addition"),), job.epochs,
            (folder / FIRST_SESSION,) if job.strategy == "sequential" else (), {"sessions": 1},
        )  # fmt: skip
        return StrategyRun(outcome, {"map50_95": 0.3} if job.epochs else {})


def fake_strategies(config: RunConfig, device: str, gate: DeviceGate) -> FakeStrategyTools:
    """A factory for workers."""
    return FakeStrategyTools()
