"""Models on a device: latency beside another model's, and exports that are checked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_json
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.devices import default_device, device_key
from paretoprune.pruning.yolo.image_size import ImageSize, check_image_size
from paretoprune.search.api.overwriting import check_output
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.errors import ConfigError
from paretoprune.search.sweep.preflight import check_model_file
from paretoprune.search.trial.agent_latency import AgentJob, check_agents, measure_on_agents, pool_of
from paretoprune.search.trial.exclusive_device import alone_on, measuring_threads

if TYPE_CHECKING:
    from paretoprune.cluster.agent.client import AgentPool
    from paretoprune.pruning.export.check import RealImages
    from paretoprune.pruning.latency.pair import LatencyResult

CHECK = ".check.json"  # beside the export: what its check found


def latency(
    model: str | Path,
    *,
    against: str | Path | None = None,
    runtime: str = "torch",
    half: bool = False,
    imgsz: ImageSize = 640,
    against_imgsz: ImageSize | None = None,
    batch: int = 1,
    threads: int | None = None,
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
    ``max_seconds``. ``against_imgsz``: input size of ``against``, None for the same. ``runtime``: torch,
    torch-cuda-graph, onnx, openvino or tensorrt. ``latency_target``: ``http://HOST:PORT``, an agent that measures it on
    its device (docs/edge.md).
    """
    options: dict[str, Any] = {"half": half, "imgsz": imgsz, "batch": batch, "threads": threads, "device": device}
    options |= {"target_halfwidth": target_halfwidth, "max_seconds": max_seconds, "against_imgsz": against_imgsz}
    options |= {"latency_target": latency_target, "token_file": token_file}
    return latencies(model, against, [runtime], trust_checkpoint=trust_checkpoint, **options)[0]


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
    latency_target: str | None = None,
    token_file: str | Path | None = None,
    **options: Any,
) -> list[LatencyResult]:
    """One result for each runtime; what a runtime cannot do is found before the first is measured."""
    for path in filter(None, (model, against)):
        check_model_file(str(path))
    for size in (imgsz, imgsz if against_imgsz is None else against_imgsz):
        check_image_size(size)
    if latency_target is not None:
        pool = _agents(latency_target, token_file, device, runtimes)
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.pruning.latency.runtimes import ExportCache, check_runtime
    from paretoprune.pruning.yolo.loading import load_model

    if latency_target is not None:
        networks = [load_model(str(path), trust_checkpoint) for path in dict.fromkeys((model, against or model))]
        exports = ExportCache()
        jobs = [
            AgentJob(runtime, imgsz, against_imgsz, half=half, threads=threads, device=device or "auto", **options)
            for runtime in runtimes
        ]
        return [measure_on_agents(pool, networks[0], networks[-1], job, exports) for job in jobs]
    place = device or default_device()
    for runtime in runtimes:
        check_runtime(runtime, place, half)
    candidate = load_model(str(model), trust_checkpoint)
    baseline = candidate if against is None else load_model(str(against), trust_checkpoint)
    options |= {"half": half, "device": place, "threads": threads or measuring_threads()}
    options |= {"baseline_imgsz": against_imgsz}
    results = []
    for runtime in runtimes:
        with alone_on(place):
            results.append(measure_pair(candidate, baseline, imgsz, runtime=runtime, **options))
    return results


def _agents(target: str, token_file: str | Path | None, device: str | None, runtimes: Sequence[str]) -> AgentPool:
    """The devices of ``--latency-target``, which are there and have the runtimes."""
    try:
        parsed = LatencyTarget.parse(target)
        if not parsed.agents:
            raise ValueError(
                f"this command measures here, or on agents: the target must be http://HOST:PORT, but got {target!r}; "
                "leave it out to measure on this machine"
            )
        for runtime in runtimes:
            parsed.check_runtime(runtime)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if device not in (None, "auto", "cpu", "gpu"):
        raise ConfigError(f"on an agent the device must be auto, cpu or gpu, but got {device!r}")
    pool = pool_of(parsed, None if token_file is None else str(token_file))
    for runtime in runtimes:
        check_agents(pool, runtime)
    return pool


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
    imgsz: ImageSize | None = None,
    output: str | Path | None = None,
    data: str | Path | None = None,
    against: str | Path | None = None,
    check: bool = True,
    seconds: float = 8.0,
    device: str | None = None,
    trust_checkpoint: bool = False,
) -> Exported:
    """Export a checkpoint through Ultralytics' exporter, to a file or folder ``output`` (None: beside it).

    Then its answers on real images (of ``data``, else two that Ultralytics brings along) are compared with the
    checkpoint's, see ``.ok``, and its latency is measured in turn with the checkpoint's in PyTorch, or with the same
    export of ``against``, for at most so many ``seconds``.
    """
    for path in filter(None, (model, against)):
        check_model_file(str(path))
    from paretoprune.pruning.export.check import real_images
    from paretoprune.pruning.export.exporter import export_model, export_path
    from paretoprune.pruning.yolo.image_size import stride_of, trained_size
    from paretoprune.pruning.yolo.loading import load_model

    target = None if output is None else Path(output)
    goes_to = export_path(model, format, target)
    if target is not None:
        folders = [(goes_to, "*")] if goes_to.is_dir() else []
        files = [goes_to.with_name(goes_to.name + CHECK), *([] if folders else [goes_to])]
        check_output(files, [model, against, data], folders)
    network: Any = load_model(str(model), trust_checkpoint)
    size = imgsz or trained_size(getattr(network, "args", None), stride_of(network))
    check_image_size(size, stride_of(network), str(model))
    place = device or default_device()
    images = real_images(network, size, None if data is None else str(data)) if check else None
    with DeviceLock(device_key(place)).using():
        written = export_model(model, format, size, place, trust_checkpoint, target)
    if images is None:
        return Exported(written, None)
    rival = None if against is None else str(against)
    return Exported(
        written, _checked(written, str(model), format, size, place, images, trust_checkpoint, rival, seconds)
    )


def _checked(
    written: Path,
    model: str,
    target: str,
    imgsz: ImageSize,
    device: str,
    images: RealImages,
    trust: bool,
    against: str | None,
    seconds: float,
) -> dict[str, Any]:
    """The result of the check and of the timing, also written beside the export as ``<export>.check.json``."""
    from paretoprune.pruning.export.check import check_export, measure_export
    from paretoprune.pruning.export.exporter import export_model
    from paretoprune.pruning.yolo.loading import load_model

    lock = DeviceLock(device_key(device))
    with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        rival = Path(model)
        with lock.using():
            comparison = check_export(written, load_model(model, trust), imgsz, device, images=images)
            if against is not None:
                rival = export_model(against, target, imgsz, device, trust, scratch)
        with lock.measuring():
            times = measure_export(written, rival, imgsz, device, measuring_threads(), seconds, trust=trust)
    found = {
        "export": written.name,
        "format": target,
        "imgsz": imgsz,
        "device": device,
        "ok": comparison.ok,
        "verdict": comparison.verdict,
        **asdict(comparison),
        **times.to_dict(),
    }
    write_json(written.with_name(written.name + CHECK), found)
    return found
