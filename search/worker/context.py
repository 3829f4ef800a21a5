"""What a worker needs to know of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.trial.context import TrialOperations

ToolsFactory = Callable[[RunConfig, str, DeviceGate], TrialOperations]


@dataclass(frozen=True)
class WorkerContext:
    """Everything a worker must know of a run; crosses processes, so plain data and importable functions only."""

    settings: dict[str, Any]
    run: str
    cpus: int
    gpus: float
    factory: ToolsFactory
    baseline_latency_ms: float = 0.0
    devices_ms: Mapping[str, float] = field(default_factory=dict)
    """Further kind of device -> the unpruned network's latency there."""
    courier: Any = None
    """The actor that carries files, where the workers do not see the run folder (``search.worker.file_transfer``)."""
    identity: dict[str, Any] | None = None
    """The dataset's identity as ``baseline.json`` holds it, where the run has one."""

    def at(self, scratch: Path) -> WorkerContext:
        """The same with another run folder; a model or dataset that lies in the run folder moves along."""
        moved = {name: dict(self.settings[name]) for name in ("model", "data")}
        for section in moved.values():
            if Path(section["path"]).is_relative_to(self.run):
                section["path"] = str(scratch / Path(section["path"]).relative_to(self.run))
        return replace(self, run=str(scratch), settings={**self.settings, **moved})

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return build_config(self.settings)

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.run))
