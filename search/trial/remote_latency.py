"""Latency measured elsewhere than in the trial's process: on a node of the cluster, or on the CPU of a GPU's host.

The model goes there as ONNX or `.pt`, is measured beside the baseline under the lock of the device there, and the
figures come back. The trial trains meanwhile: latency does not change with epochs.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.image_size import ImageSize
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.errors import ConfigError, TrialError

if TYPE_CHECKING:
    from paretoprune.pruning.latency.images import ImageStream
    from paretoprune.search.config.run_config import RunConfig

LOST_AFTER_S = 60.0  # without the target's node a measurement would wait for ever
_LOOK_EVERY_S = 2.0
_READ_AS_ONNX = ("onnx", "openvino")

# On the node: the last baseline with what a runtime made of it, as loading and exporting take longer than measuring.
_KEPT: dict[str, tuple[Any, Any]] = {}


@dataclass(frozen=True)
class MeasuringJob:
    """What is measured how, as plain data.

    ``suffix``: of both models' files; ``channels``: of their images, ``imgsz`` and ``baseline_imgsz``: their
    sizes. ``cpu``: not on a GPU of the node. ``trust``: both
    files are loaded as the run's model was.
    """

    suffix: str
    channels: int
    baseline_key: str
    imgsz: ImageSize
    baseline_imgsz: ImageSize
    batch: int
    threads: int | None
    max_seconds: float
    target_halfwidth: float
    runtime: str
    half: bool
    cpu: bool
    trust: bool = False


def measure_there(
    job: MeasuringJob, candidate: bytes, baseline: bytes, stream: ImageStream | None = None
) -> dict[str, Any]:
    """On the target's node: time ``candidate`` beside ``baseline`` (the same bytes: the baseline beside itself), with
    ``stream`` in Ultralytics' predict on these images.

    Loading takes the device like a training batch, so that it disturbs no other measurement; timing has it alone.
    """
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import default_device, device_key
    from paretoprune.cluster.environment import pin_threads
    from paretoprune.search.trial.exclusive_device import measuring_threads

    device = "cpu" if job.cpu else default_device()
    lock = DeviceLock(device_key(device))
    threads = job.threads or measuring_threads()
    pin_threads(threads)
    with tempfile.TemporaryDirectory(prefix="paretoprune-latency-") as folder:
        with lock.using():
            from paretoprune.pruning.latency.pair import PATIENCE, measure_pair
            from paretoprune.pruning.latency.runtimes import ExportCache

            if job.baseline_key not in _KEPT:
                _KEPT.clear()
                _KEPT[job.baseline_key] = (_network(job, baseline, Path(folder) / "baseline"), ExportCache())
            unpruned, exports = _KEPT[job.baseline_key]
            model = unpruned if candidate == baseline else _network(job, candidate, Path(folder) / "candidate")

        return measure_pair(
            model,
            unpruned,
            job.imgsz,
            baseline_imgsz=job.baseline_imgsz,
            device=device,
            batch=job.batch,
            threads=threads,
            max_seconds=job.max_seconds,
            target_halfwidth=job.target_halfwidth,
            runtime=job.runtime,
            half=job.half,
            exports=exports,
            gate=lock,
            patience=PATIENCE,
            stream=stream,
        ).to_dict()


class RemoteMeasurement:
    """A measurement under way; see :class:`search.trial.context.Measurement`."""

    def __init__(
        self, reference: Any, target: LatencyTarget, keep: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self._reference = reference
        self._target = target
        self._keep = keep

    def known(self) -> Mapping[str, Any] | None:
        """Nothing before the end, which is not waited for."""
        import ray

        ready, _ = ray.wait([self._reference], timeout=0)
        return self.result() if ready else None

    def result(self) -> Mapping[str, Any]:
        """Wait for it. Raises what the measuring raised, and TrialError where the node is gone for a minute."""
        import ray

        seen = time.monotonic()
        while True:
            ready, _ = ray.wait([self._reference], timeout=_LOOK_EVERY_S)
            if ready:
                break
            if self._target.resource is None or node_is_there(self._target.resource):
                seen = time.monotonic()
            elif time.monotonic() - seen > LOST_AFTER_S:
                ray.cancel(self._reference, force=True)
                raise TrialError(
                    f"latency is measured on a node with the resource {self._target.resource}, but it has left the "
                    "cluster; bring it back, then `paretoprune resume`"
                )
        try:
            values: Mapping[str, Any] = ray.get(self._reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the node's own error, which says what to do
        if self._keep is not None:
            self._keep(values)
        return values


class RemoteMeasurer:
    """One worker's way to the target: sends the baseline and the images of predict once, and every candidate."""

    def __init__(
        self, config: RunConfig, target: LatencyTarget, baseline: Any, stream: Callable[[], ImageStream | None]
    ) -> None:
        from paretoprune.pruning.latency.runtimes import ExportCache

        self._config = config
        self._target = target
        self._baseline = baseline
        self._exports = ExportCache()
        self._stream = stream
        self._sent: tuple[Any, str, Any] | None = None  # the baseline's reference in the cluster, its key; the images'

    def start(
        self, model: Any, imgsz: ImageSize, keep: Callable[[Mapping[str, Any]], None] | None = None
    ) -> RemoteMeasurement:
        """Send ``model`` as it is now, and return at once; ``imgsz``: size of its input. ``keep`` gets what was
        measured, once it is asked for."""
        import ray

        own = self._config.model.imgsz
        if self._sent is None:
            content = self._content(self._baseline, own)
            self._sent = (ray.put(content), hashlib.sha256(content).hexdigest(), ray.put(self._stream()))
        baseline, key, images = self._sent
        same = model is self._baseline and imgsz == own
        candidate = baseline if same else ray.put(self._content(model, imgsz))
        task = ray.remote(num_cpus=0, max_retries=2, **self._place())(measure_there)
        return RemoteMeasurement(task.remote(self._job(key, imgsz), candidate, baseline, images), self._target, keep)

    def _place(self) -> dict[str, Any]:
        """Where Ray puts the task. A trial's own resources are not asked: they are taken."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._target.resource is not None:
            # A whole unit: one at a time, so that a small box need not hold several models
            return {"resources": {self._target.resource: 1}, "scheduling_strategy": "DEFAULT"}
        here = ray.get_runtime_context().get_node_id()
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}

    def _job(self, key: str, imgsz: ImageSize) -> MeasuringJob:
        from paretoprune.pruning.latency.runtimes import image_channels

        latency = self._config.latency
        return MeasuringJob(
            suffix=self._suffix,
            channels=image_channels(self._baseline),
            baseline_key=key,
            imgsz=imgsz,
            baseline_imgsz=self._config.model.imgsz,
            batch=latency.batch,
            threads=self._target.threads or latency.threads,
            max_seconds=latency.max_seconds,
            target_halfwidth=latency.target_halfwidth,
            runtime=latency.runtime,
            half=latency.half,
            cpu=self._target.resource is None,
            trust=self._config.model.trust_checkpoint,
        )

    @property
    def _suffix(self) -> str:
        """ONNX where the runtime reads it: the node then needs neither an exporter nor its time. In fp16 on a GPU only
        the node itself can export."""
        latency = self._config.latency
        as_onnx = latency.runtime == "openvino" or (latency.runtime == "onnx" and not latency.half)
        return ".onnx" if as_onnx else ".pt"

    def _content(self, model: Any, imgsz: ImageSize) -> bytes:
        from paretoprune.pruning.latency.runtimes import SessionSpec
        from paretoprune.pruning.yolo.saving import save_checkpoint

        if self._suffix == ".onnx":
            spec = SessionSpec(imgsz, "cpu", self._config.latency.batch)
            return self._exports.content(model, "onnx", spec, half=False)
        with tempfile.TemporaryDirectory(prefix="paretoprune-latency-") as folder:
            path = Path(folder) / "model.pt"
            save_checkpoint(model, path)
            return path.read_bytes()


def node_is_there(resource: str) -> bool:
    """Whether a living node of the connected cluster has a whole unit of a custom resource."""
    import ray

    return any(node["Alive"] and node["Resources"].get(resource, 0) >= 1 for node in ray.nodes())


def check_target(target: LatencyTarget) -> None:
    """Raise ConfigError where the connected cluster has no node for the target."""
    if target.resource is not None and not node_is_there(target.resource):
        resource = f'{{"{target.resource}": 1}}'
        raise ConfigError(
            f"latency.target=node:{target.resource} needs a node with that custom resource, but the cluster has none; "
            f"start one with `ray start --address=HEAD --num-cpus=0 --resources='{resource}'`"
        )


def _network(job: MeasuringJob, content: bytes, path: Path) -> Any:
    """What `measure_pair` takes: an ONNX file as it is, of a checkpoint its network."""
    from paretoprune.pruning.latency.runtimes import OnnxFile
    from paretoprune.pruning.yolo.loading import load_model

    if job.suffix == ".onnx":
        return OnnxFile(content, job.channels)
    path = path.with_suffix(job.suffix)
    path.write_bytes(content)
    return load_model(path, job.trust)
