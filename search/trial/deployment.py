"""Networks judged as they will be shipped: exported, quantised, validated and timed as files."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.image_size import ImageSize
from paretoprune.results.store.accuracy import LABELS

if TYPE_CHECKING:
    from paretoprune.pruning.data.calibration import Calibration
    from paretoprune.pruning.evaluation.bootstrap import ImageStats
    from paretoprune.pruning.evaluation.evaluator import Evaluator
    from paretoprune.pruning.latency.runtimes import EngineFile
    from paretoprune.search.config.run_config import RunConfig

IN_PYTORCH = "_fp32"  # ends the name of an accuracy of the network itself, beside its file's


class Deployment:
    """Makes and validates the files of `config.deploy` on one device.

    One size's images are kept at a time: they fill memory.
    """

    def __init__(self, config: RunConfig, device: str, gate: DeviceGate, baseline: Any) -> None:
        self._config, self._device, self._gate, self._baseline = config, device, gate, baseline
        self.data = config.data.path  # by whose validation images files are judged
        self._unpruned: EngineFile | None = None  # of the run's size: every trial is timed beside it
        self._last: tuple[Any, ImageSize, EngineFile] | None = None  # which knows its precision
        self._calibration: tuple[ImageSize, Calibration] | None = None
        self._evaluator: tuple[ImageSize, Evaluator] | None = None

    def engine(self, model: Any, imgsz: ImageSize, precision: str) -> EngineFile:
        """The file of ``model`` at this size of its input, in this precision.

        That of the unpruned network is made once, that of a trial's until it is trained (see `forget`): what is timed
        before an early end is what is validated after it.
        """
        if self._last is not None and self._last[0] is model:
            _, size, made = self._last
            if (size, made.precision) == (imgsz, precision):
                return made
        own = self._config.model.imgsz, self._config.deploy.precision
        is_baseline = model is self._baseline and (imgsz, precision) == own
        if is_baseline and self._unpruned is not None:
            return self._unpruned
        from paretoprune.pruning.export.engine import make_engine

        target, batch = self._config.deploy.format, self._config.latency.batch
        with self._gate.using():
            images = self._images(imgsz) if precision == "int8" else None
            made = make_engine(model, target, imgsz, self._device, precision, images, batch)
        if is_baseline:
            self._unpruned = made
        else:
            self._last = model, imgsz, made
        return made

    def forget(self) -> None:
        """The last network changes, or is done with."""
        self._last = None

    def evaluate(self, model: Any, engine: EngineFile, imgsz: ImageSize) -> tuple[dict[str, float], ImageStats | None]:
        """Accuracy of the file of ``model`` on the validation split, and what it saw image by image."""
        return run_engine(self._evaluator_at(imgsz), model, engine)

    def judged(
        self, model: Any, metrics: dict[str, float], imgsz: ImageSize, precision: str, on_all: bool = False
    ) -> dict[str, float]:
        """``metrics`` of a network in PyTorch with its file's accuracy in their place, its own as ``map50_95_fp32``.

        on_all: on all validation images, also where trials are judged on a sample.
        """
        engine = self.engine(model, imgsz, precision)
        if not on_all:
            return beside(metrics, self.evaluate(model, engine, imgsz)[0])
        config = self._config
        with closing(engine_evaluator(config, config.data.path, imgsz, "val", self._device, self._gate)) as evaluator:
            return beside(metrics, run_engine(evaluator, model, engine)[0])

    def _images(self, imgsz: ImageSize) -> Calibration:
        from paretoprune.pruning.data.calibration import load_calibration

        if self._calibration is None or self._calibration[0] != imgsz:
            count, seed = self._config.deploy.calibration_images, self._config.search.seed
            found = load_calibration(self._config.data.path, self._baseline, imgsz, count, seed)
            self._calibration = imgsz, found
        return self._calibration[1]

    def _evaluator_at(self, imgsz: ImageSize) -> Evaluator:
        if self._evaluator is None or self._evaluator[0] != imgsz:
            if self._evaluator is not None:
                self._evaluator[1].close()
            self._evaluator = (
                imgsz,
                engine_evaluator(self._config, self.data, imgsz, "val", self._device, self._gate),
            )
        return self._evaluator[1]


def engine_evaluator(
    config: RunConfig, data: str, imgsz: ImageSize, split: str, device: str, gate: DeviceGate
) -> Evaluator:
    """Files take one shape: batches of exactly this size, of as many images as are inferred at a time."""
    from paretoprune.pruning.evaluation.evaluator import Evaluator

    batch, workers = config.latency.batch, config.trial.workers
    return Evaluator(data, imgsz, device, batch, split, gate, workers, rect=False)


def run_engine(evaluator: Evaluator, model: Any, engine: EngineFile) -> tuple[dict[str, float], ImageStats | None]:
    """Accuracy of the file of ``model``, and what it saw image by image; None of a classifier's."""
    from paretoprune.pruning.yolo.tasks import kind_of

    with engine.written() as path:
        if kind_of(model) == "classify":
            return evaluator.run(model, path, engine.precision), None
        return evaluator.run_by_image(model, exported=path, precision=engine.precision)


def beside(metrics: dict[str, float], engines: dict[str, float]) -> dict[str, float]:
    """A file's accuracy, and the network's own under names of its own."""
    own = {f"{name}{IN_PYTORCH}": metrics[name] for name in LABELS if name in metrics}
    return {**metrics, **engines, **own}
