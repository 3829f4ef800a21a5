"""A model whose channels were misread: nothing is written or started by any command, and a trial fails by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import paretoprune.pruning.workbench
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.results.store.records import TrialState
from paretoprune.search.cli import run
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model
from tests.search.fakes import NoGate, make_config

LINE = "they differ first in block model.2 (C2f), seen at model.2.cv1.conv in inference: its output is off by "


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("misread")
    save_checkpoint(tiny_model(), root / "tiny.pt")
    return {"model.path": str(root / "tiny.pt"), "data.path": str(shapes_dataset(root / "shapes", train=4, val=2))}


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block 2 is thought to read its input's channels in the opposite order."""

    def table_of(model: nn.Module) -> LayerTable:
        table = build_layer_table(model)
        conv = table.convs["model.2.cv1.conv"]
        return replace(table, convs={**table.convs, "model.2.cv1.conv": replace(conv, inputs=conv.inputs[::-1].copy())})

    monkeypatch.setattr(paretoprune.pruning.workbench, "build_layer_table", table_of)


def is_one_line(text: str) -> bool:
    return text.startswith("error: ") and LINE in text and text.count("\n") == 1


@pytest.mark.parametrize("strategy", ["structural", "sequential", "mask"])
def test_prune_writes_nothing(
    strategy: str, material: dict[str, Any], misread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ratio", "0.5", "--round-to", "1", "--imgsz", "64", "--strategy", strategy]
    assert run(["prune", material["model.path"], *options, "-o", str(tmp_path / "o.pt")]) == 1
    captured = capsys.readouterr()
    assert is_one_line(captured.err)
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_search_does_not_begin(
    material: dict[str, Any], misread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--imgsz", "64", "--set", "space.round_to=1", "--run", str(tmp_path / "run")]
    assert run(["search", material["model.path"], material["data.path"], *options]) == 1
    assert is_one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_leaves_the_block_whole_is_checked_without_it(
    material: dict[str, Any], misread: None, tmp_path: Path
) -> None:
    from paretoprune.search.sweep.preflight import check_model

    settings = {**material, "model.imgsz": 64, "space.round_to": 1}
    check_model(make_config(**{**settings, "space.exclude": ["model.1"]}))


def test_a_trial_fails_with_the_reason(material: dict[str, Any], misread: None, tmp_path: Path) -> None:
    settings = {**material, "model.imgsz": 64, "space.round_to": 1, "recover.importance": "l2"}
    tools = make_tools(make_config(**settings), "cpu", NoGate())
    request = TrialRequest(trial_id="t0001", ratios={"model.1": 0.5}, provenance="random")
    record = run_trial(request, TrialSettings(0, True, 2.0), tools, NoGate(), tmp_path)
    assert record.state is TrialState.FAILED
    assert record.error is not None
    assert record.error.startswith("prune: NotEquivalentError: ")
    assert LINE in record.error
    assert record.error.count("\n") == 0
    assert not list(tmp_path.glob("*.pt"))
