"""Sizes of the input: which are taken, and that a rectangle is measured, exported and compared as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.check import EXACT, check_export, measure_export, real_images
from paretoprune.pruning.export.exporter import export_model, export_path
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.graph.geometry_reading import read_geometry
from paretoprune.pruning.latency.pair import measure_pair
from paretoprune.pruning.latency.runtimes import ExportCache, SessionSpec, open_session
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.image_size import check_image_size, rounded_up, stride_of, trained_size
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.search.api.models import prune
from tests.pruning.tiny import _YAML as TINY
from tests.pruning.tiny import tiny_model


def sure_model(channels: int = 3) -> Any:
    """Tiny, for images of so many channels, and seeing objects."""
    model: Any = tiny_model() if channels == 3 else DetectionModel(cfg=dict(TINY), ch=channels, nc=3, verbose=False)
    for scale in model.model[-1].cv3:
        scale[-1].bias.data.fill_(-0.5)
    return model.eval()


def saved(folder: Path, channels: int = 3) -> Path:
    save_checkpoint(sure_model(channels), folder / "tiny.pt", {"imgsz": 64})
    return folder / "tiny.pt"


def dataset(folder: Path, channels: int = 3, images: int = 3) -> str:
    """Random pictures; of other numbers of channels than 1 and 3 as the pages of a TIFF."""
    places = folder / "images" / "val"
    places.mkdir(parents=True)
    (folder / "labels" / "val").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(images):
        pixels = random.integers(0, 255, (90, 50, channels), dtype=np.uint8)
        if channels in (1, 3):
            cv2.imwrite(str(places / f"{number}.png"), pixels)
        else:
            cv2.imwritemulti(str(places / f"{number}.tiff"), [pixels[..., c] for c in range(channels)])
        (folder / "labels" / "val" / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    text = f"path: {folder}\ntrain: images/val\nval: images/val\nchannels: {channels}\nnames: [a, b, c]\n"
    (folder / "data.yaml").write_text(text)
    return str(folder / "data.yaml")


@pytest.mark.parametrize(
    ("size", "stride", "wanted"),
    [(100, 32, 128), (64, 32, 64), (1, 32, 32), (96, 64, 128), ((64, 100), 32, (64, 128)), ((65, 96), 64, (128, 128))],
)
def test_a_size_is_rounded_up_as_ultralytics_does(size: Any, stride: int, wanted: Any) -> None:
    from ultralytics.utils.checks import check_imgsz

    assert rounded_up(size, stride) == wanted
    stock = check_imgsz(list(size) if isinstance(size, tuple) else size, stride)
    assert stock == (list(wanted) if isinstance(wanted, tuple) else wanted)
    if size == wanted:
        check_image_size(size, stride)
    else:
        right = ",".join(map(str, wanted)) if isinstance(wanted, tuple) else str(wanted)
        with pytest.raises(PruningError, match=rf"a multiple of {stride}.*: use {right}$"):
            check_image_size(size, stride, "m.pt")


def test_the_stride_is_the_models_and_a_checkpoints_own_size_is_what_its_training_made_of_it() -> None:
    model = tiny_model()
    assert stride_of(model) == 32  # Ultralytics trains at no smaller multiples
    model.stride = torch.tensor([8.0, 64.0])
    assert stride_of(model) == 64
    assert [trained_size({"imgsz": size}, 64) for size in (None, 100, [320, 200], [96, 96])] == [
        640,
        128,
        (320, 256),
        128,
    ]


def test_a_size_that_the_models_stride_does_not_take_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    model = sure_model()
    model.stride = torch.tensor([8.0, 64.0])
    save_checkpoint(model, tmp_path / "p6.pt", {"imgsz": 128})
    with pytest.raises(PruningError, match=r"multiple of 64, the largest stride of .*p6.pt, but got 96: use 128"):
        _ = Workbench(str(tmp_path / "p6.pt"), imgsz=96, importance="l2").table
    with pytest.raises(PruningError, match=r"multiple of 64.* got 64,96: use 64,128"):
        measure_pair(model, model, (64, 96), max_seconds=0.1, threads=1)
    with pytest.raises(PruningError, match=r"multiple of 64.* got 96: use 128"):
        export_model(tmp_path / "p6.pt", "torchscript", 96)


@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
def test_a_rectangle_is_what_is_run_and_timed(runtime: str) -> None:
    if runtime != "torch":
        pytest.importorskip("onnxruntime" if runtime == "onnx" else runtime)
        pytest.importorskip("onnx")
    model, cache = tiny_model(), ExportCache()
    places = {}
    for size in ((64, 96), (96, 64), 64):
        found = open_session(model, SessionSpec(size, "cpu", threads=1), runtime, cache).output()
        places[size] = found.shape[-1]
    assert places == {(64, 96): 8 * 12 + 16 * 24, (96, 64): 12 * 8 + 24 * 16, 64: 64 + 256}  # strides 8 and 4
    result = measure_pair(model, model, (64, 96), max_seconds=0.2, threads=1, runtime=runtime, exports=cache)
    assert result.to_dict()["imgsz"] == [64, 96]


@pytest.mark.parametrize("form", ["torchscript", "onnx", "openvino"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_export_of_any_shape_and_channels_is_checked_at_it(form: str, channels: int, tmp_path: Path) -> None:
    if form != "torchscript":
        pytest.importorskip("onnxruntime" if form == "onnx" else form)
    data, path = dataset(tmp_path / "data", channels), saved(tmp_path, channels)
    size = (64, 96) if channels != 4 else 64
    exported = export_model(path, form, size, output=tmp_path / "out")
    assert exported.parent == tmp_path / "out"
    assert [item.name for item in tmp_path.iterdir()].count("tiny.pt") == len(list(tmp_path.glob("tiny*")))
    found = check_export(exported, path, size, data=data)
    assert found.ok, found
    assert form == "openvino" or max(found.score_difference, found.box_difference) <= EXACT
    assert (found.images, found.objects > 0) == (3, True)
    images = real_images(sure_model(channels), size, data)
    assert {tuple(image.shape) for image in images.images} == {(1, channels, 64, 96 if channels != 4 else 64)}
    if form != "torchscript":  # which takes other shapes
        with pytest.raises(PruningError, match="cannot be run here on images of 96,64"):
            Backend(exported, (96, 64))
    other = sure_model(channels)
    for scale in other.model[-1].cv3:
        scale[-1].bias.data.add_(1.0)
    assert not check_export(exported, other, size, data=data).ok
    if form == "torchscript":
        assert measure_export(exported, path, size, threads=1, max_seconds=0.1).median_ms > 0


def test_the_turned_shape_is_another_network(tmp_path: Path) -> None:
    """Boxes are compared in the image's own height and width: a mask's region, too."""
    from paretoprune.pruning.export.outputs import Layout, _Boxes

    answer = [np.asarray([[[48.0], [32.0], [96.0], [64.0], [0.9], [1.0]]], np.float32), np.zeros((1, 1, 16, 24))]
    rows, columns = _Boxes.read(answer, Layout("segment", 1, size=(64, 96)))._region(0)
    assert (rows, columns) == (slice(0, 16), slice(0, 24))


def test_broken_images_are_passed_over_and_named(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", images=2)
    for name, content in (("0a.jpg", b""), ("0b.jpg", b"\xff\xd8\xff no picture"), ("0c.png", b"text")):
        (tmp_path / "data/images/val" / name).write_bytes(content)
    found = real_images(sure_model(), 64, data)
    assert len(found.images) == 2
    assert [Path(line.split(" cannot ")[0]).name for line in found.left_out] == ["0a.jpg", "0b.jpg", "0c.png"]
    for path in (tmp_path / "data/images/val").glob("?.png"):
        path.write_bytes(b"")
    with pytest.raises(
        PruningError, match=r"real images of 3 channels, but there are none \(the first: .*cannot be read"
    ):
        real_images(sure_model(), 64, data)
    with pytest.raises(PruningError, match=r"there are none \(the first: .* has 3 channels, not 4\)"):
        real_images(sure_model(4), 64)


def test_where_an_export_goes(tmp_path: Path) -> None:
    model = tmp_path / "m.pt"
    assert export_path(model, "onnx") == tmp_path / "m.onnx"
    assert export_path(model, "openvino") == tmp_path / "m_openvino_model"
    assert export_path(model, "onnx", tmp_path / "a/n.onnx") == tmp_path / "a/n.onnx"
    assert export_path(model, "onnx", tmp_path / "a") == tmp_path / "a/m.onnx"
    (tmp_path / "v1.0").mkdir()
    assert export_path(model, "torchscript", tmp_path / "v1.0") == tmp_path / "v1.0/m.torchscript"
    with pytest.raises(PruningError, match=r"must end in .onnx, or be a folder"):
        export_path(model, "onnx", tmp_path / "n.engine")
    with pytest.raises(PruningError, match=r"the format must be one of"):
        export_path(model, "onnxx")
    (tmp_path / "mine_openvino_model").mkdir()
    with pytest.raises(PruningError, match=r"holds no export, so it is not replaced"):
        export_path(model, "openvino", tmp_path / "mine_openvino_model")
    (tmp_path / "file").write_text("")
    with pytest.raises(PruningError, match=r"file' cannot be written; give another output"):
        export_path(model, "onnx", tmp_path / "file/m.onnx")


def test_an_export_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for _ in range(2):
        assert export_model(path, "torchscript", 64) == tmp_path / "tiny.torchscript"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["tiny.pt", "tiny.torchscript"]


def test_a_network_is_pruned_for_a_rectangle(tmp_path: Path) -> None:
    """Calibration, cost and checkpoint are of exactly this height and width, which stock Ultralytics then takes."""
    model, data, size = saved(tmp_path), dataset(tmp_path / "data"), (64, 96)
    pruned = prune(model, ratio=0.5, data=data, imgsz=size, round_to=1, calibration_images=4, importance="l2")
    bench = Workbench(str(model), data, size, calibration_images=4)
    assert bench.calibration.images.shape == (3, 3, *size)
    assert bench.images.shape == (4, 3, *size)  # the fourth one augmented
    content = bench.calibration.images[0]  # 90 high, 50 wide: 64 x 36 in the middle, grey beside it
    assert float((content[:, :, :29] - 114 / 255).abs().max()) < 0.01
    assert float((content[:, :, 32:64] - 114 / 255).abs().max()) > 0.2
    by_square = bench.geometry.gflops / read_geometry(bench.model, bench.table, 96).gflops
    assert by_square == pytest.approx(64 / 96)
    assert NetworkGeometry.from_json(json.loads(json.dumps(bench.geometry.to_json()))) == bench.geometry
    written = pruned.save(tmp_path / "out.pt")
    assert load_model(written).args["imgsz"] == [64, 96]
    stock, seen = YOLO(written), []
    stock.model.model[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    stock.predict(np.zeros((64, 96, 3), np.uint8), verbose=False, save=False, device="cpu")
    assert seen[-1] == size


def test_a_classifier_takes_squares_only(tmp_path: Path) -> None:
    save_checkpoint(ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False), tmp_path / "classes.pt")
    assert Workbench(str(tmp_path / "classes.pt"), imgsz=64).model is not None
    with pytest.raises(PruningError, match="a classifier's images are squares, but got 64,96: give one side"):
        assert Workbench(str(tmp_path / "classes.pt"), imgsz=(64, 96)).model
