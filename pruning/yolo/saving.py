"""Checkpoints that stock Ultralytics loads where this project is not installed."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from paretoprune.base.atomic import whole_file
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

# What a pickled class may come from. `__builtin__`, `_codecs` and `copy_reg` are protocol 2's spelling of the standard
# library; a classifier carries torchvision's transforms; numpy is left out on purpose: its module paths moved between
# versions 1 and 2.
_STOCK_ROOTS = frozenset(
    {"torch", "torchvision", "ultralytics", "collections", "__builtin__", "builtins", "_codecs", "copy_reg"}
)
_OWN_ROOTS = frozenset({"paretoprune"})
_PATH_KEYS = ("data", "model", "cfg", "pretrained", "tracker", "distill_model")
_MACHINE_KEYS = ("project", "name", "save_dir", "resume", "source", "device")


def plain_copy(model: nn.Module) -> nn.Module:
    """An independent copy on the CPU, float32, in eval mode, without anything that training or inference left behind.

    Gone are the loss object, a distillation teacher and its hooks, the head's cached anchors, and training's order of
    the weights in memory. Gradients are required again, as pruning and training need them.
    """
    from ultralytics.nn.distill_model import DistillationModel, FeatureHook

    source = model.student_model if isinstance(model, DistillationModel) else model
    copy = deepcopy(source).float().cpu().eval().to(memory_format=torch.contiguous_format)
    if hasattr(copy, "criterion"):
        copy.criterion = None  # type: ignore[assignment]
    for module in copy.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, FeatureHook)]:
            del module._forward_hooks[key]
        _forget_anchors(module)
    for parameter in copy.parameters():
        parameter.grad = None
    return copy.requires_grad_(True)


def _forget_anchors(module: nn.Module) -> None:
    """Drop the anchor cache of a detection head: it lives on the last input's device and belongs to its size."""
    from ultralytics.nn.modules.head import Detect, RTDETRDecoder

    if isinstance(module, Detect):
        for name in ("shape", "anchors", "strides"):
            vars(module).pop(name, None)  # the class attributes are the empty cache
    elif isinstance(module, RTDETRDecoder):
        for name in ("shapes", "anchors", "valid_mask"):
            vars(module).pop(name, None)


def save_checkpoint(
    model: nn.Module, path: str | Path, train_args: Mapping[str, Any] | None = None, date: str | None = None
) -> None:
    """Write `model` as a stock Ultralytics `.pt`: float32, no class of this project, no optimizer, no machine's path.

    The layout is what Ultralytics' own `strip_optimizer` leaves, but in full precision (half precision drifts the
    figures). The parent folder is created; the file appears whole or not at all. `train_args` (Ultralytics' training
    arguments, e.g. `imgsz`, `data`) go over those the model carries; paths in them are cut to their last part. `date`:
    None for that of now.

    Layers of classes of the user's own are stored by reference, as his file had them: whoever loads it imports them.

    Raises AssertionError for a network of torch and Ultralytics that pickles anything else (it would not load
    elsewhere), OSError if the place is not writable.
    """
    from ultralytics import __version__

    path = Path(path)
    copy: Any = plain_copy(model).requires_grad_(False)
    args = stock_args(model, train_args)
    copy.args, copy.pt_path, copy.task = args, path.name, args["task"]
    if "yaml_file" in (getattr(copy, "yaml", None) or {}):
        copy.yaml["yaml_file"] = PurePath(str(copy.yaml["yaml_file"])).name
    empty = ("best_fitness", "ema", "updates", "optimizer", "scaler", "stopper", "train_metrics", "train_results")
    content = {
        "date": datetime.now().astimezone().isoformat() if date is None else date,
        "version": __version__,
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
        "epoch": -1,
        "model": copy,
        "train_args": args,
        **dict.fromkeys(empty),
    }
    with whole_file(path) as file:
        torch.save(content, file, pickle_protocol=2)
        file.flush()
        _check_classes(Path(file.name), model)


def stock_args(model: nn.Module, train_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ultralytics' training arguments of `model` (a plain dict, known keys only), updated, without machine paths."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    carried = getattr(model, "args", None) or {}
    carried = dict(carried) if isinstance(carried, Mapping) else dict(vars(carried))
    merged = {**DEFAULT_CFG_DICT, **carried, **(train_args or {}), "task": task_of(model)}
    args = {key: _plain_value(value) for key, value in merged.items() if key in DEFAULT_CFG_DICT}
    for key in _MACHINE_KEYS:
        args[key] = DEFAULT_CFG_DICT.get(key)
    for key in _PATH_KEYS:
        if isinstance(args.get(key), str):
            args[key] = PurePath(args[key]).name
    return args


def task_of(model: nn.Module) -> str:
    """The Ultralytics task of a model (`detect`, `segment`, `pose`, `obb` ...), guessed from its head if not said."""
    task = getattr(model, "task", None)
    if isinstance(task, str):
        return task
    from ultralytics.nn.tasks import RTDETRDetectionModel, guess_model_task

    if isinstance(model, RTDETRDetectionModel):
        return "detect"  # the guess does not know its head
    with quiet_ultralytics():
        guessed = guess_model_task(model)
    if not isinstance(guessed, str):
        raise PruningError(f"the model's task must be known, but its head is none of Ultralytics' (got {type(model)})")
    return guessed


def _plain_value(value: Any) -> Any:
    """`value` in types that any Python unpickles: a path becomes a string, a tuple or list is converted inside."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    return value


def _check_classes(written: Path, model: nn.Module) -> None:
    foreign = sorted({name for name in pickled_classes(written) if name.split(".")[0] not in _STOCK_ROOTS})
    if any(type(module).__module__.split(".")[0] not in _STOCK_ROOTS for module in model.modules()):
        foreign = [name for name in foreign if name.split(".")[0] in _OWN_ROOTS]
    assert not foreign, f"a checkpoint may hold classes of torch and Ultralytics only, but got {', '.join(foreign)}"


def pickled_classes(path: Path) -> Iterator[str]:
    """The dotted names of all classes and functions that unpickling the torch archive at `path` would import.

    Read from the opcodes, so nothing is executed; complete for pickle protocol 2, where every global is spelled out.
    """
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        for opcode, argument, _ in pickletools.genops(archive.read(pickled)):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
