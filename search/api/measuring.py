"""Models on a device: latency beside another model's, and exports that are checked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_json
from paretoprune.base.file_names import PLAN
from paretoprune.base.image_size import ImageSize
from paretoprune.base.messages import note, speaking
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.devices import default_device, device_key
from paretoprune.pruning.names import SpanName
from paretoprune.pruning.yolo.image_size import check_image_size
from paretoprune.results.store.records import DEPLOY_PRECISION
from paretoprune.results.store.run_files import read_object
from paretoprune.search.api.overwriting import check_output
from paretoprune.search.config.latency_target import AGENT_RUNTIMES, LatencyTarget, runtime_of_file
from paretoprune.search.errors import ArgumentError, ConfigError
from paretoprune.search.sweep.preflight import check_model_file
from paretoprune.search.trial.agent_latency import AgentJob, check_agents, measure_on_agents, pool_of
from paretoprune.search.trial.exclusive_device import alone_on, measuring_threads

if TYPE_CHECKING:
    from paretoprune.cluster.agent.client import AgentPool
    from paretoprune.pruning.data.calibration import Calibration
    from paretoprune.pruning.export.check import RealImages
    from paretoprune.pruning.latency.images import ImageStream
    from paretoprune.pruning.latency.pair import LatencyResult
    from paretoprune.pruning.latency.runtimes import EngineFile

CHECK = ".check.json"  # beside the export: what its check found
CALIBRATION_IMAGES = 64
_FORMATS = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "engine"}
"""Runtime -> the format of Ultralytics' export that it runs."""
_NMS_CONF = 0.25  # the lowest score that a file with non-maximum suppression gives, where nothing else is set


def latency(
    model: str | Path,
    *,
    against: str | Path | None = None,
    runtime: str | None = None,
    half: bool = False,
    imgsz: ImageSize = 640,
    against_imgsz: ImageSize | None = None,
    batch: int = 1,
    threads: int | None = None,
    span: SpanName = "network",
    data: str | Path | None = None,
    streams: int = 1,
    memory: bool = False,
    target_halfwidth: float = 0.01,
    max_seconds: float = 10.0,
    device: str | None = None,
    latency_target: str | None = None,
    token_file: str | Path | None = None,
    trust_checkpoint: bool = False,
) -> LatencyResult:
    """A checkpoint's latency, timed in turn with ``against`` (None: itself), alone on the device; milliseconds.

    ``.speedup`` is how many times as fast it is, ``.speedup_ci95`` the interval for another measurement at another
    time, ``.median_ms`` its latency, ``.converged`` whether the interval got as narrow as ``target_halfwidth`` within
    ``max_seconds``. ``against_imgsz``: input size of ``against``, None for the same. ``runtime``: torch (None),
    torch-cuda-graph, onnx, openvino or tensorrt. ``span``: the "network" alone, or Ultralytics' whole "predict", on
    validation images of ``data`` (None: of random pixels); ``streams``: for ``.images_per_s``, so many at the same
    time; ``memory``: ``.peak_memory_mb`` too, of a process of its own. ``latency_target``: ``http://HOST:PORT``, an
    agent that measures it on its device (docs/edge.md) by onnx (None), openvino, tensorrt, ncnn or ``command:NAME``;
    there models may also be files that were made for it, ``.onnx``, ``.tflite``, ``.rknn``, ``.hef`` or an export's
    folder.
    """
    options: dict[str, Any] = {"half": half, "imgsz": imgsz, "batch": batch, "threads": threads, "device": device}
    options |= {"target_halfwidth": target_halfwidth, "max_seconds": max_seconds, "against_imgsz": against_imgsz}
    options |= {"latency_target": latency_target, "token_file": token_file}
    options |= {"span": span, "data": data, "streams": streams, "memory": memory}
    runtimes = [] if runtime is None else [runtime]
    return latencies(model, against, runtimes, trust_checkpoint=trust_checkpoint, **options)[0]


def latencies(
    model: str | Path,
    against: str | Path | None,
    runtimes: Sequence[str],
    *,
    imgsz: ImageSize,
    against_imgsz: ImageSize | None,
    half: bool,
    device: str | None,
    threads: int | None,
    trust_checkpoint: bool,
    span: SpanName = "network",
    data: str | Path | None = None,
    streams: int = 1,
    memory: bool = False,
    latency_target: str | None = None,
    token_file: str | Path | None = None,
    **options: Any,
) -> list[LatencyResult]:
    """One result for each runtime (none given: the usual one); what one cannot do is found before the first is
    measured."""
    for size in (imgsz, imgsz if against_imgsz is None else against_imgsz):
        check_image_size(size)
    if data is not None and span != "predict":
        raise ArgumentError("the images of `data` are those that `span` predict looks at; set it, or leave `data` out")
    if latency_target is not None:
        if span == "predict" or streams > 1 or memory:
            raise ArgumentError(
                "`span` predict, `streams` and `memory` are measured on this machine, not on an agent's device; leave "
                "them or `latency_target` out"
            )
        pool, runtimes = _agents(latency_target, token_file, device, runtimes, (model, against or model))
    else:
        runtimes = runtimes or ["torch"]
        for path in filter(None, (model, against)):
            check_model_file(str(path))
    with speaking(at_once=False) as say:
        say(f"loading {model}")
        from paretoprune.pruning.latency.images import image_stream
        from paretoprune.pruning.latency.runtimes import ExportCache, check_runtime, read_engine
        from paretoprune.pruning.yolo.loading import load_model

        results = []
        if latency_target is not None:
            networks = [
                load_model(str(path), trust_checkpoint) if _is_checkpoint(path) else read_engine(path)
                for path in dict.fromkeys((model, against or model))
            ]
            exports = ExportCache()
            jobs = [
                AgentJob(runtime, imgsz, against_imgsz, half=half, threads=threads, device=device or "auto", **options)
                for runtime in runtimes
            ]
            for job in jobs:
                say(f"timing {model} by {job.runtime} on {latency_target}")
                results.append(measure_on_agents(pool, networks[0], networks[-1], job, exports))
            return results
        place = device or default_device()
        for runtime in runtimes:
            check_runtime(runtime, place, half, span)
            if span == "predict" or memory:
                _file_precision(runtime, place, half)
        candidate = load_model(str(model), trust_checkpoint)
        baseline = candidate if against is None else load_model(str(against), trust_checkpoint)
        stream = image_stream(candidate, None if data is None else str(data)) if span == "predict" else None
        if stream is not None and data is None:
            note(f"images: {stream.source}, where hardly anything is found; give --data for post-processing as in use")
        pair = _Pair(
            (Path(model), Path(against or model)), (candidate, baseline), (imgsz, against_imgsz or imgsz), place,
            threads or measuring_threads(), half, stream, streams, memory, trust_checkpoint,
        )  # fmt: skip
        for number, runtime in enumerate(runtimes, 1):
            say(f"timing {model} in {runtime} ({number} of {len(runtimes)})")
            results.append(_measured(pair, runtime, say, **options))
    return results


@dataclass(frozen=True)
class _Pair:
    """Two networks that are timed in turn here: their checkpoints, what these hold, and sizes of their images."""

    paths: tuple[Path, Path]
    networks: tuple[Any, Any]
    sizes: tuple[ImageSize, ImageSize]
    device: str
    threads: int
    half: bool
    stream: ImageStream | None
    streams: int
    memory: bool
    trust: bool


def _measured(
    pair: _Pair, runtime: str, say: Callable[[str], None], batch: int, max_seconds: float, target_halfwidth: float
) -> LatencyResult:
    """In one runtime, alone on the device; whole predictions of other runtimes than PyTorch are those of a file."""
    from paretoprune.pruning.export.engine import make_engine
    from paretoprune.pruning.latency.memory import peak_memory
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.pruning.latency.runtimes import SessionSpec

    each = list(dict.fromkeys(zip(pair.paths, pair.networks, pair.sizes, strict=True)))  # one, of a model and itself
    shipped: list[EngineFile | None] = [None for _ in each]
    if runtime in _FORMATS and (pair.memory or pair.stream is not None):
        how = (pair.device, _file_precision(runtime, pair.device, pair.half), None, batch)
        with DeviceLock(device_key(pair.device)).using():
            shipped = [make_engine(network, _FORMATS[runtime], size, *how) for _, network, size in each]
    timed = pair.networks if pair.stream is None else (shipped[0] or pair.networks[0], shipped[-1] or pair.networks[1])
    with alone_on(pair.device):
        found = measure_pair(
            timed[0], timed[1], pair.sizes[0], pair.device, batch, pair.threads, max_seconds, target_halfwidth, runtime,
            pair.half, baseline_imgsz=pair.sizes[1], stream=pair.stream, streams=pair.streams,
        )  # fmt: skip
        if not pair.memory:
            return found
        peaks = []
        for (path, _, size), file in zip(each, shipped, strict=True):
            say(f"measuring the memory of {path} in {runtime}")
            spec = SessionSpec(size, pair.device, batch, pair.half, pair.threads, pair.stream)
            with nullcontext(path) if file is None else file.written() as place:
                peaks.append(peak_memory(place, spec, runtime, "fp32" if file is None else file.precision, pair.trust))
    return replace(
        found,
        peak_memory_mb=peaks[0].process_mb,
        baseline_peak_memory_mb=peaks[-1].process_mb,
        peak_device_memory_mb=peaks[0].device_mb,
        baseline_peak_device_memory_mb=peaks[-1].device_mb,
    )


def _file_precision(runtime: str, device: str, half: bool) -> str:
    """What the file of a runtime computes in. Raises PruningError where it cannot be made or run here."""
    from paretoprune.pruning.export.precision import check_precision, run_precisions

    if runtime not in _FORMATS:
        return "fp32"
    target = _FORMATS[runtime]
    halves = [name for name in run_precisions(target, device) if name in ("fp16", "bf16")] if half else ["fp32"]
    check_precision(target, halves[0], device)
    return halves[0]


def _is_checkpoint(model: str | Path) -> bool:
    return Path(model).suffix == ".pt"


def _agents(
    target: str,
    token_file: str | Path | None,
    device: str | None,
    runtimes: Sequence[str],
    models: Sequence[str | Path],
) -> tuple[AgentPool, Sequence[str]]:
    """The devices of ``--latency-target``, which are there and have the runtimes; and the runtimes."""
    try:
        parsed = LatencyTarget.parse(target)
        if not parsed.agents:
            raise ValueError(
                f"this command measures here, or on agents: the target must be http://HOST:PORT, but got {target!r}; "
                "leave it out to measure on this machine"
            )
        for model in models:
            if _is_checkpoint(model):
                check_model_file(str(model))
                runtimes = runtimes or AGENT_RUNTIMES[:1]
                for runtime in runtimes:
                    parsed.check_runtime(runtime)
            else:
                runtimes = runtimes or [runtime_of_file(str(model))]
                for runtime in runtimes:
                    runtime_of_file(str(model), runtime)
                if not Path(model).exists():
                    raise ValueError(f"the model must exist, but there is no {model}; check the path")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if device not in (None, "auto", "cpu", "gpu"):
        raise ConfigError(f"on an agent the device must be auto, cpu or gpu, but got {device!r}")
    pool = pool_of(parsed, None if token_file is None else str(token_file))
    for runtime in runtimes:
        check_agents(pool, runtime)
    return pool, runtimes


@dataclass(frozen=True)
class Exported:
    """What was written to ``path``, and what its check found there; None: it was not checked.

    ``check`` holds the keys of ``PATH.check.json``: verdict, median_ms, speedup, speedup_ci95, ...
    """

    path: Path
    check: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """Whether its answers differ from the checkpoint's by no more than another runtime's arithmetic explains."""
        return self.check is None or bool(self.check["ok"])


def export(
    model: str | Path,
    format: str = "onnx",  # noqa: A002  Ultralytics' word for it
    *,
    precision: str | None = None,
    imgsz: ImageSize | None = None,
    output: str | Path | None = None,
    data: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    batch: int = 1,
    dynamic: bool = False,
    nms: bool = False,
    options: Mapping[str, Any] | None = None,
    against: str | Path | None = None,
    check: bool = True,
    seconds: float = 8.0,
    device: str | None = None,
    trust_checkpoint: bool = False,
) -> Exported:
    """Export a checkpoint through Ultralytics' exporter, to a file or folder ``output`` (None: beside it).

    ``precision``: fp32, fp16, bf16 (OpenVINO) or int8, which is calibrated on so many training images of ``data``;
    None: that in which the plan beside the checkpoint says that it was judged, else fp32.
    ``options``: further export options of Ultralytics. Then its answers on real images (of ``data``, else two that
    Ultralytics brings along) are compared with the checkpoint's, with ``data`` its accuracy, too, see ``.ok``; and its
    latency is measured in turn with the checkpoint's in PyTorch, or with the same export of ``against``, for at most
    so many ``seconds``.
    """
    for path in filter(None, (model, against)):
        check_model_file(str(path))
    with speaking(at_once=False) as say:
        say(f"loading {model}")
        from paretoprune.pruning.data.calibration import load_calibration
        from paretoprune.pruning.export.check import real_images
        from paretoprune.pruning.export.exporter import check_options, export_model, export_path
        from paretoprune.pruning.export.precision import check_precision
        from paretoprune.pruning.yolo.image_size import stride_of, trained_size
        from paretoprune.pruning.yolo.loading import load_model

        target, place = None if output is None else Path(output), device or default_device()
        dataset = None if data is None else str(data)
        goes_to = export_path(model, format, target)
        further = {**(options or {}), "batch": batch} | {
            n: True for n, on in (("dynamic", dynamic), ("nms", nms)) if on
        }
        check_options(format, further)
        precision = precision or _judged_in(Path(model))
        check_precision(format, precision, place, run=check, remedy="; --no-check only writes the file")
        if dataset is None and (precision == "int8" or (nms and check)):
            why = (
                "`precision` int8 is calibrated on training images"
                if precision == "int8"
                else "`nms` is checked by accuracy"
            )
            raise ArgumentError(f"{why}, but no dataset is given; give `data`")
        if target is not None:
            folders = [(goes_to, "*")] if goes_to.is_dir() else []
            files = [goes_to.with_name(goes_to.name + CHECK), *([] if folders else [goes_to])]
            check_output(files, [model, against, data], folders)
        network: Any = load_model(str(model), trust_checkpoint)
        size = imgsz or trained_size(getattr(network, "args", None), stride_of(network))
        check_image_size(size, stride_of(network), str(model))
        images = real_images(network, size, dataset) if check else None
        calibration = None
        if precision == "int8":
            assert dataset is not None
            say("reading calibration images")
            calibration = load_calibration(dataset, network, size, calibration_images)
        job = _ExportJob(format, size, place, trust_checkpoint, precision, calibration, further)
        say(f"exporting {model} to {format}")
        with DeviceLock(device_key(place)).using():
            written = export_model(model, *job.arguments(target))
        if images is None:
            return Exported(written, None)
        return Exported(written, _checked(written, network, str(model), job, images, dataset, against, seconds, say))


def _judged_in(model: Path) -> str:
    """The precision in which a run judged the network; "fp32" of one of another origin."""
    plan = model.with_name(PLAN)
    said = (read_object(plan).get("made_with") or {}).get(DEPLOY_PRECISION, "fp32") if plan.is_file() else "fp32"
    if said != "fp32":
        note(f"exporting it in {said}, in which its run judged it (--precision for another)")
    return str(said)


@dataclass(frozen=True)
class _ExportJob:
    """How a model and the one it is timed against are exported."""

    format: str
    imgsz: ImageSize
    device: str
    trust: bool
    precision: str
    calibration: Calibration | None
    options: Mapping[str, Any]

    def arguments(self, output: str | Path | None) -> tuple[Any, ...]:
        """Of `export_model`, after the model."""
        how = (self.precision, self.calibration, self.options)
        return (self.format, self.imgsz, self.device, self.trust, output, *how)


def _checked(
    written: Path,
    network: Any,
    model: str,
    job: _ExportJob,
    images: RealImages,
    data: str | None,
    against: str | Path | None,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The result of the check and of the timing, also written beside the export as ``<export>.check.json``."""
    from paretoprune.pruning.export.accuracy import compare_accuracy
    from paretoprune.pruning.export.check import check_export, measure_export, verdict_on
    from paretoprune.pruning.export.exporter import export_model, size_mb

    lock, nms = DeviceLock(device_key(job.device)), job.options.get("nms")
    how: dict[str, Any] = {"precision": job.precision, "trust": job.trust, "batch": job.options.get("batch", 1)}
    with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        rival, outputs, accuracy = Path(model), None, None
        with lock.using():
            say(f"comparing the outputs of {written}")
            if not nms:  # whose answers are other numbers than the checkpoint's
                outputs = check_export(written, network, job.imgsz, job.device, None, images, job.precision)
            if against is not None:
                say(f"exporting {against} to {job.format}")
                rival = export_model(against, *job.arguments(scratch))
        if data is not None:
            say(f"validating {written.name} and {Path(model).name}, one image after the other")
            conf = job.options.get("conf") or (_NMS_CONF if nms else None)
            accuracy = compare_accuracy(written, network, data, job.imgsz, job.device, job.precision, conf, lock)
        say(f"timing {written}")
        with lock.measuring():
            times = measure_export(written, rival, job.imgsz, job.device, measuring_threads(), seconds, **how)
    found = {
        "export": written.name,
        "format": job.format,
        "precision": job.precision,
        "imgsz": job.imgsz,
        "batch": how["batch"],
        "device": job.device,
        "size_mb": size_mb(written),
        **verdict_on(outputs, accuracy, job.precision),
        "accuracy": None if accuracy is None else accuracy.to_dict(),
        **times.to_dict(),
    }
    write_json(written.with_name(written.name + CHECK), found)
    return found
