"""A network with layers of the user's own: with trust it works wherever the run loads it, and without it nowhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.pruning.errors import ModelError, RefusedNameError
from paretoprune.pruning.strategies import get_strategy
from paretoprune.pruning.training.stock_baseline import AS_PICKS
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import pickled_classes, save_checkpoint
from paretoprune.search.config.run_config import RunConfig, build_config, nest
from paretoprune.search.finalists.final_evaluation import Finalist
from paretoprune.search.finalists.finetune_picks import Job
from paretoprune.search.sweep.preflight import check_natives, trusts_native
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.remote_latency import MeasuringJob, measure_there
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model

LAYERS = """
import torch
from torch import nn

class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(channels), Swish()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))
"""
MODULE = "layers_of_a_user"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on Python's path with the user's module, his checkpoint and a dataset."""
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{MODULE}.py").write_text(LAYERS)
    sys.path.insert(0, str(folder))
    layers: Any = importlib.import_module(MODULE)
    model: Any = tiny_model()
    model.model[1].act = layers.Swish()
    model.model[2].m[0].cv1 = layers.Block(model.model[2].m[0].cv1.conv.in_channels)
    torch.save({"model": model}, folder / "own.pt")
    shapes_dataset(folder / "data", train=4, val=2, size=64)
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


def config_of(place: Path, **more: Any) -> RunConfig:
    settings = {
        "model.path": str(place / "own.pt"), "model.imgsz": 64, "model.trust_checkpoint": True,
        "data.path": str(place / "data" / "data.yaml"), "recover.calibration_images": 4, "recover.importance": "l2",
        "space.round_to": 1, "latency.max_seconds": 0.2, "latency.threads": 1, "finetune.epochs": 1,
        "finetune.workers": 0, "trial.epochs": 1,
    }  # fmt: skip
    return build_config(nest({**settings, **more}))


def test_without_trust_the_class_is_named_and_not_imported(place: Path) -> None:
    sys.modules.pop(MODULE)
    with pytest.raises(
        RefusedNameError, match=rf"names {MODULE}\.\w+; do not load it; .* --trust-checkpoint"
    ) as caught:
        load_model(place / "own.pt")
    assert caught.value.name.startswith(MODULE)
    assert MODULE not in sys.modules


def test_a_class_that_cannot_be_imported_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(place)])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ModelError, match=f"needs the module '{MODULE}', which cannot be imported here") as caught:
        load_model(place / "own.pt", trust=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_whole_way_of_a_run(place: Path, tmp_path: Path) -> None:
    """What a trial, a pick, a native rival, the last session and a measuring elsewhere do, each from the files."""
    tools = PruningOperations(config_of(place), "cpu", DeviceLock("cpu"))
    pruned, plan = tools.prune({"model.2.m.0.cv1.conv": 0.5, "model.1": 0.5})
    tools.recover(pruned, plan)
    before = {name: [*value.shape] for name, value in pruned.state_dict().items()}
    assert before["model.2.m.0.cv1.bn.weight"] == [before["model.2.m.0.cv1.conv.weight"][0]] != [16]
    tools.save(pruned, tmp_path / "pruned.pt")
    names = {name for name in pickled_classes(tmp_path / "pruned.pt") if MODULE in name}
    assert names == {f"{MODULE}.Swish", f"{MODULE}.Block"}
    tuned = tools.finetune_fully(tools.load(tmp_path / "pruned.pt"), tmp_path / "pick")
    tools.save(tuned.model, tmp_path / "best.pt")
    best = tools.load(tmp_path / "best.pt")
    assert {name: [*value.shape] for name, value in best.state_dict().items()} == before
    content = (tmp_path / "best.pt").read_bytes()
    job = MeasuringJob(
        suffix=".pt", channels=3, baseline_key="trusted", imgsz=64, baseline_imgsz=64, batch=1, threads=1,
        max_seconds=0.2, target_halfwidth=0.01, runtime="torch", half=False, cpu=True, trust=True,
    )  # fmt: skip
    assert measure_there(job, content, (place / "own.pt").read_bytes())["median_ms"] > 0
    rival, recipe = tools.train_native(str(place / "own.pt"), tmp_path / "native", lambda *_: False, trust=True)
    assert recipe == AS_PICKS
    tools.save(rival.model, tmp_path / "rival.pt")
    with pytest.raises(RefusedNameError, match=MODULE):
        tools.load(tmp_path / "rival.pt", trust=False)
    assert tools.load(tmp_path / "rival.pt", trust=True)


@pytest.mark.slow
def test_sequential_sessions_are_loaded_as_their_model_was(place: Path, tmp_path: Path) -> None:
    bench = Workbench(str(place / "own.pt"), str(place / "data" / "data.yaml"), 64, "cpu", calibration_images=4,
                      importance="l2", round_to=1, trust_checkpoint=True)  # fmt: skip
    for _ in range(2):  # once more from the files
        outcome = get_strategy("sequential").run(bench, {"model.1": 0.5}, 0, tmp_path, lambda model, *_: model, "refit")
    assert MODULE in str(pickled_names(outcome.model, tmp_path))


def pickled_names(model: nn.Module, folder: Path) -> set[str]:
    save_checkpoint(model, folder / "names.pt")
    return set(pickled_classes(folder / "names.pt"))


def test_a_native_rival_is_trusted_by_its_own_option_or_as_the_runs_model(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes((place / "own.pt").read_bytes())
    own, given = config_of(place), config_of(place, **{"finetune.trust_checkpoint": True})
    assert trusts_native(own, str(place / "own.pt"))
    assert not trusts_native(own, str(other))
    assert trusts_native(given, str(other))
    assert not trusts_native(config_of(place, **{"model.trust_checkpoint": False}), str(place / "own.pt"))
    check_natives(own, [str(place / "own.pt")])
    check_natives(given, [str(other)])
    with pytest.raises(RefusedNameError, match=f"other.pt' names {MODULE}"):
        check_natives(own, [str(other)])


def test_the_last_session_loads_each_network_as_it_was_loaded_before() -> None:
    assert Finalist("t0001", Path("a"), {}).trust is None
    assert Finalist("native:a", Path("a"), {}).trust is False
    assert Finalist("native:a", Path("a"), {"trust_checkpoint": True}).trust is True
    assert not Job("native:a", native="a.pt").trust
