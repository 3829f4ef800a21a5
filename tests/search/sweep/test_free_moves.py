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
from paretoprune.pruning.latency.runtimes import EngineFile
from paretoprune.pruning.plan import Plan
from paretoprune.results.analysis.frames import front_rows
from paretoprune.results.analysis.precisions import precision_table
from paretoprune.results.selection.selection import Pick
from paretoprune.results.selection.uncertainty import beaten_picks
from paretoprune.results.store.records import TrialRecord, as_record
from paretoprune.results.store.run_files import unpruned_words
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.config.sections import SpaceSection
from paretoprune.search.errors import SearchError
from paretoprune.search.finalists.final_evaluation import compare_finalists
from paretoprune.search.finalists.finetune_picks import Job, choose_free_moves, finetune_job
from paretoprune.search.samplers.observations import ObservationBuilder
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.space.space import Space, build_space
from paretoprune.search.sweep.free_moves import missing_moves
from paretoprune.search.sweep.state import SweepState
from paretoprune.search.sweep.sweep import run_sweep
from paretoprune.search.trial.context import Tuned
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import scratch_folder
from paretoprune.search.worker.worker import work_on_free_moves
from tests.search.fakes import FakeTools, make_config, make_prepared, make_table

SIZES = [640, 512, 448]
FILES = {"space.precision": ["fp32", "int8"], "deploy.format": "onnx"}


@dataclass
class SizedTools(FakeTools):
    """A smaller input costs 0.1 of accuracy per halving and is faster by its area, int8 costs 0.05 and is twice as
    fast; a line in ``log`` per validation."""

    imgsz: int = 640
    precision: str = "fp32"
    log: Path = field(default_factory=Path)

    def at(self, imgsz: int | None, precision: str | None = None) -> SizedTools:
        faster = (640 / (imgsz or 640)) ** 2 * (2.0 if precision == "int8" else 1.0)
        its = {"imgsz": imgsz or 640, "precision": precision or "fp32"}
        return replace(self, **its, speedup_of=lambda ratios: faster * (1.0 + sum(ratios.values()) / 8))

    def deployed(self, model: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
        lost = 0.05 if self.precision == "int8" else 0.0
        return {**metrics, "map50_95": metrics["map50_95"] - lost, "deploy_precision": self.precision}

    def evaluate(self, model: Any) -> dict[str, float]:
        if not model:  # the unpruned network
            with self.log.open("a") as file:
                file.write(f"{self.imgsz}\n")
        if (self.log.parent / f"broken{self.imgsz}").exists():
            raise OSError("out of luck")
        found = super().evaluate(model)
        return {**found, "map50_95": found["map50_95"] - 0.1 * math.log2(640 / self.imgsz)}

    def evaluate_together(
        self, models: Mapping[str, Any], sizes: Mapping[str, int | None], say: Any, precisions: Any, variants: Any
    ) -> dict[str, Any]:
        files = {name: (name, precisions.get(name)) for name in models} | variants
        its = {name: self.at(sizes.get(network), precision) for name, (network, precision) in files.items()}
        self.log.with_name("files").write_text(json.dumps({name: each.precision for name, each in its.items()}))
        return {
            name: its[name].deployed({}, its[name].evaluate(models[network])) for name, (network, _) in files.items()
        }

    def measure_together(self, models: Mapping[str, Any], sizes: Mapping[str, int | None]) -> dict[str, Any]:
        files = json.loads(self.log.with_name("files").read_text())
        its = {name: self.at(sizes.get(name), files[name]) for name in models}
        times = {name: its[name].measure(model) for name, model in models.items()}
        speedups = {name: times[name]["speedup"] for name in models}
        over = {n: {o: [speedups[n] / speedups[o]] * 3 for o in models if o != n} for n in models}
        return {name: {**times[name], "over": over[name]} for name in models}

    def train_native(self, path: str, folder: Path, on_epoch: Any, trust: bool = False) -> tuple[Tuned, str]:
        return Tuned({}, 2, 1, {}, {}), f"as pretended at {self.imgsz} px"


def sized_tools(config: RunConfig, device: str, gate: DeviceGate) -> SizedTools:
    return SizedTools(log=Path(config.model.path).parent / "log")


def space_of(*sizes: int, precisions: tuple[str, ...] = ()) -> Space:
    return build_space(make_table(), SpaceSection(), sizes=sizes, precisions=precisions)


def context_of(folder: Path, **settings: Any) -> WorkerContext:
    config = make_config(**{"model.path": str(folder / "model.pt"), "space.imgsz": SIZES, **settings})
    settings = config.model_dump(mode="json")
    return WorkerContext(settings, str(folder / "run"), 1, 0.0, sized_tools, baseline_latency_ms=20.0)


def measured(folder: Path) -> list[str]:
    return (folder / "log").read_text().split()


def test_what_was_measured_survives_a_death_and_is_not_measured_again(tmp_path: Path) -> None:
    context, space = context_of(tmp_path), space_of(*SIZES)
    context.folder.path.mkdir()
    plans = [Plan({}, imgsz=512), Plan({}, imgsz=448)]
    assert missing_moves(context.folder, space) == plans
    (tmp_path / "broken448").touch()
    with pytest.raises(OSError, match="out of luck"):
        work_on_free_moves(context, plans)
    assert missing_moves(context.folder, space) == plans[1:]
    (tmp_path / "broken448").unlink()
    work_on_free_moves(context, plans)  # as Ray repeats the task of a worker that died
    assert missing_moves(context.folder, space) == []
    assert measured(tmp_path) == ["512", "448", "448"]
    for move in context.folder.read_free_moves():
        speedup = (640 / (move.imgsz or 0)) ** 2
        assert move.metrics["speedup"] == pytest.approx(speedup)
        assert move.metrics["latency_ms"] == pytest.approx(20.0 / speedup)
        assert move.metrics["map50_95"] == pytest.approx(0.6 - 0.1 * math.log2(640 / (move.imgsz or 0)))
        assert move.metrics["params_m"] == 3.0


def test_a_run_of_one_size_has_none(tmp_path: Path) -> None:
    for sizes in ([640], []):
        assert missing_moves(RunFolder(tmp_path), space_of(*sizes)) == []


def test_there_is_one_for_each_size_in_each_precision_named_by_what_is_not_the_runs(tmp_path: Path) -> None:
    context, space = context_of(tmp_path, **FILES), space_of(640, 448, precisions=("fp32", "int8"))
    context.folder.path.mkdir()
    plans = missing_moves(context.folder, space)
    assert [(plan.imgsz, plan.precision) for plan in plans] == [(448, None), (None, "int8"), (448, "int8")]
    work_on_free_moves(context, plans)
    assert missing_moves(context.folder, space) == []
    moves = {move.trial_id: move for move in context.folder.read_free_moves()}
    assert list(moves) == ["unpruned@448", "unpruned@int8", "unpruned@448-int8"]
    assert [unpruned_words(name) for name in moves] == ["at 448 px", "in int8", "at 448 px in int8"]
    both = moves["unpruned@448-int8"]
    assert (both.imgsz, both.precision, both.metrics["deploy_precision"]) == (448, "int8", "int8")
    assert both.metrics["speedup"] == pytest.approx(2 * (640 / 448) ** 2)  # over the run's own size and precision
    assert moves["unpruned@int8"].metrics["map50_95"] == pytest.approx(0.55)
    with EngineFile("a.onnx", {"": b""}, "fp32").written() as place:  # a worker is ended by force: it goes with it
        assert place.is_relative_to(scratch_folder(context.run))
    state = SweepState(
        context.folder, space, SearchStudy(space, {"map50_95": "max", "latency_ms": "min"}, "random"), [], 3,
        ObservationBuilder(("map50_95", "latency_ms")),
    )  # fmt: skip
    for plan in space.unpruned[1:]:
        assert space.levels_of(plan) in state._study._seen


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
    assert sorted(move.imgsz or 0 for move in choose_free_moves(folder, picks, count)) == sorted(sizes)
    with pytest.raises(SearchError, match=r"--free-moves 4 needs as many free moves, but .* measured 3; a search over"):
        choose_free_moves(folder, picks, 4)


def finish(context: WorkerContext, record: TrialRecord, plan: Plan, jobs: list[Job]) -> None:
    """Fine-tune the trial and the free move of ``jobs``, and judge them together."""
    folder = context.folder
    folder.store.append(record)
    folder.trial_dir(record.trial_id).mkdir(parents=True)
    plan.save(folder.trial_plan(record.trial_id))
    folder.trial_checkpoint(record.trial_id).write_text(json.dumps(dict(plan.ratios)))
    (folder.path / jobs[1].start).parent.mkdir(parents=True)
    (folder.path / jobs[1].start).write_text("{}")
    for job in jobs:
        finetune_job(context, job)
    compare_finalists(context, [job.place for job in jobs])


def test_a_fine_tuned_free_move_is_judged_beside_the_picks_and_marks_those_that_it_beats(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    folder, plan = context.folder, Plan({"model.0.c0": 0.5})
    folder.write_baseline({"metrics": {"map50_95": 0.6, "latency_ms": 20.0}, "imgsz": 640})
    metrics = {"map50_95": 0.4, "latency_ms": 20.0 / 1.0625}
    record = pick(8.0).record.changed(trial_id="t0000", metrics=metrics, ratios=dict(plan.ratios))
    jobs = [Job("t0000", "knee"), Job("unpruned@448", native=str(tmp_path / "model.pt"), imgsz=448)]
    finish(context, record, plan, jobs)

    (tuned,), (picked,) = folder.read_tuned_moves(), folder.read_selected()
    assert (tuned.name, tuned.recipe) == ("unpruned@448", "unpruned at 448 px, as pretended at 448 px")
    assert (folder.tuned_moves_root / "unpruned@448" / "best.pt").is_file()
    assert folder.read_session()["networks"] == ["baseline", "t0000", "unpruned@448"]
    assert tuned.after["map50_95"] == pytest.approx(0.6 - 0.1 * math.log2(640 / 448))
    assert tuned.after["speedup"] == pytest.approx((640 / 448) ** 2)
    assert picked.after["speedup"] == 1.0625
    assert beaten_picks([picked], [], [tuned]) == {"t0000": "unpruned@448"}


def test_finalists_are_judged_in_their_own_precision_and_in_every_other_one(tmp_path: Path) -> None:
    """Latency is over the unpruned model's in the run's own, what a precision costs over the network itself in it."""
    context = context_of(tmp_path, **FILES)
    folder, plan = context.folder, Plan({"model.0.c0": 0.5}, precision="int8")
    folder.write_baseline({"metrics": {"map50_95": 0.6, "latency_ms": 20.0, "deploy_precision": "fp32"}, "imgsz": 640})
    metrics = {"map50_95": 0.4, "latency_ms": 10.0 / 1.0625}
    record = pick(8.0).record.changed(
        trial_id="t0000", metrics=metrics, ratios=dict(plan.ratios), precision=plan.precision
    )
    jobs = [Job("t0000", "knee"), Job("unpruned@int8", native=str(tmp_path / "model.pt"), precision="int8")]
    finish(context, record, plan, jobs)
    (tuned,), (picked,) = folder.read_tuned_moves(), folder.read_selected()
    assert tuned.recipe == "unpruned in int8, as pretended at 640 px"
    assert tuned.after["speedup"] == 2.0
    assert (picked.after["speedup"], picked.after["deploy_precision"]) == (2.125, "int8")
    session = folder.read_session()
    assert session["networks"] == ["baseline", "t0000", "unpruned@int8"]
    assert {name: list(by) for name, by in session["precisions"].items()} == {
        "baseline": ["fp32", "int8"], "t0000": ["int8", "fp32"],
    }  # fmt: skip
    by = session["precisions"]["t0000"]
    assert by["int8"]["speedup_over_own"] == [2.0] * 3
    assert by["fp32"]["speedup_over_own"] is None
    assert by["fp32"]["speedup"] == 1.0625
    assert by["fp32"]["map50_95"] - by["int8"]["map50_95"] == pytest.approx(0.05)
    table = precision_table(folder.read_baseline(), [folder_move("unpruned@int8")], session)
    assert table is not None
    assert table.rows["t0000"]["int8"].gain == 2.0
    assert table.rows["t0000"]["int8"].cost == pytest.approx(-0.05)
    assert table.advice.startswith("Ship the unpruned model in fp32: nothing faster here is within 0.02")


def folder_move(name: str) -> TrialRecord:
    metrics = {"map50_95": 0.55, "latency_ms": 10.0, "speedup": 2.0, "deploy_precision": "int8"}
    return as_record(name, metrics, None, "int8")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_measures_them_beside_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model.path": str(tmp_path / "model.pt"), "space.imgsz": SIZES, "search.trials": 2}
    (tmp_path / "model.pt").write_text("{}")
    prepared = replace(make_prepared(tmp_path / "run", **settings), space=space_of(*SIZES))
    run_sweep(prepared, sized_tools)
    assert sorted(measured(tmp_path)) == ["448", "512", "640"]
    told = capsys.readouterr().err
    assert "measuring the unpruned model at 512 px, at 448 px, too" in told
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
