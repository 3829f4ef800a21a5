"""Several finished networks evaluated together: the same images for all, and one timing session over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.image_size import ImageSize
from paretoprune.results.store.accuracy import VAL_IMAGES
from paretoprune.results.store.run_files import UNPRUNED_AT
from paretoprune.search.trial.deployment import beside, engine_evaluator, run_engine

if TYPE_CHECKING:
    from paretoprune.pruning.device import DeviceSlot
    from paretoprune.pruning.evaluation.bootstrap import ImageStats
    from paretoprune.pruning.evaluation.evaluator import Evaluator
    from paretoprune.pruning.latency.images import ImageStream
    from paretoprune.pruning.latency.runtimes import EngineFile
    from paretoprune.search.config.run_config import RunConfig

BASELINE = "baseline"
NATIVE = "native:"
TEST = "test"
PRECISION_COST = "precision_cost"
SECONDS_FACTOR = 4.0  # against a trial's measurement: these figures are the ones that are published


def evaluate_together(
    models: Mapping[str, Any],
    sizes: Mapping[str, ImageSize | None],
    config: RunConfig,
    device: str,
    gate: DeviceGate,
    say: Callable[[str], None],
    engines: Mapping[str, EngineFile],
    variants: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Name -> accuracy on the validation split, and on the test split (``test_map50_95`` ...) where there is one
    with labels.

    All images of a split, also where trials were judged on a sample. ``sizes``: of a network's images, where they
    are not the run's. Each network but ``baseline`` also gets ``map50_95_change``, against the baseline over
    the same images, with the 95 % interval of a paired bootstrap over them (``map50_95_change_ci95``);
    ``test_map50_95_change`` likewise. ``engines``: the files of the networks where these ship; the accuracy is theirs
    then, and the network's own ``map50_95_fp32``. ``variants``: further files of ``engines`` -> the network that they
    are of, and its precision; of each network's files those in another precision than the run's have
    ``precision_cost``, [difference, low, high] against that one. Picks have ``map50_95_over`` too: rival
    (native, free move) -> [difference, low, high].
    ``say`` is told what is done.
    """
    from paretoprune.pruning.data.dataset import has_split
    from paretoprune.pruning.device import DeviceSlot
    from paretoprune.pruning.evaluation.evaluator import Evaluator

    variants = variants or {}
    turn = DeviceSlot(gate)  # resampling keeps a CPU busy for seconds
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    data, own = config.data, config.model.imgsz

    def evaluator_of(imgsz: ImageSize, split: str) -> Evaluator:
        return Evaluator(data.path, imgsz, device, data.val_batch, split, gate, config.trial.workers)

    seen: dict[str, ImageStats] = {}
    for imgsz, members in _by_size(models, sizes, own).items():
        with closing(evaluator_of(imgsz, "val")) as sized:
            seen |= _evaluate_split(members, sized, "", found, say)
            for name in members:
                found[name][VAL_IMAGES] = sized.images
        if engines:
            files = {name: models[network] for name, (network, _) in variants.items() if network in members}
            found |= {name: dict(found[variants[name][0]]) for name in files}
            with closing(engine_evaluator(config, data.path, imgsz, "val", device, gate)) as exact:
                seen |= _evaluate_engines({**members, **files}, engines, exact, "", found, say)
    say("comparing them image by image")
    _compare(seen, "", config.search.seed, found, turn)
    _compare_with_natives(seen, config.search.seed, found, turn, variants)
    _compare_precisions(seen, engines, variants, config, found, turn)
    if has_split(data.path, TEST, models[BASELINE]):
        seen = {}
        for imgsz, members in _by_size(models, sizes, own).items():
            with closing(evaluator_of(imgsz, TEST)) as test:
                seen |= _evaluate_split(members, test, f"{TEST}_", found, say)
            if engines:
                with closing(engine_evaluator(config, data.path, imgsz, TEST, device, gate)) as exact:
                    seen |= _evaluate_engines(members, engines, exact, f"{TEST}_", found, say)
        _compare(seen, f"{TEST}_", config.search.seed, found, turn)
    return found


def _by_size(
    models: Mapping[str, Any], sizes: Mapping[str, ImageSize | None], own: ImageSize
) -> dict[ImageSize, dict[str, Any]]:
    """The networks by the size of their images, so that no more than one loader is open at a time."""
    found: dict[ImageSize, dict[str, Any]] = {}
    for name, model in models.items():
        found.setdefault(sizes.get(name) or own, {})[name] = model
    return found


def _evaluate_split(
    models: Mapping[str, Any],
    evaluator: Evaluator,
    prefix: str,
    found: dict[str, dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, ImageStats]:
    """Writes the metrics into `found`; what each network saw image by image, nothing for classifiers."""
    from paretoprune.pruning.yolo.tasks import kind_of

    seen = {}
    split = " on the test split" if prefix else ""
    for number, (name, model) in enumerate(models.items(), 1):
        say(f"validating {name}{split} ({number} of {len(models)})")
        if kind_of(model) == "classify":
            metrics = evaluator.run(model)
        else:
            metrics, seen[name] = evaluator.run_by_image(model)
        found[name].update({f"{prefix}{metric}": value for metric, value in metrics.items()})
    return seen


def _evaluate_engines(
    models: Mapping[str, Any],
    engines: Mapping[str, EngineFile],
    evaluator: Evaluator,
    prefix: str,
    found: dict[str, dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, ImageStats]:
    """As `_evaluate_split` of the networks' files, whose metrics take the place of the networks' own."""
    seen = {}
    for number, (name, model) in enumerate(models.items(), 1):
        say(f"validating the file of {name}{' on the test split' if prefix else ''} ({number} of {len(models)})")
        metrics, stats = run_engine(evaluator, model, engines[name])
        before = {metric: found[name][f"{prefix}{metric}"] for metric in metrics}
        found[name].update({f"{prefix}{metric}": value for metric, value in beside(before, metrics).items()})
        if stats is not None:
            seen[name] = stats
    return seen


def _compare(
    seen: Mapping[str, ImageStats], prefix: str, seed: int, found: dict[str, dict[str, Any]], turn: DeviceSlot
) -> None:
    """Every network against the baseline; one image alone says nothing about the noise."""
    from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap

    for name, stats in seen.items():
        if name != BASELINE and len(stats) > 1:
            with turn:
                noise = paired_bootstrap(seen[BASELINE], stats, seed=seed, pause=turn.pause)
            found[name][f"{prefix}map50_95_change"] = noise.difference
            found[name][f"{prefix}map50_95_change_ci95"] = list(noise.ci95)


def _compare_with_natives(
    seen: Mapping[str, ImageStats],
    seed: int,
    found: dict[str, dict[str, Any]],
    turn: DeviceSlot,
    variants: Mapping[str, tuple[str, str]],
) -> None:
    from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap

    natives = [name for name in seen if name.startswith((NATIVE, UNPRUNED_AT))]
    for name in seen:
        if name == BASELINE or name in natives or name in variants or len(seen[name]) < 2:
            continue
        with turn:
            pairs = {n: paired_bootstrap(seen[n], seen[name], seed=seed, pause=turn.pause) for n in natives}
        found[name]["map50_95_over"] = {key: [noise.difference, *noise.ci95] for key, noise in pairs.items()}


def _compare_precisions(
    seen: Mapping[str, ImageStats],
    engines: Mapping[str, EngineFile],
    variants: Mapping[str, tuple[str, str]],
    config: RunConfig,
    found: dict[str, dict[str, Any]],
    turn: DeviceSlot,
) -> None:
    """What a network's files lose against that in the run's own precision."""
    from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap

    for network in dict.fromkeys(network for network, _ in variants.values()):
        names = [network, *(name for name, (its, _) in variants.items() if its == network)]
        own = next(name for name in names if engines[name].precision == config.deploy.precision)
        for name in names:
            if name != own and name in seen and len(seen[name]) > 1:
                with turn:
                    noise = paired_bootstrap(seen[own], seen[name], seed=config.search.seed, pause=turn.pause)
                found[name][PRECISION_COST] = [noise.difference, *noise.ci95]


def measure_together(
    models: Mapping[str, Any],
    sizes: Mapping[str, ImageSize | None],
    config: RunConfig,
    device: str,
    engines: Mapping[str, EngineFile],
    stream: ImageStream | None = None,
) -> dict[str, dict[str, Any]]:
    """Name -> latency of each network, all timed in turn in one session; the caller has the device alone.

    ``sizes``: of a network's images, where they are not the run's. ``engines``: what is timed in place of the
    networks, where files ship. ``stream``: as of `measure_group`.

    The fields of a pair's measurement (``median_ms`` ... ``speedup`` over ``baseline`` with ``speedup_ci95``), and
    ``over``: every other network -> [speed-up over it, low, high].
    """
    from paretoprune.pruning.latency.group import measure_group

    latency = config.latency
    return measure_group(
        engines or models,
        BASELINE,
        {name: sizes.get(name) or config.model.imgsz for name in models},
        device=device,
        batch=latency.batch,
        threads=latency.threads,
        max_seconds=SECONDS_FACTOR * latency.max_seconds * len(models),
        target_halfwidth=latency.target_halfwidth,
        runtime=config.deploy.format if engines else latency.runtime,
        half=latency.half and not engines,
        stream=stream,
    )
