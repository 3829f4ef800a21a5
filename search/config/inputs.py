"""Whether a run's model and dataset are still those it was begun with, and where they lie now.

``baseline.json`` holds the hash of the weights and the dataset's identity; ``dataset.json.gz`` beside it what of every
image makes that identity, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from paretoprune.base.atomic import write_bytes
from paretoprune.base.messages import note
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.classes import dataset_of
from paretoprune.search.errors import RunFolderError

if TYPE_CHECKING:
    from paretoprune.pruning.data.identity import Classes, DatasetIdentity, Rows
    from paretoprune.search.config.run_config import RunConfig

IDENTITY, ROWS_NAME = "identity", "dataset.json.gz"
REMEDY = "put it back as it was, or begin a new run in another --run"


@dataclass(frozen=True)
class RunIdentity:
    """A dataset's identity for models of ``task``, with its images' rows and the classes of each."""

    task: str
    dataset: DatasetIdentity
    rows: Rows
    classes: Classes

    def content(self) -> dict[str, Any]:
        """What ``baseline.json`` holds of it."""
        return {IDENTITY: {"task": self.task, "dataset": self.dataset.model_dump(mode="json")}}

    def save_rows(self, folder: RunFolder) -> None:
        """Write ``dataset.json.gz``; before the baseline, which without it could not say what differs."""
        from paretoprune.pruning.data.identity import rows_to_bytes

        write_bytes(folder.path / ROWS_NAME, rows_to_bytes(self.rows))


def identity_of(config: RunConfig, task: str) -> RunIdentity:
    """The identity of the dataset that ``config`` names; reads every label file, for 100,000 images in 5 seconds."""
    from paretoprune.pruning.data.identity import identify

    return RunIdentity(task, *identify(config.data.path, task))


def weights_hash(model: Path) -> str:
    """16 hexadecimal digits of the checkpoint's bytes, "" where there is no such file."""
    return "" if not model.is_file() else hashlib.sha256(model.read_bytes()).hexdigest()[:16]


def placed(config: RunConfig, model: str | None, data: str | None) -> RunConfig:
    """``config`` with the model and the dataset at the places given, if any; of a run of some classes the whole
    dataset's. Such a run holds its network itself."""
    from paretoprune.search.config.paths import absolute_path

    if config.data.classes is not None:
        if data is None:
            return config
        from paretoprune.pruning.data.class_subset import moved_subset

        data, model = moved_subset(Path(config.data.path), absolute_path(data)), None
    for section, given in (("model", model), ("data", data)):
        if given is not None:
            moved = getattr(config, section).model_copy(update={"path": absolute_path(given)})
            config = config.model_copy(update={section: moved})
    return config


def check_places(folder: RunFolder, config: RunConfig) -> None:
    """:class:`RunFolderError` where the run's model or dataset is not there; says how to give its place."""
    for what, option in missing(config).items():
        place = config.model.path if what == "model" else dataset_of(config)
        raise RunFolderError(
            f"the {what} of run {folder.path} must be there, but there is no {place}; if it lies elsewhere now, give "
            f"its place: {option} PATH"
        )


def missing(config: RunConfig) -> dict[str, str]:
    """Of the model and the dataset what does not lie where ``config`` says -> the option that says where it does."""
    places = {"model": (config.model.path, "--model"), "dataset": (dataset_of(config), "--data")}
    return {
        what: option
        for what, (place, option) in places.items()
        if os.sep in place and not Path(place).exists()  # else a name that Ultralytics knows
    }


def is_identified(folder: RunFolder) -> bool:
    """Whether the run knows its weights and its dataset, so that they are the same ones wherever they lie."""
    if not folder.baseline.is_file():
        return False
    content = folder.read_baseline()
    return bool(content.get("weights_hash")) and IDENTITY in content


def check_weights(folder: RunFolder, model: str) -> None:
    """:class:`RunFolderError` where the run was begun with other weights than ``model`` has."""
    if not folder.baseline.is_file():
        return
    known, ours = folder.read_baseline().get("weights_hash"), weights_hash(Path(model))
    if known and ours and known != ours:
        raise RunFolderError(
            f"run {folder.path} belongs to another model: weights differ ({known} then, {model} has {ours}); {REMEDY}"
        )


def check_dataset_same(folder: RunFolder, config: RunConfig, now: RunIdentity | None = None) -> None:
    """:class:`RunFolderError` where the run was started with another dataset than ``config`` names; says what differs.

    ``now``: its identity, where it is known already. A run of before identities were kept is taken with a word.
    """
    if not folder.baseline.is_file():
        return
    known = stored_identity(folder)
    if known is None:
        note(f"run {folder.path} does not know its dataset's content, so {config.data.path} is taken for the same")
        return
    found = differences_from(folder, known, now or identity_of(config, known[0]))
    if found:
        raise RunFolderError(
            f"run {folder.path} was started with another dataset than {config.data.path} is now: "
            f"{told(found)}; {REMEDY}"
        )


def stored_identity(folder: RunFolder) -> tuple[str, DatasetIdentity] | None:
    """The task and the dataset's identity in ``baseline.json``; None where it was written before there were any."""
    from paretoprune.pruning.data.identity import DatasetIdentity

    content = folder.read_baseline().get(IDENTITY)
    if content is None:
        return None
    try:
        return str(content["task"]), DatasetIdentity.model_validate(content["dataset"])
    except (ValidationError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{folder.baseline} must say which dataset the run is of, but its `{IDENTITY}` is damaged; restore the file"
        ) from error


def differences_from(folder: RunFolder, known: tuple[str, DatasetIdentity], now: RunIdentity) -> list[str]:
    """The difference between the dataset and the run's, in words."""
    from paretoprune.pruning.data.identity import differences, rows_from_bytes

    path = folder.path / ROWS_NAME
    rows = rows_from_bytes(path.read_bytes()) if path.is_file() else {}
    return differences(known[1], now.dataset, rows, now.rows)


def told(found: Sequence[str]) -> str:
    """The first three differences."""
    return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def keep_identity(folder: RunFolder, now: RunIdentity | None) -> None:
    """Let a run that was begun before there were identities know its dataset from now on."""
    if now is not None and folder.baseline.is_file():
        content = folder.read_baseline()
        if IDENTITY not in content:
            now.save_rows(folder)
            folder.write_baseline({**content, **now.content()})


def check_node(config: RunConfig, wanted: Mapping[str, Any]) -> None:
    """In a worker: :class:`RunFolderError` where this machine's dataset is another one than the driver's, ``wanted``
    (what ``baseline.json`` holds of it)."""
    from paretoprune.pruning.data.identity import DatasetIdentity, differences

    now = identity_of(config, str(wanted["task"]))
    found = differences(DatasetIdentity.model_validate(wanted["dataset"]), now.dataset, {}, {})
    if found:
        raise RunFolderError(
            f"every node must have the run's dataset, but {config.data.path} on {platform.node()} is another one: "
            f"{told(found)}; copy it there"
        )


def check_comparable(folders: Sequence[RunFolder]) -> None:
    """:class:`RunFolderError` where runs were evaluated on different validation images, as far as they recorded
    them."""
    known = [(folder, stored_identity(folder)) for folder in folders if folder.baseline.is_file()]
    found = [(folder, identity[1]) for folder, identity in known if identity is not None]
    for folder, dataset in found[1:]:
        first, its = found[0]
        if dataset.classes != its.classes or dataset.splits.get("val") != its.splits.get("val"):
            raise RunFolderError(
                f"runs on one page must be of the same validation images, but {first.path} and {folder.path} are not; "
                "report them one by one"
            )
