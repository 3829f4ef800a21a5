"""Names of the files in a run folder, each written once. `results.store.run_folder` says where they lie."""

from __future__ import annotations

from typing import Final

# Of a run.
CONFIG: Final = "config.yaml"
BASELINE_RECORD: Final = "baseline.json"
FREE_MOVES: Final = "free_moves.json"
TRIALS: Final = "trials.jsonl"
STUDY: Final = "study.journal"
SESSION: Final = "session.json"
SAMPLE: Final = "sample.json.gz"
MODEL_FOLDER: Final = "model"  # the model, where it was copied or restricted to some classes
TEACHER: Final = "teacher.pt"  # of the full fine-tuning, where it is none of the run's networks
# Of a trial.
REQUEST: Final = "request.json"
RECORD: Final = "record.json"
MEASURED: Final = "latency.json"
EVENTS: Final = "events.jsonl"
TRIAL_LOG: Final = "trial.log"
PLAN: Final = "plan.json"
PRUNED: Final = "pruned.pt"
FINETUNE_STATE: Final = "finetune_state.pt"
# Of a pick or a stock rival.
BEST: Final = "best.pt"
TUNED: Final = "tuned.json"
METRICS: Final = "metrics.json"
