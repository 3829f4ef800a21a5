"""What a checkpoint's pickle may ask of the restricted loader, read before it is loaded.

Which classes a file may name is decided by Ultralytics' `torch_safe_load(safe_only=True)`. Within them a file still
decides what is *called* (the constructor of `DistillationModel` loads another file without any restriction, that of
`TorchVision` downloads one), how much is allocated, how deep things are nested and what is hashed: a key of tuples in
tuples takes hashing without an end, or the C stack. Not every torch compares a storage's length with its record's.
So the opcodes are followed here with stand-ins for every object, and nothing is made: numbers, texts and tuples are
themselves, everything else is a box that remembers what was put into it.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paretoprune.base.errors import typed_line
from paretoprune.pruning.errors import RefusedNameError

REMEDY = "do not load it; if you made it yourself, give --trust-checkpoint"
MOST_OPCODES = 1_000_000  # yolov9e beside a fresh optimizer: 190,000
MOST_CALLS = 100_000
MOST_PICKLE_BYTES = 64 * 2**20
MOST_NESTED = 100  # YOLO networks: 30; copying takes some Python frames a level, of 1,000
MOST_IN_A_TUPLE = 10_000
_NUMBERS_BELOW = 2**63  # beyond, any number of numbers share a hash
_LONGEST_NAME = 120


class _Refused(Exception):
    def __init__(self, deed: str, name: str = "") -> None:
        super().__init__(deed)
        self.deed, self.name = deed, name


class _Name:
    """A class or function that the file names."""

    __slots__ = ("full",)

    def __init__(self, full: str) -> None:
        self.full = full


class _Box:
    """Anything that is not a number, a text or a tuple. `kind`: its class, or what it came from."""

    __slots__ = ("children", "has_magic", "kind", "size")

    def __init__(self, kind: str, size: int = 0) -> None:
        self.kind, self.size = kind, size
        self.children: list[Any] = []
        self.has_magic = False


class _Tuple:
    """A tuple; `weight`: the steps that hashing it takes, however often one part is in it."""

    __slots__ = ("depth", "items", "weight")

    def __init__(self, items: list[Any]) -> None:
        inner = [item for item in items if isinstance(item, _Tuple)]
        self.items = items
        self.weight: int = len(items) + sum(item.weight for item in inner)
        self.depth: int = 1 + max((item.depth for item in inner), default=0)
        if self.weight > MOST_IN_A_TUPLE or self.depth > MOST_NESTED:
            raise _Refused("holds tuples nested without end")


def check_bounds(path: Path) -> None:
    """Raise RefusedNameError, one line, if the checkpoint at `path` asks for more than a network and plain data does.

    Nothing of the file is executed. Only the zip archives that PyTorch has written since 1.6 are read.
    """
    import torch

    size = path.stat().st_size
    with path.open("rb") as file:
        if not torch.serialization._is_zipfile(file):
            raise RefusedNameError(
                f"'{path}' must be a checkpoint as PyTorch writes it since 1.6, but it is a file of another kind; get "
                "it anew, or if you made it yourself, give --trust-checkpoint"
            )
    try:
        # The reader torch.load itself uses: another one may find another entry under the same name. Opened for it, as
        # torch.load does: it takes no name that is not UTF-8.
        with path.open("rb") as stream:
            reader = torch._C.PyTorchFileReader(stream)
            sizes = {name: reader.get_record_size(name) for name in reader.get_all_records()}
            if sum(sizes.values()) > 4 * size + 2**20 or sizes.get("data.pkl", 0) > MOST_PICKLE_BYTES:
                raise _Refused("unpacks to far more than it holds")
            pickled = reader.get_record("data.pkl")
        machine = _Machine(sizes)
        machine.run(pickled)
        if 4 * machine.elements > 8 * size + 2**26:
            raise _Refused("holds tensors far larger than the file")
    except _Refused as refused:
        deed = "".join(letter if letter.isprintable() else "?" for letter in refused.deed)
        deed = deed.encode("ascii", "backslashreplace").decode()[:_LONGEST_NAME]
        raise RefusedNameError(
            f"a checkpoint may hold a network and plain data, but '{path}' {deed}; {REMEDY}", refused.name
        ) from None
    except Exception as error:  # noqa: BLE001  a hostile stream breaks the machine in any way it likes
        why = typed_line(error, 140, whole=True)
        raise RefusedNameError(f"'{path}' must be a whole checkpoint, but is not ({why}); get it anew") from None


class _Machine:
    """Follows a pickle by the rules of torch's weights-only unpickler; `sizes`: bytes by record of the archive."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.elements = 0
        self._calls = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> None:
        """Follow it to its end. Raises _Refused, and anything where the stream is broken."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if count > MOST_OPCODES:
                raise _Refused("holds more than any network")
            name = opcode.name
            if name in _TEXTS_AND_NUMBERS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_Box(_EMPTY[name]))
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise _Refused(f"uses the opcode {name}", name)
        _check_nesting(self._stack.pop())

    def _proto(self, version: int) -> None:
        if version != 2:
            raise _Refused(f"is of pickle protocol {version}, which torch.save does not write")

    def _global(self, argument: str) -> None:
        from torch._utils import IMPORT_MAPPING, NAME_MAPPING

        module, _, name = argument.partition(" ")
        if " " in name:
            raise _Refused(f"names {argument}", argument)
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        module = IMPORT_MAPPING.get(module, module)
        if module == "torch.nn.modules.rnn":  # what it does with its state takes as long as the state says
            raise _Refused(f"names {module}.{name}", f"{module}.{name}")
        self._stack.append(_Name(f"{module}.{name}"))

    def _long(self, value: int) -> None:
        if abs(value) >= _NUMBERS_BELOW:
            raise _Refused("holds a number of more than 64 bits")
        self._stack.append(value)

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _mark(self, _: object) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _tuple(self, _: object) -> None:
        items = self._since_mark()
        self._stack.append(_Tuple(items))

    def _short_tuple(self, length: int) -> None:
        items = self._stack[len(self._stack) - length :]
        if len(items) < length:
            raise _Refused("takes more than it has put down")
        self._stack[len(self._stack) - length :] = [_Tuple(items)]

    def _append(self, _: object) -> None:
        self._fill(self._stack.pop(), None)

    def _appends(self, _: object) -> None:
        for item in self._since_mark():
            self._fill(item, None)

    def _set_item(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill(value, key, keyed=True)

    def _set_items(self, _: object) -> None:
        items = self._since_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._fill(value, key, keyed=True)

    def _fill(self, value: Any, key: Any, keyed: bool = False) -> None:
        box = self._stack[-1]
        kinds = ("dict", "collections.OrderedDict", "collections.Counter") if keyed else ("list",)
        if not isinstance(box, _Box) or box.kind not in kinds:
            raise _Refused("fills something that is neither a list nor a dictionary")
        if keyed:
            if not isinstance(key, (str, int, float, type(None))):
                raise _Refused("has a dictionary's key that is neither a text nor a number")
            box.has_magic |= isinstance(key, str) and key.startswith("__")
        _refuse_names(value)
        if isinstance(value, (_Box, _Tuple)):
            box.children.append(value)

    def _persistent(self, _: object) -> None:
        pid = self._stack.pop()
        items = pid.items if isinstance(pid, _Tuple) else []
        if len(items) != 5 or items[0] != "storage" or not isinstance(items[1], _Name):
            raise _Refused("refers to an object of its own making")
        key, location, elements = items[2:]
        if not isinstance(key, str) or not isinstance(location, str) or not isinstance(elements, int):
            raise _Refused("refers to a storage that is none")
        held = self.sizes.get(f"data/{key}", -1)
        if elements < 0 or elements * _element_size(items[1].full) > held:
            raise _Refused("has a tensor that is longer than its bytes")
        self._stack.append(_Box("storage", elements))

    def _new(self, _: object) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._count()
        if not isinstance(what, _Name):
            raise _Refused("makes an object of no class")
        if not isinstance(arguments, _Tuple) or arguments.items:
            raise _Refused(f"calls {what.full} with arguments", what.full)
        self._stack.append(_Box(what.full))

    def _reduce(self, _: object) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._count()
        full = what.full if isinstance(what, _Name) else "an object"
        if not isinstance(arguments, _Tuple) or full not in CALLS or not CALLS[full](self, arguments.items):
            raise _Refused(f"calls {full}", full)
        result = _Box(full)
        result.children = [item for item in arguments.items if isinstance(item, (_Box, _Tuple))]
        self._stack.append(result)

    def _build(self, _: object) -> None:
        """State goes into objects only, under no magic name; a tensor's would give it other bytes."""
        state, target = self._stack.pop(), self._stack[-1]
        self._count()
        if isinstance(target, _Box) and target.kind == "numpy.dtype":
            if not isinstance(state, _Tuple) or not _is_plain_dtype(state.items):
                raise _Refused("has a numpy type that does not say what it is", "numpy.dtype")
            return
        takes = isinstance(target, _Box) and target.kind not in CALLS.keys() - _WITH_ATTRIBUTES
        if not takes or not isinstance(state, _Box) or state.kind not in ("dict", "collections.OrderedDict"):
            raise _Refused("gives a state to something that has none")
        if state.has_magic:
            raise _Refused("would set a magic attribute")
        target.children.append(state)

    def _count(self) -> None:
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise _Refused("holds more than any network")

    def tensor(self, arguments: list[Any]) -> bool:
        """torch._utils._rebuild_tensor(_v2): counts its elements; memory is taken for each when it is made float32."""
        if len(arguments) not in (4, 6) or not all(isinstance(item, _Tuple) for item in arguments[2:4]):
            return False
        storage, offset, shape, strides = arguments[0], arguments[1], arguments[2].items, arguments[3].items
        numbers = [offset, *shape, *strides]
        if not _is_box(storage, "storage") or not all(type(item) is int and item >= 0 for item in numbers):
            return False
        self.elements += math.prod(shape)
        return len(arguments) == 4 or (isinstance(arguments[4], bool) and _is_empty_hooks(arguments[5]))


def _refuse_names(value: Any) -> None:
    """A class or function as a value would be called by whoever takes it for a layer or a hook; a dtype is a value."""
    import torch

    if isinstance(value, _Name):
        if value.full != _OF_CLIP and not isinstance(
            getattr(torch, value.full.removeprefix("torch."), None), torch.dtype
        ):
            raise _Refused(f"keeps {value.full}", value.full)
    elif isinstance(value, _Tuple):
        for item in value.items:
            _refuse_names(item)


def _check_nesting(root: Any) -> None:
    """Refuse what copying or comparing would have to go too deep into: in the order in which they would go."""
    seen: set[int] = set()
    ways = [(root, 0)]
    while ways:
        value, depth = ways.pop()
        if id(value) in seen or not isinstance(value, (_Box, _Tuple)):
            continue
        seen.add(id(value))
        if depth > MOST_NESTED:
            raise _Refused("is nested too deep")
        inner = value.children if isinstance(value, _Box) else value.items
        ways += [(item, depth + 1) for item in reversed(inner)]


def _element_size(full: str) -> int:
    """Bytes of an element by the name of a storage's type."""
    import torch

    if full == "torch.storage.UntypedStorage":
        return 1
    kind = getattr(torch, full.removeprefix("torch."), None) if full.endswith("Storage") else None
    if kind is None:
        raise _Refused(f"takes {full} for a tensor's type", full)
    return torch._utils._element_size(kind._dtype)


def _is_plain_dtype(state: list[Any]) -> bool:
    """What numpy writes for a number's type; another itemsize or alignment has it read elsewhere."""
    return len(state) == 8 and state[1] in ("<", "|", "=") and state[0] == 3 and state[2:] == [None] * 3 + [-1, -1, 0]


def _is_box(value: Any, *kinds: str) -> bool:
    return isinstance(value, _Box) and value.kind in kinds


def _is_empty_hooks(value: Any) -> bool:
    return _is_box(value, "collections.OrderedDict") and not value.children


def _is_state(value: Any) -> bool:
    """Attributes of a tensor, set one by one."""
    return _is_box(value, "dict", "collections.OrderedDict") and not value.has_magic


def _texts(_: _Machine, arguments: list[Any]) -> bool:
    return all(isinstance(item, str) for item in arguments)


def _nothing(_: _Machine, arguments: list[Any]) -> bool:
    return not arguments


def _bytes(_: _Machine, arguments: list[Any]) -> bool:
    """_codecs.encode(text, "latin1"), which is how protocol 2 writes bytes."""
    return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1")


def _byte_array(machine: _Machine, arguments: list[Any]) -> bool:
    """Of bytes; of a number it would take as much memory as that says."""
    of_bytes = len(arguments) == 1 and _is_box(arguments[0], "_codecs.encode")
    return not arguments or of_bytes or _bytes(machine, arguments)


def _set(_: _Machine, arguments: list[Any]) -> bool:
    return not arguments or (len(arguments) == 1 and _is_box(arguments[0], "list") and not arguments[0].children)


def _counter(_: _Machine, arguments: list[Any]) -> bool:
    return not arguments or (len(arguments) == 1 and _is_box(arguments[0], "dict"))


def _size(_: _Machine, arguments: list[Any]) -> bool:
    items = arguments[0].items if len(arguments) == 1 and isinstance(arguments[0], _Tuple) else [None]
    return all(type(item) is int for item in items)


def _parameter(_: _Machine, arguments: list[Any]) -> bool:
    return (
        len(arguments) in (3, 4)
        and _is_box(arguments[0], *_TENSORS)
        and isinstance(arguments[1], bool)
        and _is_empty_hooks(arguments[2])
        and all(_is_state(item) for item in arguments[3:])
    )


def _typed_tensor(machine: _Machine, arguments: list[Any]) -> bool:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state) calls its first argument."""
    names = [item.full if isinstance(item, _Name) else "" for item in arguments[:2]]
    if len(arguments) != 4 or names[1] not in _TENSOR_TYPES or not isinstance(arguments[2], _Tuple):
        return False
    return _is_state(arguments[3]) and names[0] in _TENSORS and CALLS[names[0]](machine, arguments[2].items)


def _forward(_: _Machine, arguments: list[Any]) -> bool:
    """getattr as official checkpoints have it: a layer's `forward` or what fusing put in its place, a constant."""
    if len(arguments) != 2 or not isinstance(arguments[1], str):
        return False
    what, name = arguments
    if isinstance(what, _Name) and what.full == _INTERPOLATION:
        return name.isupper()
    is_layer = isinstance(what, _Name) or (isinstance(what, _Box) and what.kind not in CALLS)
    return is_layer and name in ("forward", "forward_fuse")


def _number(_: _Machine, arguments: list[Any]) -> bool:
    """numpy's scalar(type, bytes); an object's type would have anything in place of the bytes."""
    return len(arguments) == 2 and _is_box(arguments[0], "numpy.dtype") and _is_box(arguments[1], "_codecs.encode")


def _number_type(_: _Machine, arguments: list[Any]) -> bool:
    return bool(arguments) and arguments[0] in _NUMBER_TYPES and all(isinstance(item, int) for item in arguments[1:])


_OF_CLIP = "clip.clip._convert_image_to_rgb"  # in the preparation of images that a world model's text encoder carries
_INTERPOLATION = "torchvision.transforms.functional.InterpolationMode"
_NUMBER_TYPES = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} | {"b1"}
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_REBUILT = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_TENSORS = (*(f"torch._utils.{name}" for name in _REBUILT), "torch._tensor._rebuild_from_type_v2")
_NAMESPACES = ("ultralytics.utils.IterableSimpleNamespace", "ultralytics.yolo.utils.IterableSimpleNamespace")
_WITH_ATTRIBUTES = {"collections.OrderedDict", *_NAMESPACES}

CALLS: dict[str, Callable[[_Machine, list[Any]], bool]] = {
    **dict.fromkeys(_TENSORS[:2], _Machine.tensor),
    **dict.fromkeys(_TENSORS[2:4], _parameter),
    _TENSORS[4]: _typed_tensor,
    **dict.fromkeys(_WITH_ATTRIBUTES, _nothing),
    **{f"pathlib{room}.{system}Path": _texts for room in ("", "._local") for system in ("Posix", "Windows")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    "numpy.dtype": _number_type,
    "_codecs.encode": _bytes,
    "builtins.bytearray": _byte_array,
    "builtins.complex": lambda _, arguments: all(isinstance(item, (int, float)) for item in arguments),
    "builtins.getattr": _forward,
    "builtins.set": _set,
    "collections.Counter": _counter,
    "torch.Size": _size,
    "torch.device": lambda _, arguments: all(isinstance(item, (str, int)) for item in arguments),
    "torch.serialization._get_layout": _texts,
    _INTERPOLATION: _texts,
}
"""What may be called, and with what; everything else is made without arguments and then given its state."""

_TEXTS_AND_NUMBERS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._proto,
    "GLOBAL": _Machine._global,
    "LONG1": _Machine._long,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "EMPTY_TUPLE": lambda machine, _: machine._short_tuple(0),
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "BINPERSID": _Machine._persistent,
    "NEWOBJ": _Machine._new,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "STOP": lambda machine, _: None,
}
