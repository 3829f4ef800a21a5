"""Keeping Ultralytics quiet, offline and side-effect free inside a worker.

Importing this module sets the environment that Ultralytics reads once, when it is first imported, so every module of
this room that needs Ultralytics imports this one first. It imports nothing heavy itself.
"""

from __future__ import annotations

import logging
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# Loading a checkpoint that names an unknown module would pip-install that name; version checks and font downloads
# would try the network. `setdefault`: a person who set these on purpose keeps the choice.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ACTIVE: list[Path | None] = []  # the log paths of the contexts that are open, innermost last


class _PlainFormatter(logging.Formatter):
    """Log lines without the terminal colours that Ultralytics puts into its messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner.name` another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _logging_to(log_path: Path | None) -> Iterator[None]:
    """Send Ultralytics' logger and Python's warnings to a file, or nowhere."""
    from ultralytics.utils import LOGGER

    handler: logging.Handler
    if log_path is None:
        handler = logging.NullHandler()
    else:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_path, encoding="utf-8")
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    handlers, level, propagate = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)

    def to_log(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        LOGGER.warning("%s: %s", category.__name__, message)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = to_log
            yield
    finally:
        LOGGER.handlers, LOGGER.propagate = handlers, propagate
        LOGGER.setLevel(level)
        handler.close()


def _local_file_first(stock: Callable[..., str]) -> Callable[..., str]:
    """Ultralytics' search for a file by its name, but a file that is there is the one that is meant, as it is called.

    By itself it takes quotes out of a path, and goes from `yolov5n.pt` to `yolov5nu.pt`, which it then downloads, and
    from `yolov5/menu.yaml` to `yolov5/men.yaml`.
    """

    def found(file: str | Path, *args: Any, **options: Any) -> str:
        return str(file) if Path(file).exists() else stock(file, *args, **options)

    return found


def _nothing(_argument: object) -> None:
    """Stand-in for what Ultralytics would do beside the work."""


def _load_tensors(path: str | Path, **options: Any) -> Any:
    """A text's embeddings that lie beside a dataset: tensors by name, in place of whatever a pickle says."""
    import torch

    from paretoprune.pruning.yolo.pickle_check import check_bounds

    check_bounds(Path(path))
    return torch.load(path, weights_only=True, **options)


@contextmanager
def quiet_ultralytics(log_path: str | Path | None = None) -> Iterator[None]:
    """Nothing of Ultralytics reaches stdout or stderr; its log lines go to `log_path` (appended), or nowhere.

    Inside, too:
    - no progress bars; how far reading labels and validating are is told to who asks (`pruning.yolo.progress`);
    - none of its integrations: its Ray callback calls `tune.report` by itself inside a live trial, and MLflow, ClearML,
      Comet, usage analytics and the rest are on or off by the user's own settings file, which is left alone;
    - nothing is unpickled but by Ultralytics' restricted loader, and a yaml's `activation` is not evaluated, unless
      `trusting` says so;
    - a dataset's labels are kept in a file of our own, which no pickle is in (`pruning.yolo.label_cache`);
    - a dataset is read from any folder, without a download and without a change to its images (`dataset_patches`);
    - a file that exists is read under the name that was given, whatever official one it is like;
    - no look on the network for a plotting font each time a dataset is read (offline mode does not stop that; behind a
      firewall it waits three seconds);
    - the thread count that torch has now stays: `select_device("cpu")` otherwise sets it to the number of cores less
      one, whatever a worker was pinned to.

    An inner context without a path keeps writing to the outer one's log. The state is the process's: not for two
    threads at once.
    """
    if log_path is None and _ACTIVE:
        yield
        return
    import torch
    from ultralytics import utils
    from ultralytics.data import dataset as data_sets
    from ultralytics.data import utils as data_utils
    from ultralytics.data.base import BaseDataset
    from ultralytics.engine import validator
    from ultralytics.models.yolo.world import train as of_worlds
    from ultralytics.models.yolo.yoloe import train as of_prompts
    from ultralytics.nn import tasks
    from ultralytics.utils import callbacks, checks, downloads, torch_utils

    from paretoprune.pruning.yolo import dataset_patches
    from paretoprune.pruning.yolo.label_cache import load_labels, save_labels
    from paretoprune.pruning.yolo.progress import loop_teller

    path = None if log_path is None else Path(log_path)
    with ExitStack() as stack:
        stack.enter_context(_logging_to(path))
        stack.enter_context(_replaced(utils, "VERBOSE", False))  # read by every progress bar when it is made
        stack.enter_context(_replaced(callbacks, "add_integration_callbacks", _nothing))
        stack.enter_context(_replaced(data_utils, "check_font", _nothing))
        for module, name in ((downloads, "attempt_download_asset"), (checks, "check_yolov5u_filename")):
            stack.enter_context(_replaced(module, name, _local_file_first(getattr(module, name))))
        stack.enter_context(_replaced(tasks, "SAFE_LOAD", True))
        stack.enter_context(_replaced(data_sets, "load_dataset_cache_file", load_labels))
        stack.enter_context(_replaced(data_sets, "save_dataset_cache_file", save_labels))
        scanning = dataset_patches.label_cache_place(data_sets.YOLODataset._load_or_scan_cache)
        stack.enter_context(_replaced(data_sets.YOLODataset, "_load_or_scan_cache", scanning))
        of_classes = dataset_patches.subset_reader(data_sets.YOLODataset.get_labels)
        stack.enter_context(_replaced(data_sets.YOLODataset, "get_labels", of_classes))
        stack.enter_context(_replaced(data_sets, "TQDM", loop_teller("reading labels", "images")))
        stack.enter_context(_replaced(validator, "TQDM", loop_teller("validating", "batches")))
        for trainers in (of_worlds, of_prompts):
            stack.enter_context(_replaced(trainers, "torch_load", _load_tensors))
        stack.enter_context(_replaced(data_utils, "YAML", dataset_patches.DatasetYaml))
        stack.enter_context(_replaced(data_utils, "_replace_image", dataset_patches.leave_image))
        stack.enter_context(_replaced(data_utils, "check_image", dataset_patches.image_checker(data_utils.check_image)))
        stack.enter_context(
            _replaced(BaseDataset, "get_img_files", dataset_patches.list_reader(BaseDataset.get_img_files))
        )
        stack.enter_context(_replaced(torch_utils, "NUM_THREADS", torch.get_num_threads()))
        _ACTIVE.append(path)
        stack.callback(_ACTIVE.pop)
        yield


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Inside `quiet_ultralytics`: where `trust` is given, checkpoints are unpickled whole and a yaml is evaluated."""
    from ultralytics.nn import tasks

    with _replaced(tasks, "SAFE_LOAD", tasks.SAFE_LOAD and not trust):
        yield


@contextmanager
def preserved_random_state(cuda: bool = True) -> Iterator[None]:
    """Put the process's random state (Python, NumPy, torch on the CPU and, where `cuda`, on every GPU) back afterwards.

    Ultralytics' trainer seeds all of them; a caller's own random numbers must not repeat because a training ran.
    """
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the legacy state that Ultralytics seeds
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if cuda else 0)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
