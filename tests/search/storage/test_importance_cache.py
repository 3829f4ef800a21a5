"""Importance scores that a run keeps: computed once, the same in every worker, anew where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretoprune.pruning import workbench
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.errors import PruningError
from paretoprune.search.config.run_config import build_config, nest
from paretoprune.search.storage.importance_cache import SCORES_NAME, keep_scores, kept_scores
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.worker import worker
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import carried, start_courier
from paretoprune.search.worker.worker import work_on_baseline, work_on_trial
from tests.pruning.recovery_material import shapes_dataset
from tests.search.fakes import FakeTools, NoGate, make_config, quick_tools

MADE_FROM = {"importance": "taylor", "seed": 0}


def test_the_same_settings_find_them_again(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random(100)
    keep_scores(tmp_path, MADE_FROM, scores)
    np.testing.assert_array_equal(kept_scores(tmp_path, dict(reversed(MADE_FROM.items()))), scores)
    assert kept_scores(tmp_path, {**MADE_FROM, "seed": 1}) is None


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_torn_file_is_as_good_as_none(tmp_path: Path, kept: float) -> None:
    assert kept_scores(tmp_path, MADE_FROM) is None
    keep_scores(tmp_path, MADE_FROM, np.arange(1000.0))
    content = (tmp_path / SCORES_NAME).read_bytes()
    (tmp_path / SCORES_NAME).write_bytes(content[: int(kept * len(content))])
    assert kept_scores(tmp_path, MADE_FROM) is None


def make_tools(data: Path, importance: str, seed: int = 0) -> PruningOperations:
    settings = {
        "model.path": str(BASELINE), "model.imgsz": IMGSZ, "data.path": str(data), "recover.importance": importance,
        "recover.calibration_images": 4, "search.seed": seed,
    }  # fmt: skip
    return PruningOperations(build_config(nest(settings)), "cpu", NoGate())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The criteria that were computed, in order."""
    found: list[str] = []
    score = workbench.score

    def noted(name: str, *given: Any) -> np.ndarray:
        found.append(name)
        return score(name, *given)

    monkeypatch.setattr(workbench, "score", noted)
    return found


def test_another_worker_cuts_the_same_channels_without_computing_them(tmp_path: Path, computed: list[str]) -> None:
    data, ratios = shapes_dataset(tmp_path / "shapes"), {"model.4*": 0.5}
    first = make_tools(data, "taylor")
    first.keep_scores(tmp_path)
    assert computed == ["taylor"]
    second = make_tools(data, "taylor")
    second.recall_scores(tmp_path)
    assert second.prune(ratios)[1] == first.prune(ratios)[1]
    assert computed == ["taylor"]

    other = make_tools(data, "taylor", seed=1)  # other images
    other.recall_scores(tmp_path)
    other.prune(ratios)
    assert computed == ["taylor", "taylor"]


def test_a_criterion_of_an_older_version_is_needed_for_new_removals_only(tmp_path: Path) -> None:
    """Its run's picks can still be fine-tuned."""
    tools = make_tools(shapes_dataset(tmp_path / "shapes"), "separability")
    assert tools.stats(tools.baseline)["params_m"] > 0
    with pytest.raises(PruningError, match=r"`importance` must be one of .*, but got 'separability'; choose one"):
        tools.prune({"model.4*": 0.5})


def test_the_first_worker_keeps_them_in_the_run_and_the_others_look_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []

    class Tools(FakeTools):
        def keep_scores(self, run: Path) -> None:
            asked.append(("keep", run))

        def recall_scores(self, run: Path) -> None:
            assert "prune" not in self.calls
            asked.append(("recall", run))

    monkeypatch.setattr(worker, "_KEPT", {})
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    settings = make_config(**{"model.path": str(model), "trial.epochs": 0}).model_dump(mode="json")
    context = WorkerContext(settings, str(tmp_path / "run"), 1, 0.0, lambda *given: Tools(), 10.0)
    work_on_baseline(context)
    request = TrialRequest(trial_id="t0000", ratios={"model.0.c0": 0.5}, provenance="test")
    assert work_on_trial(context, request).error is None
    assert asked == [("keep", tmp_path / "run"), ("recall", tmp_path / "run")]


@pytest.mark.usefixtures("ray_session")
def test_they_reach_workers_that_do_not_see_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    courier = start_courier(run)
    context = WorkerContext(make_config().model_dump(mode="json"), str(run), 1, 0.0, quick_tools, courier=courier)
    with carried(context, [], [SCORES_NAME]) as here:  # as the baseline's worker
        assert here.folder.path != run
        keep_scores(here.folder.path, MADE_FROM, np.arange(3.0))
    assert kept_scores(run, MADE_FROM) is not None
    for _ in range(2):
        with carried(context, [SCORES_NAME], []) as here:  # as a trial's
            np.testing.assert_array_equal(kept_scores(here.folder.path, MADE_FROM), np.arange(3.0))
        (run / SCORES_NAME).unlink(missing_ok=True)  # fetched once: they never change
