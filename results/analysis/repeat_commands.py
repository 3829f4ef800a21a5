"""The shell commands that repeat a run and each of its picks: every setting that a figure depends on is spelled out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paretoprune.base.image_size import ImageSize, read_size, size_text
from paretoprune.results.analysis.figures import FrontFigure, PickMove
from paretoprune.results.store.run_files import Selected
from paretoprune.results.store.run_folder import RunFolder

# Option of the command -> setting of the run. Defaults too: the run's may be older than the command that is pasted.
_PRUNE = {
    "--imgsz": "model.imgsz",
    "--strategy": "trial.strategy",
    "--importance": "recover.importance",
    "--round-to": "space.round_to",
    "--recover": "recover.method",
    "--calibration-images": "recover.calibration_images",
    "--seed": "search.seed",
    "--trust-checkpoint": "model.trust_checkpoint",
}
_LATENCY = {
    "--imgsz": "model.imgsz",
    "--batch": "latency.batch",
    "--threads": "latency.threads",
    "--runtime": "latency.runtime",
    "--half": "latency.half",
    "--target-halfwidth": "latency.target_halfwidth",
    "--trust-checkpoint": "model.trust_checkpoint",
}
_EXPORT = {
    "--imgsz": "model.imgsz",
    "--precision": "deploy.precision",
    "--calibration-images": "deploy.calibration_images",
}
_EXPORTED_AS = {"openvino": "openvino", "tensorrt": "engine"}  # what a runtime reads; ONNX for all others
SESSION_FACTOR = 8  # times a trial's seconds: what the final session gives a pick and the baseline together
_ONE_TRIAL = ("--trials", "1", "--set", "search.warm_start=false", "--set", "search.warm_start_run=null")
_ITS_ID = "t0000"

Line = tuple[str, str]


@dataclass(frozen=True)
class Commands:
    """Shell commands that belong together, each with what it is for: (purpose, line)."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Run:
    """The parts of the commands."""

    folder: RunFolder
    config: Mapping[str, Any]
    model: str
    data: str
    device: str
    imgsz: ImageSize | None = None  # of a pick, where it is not the run's
    precision: str | None = None  # likewise

    def get(self, key: str) -> Any:
        """The value of `section.name` in config.yaml, None where it has none; of a pick its own size and precision."""
        own = {"model.imgsz": self.imgsz, "deploy.precision": self.precision}.get(key)
        if own is not None:
            return own
        section, name = key.split(".")
        return (self.config.get(section) or {}).get(name)

    def options(self, wanted: Mapping[str, str]) -> list[str]:
        """The options of the settings that config.yaml holds."""
        words: list[str] = []
        for option, key in wanted.items():
            value = self.get(key)
            if value is True:
                words.append(option)
            elif option == "--imgsz" and value is not None:
                words += [option, size_text(read_size(value))]
            elif value is not None and value is not False:
                words += [option, str(value)]
        return words

    def search(self, name: str, *more: str) -> str:
        """The search with the run's own settings, in a folder beside the run's."""
        words = ["paretoprune", "search", self.model, self.data, "--config", str(self.folder.config), *more]
        return shlex.join([*words, "--run", f"{self.folder.path}-{name}"])


def commands(
    folder: RunFolder, baseline: Mapping[str, Any], figure: FrontFigure, selected: Sequence[Selected]
) -> tuple[Commands, ...]:
    """Shell-safe commands that repeat the run and, for each pick, its network, its figures and its export."""
    config = folder.read_config()
    model = str((config.get("model") or {}).get("path") or baseline.get("model") or "MODEL")
    data = str((config.get("data") or {}).get("path") or baseline.get("data") or "DATA")
    run = _Run(folder, config, model, data, str(baseline.get("device") or ""))
    finished = {item.trial_id: item for item in selected}
    groups = [Commands("The whole run", (("the same search in a new folder", run.search("again")),))]
    records = {record.trial_id: record for record in folder.read_records()}
    for move in figure.picks:
        record = records.get(move.trial_id)
        if record is not None:
            run = replace(run, imgsz=record.imgsz, precision=record.precision)
        lines = [_prune(run, move.trial_id)]
        its = finished.get(move.trial_id)
        lines += _waiting(run, move) if its is None else [*_repeat(run, its), *_use(run, its)]
        groups.append(Commands(move.trial_id, tuple(lines)))
    return tuple(groups)


def _prune(run: _Run, trial_id: str) -> Line:
    """The pick's network before any epoch; its plan records the channels that were kept."""
    plan = str(run.folder.trial_plan(trial_id))
    words = ["paretoprune", "prune", run.model, "--plan", plan, "--data", run.data, *run.options(_PRUNE)]
    words += [*_on(run.device), "-o", f"{trial_id}.pt"]
    return "prune the model by the pick's plan: the network that its trial began to train", shlex.join(words)


def _waiting(run: _Run, move: PickMove) -> list[Line]:
    """Commands for a pick that was not fully fine-tuned yet."""
    finetune = ["paretoprune", "finetune", str(run.folder.path), "--trial", move.trial_id]
    return [("fine-tune it fully", shlex.join(finetune))]


def _repeat(run: _Run, pick: Selected) -> list[Line]:
    """The pick's trial and its full fine-tuning once more, from the unpruned model on."""
    plan = str(run.folder.trial_plan(pick.trial_id))
    again = run.search(pick.trial_id, "--plan", plan, *_ONE_TRIAL)
    finetune = ["paretoprune", "finetune", f"{run.folder.path}-{pick.trial_id}", "--trial", _ITS_ID]
    if epochs := pick.settings.get("epochs"):
        finetune += ["--epochs", str(epochs)]
    if "distill" in pick.settings:
        finetune.append("--distill" if pick.settings["distill"] else "--no-distill")
    if teacher := pick.settings.get("teacher"):
        finetune += ["--teacher", str(teacher)]
    if own := pick.settings.get("train"):
        finetune += ["--set", f"finetune.train={json.dumps(own)}"]
    return [
        ("its trial once more, in a folder of its own", again),
        ("and its full fine-tuning there", shlex.join(finetune)),
    ]


def _use(run: _Run, pick: Selected) -> list[Line]:
    """Commands for a pick that is ready."""
    best = str(run.folder.selected_checkpoint(pick.trial_id))
    target = str(run.get("latency.target") or "own")
    where = f", on the node with {target.removeprefix('node:')}" if target.startswith("node:") else ""
    agents = ["--latency-target", target] if target.startswith("http") else []
    device = "cpu" if target.startswith("cpu:") else "" if where or agents else run.device
    latency = ["paretoprune", "latency", best, "--against", run.model, *run.options(_LATENCY), *_on(device), *agents]
    if run.imgsz is not None:
        latency += ["--against-imgsz", size_text(read_size(replace(run, imgsz=None).get("model.imgsz")))]
    if run.get("latency.span") == "predict":
        latency += ["--span", "predict", "--data", run.data]
    if seconds := run.get("latency.max_seconds"):
        latency += ["--max-seconds", f"{SESSION_FACTOR * seconds:g}"]
    shipped = run.get("deploy.format") or "torch"
    target = _EXPORTED_AS.get(run.get("latency.runtime"), "onnx") if shipped == "torch" else shipped
    export = ["paretoprune", "export", best, "--format", target]
    export += [*run.options(_EXPORT if shipped != "torch" else {"--imgsz": "model.imgsz"}), "--data", run.data]
    return [
        *_validate(run, best),
        (f"measure its latency beside the baseline{where}", shlex.join(latency)),
        ("export it, checked on the validation images", shlex.join(export)),
    ]


def _validate(run: _Run, best: str) -> list[Line]:
    """Stock Ultralytics takes one side where it validates a checkpoint, and a file's own height and width."""
    if run.get("data.classes"):  # stock Ultralytics would take the labels' numbers for those of the kept classes
        return []
    size, batch = run.get("model.imgsz"), run.get("data.val_batch")
    device = [f"device={run.device}"] if run.device else []
    lines = []
    if size and not isinstance(read_size(size), int):
        exact = f"imgsz={size_text(read_size(size))}"
        words = ["yolo", "export", f"model={best}", "format=torchscript", exact, *device]
        lines.append(("export it at its input's height and width, for the next line", shlex.join(words)))
        best, size, batch = f"{best.removesuffix('.pt')}.torchscript", None, 1
    words = ["yolo", "val", f"model={best}", f"data={run.data}"]
    words += [f"imgsz={size}"] if size else []
    words += [f"batch={batch}"] if batch else []  # rectangular batches: the figures depend on it a little
    return [*lines, ("validate it in stock Ultralytics", shlex.join([*words, *device]))]


def _on(device: str) -> list[str]:
    return ["--device", device] if device else []
