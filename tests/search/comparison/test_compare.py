"""Strategies side by side: run once, taken up again, measured together, printed with the promised keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paretoprune.results.analysis.strategy_comparison import Comparison, ComparisonFolder
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.comparison.compare import ValidatedRun, check_names, compare
from paretoprune.search.comparison.operations import StrategyJob, StrategyTools, measure_strategies
from paretoprune.search.errors import RunFolderError, SearchError
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.storage.event_log import EventFeed
from paretoprune.search.trial.trial import Tuned
from paretoprune.search.worker.context import WorkerContext
from tests.search.fakes import NoGate, make_config
from tests.search.strategy_fakes import FIRST_SESSION, FakeStrategyTools, fake_strategies

Captured = pytest.CaptureFixture[str]
PROMISED = {
    "strategy", "params_m", "gflops", "speedup", "speedup_ci95", "map50_95", "epochs", "skipped", "checkpoint",
}  # fmt: skip
THREE = ("structural", "sequential", "mask")


def make_prepared(
    run_dir: Path, strategies: tuple[str, ...] = THREE, epochs: int = 2, ratio: float = 0.25
) -> ValidatedRun:
    return ValidatedRun(ComparisonFolder(run_dir), make_config(), strategies, {"*": ratio}, epochs, "0123456789abcdef")


def ran(folder: ComparisonFolder) -> list[str]:
    """What workers ran since the last look, in alphabetical order: they run at the same time."""
    log = folder.path / "ran.txt"
    lines = sorted(log.read_text().splitlines()) if log.is_file() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.fixture
def compared(tmp_path: Path, ray_session: object) -> tuple[ValidatedRun, Comparison]:
    prepared = make_prepared(tmp_path / "run")
    return prepared, compare(prepared, fake_strategies)


def test_every_strategy_is_run_and_measured_beside_the_unpruned_network(
    tmp_path: Path, ray_session: object, capsys: Captured
) -> None:
    prepared = make_prepared(tmp_path / "run")
    comparison = compare(prepared, fake_strategies)
    assert ran(prepared.folder) == ["mask anew", "sequential anew", "structural anew"]
    assert [row.strategy for row in comparison.rows] == list(THREE)
    structural, sequential, mask = comparison.rows
    assert structural.metrics["speedup"] == pytest.approx(1 + 0.5 / 8)
    assert structural.metrics["latency_ms"] == pytest.approx(comparison.baseline["latency_ms"] / (1 + 0.5 / 8))
    assert mask.metrics["speedup"] == comparison.baseline["speedup"] == 1.0
    assert mask.metrics["map50_95"] == pytest.approx(comparison.baseline["map50_95"])
    assert structural.metrics["map50_95_refit"] == 0.3
    assert sequential.sessions == (str(prepared.folder.strategy_dir("sequential") / FIRST_SESSION),)
    assert comparison.failed == {}
    for path in (prepared.folder.json, prepared.folder.csv, RunFolder(prepared.folder.path).report_html):
        assert path.is_file()
    for row in comparison.rows:
        assert row.epochs == 2
        assert Path(row.checkpoint).is_file()
        assert Path(row.plan).is_file()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "structural: tuning epoch 2/2: mAP50-95 0.400" in captured.err
    assert "mask: done after 2 epochs" in captured.err


def test_the_same_comparison_is_not_repeated(compared: tuple[ValidatedRun, Comparison], capsys: Captured) -> None:
    prepared, comparison = compared
    ran(prepared.folder)
    before = prepared.folder.json.stat().st_mtime_ns
    assert compare(prepared, fake_strategies) == comparison
    assert ran(prepared.folder) == []
    assert prepared.folder.json.stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().err


def test_one_more_strategy_is_run_alone_and_all_are_measured_again(compared: tuple[ValidatedRun, Comparison]) -> None:
    prepared, _ = compared
    ran(prepared.folder)
    comparison = compare(replace(prepared, strategies=(*THREE, "skip")), fake_strategies)
    assert ran(prepared.folder) == ["skip anew"]
    assert [row.strategy for row in comparison.rows] == [*THREE, "skip"]


def test_other_settings_or_a_missing_checkpoint_make_a_strategy_anew(compared: tuple[ValidatedRun, Comparison]) -> None:
    prepared, _ = compared
    ran(prepared.folder)
    prepared.folder.checkpoint("mask").unlink()
    compare(prepared, fake_strategies)
    assert ran(prepared.folder) == ["mask again"]  # its own folder, so what it left counts
    other = replace(prepared, epochs=1)
    assert [row.epochs for row in compare(other, fake_strategies).rows] == [1, 1, 1]
    assert ran(prepared.folder) == ["mask anew", "sequential anew", "structural anew"]
    assert compare(replace(other, model_hash="f" * 16), fake_strategies).failed == {}
    assert len(ran(prepared.folder)) == 3


def test_a_failed_strategy_holds_nothing_up_and_goes_on_where_it_was(tmp_path: Path, ray_session: object) -> None:
    prepared = make_prepared(tmp_path / "run")
    prepared.folder.path.mkdir()
    (prepared.folder.path / "fail-sequential").touch()
    comparison = compare(prepared, fake_strategies)
    assert comparison.failed == {"sequential": "RuntimeError: out of luck"}
    assert [row.strategy for row in comparison.rows] == ["structural", "mask"]
    log = (prepared.folder.strategy_dir("sequential") / "strategy.log").read_text()
    assert "Traceback" in log
    assert "out of luck" in log
    ran(prepared.folder)
    (prepared.folder.path / "fail-sequential").unlink()
    comparison = compare(prepared, fake_strategies)
    assert ran(prepared.folder) == ["sequential again"]
    assert comparison.failed == {}
    assert [row.strategy for row in comparison.rows] == list(THREE)


def test_where_all_fail_the_first_reason_is_said(tmp_path: Path, ray_session: object) -> None:
    prepared = make_prepared(tmp_path / "run", strategies=("skip",))
    prepared.folder.path.mkdir()
    (prepared.folder.path / "fail-skip").touch()
    with pytest.raises(SearchError, match="every strategy failed, the first because of RuntimeError: out of luck"):
        compare(prepared, fake_strategies)
    assert not prepared.folder.json.exists()


def test_without_epochs_the_final_accuracy_is_the_one_before_any(tmp_path: Path, ray_session: object) -> None:
    comparison = compare(make_prepared(tmp_path / "run", ("structural",), epochs=0), fake_strategies)
    (row,) = comparison.rows
    assert row.metrics["map50_95_refit"] == row.metrics["map50_95"]


def test_a_folder_that_another_driver_holds_is_refused(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path)
    with DriverLock(tmp_path), pytest.raises(RunFolderError, match="in use by another driver"):
        compare(prepared, fake_strategies)


def test_every_network_and_the_baseline_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = FakeStrategyTools()
    monkeypatch.setattr("paretoprune.search.comparison.operations.tools_of", lambda context: (tools, NoGate()))
    folder = ComparisonFolder(tmp_path)
    folder.strategies.mkdir()
    folder.strategy_dir("skip").mkdir()
    folder.checkpoint("skip").write_text('{"model.0": 0.5}')
    context = WorkerContext(make_config().model_dump(mode="json"), str(tmp_path), 1, 0.0, fake_strategies)
    measured = measure_strategies(context, ["skip"])
    assert tools.calls == [*2 * ["evaluate", "measure"], "release"]
    assert set(measured["strategies"]) == {"skip"}
    assert measured["baseline"]["latency_ratio"] == 1.0


class Tuning:
    """A strategy that tunes in ``sessions`` parts; without sessions it keeps no intermediate checkpoint."""

    def __init__(self, sessions: int) -> None:
        self.sessions = sessions
        self.calls: list[tuple[int, str]] = []

    def run(self, bench: Any, ratios: Any, epochs: int, folder: Path, tune: Any, recover: str) -> Any:
        self.calls.append((epochs, recover))
        model = "whole"
        for number in range(max(1, self.sessions)):
            model = tune(model, epochs // max(1, self.sessions), folder / f"part-{number}")
        kept = tuple(folder / f"{number}.pt" for number in range(self.sessions))
        return SimpleNamespace(model=model, sessions=kept, epochs=epochs)


@pytest.mark.parametrize(("sessions", "calls"), [(0, [(6, "refit")]), (3, [(6, "refit"), (0, "refit")])])
def test_the_accuracy_before_any_epoch(
    sessions: int, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = Tuning(sessions)
    tuned: list[tuple[str, int, int]] = []
    shown: list[tuple[str, int, int]] = []
    monkeypatch.setattr("paretoprune.pruning.strategies.get_strategy", lambda name: strategy)

    class Tools(StrategyTools):
        def __init__(self) -> None:
            self._config = make_config()
            self._bench: Any = None

        def _tune(self, model: Any, folder: Path, on_epoch: Any, section: Any, patience: int) -> Tuned:
            assert folder.is_dir()
            tuned.append((folder.name, section.epochs, patience))
            assert on_epoch(1, {"map50_95": 0.4}) is False
            return Tuned("tuned", section.epochs, 1, {"map50_95": 0.1 * len(tuned)}, {"map50_95": 0.5})

        def evaluate(self, model: Any) -> dict[str, float]:
            return {"map50_95": {"whole": 0.05}[model]}

    def on_stage(stage: str, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        shown.append((stage, epoch, epochs))

    done = Tools().run_strategy(StrategyJob("any", {"*": 0.3}, 6), tmp_path, on_stage)
    parts = max(1, sessions)
    assert done.outcome.model == "tuned"
    assert done.before_epochs == {"map50_95": 0.05 if sessions else 0.1}
    assert strategy.calls == calls
    assert tuned == [(f"part-{number}", 6 // parts, 0) for number in range(parts)]  # no patience: all epochs are spent
    assert shown == [(f"part-{number}", 1, 6 // parts) for number in range(parts)]


def test_a_feed_gives_whole_lines_once_and_passes_over_the_past(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "old"}\n')
    feed = EventFeed(path)
    with path.open("a") as stream:
        stream.write('{"event": "a"}\n{"event": ')
        stream.flush()
        assert [event["event"] for event in feed.fresh()] == ["a"]
        stream.write('"b"}\n')
        stream.flush()
        assert [event["event"] for event in feed.fresh()] == ["b"]
    assert list(feed.fresh()) == []
    assert list(EventFeed(tmp_path / "none").fresh()) == []


def test_names_are_taken_once_and_in_order() -> None:
    assert check_names(" mask,skip , mask,") == ("mask", "skip")
    with pytest.raises(ValueError, match="--strategies needs at least one name"):
        check_names(" , ")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, compared: tuple[ValidatedRun, Comparison]) -> Comparison:
    """The command prints this comparison instead of making one."""
    prepared, comparison = compared
    monkeypatch.setattr("paretoprune.search.comparison.compare.prepare", lambda *arguments: prepared)
    monkeypatch.setattr("paretoprune.search.comparison.compare.compare", lambda given: comparison)
    return comparison


def test_json_has_the_promised_keys_and_paths(printed: Comparison, capsys: Captured) -> None:
    capsys.readouterr()
    assert run(["compare", "m.pt", "d.yaml", "--budget-epochs", "2", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in rows] == list(THREE)
    for row in rows:
        assert set(row) >= PROMISED
        assert Path(row["checkpoint"]).is_file()
        assert row["skipped"] == [{"layer": "model.2", "reason": "feeds an addition"}]
        low, high = row["speedup_ci95"]
        assert low < row["speedup"] < high


def test_csv_and_table(printed: Comparison, capsys: Captured) -> None:
    capsys.readouterr()
    assert run(["compare", "m.pt", "d.yaml", "--budget-epochs", "2", "--format", "csv"]) == 0
    assert [line["strategy"] for line in csv.DictReader(io.StringIO(capsys.readouterr().out))] == list(THREE)
    assert run(["compare", "m.pt", "d.yaml", "--budget-epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["strategy", "(unpruned)", *THREE]
    assert lines[5] == "structural skipped 1: feeds an addition (model.2)"
