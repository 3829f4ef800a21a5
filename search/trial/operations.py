"""The operations of a trial on a network, by functions of ``pruning``. One instance lives in each worker process and is
reused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.image_size import ImageSize, plain_size
from paretoprune.results.store.accuracy import ON_ALL, VAL_IMAGES, accuracies
from paretoprune.results.store.records import DEPLOY_PRECISION
from paretoprune.search.config.inputs import weights_hash
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.storage.importance_cache import keep_scores, kept_scores
from paretoprune.search.storage.sample import sampled_data
from paretoprune.search.trial.agent_latency import AgentMeasurer
from paretoprune.search.trial.context import Measured, Measurement, OnEpoch, PlanLike, Tuned
from paretoprune.search.trial.deployment import Deployment
from paretoprune.search.trial.joint_evaluation import evaluate_together, measure_together
from paretoprune.search.trial.remote_latency import RemoteMeasurer

if TYPE_CHECKING:
    from paretoprune.pruning.evaluation.evaluator import Evaluator
    from paretoprune.pruning.latency.images import ImageStream
    from paretoprune.pruning.latency.runtimes import EngineFile, Timeable
    from paretoprune.pruning.plan import Plan
    from paretoprune.pruning.training.settings import FinetuneSettings
    from paretoprune.search.config.run_config import RunConfig
    from paretoprune.search.config.sections import FinetuneSection, TrialSection

Say = Callable[[str], None]
"""Takes a line for people about what is done now."""

KEPT_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
NOISE_KEEP = (0.8, 0.6, 0.4)  # shares of the multiply-adds
NOISE_RESAMPLES = 100  # a standard deviation from them is good to 7 %
ENERGY_SECONDS = 3.0  # a GPU's counter moves some ten times a second


class PruningOperations:
    """A workbench (baseline, layer table, calibration batch), an evaluator with its loader, and the run's settings."""

    def __init__(self, config: RunConfig, device: str, gate: DeviceGate) -> None:
        from paretoprune.pruning.latency.runtimes import ExportCache
        from paretoprune.pruning.workbench import Workbench

        self._config = config
        self._gate = gate
        self.device = device
        self._data = config.data.path  # what trials train and are judged on
        self._imgsz = config.model.imgsz
        self._precision: str = config.deploy.precision  # of the files, where these ship
        self._own: PruningOperations = self  # those of the run's size
        self._sized: PruningOperations | None = None  # the last ones of another
        self._bench = Workbench(
            config.model.path,
            config.data.path,
            config.model.imgsz,
            device,
            calibration_images=config.recover.calibration_images,
            importance=config.recover.importance,
            round_to=config.space.round_to,
            seed=config.search.seed,
            trust_checkpoint=config.model.trust_checkpoint,
            gate=gate,
        )
        self._scored = False
        self._images: ImageStream | None = None  # see `_stream`
        self._exports = ExportCache()  # of the baseline, for all trials of this worker
        self._remote: dict[str, AgentMeasurer | RemoteMeasurer] = {}  # by kind of device, "" the main one
        for name, latency in config.latency.everywhere().items():
            target = LatencyTarget.parse(latency.target)
            if target.agents:
                self._remote[name] = AgentMeasurer(latency, config.timed_by(latency), target, config.model.imgsz)
            elif not target.is_device(device):
                self._remote[name] = RemoteMeasurer(config, target, self._bench.model, self._stream)
        self._evaluator = self._make_evaluator(self._data)
        self._finals: dict[str, tuple[Any, EngineFile]] = {}  # networks that are evaluated together, and their files
        self._deployment: Deployment | None = None
        if config.deploy.in_trials:
            self._deployment = Deployment(config, device, gate, self._bench.model)

    def use_sample(self, run: Path) -> None:
        """Train and judge trials on the run's sample of images, where it has one; called before anything else."""
        from paretoprune.pruning.yolo.saving import task_of

        self._data = sampled_data(run, self._config.data.path, task_of(self.baseline))
        self._evaluator = self._make_evaluator(self._data)
        if self._deployment is not None:
            self._deployment.data = self._data

    def _make_evaluator(self, data: str) -> Evaluator:
        from paretoprune.pruning.evaluation.evaluator import Evaluator

        batch, workers = self._config.data.val_batch, self._config.trial.workers
        return Evaluator(data, self._imgsz, self.device, batch, gate=self._gate, workers=workers)

    def at(self, imgsz: ImageSize | None, precision: str | None = None) -> PruningOperations:
        """The tools for networks of another input size, or whose files compute in another precision; None: the run's.

        Images, refit targets and the loader of the run's size and of one other are kept: they fill memory.
        """
        own = self._own
        if precision is not None and precision != own._precision:
            found = copy.copy(own.at(imgsz))
            found._precision = precision
            return found
        if imgsz is None or imgsz == own._imgsz:
            return own
        if own._sized is None or own._sized._imgsz != imgsz:
            if own._sized is not None:
                own._sized._evaluator.close()
            own._sized = None  # the copy would hold on to it, and with it to all those before
            own._sized = copy.copy(own)
            own._sized._imgsz, own._sized._bench = imgsz, own._bench.at(imgsz)
            own._sized._evaluator = own._sized._make_evaluator(own._data)
        return own._sized

    @property
    def baseline(self) -> Any:
        """The unpruned network."""
        return self._bench.model

    def logging(self, path: Path) -> AbstractContextManager[None]:
        """Ultralytics' lines go to ``path``."""
        from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

        return quiet_ultralytics(path)

    def prune(self, plan: Plan) -> tuple[Any, PlanLike]:
        """A pruned copy of the baseline and its plan; channels are chosen by their importance at the run's size."""
        self._score()
        return self._bench.prune(plan)

    def recover(self, model: Any, plan: Any) -> None:
        """Refit ``model`` in place as the configuration says."""
        self._bench.recover(model, plan, how=self._config.recover.method)

    def stats(self, model: Any) -> dict[str, float]:
        """Parameters (millions), GFLOPs and size of a network."""
        from paretoprune.pruning.yolo.loading import model_stats

        stats = model_stats(model, self._imgsz)
        return {"params_m": stats.params_m, "gflops": stats.gflops, "size_mb": stats.size_mb}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Accuracy on the validation images by which trials are judged, and their number as `val_images`."""
        return {**self._evaluator.run(model), VAL_IMAGES: self._evaluator.images}

    def on_all_images(self, model: Any, say: Say) -> dict[str, float]:
        """Accuracy on all validation images, as `map50_95_all`, and their number, where trials are judged on a sample;
        else {}."""
        if self._data == self._config.data.path:
            return {}
        say("validating it on all validation images")
        with closing(self._make_evaluator(self._config.data.path)) as evaluator:
            metrics = evaluator.run(model)
            images = evaluator.images
        if self._deployment is not None:
            metrics = self._deployment.judged(model, metrics, self._imgsz, self._precision, on_all=True)
        return {f"{name}{ON_ALL}": value for name, value in {**accuracies(metrics), VAL_IMAGES: images}.items()}

    def deployed(self, model: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
        """``metrics`` with the accuracy of what ships, where that is a file and trials are judged by it, and the
        precision that it computes in (`DEPLOY_PRECISION`)."""
        if self._deployment is None:
            return dict(metrics)
        found = self._deployment.judged(model, dict(metrics), self._imgsz, self._precision)
        return {**found, DEPLOY_PRECISION: self._precision}

    def finetune(self, model: Any, folder: Path, on_epoch: OnEpoch | None, start: Mapping[str, float]) -> Tuned:
        """The short fine-tuning of ``config.trial``; the start is not validated again."""
        return self._tune(model, folder, on_epoch, self._config.trial, patience=0, start=start)

    def finetune_fully(
        self, model: Any, folder: Path, on_epoch: OnEpoch | None = None, teacher: Path | None = None
    ) -> Tuned:
        """The full fine-tuning of ``config.finetune``; ``teacher``: where the file of its teacher lies here."""
        section = self._config.finetune
        together = self.device.startswith("cuda") and section.gpus_per_pick > 1  # the worker was given them all
        device = ",".join(f"cuda:{number}" for number in range(section.gpus_per_pick)) if together else self.device
        data = self._config.data.path
        return self._tune(
            model, folder, on_epoch, section, patience=section.patience, device=device, data=data, own=teacher
        )

    def save(self, model: Any, path: Path) -> None:
        """A stock checkpoint."""
        from paretoprune.pruning.yolo.saving import save_checkpoint

        save_checkpoint(model, path, {"imgsz": self._imgsz, "data": self._config.data.path})

    def load(self, path: Path, trust: bool | None = None) -> Any:
        """A network from its checkpoint; ``trust`` None: it was made of the run's model, and is trusted as that is."""
        from paretoprune.pruning.yolo.loading import load_model

        return load_model(path, self._config.model.trust_checkpoint if trust is None else trust)

    @property
    def measures_here(self) -> bool:
        """Whether latency is measured on this worker's own device."""
        return "" not in self._remote

    def start_measure(
        self, model: Any, keep: Callable[[Mapping[str, Any]], None] | None = None, device: str = ""
    ) -> Measurement:
        """Latency of ``model`` beside the baseline: on the own device now, elsewhere while the trial goes on."""
        if device in self._remote:
            measurer = self._remote[device]
            if isinstance(measurer, RemoteMeasurer):
                with self._gate.using():  # only made ready to be sent
                    return measurer.start(model, self._imgsz, keep)
            pair = self._shipped(model), self._own._shipped(self._bench.model)
            with self._gate.using():
                return measurer.start(*pair, self._imgsz, keep)
        found = self._measured(model)
        if "energy_j" in self._config.search.objectives:
            found["energy_j"] = self._energy(model)
        if keep is not None:
            keep(found)
        return Measured(found)

    def train_native(
        self,
        path: str,
        folder: Path,
        on_epoch: OnEpoch | None = None,
        trust: bool = False,
        teacher: Path | None = None,
    ) -> tuple[Tuned, str]:
        """A stock model on the run's data at these tools' input size, for as many epochs as a pick has in all; and how,
        in words. ``teacher``: as for a pick."""
        from paretoprune.pruning.training.stock_baseline import train_native
        from paretoprune.pruning.yolo.tasks import is_single_class

        config, section = self._config, self._config.finetune
        epochs = section.epochs + config.trial.epochs
        settings = self._training(section, teacher, epochs=epochs, patience=section.patience)
        as_one = is_single_class(self.baseline)
        data, device, gate = config.data.path, self.device, self._gate
        taught = None if teacher is None else (teacher, section.trust_checkpoint)
        result = train_native(path, data, settings, folder, device, gate, on_epoch, as_one, trust, taught)
        return Tuned(result.model, result.epochs, result.best_epoch, {}, {}), result.recipe

    def evaluate_together(
        self,
        models: Mapping[str, Any],
        sizes: Mapping[str, ImageSize | None],
        say: Say,
        precisions: Mapping[str, str | None] | None = None,
        variants: Mapping[str, tuple[str, str]] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """See :func:`search.trial.joint_evaluation.evaluate_together`; ``precisions``: of the networks' files, where
        they are not the run's."""
        if self._config.deploy.format != "torch":
            say("exporting them")
        variants = variants or {}
        networks = {**models, **{name: models[network] for name, (network, _) in variants.items()}}
        inputs = {**sizes, **{name: sizes.get(network) for name, (network, _) in variants.items()}}
        engines = self._engines(
            networks, inputs, {**(precisions or {}), **{name: its for name, (_, its) in variants.items()}}
        )
        self._own._finals = {name: (networks[name], engine) for name, engine in engines.items()}
        config, device, gate = self._config, self.device, self._gate
        return evaluate_together(models, sizes, config, device, gate, say, engines, variants)

    def measure_together(
        self, models: Mapping[str, Any], sizes: Mapping[str, ImageSize | None]
    ) -> dict[str, dict[str, Any]]:
        """See :func:`search.trial.joint_evaluation.measure_together`."""
        engines = {name: engine for name, (_, engine) in self._own._finals.items()}
        return measure_together(models, sizes, self._config, self.device, engines, self._stream())

    def _engines(
        self,
        models: Mapping[str, Any],
        sizes: Mapping[str, ImageSize | None],
        precisions: Mapping[str, str | None],
    ) -> dict[str, EngineFile]:
        """The files of networks by name; none where the networks themselves ship."""
        if self._config.deploy.format == "torch":
            return {}
        making = self._deployment or Deployment(self._config, self.device, self._gate, self._bench.model)
        return {
            name: making.engine(model, sizes.get(name) or self._imgsz, precisions.get(name) or self._precision)
            for name, model in models.items()
        }

    def release(self) -> None:
        """Free the finished trial's networks: they hang in reference cycles, and a worker lives for the whole sweep."""
        if self._deployment is not None:
            self._deployment.forget()
        gc.collect()
        self._bench.free_cached_memory()

    def keep_scores(self, run: Path) -> None:
        """Leave the channels' importance in the run folder, for the run's other workers."""
        self._score()
        keep_scores(run, self._scores_made_from(), self._bench.scores)

    def recall_scores(self, run: Path) -> None:
        """Take over what :meth:`keep_scores` left; without it, this worker computes them when it first prunes."""
        if self._scored:
            return
        found = kept_scores(run, self._scores_made_from())
        if found is not None:
            self._bench.scores, self._scored = found, True

    def _score(self, say: Say = lambda text: None) -> None:
        """Score the channels, if they are not yet: once a run, so in the order in which steps give them up."""
        from paretoprune.pruning.budget.progressive import path_scores

        own = self._own
        if not own._scored and own._bench.importance == own._bench.loss_criterion:
            own._bench.scores = path_scores(own._bench, say)
        own._scored = True

    def _scores_made_from(self) -> dict[str, Any]:
        config = self._config
        return {
            "weights": weights_hash(Path(config.model.path)),
            "data": config.data.path,
            "imgsz": plain_size(config.model.imgsz),
            "images": config.recover.calibration_images,
            "importance": config.recover.importance,
            "seed": config.search.seed,
            "round_to": config.space.round_to,
            "order": "of removal in steps",
        }

    def describe(self, say: Say) -> dict[str, Any]:
        """The layer table, the geometry and what else holds for the whole run, for ``baseline.json``.

        ``say`` is told what is done.
        """
        if self._config.trial.epochs:
            from paretoprune.pruning.data.calibration import read_training_labels

            say("reading the labels of the training images")  # here, once for all trials
            read_training_labels(self._data, self.baseline)
        self._score(say)
        from paretoprune.pruning.importance.allocation import width_losses

        table = self._bench.table
        groups = [
            {
                "name": group.name,
                "layers": list(group.layers),
                "channels": group.channels,
                "block": group.block,
                "losses": width_losses(group, self._bench.loss_scores, self._bench.round_to),
            }
            for group in table.groups
        ]
        branches = []
        if self._config.space.depth and self._bench.branches.by_name:
            say("estimating what branches cost")
            branches = [{"name": name, "loss": loss} for name, loss in self._bench.branch_losses.items()]
        return {
            "layers": table.to_rows(),
            "groups": groups,
            "branches": branches,
            "geometry": self._bench.geometry.to_json(),
            "sensitivity": self._sensitivity(say),
            "noise": self._noise(say),
        }

    def _noise(self, say: Say) -> dict[str, Any]:
        """How much of a difference in accuracy is the choice of validation images (``pruning.evaluation.bootstrap``).

        Between the unpruned network and a pruned, refitted copy, since two pruned networks differ about as much. Where
        a lighter cut removes dead channels only, and so changes nothing, a heavier one.
        """
        from paretoprune.pruning.evaluation.bootstrap import paired_bootstrap
        from paretoprune.pruning.yolo.tasks import kind_of

        if kind_of(self.baseline) == "classify":  # a share of images: their number gives a bound
            self._evaluator.run(self.baseline)
            return {"images": self._evaluator.images}
        say("noise of the accuracy: validating the model image by image")
        reference = self._evaluator.run_by_image(self.baseline)[1]
        for keep in NOISE_KEEP if len(reference) > 1 else ():
            ratios = self._bench.allocated(keep)
            if ratios is None:
                break
            say(f"noise of the accuracy: refitting and validating a copy with {keep:.0%} of its work")
            model, plan = self._bench.prune(ratios)
            self._bench.recover(model, plan, how="refit")  # unrefitted it finds nothing: all would differ
            seen = self._evaluator.run_by_image(model)[1]
            turn, seed = self._bench.turn, self._config.search.seed
            with turn:
                noise = paired_bootstrap(reference, seen, NOISE_RESAMPLES, seed, pause=turn.pause)
            self.release()
            if noise.std > 0:
                how = f"{noise.images} validation images, {noise.resamples} resamples"
                source = f"paired bootstrap over {how}: the model against itself with {keep:.0%} of its work"
                stds = {"map50_95_std": noise.std, "map50_std": noise.std50}
                return {**stds, "images": noise.images, "source": source}
        return {"images": len(reference)}  # which gives a bound

    def _sensitivity(self, say: Say) -> list[dict[str, Any]]:
        """Plans by sensitivity for the warm start, heavier and heavier, as far as the widths go."""
        say("choosing the first plans by sensitivity")
        rows = []
        for keep in KEPT_SHARES:
            ratios = self._bench.allocated(keep)
            if ratios is None:
                break
            rows.append({"keep": keep, "ratios": ratios})
        return rows

    def _shipped(self, model: Any) -> Timeable:
        """What is timed of a network: its file where one ships."""
        for known, engine in self._own._finals.values():
            if known is model and engine.precision == self._precision:
                return engine
        return model if self._deployment is None else self._deployment.engine(model, self._imgsz, self._precision)

    def _stream(self) -> ImageStream | None:
        """What predict is timed on, read once; None where the network alone is timed."""
        own = self._own
        if own._images is None and self._config.latency.span == "predict":
            from paretoprune.pruning.latency.images import image_stream

            own._images = image_stream(self.baseline, self._config.data.path)
        return own._images

    def _measured(self, model: Any) -> dict[str, Any]:
        from paretoprune.pruning.latency.pair import PATIENCE, measure_pair

        latency, own = self._config.latency, self._config.model.imgsz
        runtime = latency.runtime if self._deployment is None else self._config.deploy.format
        return measure_pair(
            self._shipped(model),
            self._own._shipped(self._bench.model),  # in the run's own precision, whatever the other's: ratios compare
            self._imgsz, baseline_imgsz=own, device=self.device, batch=latency.batch, threads=latency.threads,
            max_seconds=latency.max_seconds, target_halfwidth=latency.target_halfwidth, runtime=runtime,
            half=latency.half, exports=self._exports, gate=self._gate, patience=PATIENCE, stream=self._stream(),
        ).to_dict()  # fmt: skip

    def _energy(self, model: Any) -> float:
        """Joules of an inference of ``model``, on a device that counts them."""
        from paretoprune.pruning.latency.energy import energy_per_inference
        from paretoprune.pruning.latency.runtimes.base import SessionSpec

        latency = self._config.latency
        spec = SessionSpec(self._imgsz, self.device, latency.batch, latency.half, latency.threads, self._stream())
        with self._gate.measuring():
            return energy_per_inference(model, spec, latency.runtime, self._exports, ENERGY_SECONDS)

    def _tune(
        self,
        model: Any,
        folder: Path,
        on_epoch: OnEpoch | None,
        section: TrialSection | FinetuneSection,
        patience: int,
        start: Mapping[str, float] | None = None,
        device: str | None = None,
        data: str | None = None,
        own: Path | None = None,
    ) -> Tuned:
        from paretoprune.pruning.training.finetune import finetune
        from paretoprune.pruning.training.teacher import own_teacher

        teacher = self._bench.model if section.distill else None
        if own is not None:
            teacher = own_teacher(own, model, self._imgsz, self._config.finetune.trust_checkpoint)
        if self._deployment is not None:
            self._deployment.forget()
        settings = self._training(section, own, epochs=section.epochs, patience=patience, distill=section.distill)
        classes = self._bench.class_weights if section.distill else None
        data, device = data or self._data, device or self.device
        done = finetune(model, data, settings, folder, device, self._gate, teacher, on_epoch, start, classes)
        figures = (done.start_metrics, done.metrics, done.retries, done.precision)
        return Tuned(done.model, done.epochs, done.best_epoch, *figures)

    def _training(self, section: TrialSection | FinetuneSection, own: Path | None, **more: Any) -> FinetuneSettings:
        """How networks are trained by a section of the settings; ``own``: the teacher's file, where there is one."""
        from paretoprune.pruning.training.settings import FinetuneSettings

        return FinetuneSettings(
            imgsz=self._imgsz,
            batch=section.batch,
            lr=section.lr,
            seed=self._config.search.seed,
            workers=section.workers,
            amp=self._config.trial.amp,
            train=getattr(section, "train", {}),
            taught_by="" if own is None else str(self._config.finetune.teacher),
            evaluation_batch=self._config.data.val_batch,
            **more,
        )
