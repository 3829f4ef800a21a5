"""Latency on a device without Ray: networks go there as files, samples come back, statistics are made here as always.

The device runs `cluster.agent.agent`; see docs/edge.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.cluster.agent.client import AgentClient, AgentPool, read_token
from paretoprune.cluster.errors import AgentAwayError
from paretoprune.search.config.latency_target import TOLD_TO_HALVE, LatencyTarget
from paretoprune.search.errors import ConfigError

if TYPE_CHECKING:
    from paretoprune.pruning.latency.pair import LatencyResult
    from paretoprune.pruning.latency.runtimes import ExportCache, Timeable
    from paretoprune.search.config.sections import LatencySection

_ENDS = ("xml", "bin", "param")  # of the files of a folder that are the network; the ends are an agent's roles


@dataclass(frozen=True)
class AgentJob:
    """What is measured how. ``runtime``: the device's; ``imgsz``: of the candidate's images, ``baseline_imgsz`` of the
    baseline's, None for the same; ``device``: "auto" (its GPU where the runtime has one), "cpu" or
    "gpu"."""

    runtime: str
    imgsz: ImageSize
    baseline_imgsz: ImageSize | None = None
    batch: int = 1
    half: bool = False
    threads: int | None = None
    max_seconds: float = 4.0
    target_halfwidth: float = 0.01
    device: str = "auto"
    patience: float = 1.0


@dataclass(frozen=True)
class SentModel:
    """A network's ``files`` (role -> content), the ``shape`` of its input, and what it computes in ("": as the runtime
    says)."""

    files: Mapping[str, bytes]
    shape: list[int]
    precision: str = ""


def pool_of(target: LatencyTarget, token_file: str | None, wait_minutes: float = 0.0) -> AgentPool:
    """The target's devices. Raises AgentError where there is no token."""
    return AgentPool(target.agents, read_token(token_file), 60 * wait_minutes)


def check_agents(pool: AgentPool, runtime: str) -> list[dict[str, Any]]:
    """What each device says of itself. Raises AgentError where one is away, refuses, or has not the runtime."""
    found = []
    for client in pool.clients:
        info = client.info()
        has = [*info.get("runtimes", {}), *info.get("commands", {})]
        if runtime not in has:
            raise ConfigError(
                f"the device at {client.address} must have the runtime {runtime}, but it has "
                f"{', '.join(has) or 'none'}; install it for the Python that runs the agent, or choose another "
                "latency.runtime (--runtime)"
            )
        found.append(info)
    return found


def measure_on_agents(
    pool: AgentPool, candidate: Timeable, baseline: Timeable, job: AgentJob, exports: ExportCache
) -> LatencyResult:
    """Time ``candidate`` and ``baseline`` in turn on one device of the pool; as `pruning.latency.pair.measure_pair`.

    Raises AgentAwayError where no device comes back in time, AgentError where the device cannot run them, and
    PruningError where a network cannot be exported.
    """
    sizes = job.imgsz, job.baseline_imgsz or job.imgsz
    first, second = (
        sent_model(each, size, job, exports) for each, size in zip((candidate, baseline), sizes, strict=True)
    )
    return measure_sent(pool, first, second, job)


def sent_model(network: Timeable, imgsz: ImageSize, job: AgentJob, exports: ExportCache) -> SentModel:
    """What goes to the device for a network: its file where it is one, else what it is exported to for the runtime."""
    from paretoprune.pruning.export.engine import make_engine
    from paretoprune.pruning.latency.runtimes import EngineFile, OnnxFile, SessionSpec, image_channels

    shape = [job.batch, image_channels(network), *height_width(imgsz)]
    if job.runtime == "ncnn" and not isinstance(network, (EngineFile, OnnxFile)):
        network = make_engine(network, "ncnn", imgsz, precision="fp16" if job.half else "fp32", batch=job.batch)
    if not isinstance(network, EngineFile):
        return SentModel(
            {"model": exports.content(network, "onnx", SessionSpec(imgsz, "cpu", job.batch), False)}, shape
        )
    if "" in network.files:
        return SentModel({"model": network.files[""]}, shape, network.precision)
    ends = {name.rpartition(".")[2]: content for name, content in network.files.items()}
    return SentModel({end: ends[end] for end in _ENDS if end in ends}, shape, network.precision)


def measure_sent(pool: AgentPool, candidate: SentModel, baseline: SentModel, job: AgentJob) -> LatencyResult:
    """The part of `measure_on_agents` that is the devices'."""
    return pool.run(lambda client: _measured(client, (candidate, baseline), job))


def _measured(client: AgentClient, models: tuple[SentModel, SentModel], job: AgentJob) -> LatencyResult:
    """One measurement on one device, from sending the files to the device's last word."""
    from paretoprune.pruning.latency.pair import (
        WARMUP_SHARE,
        LatencyResult,
        figures,
        pair_block_ms,
        until_known,
    )

    sent = [
        {"files": {role: client.send(content) for role, content in model.files.items()}, "shape": model.shape}
        for model in models
    ]
    told = job.runtime in TOLD_TO_HALVE and models[0].precision in ("fp16", "bf16")
    request = {
        "candidate": sent[0],
        "baseline": sent[1],
        "runner": job.runtime,
        "device": job.device,
        "half": job.half or told,
        "threads": job.threads,
        "seconds": job.patience * job.max_seconds,
        "warmup_seconds": WARMUP_SHARE * job.max_seconds,
        "block_ms": pair_block_ms(job.max_seconds),
    }
    events = _Events(client.measure(request))
    try:
        events.until("prepared")
        begun = time.perf_counter()
        warmup_iterations = int(events.until("warm")["iterations"])
        times = until_known(
            events.quads(), warmup_iterations, begun, job.max_seconds, job.target_halfwidth, patience=job.patience
        )
        seconds = time.perf_counter() - begun
        if "end" not in events.seen:
            with suppress(AgentAwayError):  # it may have ended by itself; if it is away, its last event is missing
                client.enough(events.seen["started"]["id"])
            events.until("end")
    finally:
        events.close()
    started, prepared = events.seen["started"]["facts"], events.seen["prepared"]
    return LatencyResult(
        **figures(times, job.batch),
        device=prepared["device"],
        threads=prepared["threads"],
        imgsz=job.imgsz,
        batch=job.batch,
        runtime=job.runtime,
        precision=models[0].precision or prepared["precision"],
        baseline_precision=models[1].precision or prepared["precision"],
        runtime_version=prepared["version"],
        host=started["host"],
        seconds=seconds,
        target_halfwidth=job.target_halfwidth,
        conditions=_conditions(started, events.seen["state"], events.seen["end"]["state"]),
    )


class _Events:
    """An agent's events, with the last of each kind kept."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self._events = events
        self.seen: dict[str, dict[str, Any]] = {}

    def until(self, kind: str) -> dict[str, Any]:
        """Read on to the next event of a kind."""
        for event in self._events:
            self.seen[event["event"]] = event
            if event["event"] == kind:
                return event
        raise AgentAwayError("the device", f"it ended a measurement before it was {kind}")

    def quads(self) -> Iterator[Any]:
        """The rounds as they come, to the measurement's end."""
        from paretoprune.pruning.latency.statistics import Quad

        for event in self._events:
            self.seen[event["event"]] = event
            if event["event"] == "rounds":
                for pair in event["rounds"]:
                    yield Quad(*(tuple(tuple(block) for block in blocks) for blocks in pair))  # type: ignore[arg-type]
            if event["event"] == "end":
                return

    def close(self) -> None:
        """Leave; what still runs on the device for it is ended there."""
        close: Callable[[], None] = self._events.close  # type: ignore[attr-defined]
        close()


def _conditions(facts: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    """What the device said of itself, in the words of a local measurement; a device's own counters decide."""
    from paretoprune.pruning.latency.device_state import Conditions

    counts = [state["throttle_count"] for state in (before, after)]
    now = [state["throttled_now"] for state in (before, after)]
    counted = None if None in counts else counts[1] > counts[0]
    seen = None if now == [None, None] else True in now
    throttled = None if counted is None and seen is None else bool(counted or seen)
    return Conditions(
        device_name=facts["model"],
        driver=facts["system"],
        clock_mhz_start=before["clock_mhz"],
        clock_mhz_end=after["clock_mhz"],
        throttled=throttled,
        throttle_reasons=None if throttled is None else ("thermal or power",) * throttled,
        temperature_c_start=before["temperature_c"],
        temperature_c_end=after["temperature_c"],
        governor=before["governor"],
        power_mode=before["power_mode"],
        memory_free_mb=before["memory_free_mb"],
    )


class AgentMeasurement:
    """A measurement under way in a thread; see :class:`search.trial.context.Measurement`."""

    def __init__(self, work: Callable[[], dict[str, Any]]) -> None:
        self._future: Future[dict[str, Any]] = Future()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[], dict[str, Any]]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:  # noqa: BLE001  whoever asks for the result gets it
            self._future.set_exception(error)

    def known(self) -> Mapping[str, Any] | None:
        """Nothing before the end, which is not waited for."""
        if not self._future.done() or isinstance(self._future.exception(), AgentAwayError):
            return None  # `result` says that the device is away: it may not be needed
        return self._future.result()

    def result(self) -> Mapping[str, Any]:
        """Wait for it. Raises what the measuring raised; AgentAwayError where no device came back in time."""
        return self._future.result()


class AgentMeasurer:
    """One worker's way to the devices of one kind; exports a network as it is now, and measures while the trial goes
    on.

    ``runtime``: the devices'; ``imgsz``: size of the unpruned network's input.
    """

    def __init__(self, latency: LatencySection, runtime: str, target: LatencyTarget, imgsz: ImageSize) -> None:
        from paretoprune.pruning.latency.runtimes import ExportCache

        self._latency, self._runtime, self._imgsz = latency, runtime, imgsz
        self._pool = pool_of(target, latency.token_file, latency.wait_minutes)
        self._exports = ExportCache()
        self._baseline: tuple[Timeable, SentModel] | None = None

    def start(
        self,
        candidate: Timeable,
        baseline: Timeable,
        imgsz: ImageSize,
        keep: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> AgentMeasurement:
        """Make the files of both as they are now, and return; the rest is done in a thread.

        ``imgsz``: size of the candidate's input. ``keep`` gets what was measured.
        """
        from paretoprune.pruning.latency.pair import PATIENCE

        latency = self._latency
        job = AgentJob(
            runtime=self._runtime,
            imgsz=imgsz,
            baseline_imgsz=self._imgsz,
            batch=latency.batch,
            half=latency.half,
            threads=latency.threads,
            max_seconds=latency.max_seconds,
            target_halfwidth=latency.target_halfwidth,
            patience=PATIENCE,
        )
        if self._baseline is None or self._baseline[0] is not baseline:
            self._baseline = baseline, sent_model(baseline, self._imgsz, job, self._exports)
        pair = sent_model(candidate, imgsz, job, self._exports), self._baseline[1]

        def measured() -> dict[str, Any]:
            found = measure_sent(self._pool, *pair, job).to_dict()
            if keep is not None:
                keep(found)
            return found

        return AgentMeasurement(measured)
