"""The final evaluation: picks, native models and the unpruned model, all evaluated in one session.

All of them are evaluated on the same images and timed in turn, so every figure of the comparison is of the
same minutes, also of picks that were fine-tuned on another day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.atomic import write_json
from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.file_names import BASELINE_RECORD, BEST, CONFIG, EVENTS, METRICS, SESSION, TRIALS, TUNED
from paretoprune.base.image_size import ImageSize, read_size
from paretoprune.results.store.accuracy import on_all_images
from paretoprune.results.store.records import SCHEMA_VERSION
from paretoprune.results.store.run_files import UNPRUNED_AT, read_object
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.trial.joint_evaluation import BASELINE, NATIVE
from paretoprune.search.trial.trial import latency_metrics
from paretoprune.search.worker.cluster import MODEL_FOLDER
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import carried
from paretoprune.search.worker.worker import tools_of


@dataclass(frozen=True)
class Finalist:
    """A fully fine-tuned network, as ``tuned.json`` in its folder says. ``name``: trial id, ``native:<stem>``, or of a
    free move ``unpruned@<imgsz>``."""

    name: str
    directory: Path
    content: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The network."""
        return self.directory / BEST

    @property
    def trust(self) -> bool | None:
        """How its file is loaded; None: as the run's model, which a pick was made of."""
        return bool(self.content.get("trust_checkpoint")) if self.is_rival else None

    @property
    def imgsz(self) -> ImageSize | None:
        """Size of a free move's input; None of all others."""
        return read_size(self.content["imgsz"]) if "imgsz" in self.content else None

    @property
    def is_rival(self) -> bool:
        """Whether it is a native model or a free move, and no pick."""
        return self.name.startswith((NATIVE, UNPRUNED_AT))


def finished_networks(folder: RunFolder) -> list[Finalist]:
    """Every pick and rival whose fine-tuning ended, picks first; also those of older runs."""
    found = []
    for root, prefix in ((folder.selected_root, ""), (folder.native_root, NATIVE), (folder.tuned_moves_root, "")):
        for directory in sorted(path for path in root.glob("*") if (path / BEST).is_file()):
            content = finished_content(directory)
            if content is not None:
                found.append(Finalist(prefix + directory.name, directory, content))
    return found


def finished_content(directory: Path) -> dict[str, Any] | None:
    """tuned.json, or what metrics.json held before there was one; None while the fine-tuning goes on."""
    for name in (TUNED, METRICS):
        path = directory / name
        if path.is_file():
            return read_object(path)
    return None


def needs_session(folder: RunFolder) -> bool:
    """Whether a finished network is not in the last session, or was fine-tuned anew since."""
    networks = finished_networks(folder)
    if not networks:
        return False
    if not folder.session.is_file():
        return True
    known = folder.read_session().get("tuned_at", {})
    return {item.name: item.content.get("tuned_at") for item in networks} != known


def compare_finalists(context: WorkerContext, places: Sequence[str]) -> None:
    """In a worker: judge all finished networks together and write every ``metrics.json``, then ``session.json``.

    places: their folders below the run's.
    """
    needs = [MODEL_FOLDER, BASELINE_RECORD, TRIALS, CONFIG]
    with carried(context, needs, [*places, SESSION, "session.log"]) as here:
        _compare(here)


def _timed(
    tools: Any,
    gate: DeviceGate,
    models: Mapping[str, Any],
    sizes: Mapping[str, ImageSize | None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every network's latency; on a target elsewhere each beside the unpruned one, one after the other."""
    say(f"timing {len(models)} networks in turn")
    if not tools.measures_here:
        return {name: tools.at(sizes.get(name)).start_measure(model).result() for name, model in models.items()}
    with gate.measuring():
        return dict(tools.measure_together(models, sizes))


def _timed_on_devices(
    tools: Any,
    models: Mapping[str, Any],
    sizes: Mapping[str, ImageSize | None],
    devices: Iterable[str],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Every network's latency on the further kinds of devices, each beside the unpruned one; by network and kind."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for device in devices:
        say(f"timing {len(models)} networks on {device}")
        for name, model in models.items():
            found[name][device] = tools.at(sizes.get(name)).start_measure(model, device=device).result()
    return found


def _compare(context: WorkerContext) -> None:
    folder = context.folder
    say = PhaseClock(folder.path / EVENTS).step
    say("loading the networks")
    tools, gate = tools_of(context)
    networks = finished_networks(folder)
    before = on_all_images(folder.read_baseline()["metrics"])
    records = {record.trial_id: record for record in folder.read_records()}
    with tools.logging(folder.path / "session.log"):
        models = {BASELINE: tools.baseline}
        models.update({item.name: tools.load(item.checkpoint, item.trust) for item in networks})  # the files
        sizes = {item.name: item.imgsz if item.is_rival else records[item.name].imgsz for item in networks}
        accuracies = tools.evaluate_together(models, sizes, say)
        better = {name: found.pop("map50_95_over", {}) for name, found in accuracies.items()}
        times = _timed(tools, gate, models, sizes, say)
        on_devices = _timed_on_devices(tools, models, sizes, context.config.latency.targets, say)
    deploy = context.config.deploy
    target = LatencyTarget.parse(context.config.latency.target)
    files_timed = bool(target.agents) or target.is_device(tools.device)
    only_picks = deploy.format != "torch" and not deploy.in_trials and files_timed
    # The run's own latency of the unpruned network is of PyTorch where only the picks are files
    base_ms = float(times[BASELINE]["median_ms"] if only_picks else before["latency_ms"])
    devices_ms = {
        device: float(measured["median_ms"] if only_picks else before[f"latency_ms_{device}"])
        for device, measured in on_devices[BASELINE].items()
    }
    session = {"measured_at": time.time(), "networks": list(models), "device": tools.device}
    beside = {
        **before,
        **accuracies[BASELINE],
        "latency_ms": base_ms,
        "latency_measured_ms": float(times[BASELINE]["median_ms"]),
        **{f"latency_ms_{device}": unpruned_ms for device, unpruned_ms in devices_ms.items()},
    }
    for item in networks:
        after = {**accuracies[item.name], **tools.at(sizes.get(item.name)).stats(models[item.name])}
        after.update(latency_metrics(times[item.name], base_ms))
        for device, measured in on_devices[item.name].items():
            after.update(latency_metrics(measured, devices_ms[device], device))
        content = {"after": after, "baseline": beside, "session": session, **_lasting(item.content)}
        if item.is_rival:
            name = item.directory.name
            write_json(item.directory / METRICS, {"schema_version": SCHEMA_VERSION, "name": name, **content})
        else:
            folder.write_selected(item.name, {"before": records[item.name].metrics, **content})
    over = {name: times[name].get("over", {}) for name in models}
    tuned_at = {item.name: item.content.get("tuned_at") for item in networks}
    write_json(
        folder.session,
        {
            "schema_version": SCHEMA_VERSION,
            **session,
            "tuned_at": tuned_at,
            "speedup_over": over,
            "map50_95_over": better,
        },
    )


def _lasting(content: Mapping[str, Any]) -> dict[str, Any]:
    """What tuned.json says that belongs into metrics.json."""
    wanted = (
        "chosen_as settings epochs best_epoch retries precision model imgsz recipe trust_checkpoint seconds tuned_at"
    )
    return {name: content[name] for name in wanted.split() if name in content}
