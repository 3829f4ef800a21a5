"""Hostile checkpoints: each one works when it is really loaded, and none does anything here."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.nn.modules import Conv

import pruning
from pruning.checkpoints import save_checkpoint
from pruning.errors import ModelError, RefusedNameError
from pruning.export import export_model
from pruning.models import load_model
from pruning.pickle_check import check_checkpoint, check_label_cache
from pruning.quiet import quiet_ultralytics
from pruning.workbench import Workbench
from tests.pruning_tests.masking import build
from tests.pruning_tests.recovery_material import shapes_dataset
from tests.pruning_tests.test_surgery_families import TASKS
from tests.pruning_tests.tiny import tiny_model

Marker = Callable[[], bool]


def zipped(pickled: bytes, path: Path, **others: bytes) -> Path:
    """A torch archive around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
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


def attacks(target: str) -> dict[str, bytes]:
    """Pickles that each make the file ``target`` (by os.mkdir, which is posix.mkdir) in their own way."""
    text = f"V{target}\n".encode()
    put_together = short("os") + short("mkdir") + b"\x93"
    backbone = [[-1, 1, "Conv", [8, 3, 2]]]
    code = f"__import__('os').mkdir({target!r}) or torch.nn.SiLU()"
    yaml = {"nc": 1, "activation": code, "backbone": backbone, "head": [[[0], 1, "Detect", ["nc"]]]}
    plain = pickle.dumps(yaml, 2)[2:-1]
    return {
        "reduce": b"cposix\nmkdir\n(" + text + b"tR.",
        "python 2 names": b"c__builtin__\neval\n(V__import__('os').mkdir(" + repr(target).encode() + b")\ntR.",
        "inst": b"(" + text + b"iposix\nmkdir\n.",
        "obj": b"(cposix\nmkdir\n" + text + b"o.",
        "names on the stack": b"\x80\x04" + put_together + short(target) + b"\x85R.",
        "names in the memo": b"\x80\x04" + short("mkdir") + b"\x940" + short("os") + b"h\x00\x93" + short(target)
        + b"\x85R.",
        "memo overwritten": b"\x80\x04" + short("collections") + b"q\x000" + short("os") + b"q\x000"
        + b"h\x00" + short("mkdir") + b"\x93" + short(target) + b"\x85R.",
        "through a module": b"\x80\x04" + short("torch.serialization") + short("os.mkdir") + b"\x93" + short(target)
        + b"\x85R.",
        "model from a yaml": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n" + plain + b"\x85R.",
        "newobj with a yaml": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n" + plain + b"\x85\x81.",
        "reconstructor": b"\x80\x02ccopyreg\n_reconstructor\n(cultralytics.nn.tasks\nDetectionModel\n"
        b"cultralytics.nn.tasks\nDetectionModel\n" + plain + b"tR.",
        "nested": b"ctorch.storage\n_load_from_bytes\n(cbuiltins\nbytes\n(]" + b"".join(
            b"K" + bytes([value]) + b"a" for value in _nested(target)) + b"tRtR.",
        "tensor rebuilt by anything": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nmkdir\nctorch\nTensor\n"
        b"(" + text + b"tNtR.",
    }  # fmt: skip


def _nested(target: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"cposix\nmkdir\n(V" + target.encode() + b"\ntR.")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


WAYS = list(attacks(""))
RUNS_LATER = {"newobj with a yaml", "tensor rebuilt by anything"}  # refused although they fail before they do harm


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_attack_works_without_the_check_and_is_refused_with_it(
    way: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)  # what a model's yaml may replace for good
    target = tmp_path / "made"
    content = attacks(str(target))[way]
    path = tmp_path / "evil.pt"
    if legacy:
        head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(item, 2) for item in head) + content + pickle.dumps([], 2))
    else:
        zipped(content, path)
    with pytest.raises(RefusedNameError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert re.search("mkdir|eval|DetectionModel|_load_from_bytes|_reconstructor", caught.value.name), message
    assert message.endswith("--trust-checkpoint")
    assert not target.exists()
    with contextlib.suppress(Exception):  # what is left of the attack may fail after it has done its work
        torch.load(path, weights_only=False)
    if way not in RUNS_LATER:
        assert target.exists(), "the attack is none: this test shows nothing"


def test_trust_is_given_by_name_only(tmp_path: Path) -> None:
    target = tmp_path / "made"
    path = zipped(attacks(str(target))["reduce"], tmp_path / "mine.pt")
    with pytest.raises(ModelError):  # it is still no model; but it was loaded
        load_model(path, trust=True)
    assert target.exists()


@pytest.mark.parametrize(
    "load",
    [lambda path: export_model(path, "onnx", 64), lambda path: Workbench(str(path)).model, load_model],
    ids=["export", "workbench", "load"],
)
def test_every_way_in_is_guarded(load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = zipped(attacks(str(tmp_path / "made"))["reduce"], tmp_path / "evil.pt")
    with pytest.raises(RefusedNameError, match=r"names posix\.mkdir; do not load it"):
        load(path)
    assert not (tmp_path / "made").exists()


def test_nothing_else_loads_files_that_can_run_code() -> None:
    """Whoever adds a way of loading has to come by here."""
    loading = re.compile(
        r"torch\.load\(|\bYOLO\(|load_checkpoint\(|torch_safe_load\(|pickle\.loads?\(|allow_pickle=True"
    )
    allowed = {"models.py", "native.py", "export.py", "train.py"}  # behind the check; the built-in model's own training
    allowed |= {"finetune_group.py", "finetune_rank.py"}  # what the processes of one group hand over in private
    root = Path(str(pruning.__file__)).parent.parent
    found = set()
    for path in [file for room in ("pruning", "search", "cluster", "results") for file in (root / room).rglob("*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            code = line.split("#")[0]
            if loading.search(code) and "def " not in code and "weights_only=True" not in code and "`" not in code:
                found.add(path.name)
    assert found <= allowed


def test_two_entries_of_one_name_are_one_to_the_loader(tmp_path: Path) -> None:
    """Archive readers differ in which entry they take; the check reads with torch's own."""
    path = tmp_path / "twice.pt"
    harmless, evil = pickle.dumps({"a": 1}, 2), attacks(str(tmp_path / "made"))["reduce"]
    for first, second in ((harmless, evil), (evil, harmless)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", first)
            archive.writestr("archive/version", "3\n")
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("archive/data.pkl", second)
        try:
            check_checkpoint(path)
        except RefusedNameError:
            continue
        torch.load(path, weights_only=False)
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"GIF89a", b"\x80\x02}q\x00.", b"cposix\n"])
def test_broken_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(RefusedNameError) as caught:
        check_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_archives_of_another_kind_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(__file__, "pickle")
    with pytest.raises(RefusedNameError, match="archive of another kind"):
        check_checkpoint(tmp_path / "old.pt")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "script.pt"))
    with pytest.raises(RefusedNameError, match="TorchScript"):
        check_checkpoint(tmp_path / "script.pt")
    (tmp_path / "prefixed.pt").write_bytes(b"#!" + zipped(b"N.", tmp_path / "x.pt").read_bytes())
    with pytest.raises(RefusedNameError, match="archive of another kind"):
        check_checkpoint(tmp_path / "prefixed.pt")


def test_a_name_is_shown_without_its_terminal_codes(tmp_path: Path) -> None:
    path = zipped(b"\x80\x04" + short("os\x1b[31m\u202e") + short("x\ny") + b"\x93.", tmp_path / "evil.pt")
    with pytest.raises(RefusedNameError) as caught:
        check_checkpoint(path)
    assert str(caught.value).isprintable()
    assert r"os?[31m\u202e.x?y" in str(caught.value)


def test_state_goes_into_objects_only(tmp_path: Path) -> None:
    state = b"\x80\x02ctypes\nSimpleNamespace\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    with pytest.raises(RefusedNameError, match=r"a change of types\.SimpleNamespace"):
        check_checkpoint(zipped(state, tmp_path / "class.pt"))
    extension = b"\x80\x02\x82\x01."
    with pytest.raises(RefusedNameError, match="extension 1"):
        check_checkpoint(zipped(extension, tmp_path / "extension.pt"))


FAMILIES = ["yolov3-tiny", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n", "rtdetr-l", *TASKS[4:8]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_let_through(name: str, tmp_path: Path) -> None:
    """As Ultralytics saves it: the model in half precision beside what a training leaves."""
    model = build(name)
    trained = {
        "model": model.half(), "ema": None, "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "train_args": {"data": Path("a/b.yaml"), "imgsz": 64}, "train_metrics": {"fitness": np.float64(0.5)},
        "best_fitness": np.array([0.5]), "date": "2026", "updates": 3,
    }  # fmt: skip
    for protocol in (2, 4):
        torch.save(trained, tmp_path / "last.pt", pickle_protocol=protocol)
        check_checkpoint(tmp_path / "last.pt")


def test_the_old_format_is_let_through(tmp_path: Path) -> None:
    torch.save({"model": tiny_model()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "old.pt")


def test_our_own_checkpoints_are_let_through(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "own.pt")
    check_checkpoint(tmp_path / "own.pt")


def test_a_hostile_label_cache_is_read_again_not_run(tmp_path: Path) -> None:
    """Ultralytics unpickles the cache that lies beside a dataset's labels."""
    from pruning.calibration import load_calibration

    data = shapes_dataset(tmp_path / "data", train=2, val=2)
    model = tiny_model()
    images = load_calibration(str(data), model, 64, 2, 0)
    caches = list((tmp_path / "data").rglob("*.cache"))
    assert caches
    check_label_cache(caches[0])
    target = tmp_path / "made"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            import os

            return os.mkdir, (str(target),)

    for cache in caches:
        with cache.open("wb") as stream:
            np.save(stream, np.array({"version": Evil()}, dtype=object), allow_pickle=True)
    with quiet_ultralytics(tmp_path / "log"):
        again = load_calibration(str(data), model, 64, 2, 0)
    assert not target.exists()
    assert torch.equal(again.batch["img"], images.batch["img"])
    assert "label cache not used" in (tmp_path / "log").read_text()
    check_label_cache(caches[0])  # made anew
