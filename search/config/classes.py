"""A run, or a pruning, of some of the model's classes: `data.classes`.

The network and the dataset of these classes alone are written into a folder, and take the place of the user's: whatever
follows knows of no other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.file_names import MODEL_FOLDER
from paretoprune.search.errors import RunFolderError

if TYPE_CHECKING:
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.config.run_config import RunConfig


def restrict(
    model: str, data: str | None, classes: Sequence[str | int], folder: Path, trust: bool = False
) -> tuple[str, str | None]:
    """Write the checkpoint `model` and the dataset `data` of these classes alone into `folder`; their paths there.

    Raises PruningError for a class that the model does not have, a head whose classes cannot be told apart, and a
    dataset that is not of the model's classes.
    """
    from paretoprune.pruning.data.class_subset import class_subset
    from paretoprune.pruning.surgery.classes import class_numbers, same_weights, with_classes
    from paretoprune.pruning.yolo.loading import load_model
    from paretoprune.pruning.yolo.saving import save_checkpoint

    whole = load_model(model, trust)
    kept = class_numbers(whole, classes)
    folder.mkdir(parents=True, exist_ok=True)
    subset = None if data is None else class_subset(data, whole, kept, folder)
    found, target = with_classes(whole, kept), folder / Path(model).name
    if not target.is_file():
        save_checkpoint(found, target, date="")  # the same bytes at every start
    elif not same_weights(load_model(target, trust), found):
        raise RunFolderError(f"{target} holds the classes of another model than {model}; choose another --run")
    return str(target), subset


def with_class_names(config: RunConfig) -> RunConfig:
    """``config`` with ``data.classes`` as the model's own names, in its order."""
    if config.data.classes is None:
        return config
    from paretoprune.pruning.surgery.classes import class_numbers
    from paretoprune.pruning.yolo.loading import load_model

    model: Any = load_model(config.model.path, config.model.trust_checkpoint)
    names = [str(model.names[number]) for number in class_numbers(model, config.data.classes)]
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": names})})


def with_class_subset(config: RunConfig, folder: RunFolder) -> RunConfig:
    """``config`` with the network and the dataset of ``data.classes`` in the run folder, as this or an earlier start
    wrote them."""
    own = folder.path / MODEL_FOLDER
    if config.data.classes is None or Path(config.model.path).is_relative_to(own):
        return config
    model, data = restrict(config.model.path, config.data.path, config.data.classes, own, config.model.trust_checkpoint)
    moved = {"model": config.model.model_copy(update={"path": model})}
    return config.model_copy(update={**moved, "data": config.data.model_copy(update={"path": data})})


def dataset_of(config: RunConfig) -> str:
    """Where the user's dataset lies, of which a run of some classes has a description of its own."""
    if config.data.classes is None or not Path(config.data.path).is_file():
        return config.data.path
    from paretoprune.pruning.data.class_subset import source_of

    return source_of(Path(config.data.path))
