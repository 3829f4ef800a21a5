"""Realistic synthetic run folders: a YOLOv8n-like list of layers, accuracy and latency that follow the widths."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from paretoprune.base.atomic import write_json
from paretoprune.results.report.report import write_report
from paretoprune.results.selection.selection import choose
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder

BASE_MS = 12.4
BASE_MAP = 0.612


def _c2f(block: int, width: int, repeats: int) -> list[tuple[str, int]]:
    inner = [(f"m.{index}.cv{part}", width // 2) for index in range(repeats) for part in (1, 2)]
    return [(f"model.{block}.{name}", channels) for name, channels in [("cv1", width), *inner, ("cv2", width)]]


def yolov8n_layers() -> list[dict[str, Any]]:
    """Rows as baseline.json holds them."""
    names = [("model.0.conv", 16), ("model.1.conv", 32), *_c2f(2, 32, 1), ("model.3.conv", 64), *_c2f(4, 64, 2)]
    names += [("model.5.conv", 128), *_c2f(6, 128, 2), ("model.7.conv", 256), *_c2f(8, 256, 1)]
    names += [("model.9.cv1", 128), ("model.9.cv2", 256), *_c2f(12, 128, 1), *_c2f(15, 64, 1), ("model.16.conv", 64)]
    names += [*_c2f(18, 128, 1), ("model.19.conv", 128), *_c2f(21, 256, 1)]
    for branch, width, outputs in (("cv2", 64, 64), ("cv3", 80, 3)):
        for scale in range(3):
            names += [(f"model.22.{branch}.{scale}.{part}", width) for part in (0, 1)]
            names.append((f"model.22.{branch}.{scale}.2", outputs))
    rows = []
    for group, (name, channels) in enumerate(names):
        fixed = name.startswith("model.22") and name.endswith(".2")
        reason = "the detection head's output" if fixed else ""
        block = int(name.split(".")[1])
        rows.append(
            {
                "layer": name,
                "block": block,
                "group": group,
                "out_channels": channels,
                "prunable": not fixed,
                "reason": reason,
            }
        )
    return rows


def synthetic_metrics(ratios: dict[str, float], rng: np.random.Generator, gain: float = 0.0) -> dict[str, Any]:
    """Accuracy falls faster than linearly with what is cut, latency with the widths squared, plus a little noise."""
    rows = [row for row in yolov8n_layers() if row["prunable"]]
    cuts = np.array([ratios.get(row["layer"], 0.0) for row in rows])
    sensitivity = np.random.default_rng(5).gamma(1.2, 1.0, len(rows))
    cost = np.random.default_rng(6).gamma(1.5, 1.0, len(rows))
    sensitivity, cost = sensitivity / sensitivity.sum(), cost / cost.sum()
    damage = float((sensitivity * cuts**1.35).sum())
    left = float((cost * (1 - cuts) ** 1.6).sum())
    ratio = (0.18 + 0.82 * left) * (1 + rng.normal(0, 0.006))
    accuracy = BASE_MAP * float(np.clip(1 - 1.35 * damage * (1 - gain), 0, 1)) + rng.normal(0, 0.004)
    accuracy = max(accuracy, 0.0)
    half = 0.012 * (1 + rng.random())
    return {
        "map50_95": accuracy,
        "map50": min(accuracy * 1.42, 1.0),
        "precision": min(accuracy * 1.35, 1.0),
        "recall": min(accuracy * 1.30, 1.0),
        "map50_95_refit": accuracy * 0.94,
        "latency_ms": ratio * BASE_MS,
        "latency_ratio": ratio,
        "latency_measured_ms": ratio * BASE_MS * 1.02,
        "latency_p90_ms": ratio * BASE_MS * 1.08,
        "baseline_latency_measured_ms": BASE_MS * 1.02,
        "speedup": 1 / ratio,
        "speedup_ci95": [1 / ratio - half, 1 / ratio + half],
        "params_m": 3.01 * float(((1 - cuts) ** 2).mean()),
        "gflops": 2.02 * left,
        "size_mb": 6.1 * float(((1 - cuts) ** 2).mean()),
    }


def synthetic_records(trials: int, seed: int = 0, failed: int = 2, stopped: int = 3) -> list[TrialRecord]:
    """A ladder of uniform ratios, then random plans that get better; the last ones failed or were stopped."""
    rng = np.random.default_rng(seed)
    layers = [row["layer"] for row in yolov8n_layers() if row["prunable"]]
    sensitivity = np.random.default_rng(5).gamma(1.2, 1.0, len(layers))
    records = []
    for index in range(trials):
        ladder = index < min(6, trials // 3)
        level = 0.1 * (index + 1) if ladder else rng.uniform(0.05, 0.65)
        wish = level * np.exp(-rng.uniform(0, 1.2) * (sensitivity - 1)) + rng.normal(0, 0.12, len(layers))
        cuts = np.full(len(layers), level) if ladder else np.clip(wish, 0, 0.8)
        ratios = {name: round(float(cut) * 8) / 8 for name, cut in zip(layers, cuts, strict=True) if cut > 0.06}
        record = synthetic_record(f"t{index:04d}", ratios, rng, finished_at=1.78e9 + 95 * index)
        records.append(_ended(record, index, trials, failed, stopped, "ladder" if ladder else "sampler"))
    return records


def _ended(record: TrialRecord, index: int, trials: int, failed: int, stopped: int, provenance: str) -> TrialRecord:
    content = {**record.to_json(), "provenance": provenance}
    if index >= trials - failed:
        reason = "CUDA out of memory while fine-tuning; use a smaller batch" if index % 2 else "worker died (signal 9)"
        content.update(state="failed", metrics={}, error=reason, epochs=0, fidelity="refit")
    elif index >= trials - failed - stopped:
        content.update(state="stopped", epochs=1)
    return TrialRecord.from_json(content)


def synthetic_record(trial_id: str, ratios: dict[str, float], rng: np.random.Generator, **more: Any) -> TrialRecord:
    """One completed trial of three epochs."""
    values: dict[str, Any] = {
        "trial_id": trial_id,
        "state": TrialState.COMPLETED,
        "plan_hash": hashlib.sha256(json.dumps(ratios, sort_keys=True).encode()).hexdigest()[:16],
        "ratios": ratios,
        "metrics": synthetic_metrics(ratios, rng),
        "epochs": 3,
        "fidelity": "epochs",
        "seconds": {"prune": 1.2, "refit": 8.4, "finetune": 61.0, "evaluate": 9.3, "latency": 7.9},
        "device": "cpu",
        "node": "node-1",
        "finished_at": 1.78e9,
        "provenance": "sampler",
    }
    return TrialRecord(**{**values, **more})


@pytest.fixture
def record() -> Callable[..., TrialRecord]:
    """A completed record with two metrics; anything can be overridden."""

    def build(trial_id: str, map50_95: float = 0.5, latency_ms: float = 8.0, **more: Any) -> TrialRecord:
        metrics = {"map50_95": map50_95, "latency_ms": latency_ms, **more.pop("metrics", {})}
        values: dict[str, Any] = {"state": "completed", "plan_hash": "0" * 16, "ratios": {}, "epochs": 0}
        values.update(fidelity="refit", finished_at=1.0, metrics=metrics)
        return TrialRecord(trial_id=trial_id, **{**values, **more})

    return build


@pytest.fixture
def baseline() -> dict[str, Any]:
    return synthetic_baseline()


def synthetic_baseline(model: str = "bccd_yolov8n.pt") -> dict[str, Any]:
    metrics = synthetic_metrics({}, np.random.default_rng(0))
    metrics.update(map50_95=BASE_MAP, latency_ms=BASE_MS, latency_ratio=1.0, speedup=1.0, params_m=3.01, gflops=2.02)
    del metrics["speedup_ci95"]
    layers = yolov8n_layers()
    groups = [
        {"name": row["layer"], "layers": [row["layer"]], "channels": row["out_channels"], "block": row["block"]}
        for row in layers
        if row["prunable"]
    ]
    versions = {"python": "3.11.9", "torch": "2.15.0", "ultralytics": "8.4.190", "ray": "2.60.0", "optuna": "5.0.0"}
    machine = {"platform": "Linux x86_64", "cpu": "AMD EPYC 9B14", "cores": "2"}
    return {
        "model": model,
        "data": "bccd/data.yaml",
        "imgsz": 320,
        "metrics": metrics,
        "device": "cpu",
        "environment": {**versions, **machine},
        "layers": layers,
        "groups": groups,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Build a run folder below the test's directory."""

    def build(records: list[TrialRecord], picks: dict[str, str] | None = None, model: str = "n.pt") -> RunFolder:
        return build_run(tmp_path / "run", records, picks, model)

    return build


def build_run(path: Path, records: list[TrialRecord], picks: dict[str, str] | None, model: str) -> RunFolder:
    """Write every file a run would have; picks: trial id -> chosen_as, each one fully fine-tuned."""
    folder = RunFolder(path)
    folder.write_baseline(synthetic_baseline(model))
    config = {"model": {"path": model}, "data": {"path": "bccd/data.yaml"}, "trial": {"epochs": 3}}
    folder.config.write_text(yaml.safe_dump(config))
    folder.trials_file.write_text("".join(json.dumps(item.to_json()) + "\n" for item in records))
    for item in records:
        if item.state is TrialState.COMPLETED and len(records) < 100:
            folder.trial_dir(item.trial_id).mkdir(parents=True)
            folder.trial_plan(item.trial_id).write_text("{}")
            folder.trial_checkpoint(item.trial_id).write_bytes(b"weights")
    by_id = {item.trial_id: item for item in records}
    for trial_id, chosen_as in (picks or {}).items():
        before = by_id[trial_id].metrics
        after = synthetic_metrics(by_id[trial_id].ratios, np.random.default_rng(3), gain=0.72)
        content = {"before": before, "after": after, "baseline": synthetic_baseline()["metrics"], "epochs": 30}
        folder.write_selected(trial_id, {**content, "best_epoch": 27, "chosen_as": chosen_as})
        folder.selected_checkpoint(trial_id).write_bytes(b"weights")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 46 trials with three picks fully fine-tuned, and its report. Shared: copy it to change it."""
    records = synthetic_records(46)
    picks = {pick.trial_id: pick.chosen_as for pick in choose(records, synthetic_baseline(), 3)}
    folder = build_run(tmp_path_factory.mktemp("finished") / "run", records, picks, "n.pt")
    add_native(folder, list(picks))
    add_free_moves(folder)
    write_report(folder.path)
    return folder


def add_free_moves(folder: RunFolder) -> None:
    """The unpruned model at 224 px, which is better than most trials, at 288 px, and fine-tuned at 224 px."""
    for imgsz, accuracy, ratio in ((224, BASE_MAP - 0.018, 0.55), (288, BASE_MAP - 0.004, 0.85)):
        interval = [1 / ratio - 0.02, 1 / ratio + 0.02]
        metrics = {"map50_95": accuracy, "latency_ms": ratio * BASE_MS, "latency_ratio": ratio, "speedup": 1 / ratio}
        costs = {"params_m": 3.01, "gflops": 2.02 * (imgsz / 320) ** 2}
        folder.write_free_move(imgsz, {**metrics, **costs, "speedup_ci95": interval})
    directory = folder.tuned_moves_root / "unpruned@224"
    directory.mkdir(parents=True)
    after = {**folder.read_free_moves()[-1].metrics, "map50_95": BASE_MAP + 0.02}
    content = {"model": "n.pt", "recipe": "unpruned at 224 px, fine-tuned like the picks", "epochs": 33, "after": after}
    write_json(directory / "metrics.json", {"schema_version": 1, "name": "unpruned@224", **content})


def add_native(folder: RunFolder, picks: list[str]) -> None:
    """A native rival `small`, the session that compared it with the picks, and the noise measured at the start."""
    directory = folder.native_dir("small")
    directory.mkdir(parents=True)
    after = synthetic_metrics(dict.fromkeys(("model.5.conv", "model.7.conv"), 0.5), np.random.default_rng(8), gain=0.5)
    after.update(map50_95_change=-0.05, map50_95_change_ci95=[-0.08, -0.02], test_map50_95=0.53)
    content = {"name": "small", "model": "small.pt", "recipe": "fresh head", "epochs": 33, "after": after}
    baseline = {**synthetic_baseline()["metrics"], "test_map50_95": 0.6}
    write_json(directory / "metrics.json", {"schema_version": 1, **content, "baseline": baseline})
    session = {
        "schema_version": 1,
        "networks": ["baseline", *picks, "native:small"],
        "map50_95_over": {pick: {"native:small": [0.02, 0.001, 0.04]} for pick in picks},
        "speedup_over": {pick: {"native:small": [1.1, 0.99, 1.2], "baseline": [1.5, 1.4, 1.6]} for pick in picks},
    }
    write_json(folder.session, session)
    content = {**folder.read_baseline(), "noise": {"map50_95_std": 0.01, "source": "bootstrap over 87 images"}}
    layers = [row["layer"] for row in content["layers"] if row["prunable"]]
    plans = [{"keep": keep, "ratios": dict.fromkeys(layers[: 10 * step], 0.5)} for step, keep in enumerate((0.9, 0.5))]
    folder.write_baseline({**content, "sensitivity": plans})


@pytest.fixture
def records() -> list[TrialRecord]:
    """46 records: 41 completed, 3 stopped, 2 failed."""
    return synthetic_records(46)


@pytest.fixture
def make_many() -> Callable[[int], list[TrialRecord]]:
    return synthetic_records


@pytest.fixture
def drawn_by_browser(tmp_path: Path) -> Callable[..., str]:
    """Open a page in a real headless browser that reaches no network; what it made of the page, as HTML."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    command = [browser, *flags.split(" "), "--host-resolver-rules=MAP * ~NOTFOUND"]

    def draw(page: Path, width: int = 1280) -> str:
        more = [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=240, check=True).stdout

    return draw
