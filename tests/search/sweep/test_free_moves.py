"""The unpruned model at smaller inputs: measured once, kept through deaths, fine-tuned beside the picks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from paretoprune.base.device_gate import DeviceGate
from paretoprune.pruning.plan import Plan
from paretoprune.results.analysis.frames import front_rows
from paretoprune.results.selection.selection import Pick
from paretoprune.results.selection.uncertainty import beaten_picks
from paretoprune.results.store.records import TrialRecord
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.errors import SearchError
from paretoprune.search.finalists.final_evaluation import compare_finalists
from paretoprune.search.finalists.finetune_picks import Job, choose_free_moves, finetune_job
from paretoprune.search.sweep.free_moves import missing_sizes
from paretoprune.search.sweep.sweep import run_sweep
from paretoprune.search.trial.context import Tuned
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.worker import work_on_free_moves
from tests.search.fakes import FakeTools, make_config, make_prepared

SIZES = [640, 512, 448]


@dataclass
class SizedTools(FakeTools):
    """A smaller input costs 0.1 of accuracy per halving and is faster by its area; a line in ``log`` per validation."""

    imgsz: int = 640
    log: Path = field(default_factory=Path)

    def at(self, imgsz: int | None) -> SizedTools:
        area = (640 / (imgsz or 640)) ** 2
        return replace(self, imgsz=imgsz or 640, speedup_of=lambda ratios: area * (1.0 + sum(ratios.values()) / 8))

    def evaluate(self, model: Any) -> dict[str, float]:
        if not model:  # the unpruned network
            with self.log.open("a") as file:
                file.write(f"{self.imgsz}\n")
        if (self.log.parent / f"broken{self.imgsz}").exists():
            raise OSError("out of luck")
        found = super().evaluate(model)
        return {**found, "map50_95": found["map50_95"] - 0.1 * math.log2(640 / self.imgsz)}

    def evaluate_together(self, models: Mapping[str, Any], sizes: Mapping[str, int | None], say: Any) -> dict[str, Any]:
        return {name: self.at(sizes.get(name)).evaluate(model) for name, model in models.items()}

    def measure_together(self, models: Mapping[str, Any], sizes: Mapping[str, int | None]) -> dict[str, Any]:
        return {name: self.at(sizes.get(name)).measure(model) for name, model in models.items()}

    def train_native(self, path: str, folder: Path, on_epoch: Any, trust: bool = False) -> tuple[Tuned, str]:
        return Tuned({}, 2, 1, {}, {}), f"as pretended at {self.imgsz} px"


def sized_tools(config: RunConfig, device: str, gate: DeviceGate) -> SizedTools:
    return SizedTools(log=Path(config.model.path).parent / "log")


def context_of(folder: Path) -> WorkerContext:
    config = make_config(**{"model.path": str(folder / "model.pt"), "space.imgsz": SIZES})
    settings = config.model_dump(mode="json")
    return WorkerContext(settings, str(folder / "run"), 1, 0.0, sized_tools, baseline_latency_ms=20.0)


def measured(folder: Path) -> list[str]:
    return (folder / "log").read_text().split()


def test_what_was_measured_survives_a_death_and_is_not_measured_again(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.folder.path.mkdir()
    assert missing_sizes(context.folder, context.config) == [512, 448]
    (tmp_path / "broken448").touch()
    with pytest.raises(OSError, match="out of luck"):
        work_on_free_moves(context, [512, 448])
    assert missing_sizes(context.folder, context.config) == [448]
    (tmp_path / "broken448").unlink()
    work_on_free_moves(context, [512, 448])  # as Ray repeats the task of a worker that died
    assert missing_sizes(context.folder, context.config) == []
    assert measured(tmp_path) == ["512", "448", "448"]
    for move in context.folder.read_free_moves():
        speedup = (640 / (move.imgsz or 0)) ** 2
        assert move.metrics["speedup"] == pytest.approx(speedup)
        assert move.metrics["latency_ms"] == pytest.approx(20.0 / speedup)
        assert move.metrics["map50_95"] == pytest.approx(0.6 - 0.1 * math.log2(640 / (move.imgsz or 0)))
        assert move.metrics["params_m"] == 3.0


def test_a_run_of_one_size_has_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for sizes in ([640], [], None):
        assert missing_sizes(folder, make_config(**{"space.imgsz": sizes})) == []


def pick(latency_ms: float) -> Pick:
    metrics = {"map50_95": 0.5, "latency_ms": latency_ms}
    return Pick(
        TrialRecord(
            trial_id=f"t{latency_ms}", state="completed", plan_hash="", ratios={}, metrics=metrics, epochs=0,
            fidelity="refit", finished_at=0.0,
        ),
        "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("latencies", "count", "sizes"),
    [([9.0], 1, [512]), ([5.0], 1, [320]), ([5.1, 9.9], 2, [320, 512]), ([4.0], 3, [320, 448, 512])],
)
def test_the_sizes_nearest_to_the_picks_latency_are_fine_tuned(
    latencies: list[float], count: int, sizes: list[int], tmp_path: Path
) -> None:
    folder, picks = RunFolder(tmp_path), [pick(latency) for latency in latencies]
    for imgsz, latency_ms in ((512, 10.0), (448, 7.0), (320, 5.0)):
        folder.write_free_move(imgsz, {"map50_95": 0.5, "latency_ms": latency_ms})
    assert sorted(choose_free_moves(folder, picks, count)) == sorted(sizes)
    with pytest.raises(SearchError, match=r"--free-moves 4 needs as many free moves, but .* measured 3; a search over"):
        choose_free_moves(folder, picks, 4)


def test_a_fine_tuned_free_move_is_judged_beside_the_picks_and_marks_those_that_it_beats(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    folder, plan = context.folder, Plan({"model.0.c0": 0.5})
    folder.write_baseline({"metrics": {"map50_95": 0.6, "latency_ms": 20.0}, "imgsz": 640})
    metrics = {"map50_95": 0.4, "latency_ms": 20.0 / 1.0625}
    record = pick(8.0).record.changed(trial_id="t0000", metrics=metrics, ratios=dict(plan.ratios))
    folder.store.append(record)
    folder.trial_dir("t0000").mkdir(parents=True)
    plan.save(folder.trial_plan("t0000"))
    folder.trial_checkpoint("t0000").write_text(json.dumps(dict(plan.ratios)))
    jobs = [Job("t0000", "knee"), Job("unpruned@448", native=str(tmp_path / "model.pt"), imgsz=448)]
    (folder.path / jobs[1].start).parent.mkdir(parents=True)
    (folder.path / jobs[1].start).write_text("{}")
    for job in jobs:
        finetune_job(context, job)
    compare_finalists(context, [job.place for job in jobs])

    (tuned,), (picked,) = folder.read_tuned_moves(), folder.read_selected()
    assert (tuned.name, tuned.recipe) == ("unpruned@448", "unpruned at 448 px, as pretended at 448 px")
    assert (folder.tuned_moves_root / "unpruned@448" / "best.pt").is_file()
    assert folder.read_session()["networks"] == ["baseline", "t0000", "unpruned@448"]
    assert tuned.after["map50_95"] == pytest.approx(0.6 - 0.1 * math.log2(640 / 448))
    assert tuned.after["speedup"] == pytest.approx((640 / 448) ** 2)
    assert picked.after["speedup"] == 1.0625
    assert beaten_picks([picked], [], [tuned]) == {"t0000": "unpruned@448"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_measures_them_beside_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model.path": str(tmp_path / "model.pt"), "space.imgsz": SIZES, "search.trials": 2}
    (tmp_path / "model.pt").write_text("{}")
    prepared = make_prepared(tmp_path / "run", **settings)
    run_sweep(prepared, sized_tools)
    assert sorted(measured(tmp_path)) == ["448", "512", "640"]
    told = capsys.readouterr().err
    assert "measuring the unpruned model at 512, 448 px, too" in told
    assert "unpruned@512: mAP50-95 0.568, 1.56 times as fast (unpruned)" in told
    folder = prepared.folder
    rows = front_rows(folder)
    assert [row["trial_id"] for row in rows if row["kind"] == "free move"] == ["unpruned@512", "unpruned@448"]
    assert [row["checkpoint"] for row in rows][-1] == str(tmp_path / "model.pt")
    kept = {move.imgsz: move.metrics for move in folder.read_free_moves()}
    folder.free_moves.unlink()
    folder.write_free_move(512, kept[512])  # as if the driver had died after the first
    run_sweep(prepared, sized_tools)
    assert sorted(measured(tmp_path)) == ["448", "448", "512", "640"]
