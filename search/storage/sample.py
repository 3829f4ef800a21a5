"""The images that trials train and are judged on, where these are not all: drawn once, kept in the run folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

from paretoprune.base.atomic import write_bytes
from paretoprune.base.file_names import SAMPLE
from paretoprune.base.messages import note
from paretoprune.search.config.inputs import RunIdentity

if TYPE_CHECKING:
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.config.run_config import RunConfig

_LAID_OUT = "sample"  # the folder of what `sampled_data` makes


def images_of_trials(config: RunConfig) -> dict[str, int]:
    """How many images of each split a trial needs at most; 0: all. An epoch is over so many that all epochs together
    take no more than `trial.steps`."""
    trial = config.trial
    train = trial.steps // trial.epochs * trial.batch if trial.steps and trial.epochs else 0
    return {"train": train, "val": trial.val_images}


def keep_sample(folder: RunFolder, config: RunConfig, identity: RunIdentity | None) -> None:
    """Draw the run's sample, unless an earlier start did, and write it where there is a split that is larger."""
    if identity is None or (folder.path / SAMPLE).is_file():
        return
    from paretoprune.pruning.data.sampling import draw_sample

    drawn = draw_sample(identity.rows, identity.classes, images_of_trials(config), config.search.seed)
    if drawn:
        write_bytes(folder.path / SAMPLE, gzip.compress(json.dumps(drawn).encode(), mtime=0))
    for split, doing in (("train", "train"), ("val", "are judged")):
        if split in drawn:
            note(f"trials {doing} on a sample of {len(drawn[split]):,} of {len(identity.rows[split]):,} {split} images")


def sampled_data(run: Path, data: str, task: str) -> str:
    """In a worker: the dataset that trials use, the run's sample of ``data``, or ``data`` where it has none."""
    try:
        sample = json.loads(gzip.decompress((run / SAMPLE).read_bytes()))
    except FileNotFoundError:
        return data
    from paretoprune.pruning.data.sampling import sampled_dataset

    return sampled_dataset(data, task, sample, run / _LAID_OUT)
