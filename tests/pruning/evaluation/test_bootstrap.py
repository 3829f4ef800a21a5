"""The paired bootstrap: against Ultralytics' own figure, a closed form, and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.bootstrap import ImageStats, paired_bootstrap
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.yolo.loading import load_model


def one_object_an_image(hits: list[bool]) -> ImageStats:
    """Each image has one object of one class and one prediction of it, right at every IoU or none."""
    return ImageStats(
        tp=[np.full((1, 10), hit) for hit in hits],
        conf=[np.array([0.9])] * len(hits),
        pred_cls=[np.array([0.0])] * len(hits),
        target_cls=[np.array([0.0])] * len(hits),
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], ImageStats]:
    data = build_dataset(tmp_path_factory.mktemp("data") / "digits", train=4, val=24)
    evaluator = Evaluator(str(data), IMGSZ, "cpu", batch=8)
    found = evaluator.run_by_image(load_model(BASELINE))
    evaluator.close()
    return found


def test_all_images_once_give_the_validators_own_figure(seen: tuple[dict[str, float], ImageStats]) -> None:
    metrics, stats = seen
    assert len(stats) == 24
    map50_95, map50 = stats.accuracy()
    assert map50_95 == pytest.approx(metrics["map50_95"], abs=1e-12)
    assert map50 == pytest.approx(metrics["map50"], abs=1e-12)


def test_a_network_does_not_differ_from_itself(seen: tuple[dict[str, float], ImageStats]) -> None:
    noise = paired_bootstrap(seen[1], seen[1], resamples=20)
    assert (noise.difference, noise.std, noise.ci95, noise.images) == (0.0, 0.0, (0.0, 0.0), 24)


def test_the_interval_holds_the_difference_and_a_seed_repeats_it() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.8
    other = np.where(rng.random(60) < 0.3, ~hits, hits)
    pair = one_object_an_image(hits.tolist()), one_object_an_image(other.tolist())
    noise = paired_bootstrap(*pair, resamples=100)
    assert noise.ci95[0] <= noise.difference <= noise.ci95[1]
    assert 0 < noise.std < 0.2
    assert noise == paired_bootstrap(*pair, resamples=100)
    assert noise != paired_bootstrap(*pair, resamples=100, seed=1)
    assert paired_bootstrap(*pair, max_seconds=0.0).resamples == 20


def test_noise_shrinks_with_the_root_of_the_images() -> None:
    rng = np.random.default_rng(1)
    stds = []
    for images in (50, 800):
        a, b = (one_object_an_image((rng.random(images) < 0.7).tolist()) for _ in range(2))
        stds.append(paired_bootstrap(a, b, resamples=100).std)
    assert 2.5 < stds[0] / stds[1] < 6  # 4 by the law, and AP is no plain mean


def test_different_images_are_refused() -> None:
    with pytest.raises(PruningError, match="but got 3 and 2"):
        paired_bootstrap(one_object_an_image([True] * 3), one_object_an_image([True] * 2))
    with pytest.raises(PruningError, match="two images or more"):
        paired_bootstrap(one_object_an_image([True]), one_object_an_image([True]))


def test_without_objects_accuracy_is_zero() -> None:
    empty = ImageStats([np.zeros((0, 10), bool)] * 2, [np.zeros(0)] * 2, [np.zeros(0)] * 2, [np.zeros(0)] * 2)
    assert empty.accuracy() == (0.0, 0.0)
