"""The final evaluation: picks, native models and the unpruned model, all evaluated in one session.

All of them are evaluated on the same images and timed in turn, so every figure of the comparison is of the
same minutes, also of picks that were fine-tuned on another day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_json
from paretoprune.base.device_gate import DeviceGate
from paretoprune.base.file_names import (
    BASELINE_RECORD,
    BEST,
    CONFIG,
    EVENTS,
    METRICS,
    MODEL_FOLDER,
    SESSION,
    TRIALS,
    TUNED,
)
from paretoprune.base.image_size import ImageSize, read_size
from paretoprune.results.store.accuracy import accuracies, on_all_images
from paretoprune.results.store.records import DEPLOY_PRECISION, SCHEMA_VERSION
from paretoprune.results.store.run_files import UNPRUNED_AT, read_object
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.storage.event_log import PhaseClock
from paretoprune.search.trial.joint_evaluation import BASELINE, NATIVE, PRECISION_COST
from paretoprune.search.trial.trial import latency_metrics
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import carried
from paretoprune.search.worker.worker import tools_of

if TYPE_CHECKING:
    from paretoprune.search.config.run_config import RunConfig


@dataclass(frozen=True)
class Finalist:
    """A fully fine-tuned network, as ``tuned.json`` in its folder says. ``name``: trial id, ``native:<stem>``, or of a
    free move ``unpruned@<imgsz>-<precision>``."""

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
    def precision(self) -> str | None:
        """Of a free move's file; None: the run's."""
        return self.content.get(DEPLOY_PRECISION)

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
    precisions: Mapping[str, str | None],
) -> dict[str, Any]:
    """Every network's latency; on a target elsewhere each beside the unpruned one, one after the other."""
    say(f"timing {len(models)} networks in turn")
    if not tools.measures_here:
        here = {name: tools.at(sizes.get(name), precisions.get(name)) for name in models}
        return {name: here[name].start_measure(model).result() for name, model in models.items()}
    with gate.measuring():
        return dict(tools.measure_together(models, sizes))


def _timed_on_devices(
    tools: Any,
    models: Mapping[str, Any],
    sizes: Mapping[str, ImageSize | None],
    devices: Iterable[str],
    say: Callable[[str], None],
    precisions: Mapping[str, str | None],
) -> dict[str, dict[str, Any]]:
    """Every network's latency on the further kinds of devices, each beside the unpruned one; by network and kind."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for device in devices:
        say(f"timing {len(models)} networks on {device}")
        for name, model in models.items():
            its = tools.at(sizes.get(name), precisions.get(name))
            found[name][device] = its.start_measure(model, device=device).result()
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
        plans = {item.name: item if item.is_rival else records[item.name] for item in networks}
        sizes = {name: plan.imgsz for name, plan in plans.items()}
        precisions = {name: plan.precision for name, plan in plans.items()}
        variants = _variants(context.config, precisions)
        judged = tools.evaluate_together(models, sizes, say, precisions, variants)
        for name, (network, precision) in variants.items():
            models[name], sizes[name], precisions[name] = models[network], sizes.get(network), precision
        better = {name: found.pop("map50_95_over", {}) for name, found in judged.items()}
        times = _timed(tools, gate, models, sizes, say, precisions)
        on_devices = _timed_on_devices(tools, models, sizes, context.config.latency.targets, say, precisions)
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
    session = {
        "measured_at": time.time(),
        "networks": [name for name in models if name not in variants],
        "device": tools.device,
    }
    beside = {
        **before,
        **judged[BASELINE],
        "latency_ms": base_ms,
        "latency_measured_ms": float(times[BASELINE]["median_ms"]),
        **{f"latency_ms_{device}": unpruned_ms for device, unpruned_ms in devices_ms.items()},
    }
    for item in networks:
        after = {**judged[item.name], **tools.at(sizes.get(item.name)).stats(models[item.name])}
        after.update(latency_metrics(times[item.name], base_ms))
        if deploy.format != "torch":
            after[DEPLOY_PRECISION] = precisions[item.name] or deploy.precision
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
            "precisions": _by_precision(variants, precisions, deploy.precision, judged, times, base_ms),
        },
    )


def _variants(config: RunConfig, precisions: Mapping[str, str | None]) -> dict[str, tuple[str, str]]:
    """Every network in the other precisions of the run: "t0007 in int8" -> network, precision. Free moves are there in
    their own."""
    names = [BASELINE, *(name for name in precisions if not name.startswith(UNPRUNED_AT))]
    own = config.deploy.precision
    return {
        f"{name} in {precision}": (name, precision)
        for name in names
        for precision in config.space.precision or ()
        if precision != (precisions.get(name) or own)
    }


def _by_precision(
    variants: Mapping[str, tuple[str, str]],
    precisions: Mapping[str, str | None],
    own: str,
    judged: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Mapping[str, Any]],
    base_ms: float,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> precision -> accuracy and latency; and what it costs against the same network in the run's ``own``:
    ``accuracy_cost`` and ``speedup_over_own``, each [value, low, high] where intervals are known."""
    members: dict[str, dict[str, str]] = {}
    for name, (network, precision) in variants.items():
        members.setdefault(network, {precisions.get(network) or own: network})[precision] = name
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for network, names in members.items():
        rows = found.setdefault(network, {})
        for precision, name in names.items():
            row = {**accuracies(judged[name]), **latency_metrics(times[name], base_ms)}
            row["accuracy_cost"] = judged[name].get(PRECISION_COST)
            row["speedup_over_own"] = times[name].get("over", {}).get(names[own])
            rows[precision] = row
    return found


def _lasting(content: Mapping[str, Any]) -> dict[str, Any]:
    """What tuned.json says that belongs into metrics.json."""
    wanted = (
        "chosen_as settings epochs best_epoch retries precision model imgsz recipe trust_checkpoint seconds tuned_at"
    )
    return {name: content[name] for name in (*wanted.split(), DEPLOY_PRECISION) if name in content}
