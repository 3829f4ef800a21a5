"""Hostile checkpoints: none runs code, crashes, hangs or fills the memory, and each is one clear line."""

from __future__ import annotations

import contextlib
import re
import signal
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, WorldModel, YOLOEModel, torch_safe_load
from ultralytics.utils import IterableSimpleNamespace

from paretoprune.pruning.errors import ModelError, RefusedNameError
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.pickle_check import check_bounds
from paretoprune.pruning.yolo.saving import pickled_classes, save_checkpoint
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics
from tests.pruning import hostile
from tests.pruning.hostile import in_a_child, zipped
from tests.pruning.masking import build
from tests.pruning.tiny import tiny_model

RUNNING = list(hostile.running(""))
PAST = ["another file", "a download", "a method", "a class as a hook", "magic of a parameter",
        "memory by a number", "memory by a layer",
        "memory by strides", "a storage that lies", "state of a loop", "hash bomb", "hash bomb in a set",
        "hash bomb as a storage", "deep key", "deep tuple", "deep lists", "deep from the top", "numbers of one hash",
        "numpy object", "numpy type that lies", "numpy size that lies", "more than any network",
        "calls without end"]  # fmt: skip


def refusal(path: Path) -> str:
    """What loading the file says, in a process of its own with 10 s and 2 GB."""

    def load() -> str:
        try:
            load_model(path)
        except ModelError as error:
            return f"refused: {error}"
        return "loaded"

    status, said = in_a_child(load)
    assert status == 0, signal.Signals(-status)
    match = re.fullmatch(r"returned [\"']refused: (.*)[\"']", said)
    assert match, said
    message = match[1]
    assert str(path) in message
    assert "\\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("kind", RUNNING)
def test_an_attack_works_on_the_plain_loader_and_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)  # what a model's yaml may replace for good
    target = tmp_path / "made"
    path = zipped(hostile.running(str(target))[kind], tmp_path / "evil.pt")
    assert refusal(path).endswith("--trust-checkpoint")
    assert not target.exists()
    with contextlib.suppress(Exception):  # what is left of the attack may fail after it has done its work
        torch.load(path, weights_only=False)
    assert target.exists(), "the attack is none: this test shows nothing"


@pytest.mark.parametrize("kind", PAST)
def test_what_the_restricted_loader_allows_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    attacks = hostile.past_the_allow_list(tmp_path, str(target))
    assert sorted(attacks) == sorted(PAST)
    path = zipped(attacks[kind], tmp_path / "evil.pt", **{"data/0": b"0000"})
    assert refusal(path)
    assert not target.exists()


@pytest.mark.parametrize("kind", ["another file", "deep key", "hash bomb", "memory by strides", "memory by a layer"])
def test_the_bounds_are_needed(kind: str, tmp_path: Path) -> None:
    """Each of these does its harm under Ultralytics' restricted loader alone."""
    target = tmp_path / "made"
    attack = hostile.past_the_allow_list(tmp_path, str(target))[kind]
    path = zipped(attack, tmp_path / "evil.pt", **{"data/0": b"0000"})

    def load() -> None:
        found = torch_safe_load(str(path), safe_only=True)[0]
        for value in found.values() if isinstance(found, dict) else [found]:
            value.double()

    status, said = in_a_child(load, seconds=3)
    assert target.exists() if kind == "another file" else status < 0 or "allocate" in said, (status, said)


@pytest.mark.parametrize("kind", list(hostile.broken("")))
def test_a_broken_pickle_is_one_line(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    assert refusal(zipped(hostile.broken(str(target))[kind], tmp_path / "evil.pt"))
    assert not target.exists()


def test_files_of_other_kinds_are_one_line_each(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for path in hostile.other_files(tmp_path, str(target)).values():
        refusal(path)
    assert not target.exists()


def test_trust_is_given_by_name_only(tmp_path: Path) -> None:
    target = tmp_path / "made"
    path = zipped(hostile.running(str(target))["reduce"], tmp_path / "mine.pt")
    with pytest.raises(ModelError):  # it is still no model; but it was loaded
        load_model(path, trust=True)
    assert target.exists()


@pytest.mark.parametrize(
    "load",
    [lambda path: export_model(path, "onnx", 64), lambda path: Workbench(str(path)).model, load_model],
    ids=["export", "workbench", "load"],
)
def test_every_way_in_is_guarded(load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = zipped(hostile.running(str(tmp_path / "made"))["reduce"], tmp_path / "evil.pt")
    with pytest.raises(RefusedNameError, match=r"calls posix\.mkdir; do not load it"):
        load(path)
    assert not (tmp_path / "made").exists()


def test_nothing_else_loads_files_that_can_run_code() -> None:
    """Whoever adds a way of loading has to come by here."""
    loading = re.compile(
        r"torch\.load\(|\bYOLO\(|load_checkpoint\(|torch_safe_load\(|pickle\.loads?\(|allow_pickle=True"
    )
    allowed = {
        "loading.py",
        "stock_baseline.py",
        "exporter.py",
        "train.py",
    }  # behind the check; the built-in model's own training
    allowed |= {"ddp.py", "ddp_worker.py"}  # what the processes of one group hand over in private
    root = Path(__file__).resolve().parents[3]
    found = set()
    for path in [
        file
        for room in ("paretoprune", "pruning", "search", "cluster", "results")
        for file in (root / room).rglob("*.py")
    ]:
        for line in path.read_text(encoding="utf-8").splitlines():
            code = line.split("#")[0]
            if loading.search(code) and "def " not in code and "weights_only=True" not in code and "`" not in code:
                found.add(path.name)
    assert found <= allowed


def test_two_entries_of_one_name_are_one_to_the_loader(tmp_path: Path) -> None:
    """Archive readers differ in which entry they take; the check reads with torch's own."""
    path = tmp_path / "twice.pt"
    harmless, evil = b"\x80\x02}.", hostile.running(str(tmp_path / "made"))["reduce"]
    for first, second in ((harmless, evil), (evil, harmless)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", first)
            archive.writestr("archive/version", "3\n")
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("archive/data.pkl", second)
        try:
            check_bounds(path)
        except RefusedNameError:
            continue
        torch.load(path, weights_only=False)
        assert not (tmp_path / "made").exists()


def test_a_name_is_shown_without_its_terminal_codes(tmp_path: Path) -> None:
    shown = []
    for pickled in (b"cos\x1b[31m\nx\ry\n)R.", b"cos\x1b[31m\nx\ry\n."):
        with pytest.raises(ModelError) as caught:
            load_model(zipped(hostile.TWO + pickled, tmp_path / "evil.pt"))
        assert str(caught.value).isprintable()
        shown.append(str(caught.value))
    assert "os?[31m.x?y" in shown[0]
    assert r"os\x1b[31m.x" in shown[1]


def official(model: nn.Module, fused: bool, tmp_path: Path) -> Path:
    """As Ultralytics saves it: in half precision, beside what a training leaves; the average of a training's last."""
    model = deepcopy(model)
    head: Any = list(model.model)[-1]  # type: ignore[arg-type]
    if isinstance(head, Detect) and type(head) is not Detect:
        head.detect = Detect.forward  # as the official files of 2023 and 2024 have it
    if fused:
        with quiet_ultralytics():
            model = model.fuse()  # type: ignore[operator]
    model.args = IterableSimpleNamespace(imgsz=64, data="a.yaml", save_dir=Path("a"))  # type: ignore[assignment]
    model.criterion = None  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters())
    halved = deepcopy(model).half()
    content = {
        "epoch": -1, "model": halved if fused else None, "ema": None if fused else halved, "updates": 3,
        "optimizer": optimizer.state_dict(), "train_args": {"data": Path("a/b.yaml"), "imgsz": 64, "lr0": 0.01},
        "train_metrics": {"fitness": np.float64(0.5)}, "train_results": {"epoch": [1, 2]}, "date": "2026",
        "best_fitness": np.float64(0.5), "git": {"root": Path("a"), "branch": None},
    }  # fmt: skip
    path = tmp_path / f"{'fused' if fused else 'last'}.pt"
    torch.save(content, path)
    return path


OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "world": lambda: WorldModel("yolov8s-worldv2.yaml", nc=3, verbose=False),
    "yoloe": lambda: YOLOEModel("yoloe-v8s.yaml", nc=3, verbose=False),
} | {
    name: lambda name=name: build(name)  # type: ignore[misc]
    for name in "yolov3-tiny yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov10n yolo26n-seg rtdetr-l".split()
}


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_official_checkpoints_and_what_is_made_of_them_load_without_trust(name: str, tmp_path: Path) -> None:
    model = OFFICIAL[name]()
    for fused in (False, True):
        path = official(model, fused, tmp_path)
        if fused or name.endswith(("seg", "pose", "obb")):
            with zipfile.ZipFile(path) as archive:
                assert b"getattr" in archive.read(f"{path.stem}/data.pkl")
        loaded = load_model(path)
        own = tmp_path / "own.pt"
        save_checkpoint(loaded, own)
        again = load_model(own)
        for key, value in loaded.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


def test_real_weights_load_without_trust(assets: Path) -> None:
    for path in sorted((assets / "weights").glob("*.pt")):
        assert load_model(path)


def test_a_yaml_is_never_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when a checkpoint is loaded, and not when its network is built again with another head."""
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)
    target = tmp_path / "made"
    model: Any = tiny_model()
    model.yaml["activation"] = f"__import__('os').mkdir({str(target)!r}) or torch.nn.SiLU()"
    torch.save({"model": model}, tmp_path / "evil.pt")
    loaded: Any = load_model(tmp_path / "evil.pt")
    with quiet_ultralytics(), pytest.raises(TypeError, match="blocked during restricted model load"):
        DetectionModel(loaded.yaml, nc=2, verbose=False)
    assert not target.exists()
    model.yaml["activation"] = "torch.nn.LeakyReLU(0.1)"
    with quiet_ultralytics():
        again: Any = DetectionModel(model.yaml, nc=2, verbose=False)
    assert isinstance(again.model[0].act, nn.LeakyReLU)


def test_our_own_checkpoints_hold_no_class_of_ours(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "own.pt")
    known = {"torch", "ultralytics", "collections", "__builtin__"}
    assert {name.split(".")[0] for name in pickled_classes(tmp_path / "own.pt")} <= known


def test_embeddings_beside_a_dataset_are_tensors_or_nothing(tmp_path: Path) -> None:
    """Ultralytics' trainers of text-prompted networks unpickle what lies beside the images."""
    from ultralytics.models.yolo.world import train as of_worlds
    from ultralytics.models.yolo.yoloe import train as of_prompts

    target = tmp_path / "made"
    evil = zipped(hostile.running(str(target))["reduce"], tmp_path / "text_embeddings_clip_ViT-B_32.pt")
    good = tmp_path / "good.pt"
    torch.save({"a cat": torch.ones(3)}, good)
    for trainers in (of_worlds, of_prompts):
        with quiet_ultralytics():
            with pytest.raises(RefusedNameError):
                trainers.torch_load(evil, map_location="cpu")
            assert torch.equal(trainers.torch_load(good, map_location="cpu")["a cat"], torch.ones(3))
    assert not target.exists()


@pytest.mark.parametrize("what", ["scale", "stride", "route", "parameters", "classes", "hook"])
def test_a_network_that_cannot_run_is_one_line(what: str, tmp_path: Path) -> None:
    """It loads: nothing but its numbers is wrong."""
    model: Any = tiny_model()
    if what == "scale":
        model.model[1].act = nn.Upsample(scale_factor=1e6)
    elif what == "stride":
        model.model[1].conv.stride = (0, 0)
    elif what == "route":
        model.model[2].f = 10**9
    elif what == "parameters":
        model.model[1].conv._parameters = {}
    elif what == "classes":
        model.model[-1].nc = 10**12
    else:
        model.model[1]._forward_hooks = {0: "hook"}
    torch.save({"model": model}, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="but it does not") as caught:
        build_layer_table(load_model(tmp_path / "odd.pt"))
    assert "\n" not in str(caught.value)
