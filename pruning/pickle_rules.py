"""Which names a checkpoint may hold, and what it may do with each."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _never(args: tuple[Any, ...]) -> bool:
    return False


def _always(args: tuple[Any, ...]) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """may_make: objects of it may be made without arguments and then given state. may_call: with these arguments.

    A rule with neither lets a name be mentioned only (a dtype, a storage type).
    """

    may_make: bool = False
    may_call: Callable[[tuple[Any, ...]], bool] = _never


MENTION = Rule()
MAKE = Rule(may_make=True)
MAKE_OR_CALL_EMPTY = Rule(may_make=True, may_call=lambda args: not args)
CALL = Rule(may_make=True, may_call=_always)

_PLAIN_TYPES = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range", "set", "slice",
    "str", "tuple",
)  # fmt: skip
_REBUILDERS = tuple(
    f"torch._utils.{name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMBER_TYPE = re.compile(r"[<>=|]?[?biufcSUO]\d*|bool|u?int\d+|float\d+|complex\d+")


def _is_named(what: Any, *names: str) -> bool:
    return getattr(what, "full", None) in names


def _number_dtype(args: tuple[Any, ...]) -> bool:
    """dtype('f8', False, True): of numbers, text, or objects (which the pickle has to spell out itself)."""
    return bool(args) and isinstance(args[0], str) and bool(_NUMBER_TYPE.fullmatch(args[0]))


def _plain_reconstructor(args: tuple[Any, ...]) -> bool:
    """copyreg._reconstructor(class, object, None) makes an object; any other base would have its constructor called."""
    return len(args) == 3 and args[0].rule.may_make and _is_named(args[1], "builtins.object") and args[2] is None


def _tensor_with_attributes(args: tuple[Any, ...]) -> bool:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state) calls its first argument."""
    types = ("torch.Tensor", "torch.nn.parameter.Parameter")
    return len(args) == 4 and _is_named(args[0], *_REBUILDERS) and _is_named(args[1], *types)


def _latin1(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1")


def _plain_factory(args: tuple[Any, ...]) -> bool:
    return not args or args[0] is None or _is_named(args[0], *(f"builtins.{name}" for name in _PLAIN_TYPES))


RULES: dict[str, Rule] = {
    **{f"builtins.{name}": CALL for name in _PLAIN_TYPES},
    **{f"datetime.{name}": CALL for name in ("date", "datetime", "time", "timedelta", "timezone")},
    **{f"pathlib.{name}": CALL for name in _PATHS},
    **{f"pathlib._local.{name}": CALL for name in _PATHS},  # Python 3.13
    **dict.fromkeys(_REBUILDERS, CALL),
    **{f"numpy.{core}.multiarray.scalar": Rule(may_call=_always) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Rule(may_call=_always) for core in ("core", "_core")},
    "_codecs.encode": Rule(may_call=_latin1),
    "argparse.Namespace": MAKE,
    "builtins.object": MAKE,
    "collections.Counter": CALL,
    "collections.OrderedDict": CALL,
    "collections.defaultdict": Rule(may_make=True, may_call=_plain_factory),
    "collections.deque": CALL,
    "copyreg._reconstructor": Rule(may_call=_plain_reconstructor),
    "numpy.dtype": Rule(may_call=_number_dtype),
    "numpy.ndarray": MENTION,
    "torch.Size": CALL,
    "torch.Tensor": MENTION,
    "torch._tensor._rebuild_from_type_v2": Rule(may_call=_tensor_with_attributes),
    "torch.device": CALL,
    "torch.nn.parameter.Parameter": MENTION,
    "torch.serialization._get_layout": CALL,
    "torch.storage.TypedStorage": MENTION,
    "torch.storage.UntypedStorage": MENTION,
    "torchvision.transforms.functional.InterpolationMode": CALL,
    **{
        f"torchvision.transforms.transforms.{name}": MAKE
        for name in ("CenterCrop", "Compose", "Normalize", "Resize", "ToTensor")
    },
    "types.SimpleNamespace": MAKE_OR_CALL_EMPTY,
    "ultralytics.utils.IterableSimpleNamespace": MAKE_OR_CALL_EMPTY,
    "ultralytics.yolo.utils.IterableSimpleNamespace": MAKE_OR_CALL_EMPTY,  # as it was called in 2023
    # Gone from Ultralytics, which puts others in their place when it loads.
    "ultralytics.nn.modules.block.Silence": MAKE,
    "ultralytics.nn.tasks.YOLOv10DetectionModel": MAKE,
    "ultralytics.utils.loss.v10DetectLoss": MAKE,
}
_LAYER_MODULES = re.compile(
    r"torch\.nn\.modules(\.\w+)?|ultralytics\.nn\.(tasks|modules(\.\w+)?)|ultralytics\.utils\.(loss|tal)"
)


def rule_of(module: str, name: str) -> Rule | None:
    """What may be done with ``module.name``, None where it has no place in a checkpoint. Imports torch's and
    Ultralytics' own modules only.
    """
    rule = RULES.get(f"{module}.{name}")
    if rule is not None or not name.isidentifier():  # dots walk through a module into whatever it imported
        return rule
    if module == "torch":
        return _torch_value(name)
    if _LAYER_MODULES.fullmatch(module):
        return _layer(module, name)
    return None


def _torch_value(name: str) -> Rule | None:
    """dtypes (`torch.float16`) and storage types (`torch.HalfStorage`)."""
    import torch

    value = getattr(torch, name, None)
    is_storage = isinstance(value, type) and name.endswith("Storage")
    return MENTION if is_storage or isinstance(value, torch.dtype) else None


def _layer(module: str, name: str) -> Rule | None:
    """A class that the module itself or its neighbours define: layers, and the losses that old checkpoints carry."""
    from torch import nn

    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:  # of another version
        return None
    if not isinstance(value, type):
        return None
    losses = module.startswith("ultralytics.utils") and value.__module__ == module
    layers = issubclass(value, nn.Module) and value.__module__.split(".")[0] in ("torch", "ultralytics")
    return MAKE if losses or layers else None
