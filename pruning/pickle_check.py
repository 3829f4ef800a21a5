"""Reading a checkpoint's pickle without running it: which names it would import, and what it would call.

Unpickling imports and calls whatever the file says, so a checkpoint from elsewhere is a program. Here the standard
library's own unpickling machine runs with stand-ins: a name becomes an inert object, a call is looked at and not made.
So memo tricks and names put together on the stack (STACK_GLOBAL) come out as the real machine would see them. What is
let through is what YOLO checkpoints hold: layers of torch and Ultralytics made without arguments (their constructors
evaluate texts of the model's yaml), tensors, plain data. Everything else is refused by name.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from pruning.errors import RefusedNameError
from pruning.pickle_rules import Rule, rule_of

REMEDY = "do not load it; if you made it yourself, give --trust-checkpoint"
_LEGACY_PICKLES = 5  # magic number, protocol, system, the content, the storages' keys; raw bytes follow
_LONGEST_NAME = 120


def check_checkpoint(path: Path) -> None:
    """Raise RefusedNameError, one line, if loading the checkpoint at ``path`` would do anything but rebuild a network.

    Nothing of the file is executed. Reads the formats that ``torch.load`` reads: zip archives and the five pickles in a
    row of PyTorch before 1.6. Refused whole: tar archives (older still), TorchScript, and what is damaged, because a
    broken pickle runs up to where it breaks.
    """
    for stream in _pickles(path):
        check_pickle(stream, path)


def check_pickle(stream: BinaryIO, path: Path) -> Any:
    """Run one pickle dry, from the stream's position to its end mark; ``path`` is for the message.

    Returns the plain data in it (stand-ins in place of everything else). Raises RefusedNameError.
    """
    try:
        return _DryRun(stream, encoding="utf-8").load()
    except _Refused as refused:
        name = refused.name.encode("ascii", "backslashreplace").decode()
        name = "".join(letter if letter.isprintable() else "?" for letter in name)[:_LONGEST_NAME]
        raise RefusedNameError(
            f"a checkpoint may hold a network and plain data, but '{path}' {refused.deed} {name}; {REMEDY}", name
        ) from None
    except Exception as error:  # noqa: BLE001  a hostile stream breaks the machine in any way it likes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise _broken(path, why) from None


def _broken(path: Path, why: str) -> RefusedNameError:
    return RefusedNameError(f"'{path}' must be a whole checkpoint, but it cannot be read ({why}); get it anew", "")


def check_label_cache(path: Path) -> None:
    """The same for a dataset's ``labels.cache``, which Ultralytics unpickles (NumPy's format around one pickle)."""
    import numpy as np

    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        header(stream)
        check_pickle(stream, path)


def _pickles(path: Path) -> list[BinaryIO]:
    """The pickles that torch.load would run, in its order. A legacy file's come as one stream, read one by one."""
    import torch

    with path.open("rb") as file:
        zipped = torch.serialization._is_zipfile(file)
    if zipped:
        # The reader torch.load itself uses: another one may find another entry under the same name.
        try:
            reader = torch._C.PyTorchFileReader(str(path))
            names = reader.get_all_records()
            pickled = reader.get_record("data.pkl")
        except RuntimeError as error:
            why = str(error).split("\n")[0][:100]
            raise _broken(path, why) from None
        if "constants.pkl" in names:
            raise RefusedNameError(f"'{path}' is a TorchScript archive, which brings its own code; {REMEDY}", "")
        return [io.BytesIO(pickled)]
    if zipfile.is_zipfile(path) or _is_tar(path):
        raise RefusedNameError(f"'{path}' must be a checkpoint, but it is an archive of another kind; {REMEDY}", "")
    stream = io.BytesIO(path.read_bytes())
    return [stream] * _LEGACY_PICKLES


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, EOFError):
        return False


class _Refused(Exception):
    def __init__(self, name: str, deed: str = "would run") -> None:
        super().__init__(name)
        self.name = name
        self.deed = deed


class _Inert:
    """In place of an object: takes state, items and members, and does nothing with them."""

    def append(self, item: object) -> None:
        """As a list's."""

    def extend(self, items: object) -> None:
        """As a list's."""

    def add(self, item: object) -> None:
        """As a set's."""

    def __setitem__(self, key: object, value: object) -> None:
        """As a dictionary's."""


class Name:
    """In place of a class or function. Has no members, so that no opcode can put anything into it."""

    __slots__ = ("full", "rule")

    def __init__(self, full: str, rule: Rule) -> None:
        self.full = full
        self.rule = rule


class _DryRun(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The machine in pure Python, with every opcode that imports or calls replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]
    proto: int
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Name:
        """What the real one would import under these two texts, by the same rules."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refused(f"{module!r}.{name!r}", "names")
        if self.proto < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        rule = rule_of(module, name)
        if rule is None:
            raise _Refused(f"{module}.{name}", "names")
        return Name(f"{module}.{name}", rule)

    def get_extension(self, code: int) -> None:
        """Names hidden behind numbers of a process-wide table."""
        raise _Refused(f"extension {code}", "names")

    def persistent_load(self, pid: Any) -> _Inert | Name:
        """A tensor's bytes; in a legacy file also a layer's class, beside the source that it was saved with."""
        kind = pid[0] if isinstance(pid, tuple) and len(pid) > 1 else None
        if kind == "module" and isinstance(pid[1], Name):
            return pid[1]
        if kind != "storage":
            raise _Refused(f"a {type(pid).__name__} of its own making", "refers to")
        return _Inert()

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._call(klass, tuple(args)) if args else self._make(klass, ()))

    def _call(self, what: Any, args: Any) -> _Inert:
        if not isinstance(what, Name):
            raise _Refused(f"a call of {type(what).__name__.lstrip('_')}")
        if not isinstance(args, tuple) or not what.rule.may_call(args):
            raise _Refused(f"{what.full} with arguments")
        return _Inert()

    def _make(self, what: Any, args: Any) -> _Inert:
        if not isinstance(what, Name) or not what.rule.may_make or args != ():
            raise _Refused(f"{what.full} with arguments" if isinstance(what, Name) else "a call")
        return _Inert()

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args)

    def _newobj_ex(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        if keywords:
            raise _Refused("a constructor with keywords")
        self.stack[-1] = self._make(self.stack[-1], args)

    def _build(self) -> None:
        """State goes into objects only (into a class it would change the class for everybody), and no magic name."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Inert):
            raise _Refused(f"a change of {getattr(self.stack[-1], 'full', type(self.stack[-1]).__name__)}")
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            magic = [key for key in state[1] if isinstance(key, str) and key.startswith("__")]
            if magic:
                raise _Refused(magic[0], "would set")

    def _out_of_band(self) -> None:
        raise _Refused("a buffer outside the file", "needs")

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _newobj
    dispatch[pickle.NEWOBJ_EX[0]] = _newobj_ex
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.NEXT_BUFFER[0]] = _out_of_band
    dispatch[pickle.READONLY_BUFFER[0]] = _out_of_band
