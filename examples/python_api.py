"""The whole job from Python, on what the project brings along: search, full fine-tuning, tables, report, export.

Usage: python examples/python_api.py [FOLDER]

Everything is written below FOLDER (default: runs/example). Small on purpose, some two minutes on two CPU cores: for
figures worth reading give it your own model and data, a GPU, fifty trials and fifty epochs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from paretoprune import (
    Bounds,
    RunFolder,
    build_config,
    check_export,
    choose_picks,
    export_model,
    front_frame,
    front_rows,
    hypervolume_frame,
    measure_export,
    nest,
    prepare,
    promote,
    run_sweep,
    trials_frame,
    write_report,
)
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset


def search_plans(folder: Path) -> RunFolder:
    """Three trials, judged after one epoch. The keys are those of config.yaml; what is left out has its default."""
    data = build_dataset(folder / "digits", train=48, val=24)
    settings = {
        "model.path": str(BASELINE),
        "model.imgsz": IMGSZ,
        "data.path": str(data),
        "search.trials": 3,
        "trial.epochs": 1,
        "recover.calibration_images": 16,
        "latency.max_seconds": 1.0,
    }
    prepared = prepare(build_config(nest(settings)), folder / "run")  # raises a one-line error for what cannot work
    outcome = run_sweep(prepared)
    print(f"{outcome.finished} trials, {outcome.failed} of them failed")
    return prepared.folder


def finetune_a_pick(run: RunFolder) -> Path:
    """Choose by the same words as the command line, fine-tune fully, and give the checkpoint."""
    from paretoprune.search.config.stored import load_run_config

    config = load_run_config(run)
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"epochs": 2})})
    picks = choose_picks(run, run.objectives(), ["fastest"], Bounds(max_params_m=1.7))
    promotion = promote(run, config, picks)
    if promotion.failed:
        raise RuntimeError(f"full fine-tuning failed: {promotion.failed}")
    return run.selected_checkpoint(picks[0].trial_id)


def show_tables(run: RunFolder) -> None:
    """Data frames whose columns carry their units; the same rows as plain dictionaries for those without pandas."""
    records, baseline = run.read_records(), run.read_baseline()
    frame = trials_frame(records, baseline, run.objectives())
    print(frame[["trial_id", "map50_95", "latency_ms", "speedup", "params_m", "on_front"]].to_string(index=False))
    print(front_frame(run)[["trial_id", "map50_95", "latency_ms", "tied_with"]].to_string(index=False))
    print(hypervolume_frame(records, baseline, run.objectives()).to_string(index=False))
    print("front:", [row["trial_id"] for row in front_rows(run)])


def ship(checkpoint: Path) -> Path:
    """Export, and look whether the exported network answers as the checkpoint does, and how fast it is."""
    exported = export_model(checkpoint, "onnx", IMGSZ)
    check = check_export(exported, checkpoint, IMGSZ)
    times = measure_export(exported, checkpoint, IMGSZ, max_seconds=2.0)
    print(f"{exported.name}: answers {check.verdict}; {times.speedup:.2f} times as fast as {times.against}")
    return exported


def main(folder: Path) -> None:
    """The steps in order."""
    run = search_plans(folder)
    checkpoint = finetune_a_pick(run)
    show_tables(run)
    ship(checkpoint)
    print("report:", write_report(run.path))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
