"""Several GPUs for one pick: what is asked of Ray, of the fine-tuning, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from paretoprune.search.config.run_config import build_config
from paretoprune.search.errors import SearchError
from paretoprune.search.finalists.finetune_picks import _recipe, _with_gpus
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.worker.context import WorkerContext
from tests.search.fakes import FakeTools, NoGate

MODEL = {"model": {"path": "m.pt"}, "data": {"path": "d.yaml"}}


def context(gpus: float) -> WorkerContext:
    return WorkerContext(MODEL, "run", cpus=2, gpus=gpus, factory=lambda *_: FakeTools())


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}]
    dead = {"Alive": False, "Resources": {"GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead])


def test_a_pick_is_given_its_gpus(two_machines: None) -> None:
    assert _with_gpus(context(0.5), 2).gpus == 2.0
    assert _with_gpus(context(0.5), 1).gpus == 0.5


def test_more_than_a_machine_has_is_refused(two_machines: None) -> None:
    with pytest.raises(SearchError, match="gpus_per_pick is 4, but no machine of the cluster has over 2 GPUs"):
        _with_gpus(context(1.0), 4)


def test_without_a_gpu_it_is_said_that_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _with_gpus(context(0.0), 2).gpus == 0.0
    assert "gpus_per_pick=2 changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("worker", "expected"), [("cuda:0", "cuda:0,cuda:1"), ("cpu", "cpu")])
def test_the_fine_tuning_is_told_all_of_them(
    worker: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "d.yaml").touch()
    data = {"data": {"path": str(tmp_path / "d.yaml")}}
    config = build_config({**MODEL, **data, "finetune": {"gpus_per_pick": 2}}, "test")
    tools = PruningOperations(config, worker, NoGate())
    seen: dict[str, Any] = {}
    monkeypatch.setattr(tools, "_tune", lambda *_, **named: seen.update(named))
    tools.finetune_fully(object(), Path("folder"))
    assert seen["device"] == expected


def test_the_batch_must_be_divisible() -> None:
    with pytest.raises(ValueError, match="batch must be a multiple of gpus_per_pick, got 16 and 3"):
        build_config({**MODEL, "finetune": {"gpus_per_pick": 3}}, "test")


def test_a_pick_that_is_done_is_not_done_again_with_other_gpus() -> None:
    settings = build_config(MODEL, "test").finetune.model_dump(mode="json")
    assert _recipe({**settings, "gpus_per_pick": 4}) == _recipe(settings)
    assert _recipe({**settings, "epochs": 4}) != _recipe(settings)
