"""Sessions: one per block, each leaves a checkpoint, and an interruption costs at most the one under way."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.strategies import Outcome
from paretoprune.pruning.strategies.sequential import plan_steps, share_epochs
from paretoprune.pruning.surgery.surgery import replay
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.conftest import StockPython
from tests.pruning.recovery_material import files_below, same_weights, stock_model, weights
from tests.pruning.strategies_material import RATIOS, CountingTune, Killed, make_bench, run, shapes_of

pytestmark = pytest.mark.slow

_LOADS = """
import os, sys
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
import numpy as np
from ultralytics import YOLO
image = np.zeros((96, 96, 3), dtype=np.uint8)
for path in sys.argv[1:]:
    model = YOLO(path)
    model.predict(image, imgsz=96, device="cpu", verbose=False)
    print(sum(p.numel() for p in YOLO(path).model.parameters()))
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@dataclass
class Sequence:
    """A finished sequence of five epochs; nobody writes into its folder."""

    folder: Path
    outcome: Outcome
    tune: CountingTune

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return folder


@pytest.fixture(scope="module")
def finished(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    folder, tune = tmp_path_factory.mktemp("finished"), CountingTune()
    return Sequence(folder, run("sequential", bench, folder, 5, tune), tune)


@pytest.fixture(scope="module")
def untuned(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run("sequential", bench, tmp_path_factory.mktemp("untuned"))


def test_five_blocks_are_five_sessions_and_checkpoints(
    bench: Workbench, stock_python: StockPython, tmp_path: Path
) -> None:
    tune = CountingTune()
    outcome = run("sequential", bench, tmp_path, 10, tune)
    assert [p.name for p in outcome.sessions] == [f"session-{k}.pt" for k in range(1, 6)]
    assert [epochs for epochs, _ in tune.calls] == [2] * 5
    assert outcome.notes == {"sessions": 5}
    sizes = [int(line) for line in stock_python(_LOADS, *outcome.sessions).stdout.splitlines() if line.isdigit()]
    assert len(sizes) == 5
    assert sizes == sorted(set(sizes), reverse=True)  # every session removed something
    assert sizes[-1] == sum(p.numel() for p in outcome.model.parameters())


def test_only_the_first_layer_of_a_block_is_cut(bench: Workbench, untuned: Outcome) -> None:
    steps = plan_steps(bench, RATIOS, 0)
    assert [s.group.name for s in steps] == ["model.1", "model.2.cv1", "model.4.cv1", "model.5", "model.22.cv2.0.0"]
    # what loses its channels with the first convolution of a C2f goes with it, the rest of the block stays
    assert {n for n in untuned.layers if n.startswith("model.4.")} == {
        "model.4.cv1",
        "model.4.m.0.cv2",
        "model.4.m.1.cv2",
    }
    reasons = dict(untuned.skipped)
    assert "only the first layer to prune in a block is cut, here model.4.cv1" in reasons["model.4.m.0.cv1"]
    assert untuned.model.get_submodule("model.4.m.0.cv1.conv").out_channels == 16


def test_the_plan_counts_from_the_baseline(bench: Workbench, untuned: Outcome) -> None:
    """Though every session prunes what the one before left: replayed at once it is the same network."""
    again, _ = replay(bench.model, bench.table, untuned.plan)
    assert same_weights(weights(again), weights(untuned.model))


def test_each_session_starts_from_the_file_before(bench: Workbench, finished: Sequence) -> None:
    outcome = finished.outcome
    for given, path in zip(finished.tune.shapes, outcome.sessions, strict=True):
        assert given == shapes_of(stock_model(path))
    last = weights(stock_model(outcome.sessions[-1]))
    assert same_weights(weights(outcome.model), last)
    # a layer of no session's carries the mark of each tuning
    name = "model.7.bn.bias"
    marks = (last[name] - bench.model.state_dict()[name]).mean()
    assert float(marks) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("dies_at", [1, 3, 5])
def test_an_interrupted_sequence_goes_on_at_its_session(
    bench: Workbench, finished: Sequence, dies_at: int, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run("sequential", bench, tmp_path, 5, CountingTune(dies_at=dies_at))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path).glob("session-*.pt")}
    assert len(before) == dies_at - 1
    tune = CountingTune()
    outcome = run("sequential", bench, tmp_path, 5, tune)
    assert len(tune.calls) == 5 - (dies_at - 1)
    assert outcome.epochs == 5
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert finished.outcome.plan == outcome.plan
    assert same_weights(weights(finished.outcome.model), weights(outcome.model))


def test_a_session_counts_only_once_it_is_listed(bench: Workbench, tmp_path: Path) -> None:
    """Killed between its checkpoint and the list: the file is there, but nothing says that it is whole."""
    with pytest.raises(Killed):
        run("sequential", bench, tmp_path, 5, CountingTune(dies_at=3))
    save_checkpoint(bench.model, tmp_path / "session-3.pt")
    outcome = run("sequential", bench, tmp_path, 5)
    assert shapes_of(stock_model(outcome.sessions[2])) != shapes_of(bench.model)
    assert not [name for name in files_below(tmp_path) if name.startswith(".")]


def test_a_finished_sequence_is_not_repeated(bench: Workbench, finished: Sequence) -> None:
    first, tune = finished.outcome, CountingTune()
    again = run("sequential", bench, finished.folder, 5, tune)
    assert tune.calls == []
    assert (again.plan, again.epochs, again.sessions) == (first.plan, first.epochs, first.sessions)
    assert same_weights(weights(again.model), weights(first.model))


@pytest.mark.parametrize(
    ("ratios", "epochs", "recover"), [({"model.1": 0.5}, 5, "none"), (RATIOS, 4, "none"), (RATIOS, 5, "bn")]
)
def test_sessions_of_another_sequence_are_refused(
    bench: Workbench, finished: Sequence, ratios: dict[str, float], epochs: int, recover: str
) -> None:
    with pytest.raises(PruningError, match="must hold sessions of this very sequence") as error:
        run("sequential", bench, finished.folder, epochs, recover=recover, ratios=ratios)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"identity": "x"}', '{"identity": "x", "sessions": [{}]}'])
def test_a_broken_list_is_one_clear_line(bench: Workbench, text: str, tmp_path: Path) -> None:
    (tmp_path / "sessions.json").write_text(text)
    with pytest.raises(PruningError, match="must list finished sessions") as error:
        run("sequential", bench, tmp_path)
    assert "\n" not in str(error.value)


def test_a_listed_checkpoint_that_is_gone_is_named(bench: Workbench, finished: Sequence, tmp_path: Path) -> None:
    (finished.copy(tmp_path) / "session-2.pt").unlink()
    with pytest.raises(PruningError, match=r"session-2\.pt is gone"):
        run("sequential", bench, tmp_path, 5)


def test_the_list_says_what_each_session_did(bench: Workbench, tmp_path: Path) -> None:
    run("sequential", bench, tmp_path, 7)
    content = json.loads((tmp_path / "sessions.json").read_text())
    rows = content["sessions"]
    assert content["schema_version"] == 1
    assert [r["block"] for r in rows] == [1, 2, 4, 5, 22]
    assert [r["epochs"] for r in rows] == [1, 1, 1, 2, 2]
    assert [r["checkpoint"] for r in rows] == [f"session-{k}.pt" for k in range(1, 6)]
    assert rows[0]["plan"]["ratios"] == {"model.1": 0.25}


@pytest.mark.parametrize(
    ("epochs", "sessions", "shares"),
    [(10, 5, [2] * 5), (7, 5, [1, 1, 1, 2, 2]), (2, 5, [0, 0, 0, 1, 1]), (0, 3, [0] * 3), (4, 0, [])],
)
def test_epochs_are_shared(epochs: int, sessions: int, shares: list[int]) -> None:
    assert share_epochs(epochs, sessions) == shares


def test_sessions_without_epochs_are_said(bench: Workbench, tmp_path: Path) -> None:
    outcome = run("sequential", bench, tmp_path, 2)
    assert outcome.epochs == 2
    assert outcome.notes == {"sessions": 5, "sessions_without_epochs": 3}
