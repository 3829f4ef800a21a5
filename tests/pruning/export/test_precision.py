"""Exports in other precisions: what they are calibrated on, what they compute in, what is refused, what they cost."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.data.calibration import Calibration, load_calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.accuracy import ExportAccuracy, compare_accuracy
from paretoprune.pruning.export.check import ExportCheck, verdict_on
from paretoprune.pruning.export.exporter import check_options, export_model
from paretoprune.pruning.export.precision import check_precision
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.search.cli import run

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed: nothing was exported")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed: nothing was exported")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_dataset(tmp_path_factory.mktemp("data") / "digits", train=4, val=4))


def test_int8_takes_its_ranges_from_the_calibration_images(tmp_path: Path) -> None:
    images = 0.4 * torch.rand(2, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = 0.6
    file = export_model(BASELINE, "onnx", output=tmp_path, precision="int8", calibration=Calibration({"img": images}))
    graph = onnx.load(file).graph
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images")
    known = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    assert float(known[first.input[1]]) == pytest.approx(round(0.6 * 255) / 255 / 255)  # 8 bits from 0 to the largest
    assert known[first.input[2]].dtype == np.uint8
    restored = {node.input[0]: known.get(node.input[1]) for node in graph.node if node.op_type == "DequantizeLinear"}
    channels = [len(scale) for name, scale in restored.items() if name in known and known[name].ndim == 4]
    assert channels == [known[name].shape[0] for name in restored if name in known and known[name].ndim == 4]
    network: Any = load_model(BASELINE)
    place = f"/model.{len(network.model) - 1}/"
    head = [node for node in graph.node if node.op_type == "Conv" and place in node.name]
    assert head
    assert all(node.input[1] in known for node in head)  # in fp32: not behind a DequantizeLinear
    weights = [
        known[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in known
    ]
    assert {each.dtype for each in weights if each.ndim == 4} == {np.dtype("int8")}


def test_the_command_judges_an_int8_file_by_its_accuracy(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copy(BASELINE, tmp_path / "m.pt")
    wanted = ["--precision", "int8", "--data", data, "--calibration-images", "2", "--seconds", "0.3", "--device", "cpu"]
    assert run(["export", str(model), *wanted, "--set", "opset=17"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "m.onnx")
    found = json.loads((tmp_path / "m.onnx.check.json").read_text())
    assert (found["precision"], found["ok"], found["against"]) == ("int8", True, "m.pt")
    accuracy = found["accuracy"]
    assert (accuracy["metric"], accuracy["images"]) == ("map50_95", 4)
    assert accuracy["difference"] == accuracy["file"] - accuracy["model"]
    assert accuracy["ci95"][0] <= accuracy["difference"] <= accuracy["ci95"][1]
    assert f"accuracy: map50_95 {accuracy['file']:.4f}" in printed.err
    assert {each.version for each in onnx.load(tmp_path / "m.onnx").opset_import if not each.domain} == {17}


def test_a_file_in_fp32_is_as_accurate_as_its_network(tmp_path: Path, data: str) -> None:
    network = load_model(BASELINE)
    file = export_model(BASELINE, "torchscript", output=tmp_path)
    found = compare_accuracy(file, network, data, IMGSZ)
    assert found.model > 0.5
    assert found.difference == pytest.approx(0, abs=1e-3)
    assert found.images == 4


def test_a_rectangular_export_is_calibrated_on_rectangles(data: str) -> None:
    assert load_calibration(data, load_model(BASELINE), (32, 64), 2).images.shape == (2, 3, 32, 64)


def test_openvino_computes_in_what_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed: nothing was exported")
    from paretoprune.pruning.latency.runtimes.openvino_session import half_type, openvino_core

    file = export_model(BASELINE, "openvino", 64, output=tmp_path)
    native = {"f16": "fp16"}.get(str(half_type(openvino_core())), half_type(openvino_core()))
    for precision in filter(None, ("fp32", native)):
        compiled: Any = Backend(file, 64, precision=precision)._model.ov_compiled_model
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        assert {"f32": "fp32", "f16": "fp16"}.get(hint, hint) == precision
        assert compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()


@pytest.mark.parametrize(
    ("target", "precision", "line"),
    [
        ("onnx", "bf16", "onnx is not written in bf16 on cpu: it is written in fp32, fp16 or int8; possible here: "),
        ("onnx", "fp16", "onnx does not compute in fp16 on cpu; possible here: "),
        ("engine", "fp16", "engine is not written in fp16 on cpu: it needs a GPU; possible here: "),
        ("torchscript", "int8", "torchscript is not written in int8 on cpu: it is written in fp32; possible here: "),
        ("onnx", "fp8", "the precision must be one of fp32, fp16, bf16, int8, but got 'fp8'"),
    ],
)
def test_what_does_not_go_together_is_one_line(target: str, precision: str, line: str) -> None:
    with pytest.raises(PruningError, match=line):
        check_precision(target, precision, "cpu")


def test_a_file_for_another_device_may_be_written() -> None:
    check_precision("onnx", "fp16", "cpu", run=False)


@pytest.mark.parametrize(
    ("target", "precision", "package", "extra"),
    [("openvino", "int8", "nncf", "openvino"), ("onnx", "fp32", "onnxslim", "onnx"), ("ncnn", "fp32", "ncnn", "ncnn")],
)
def test_a_missing_package_is_said_with_its_extra(
    target: str, precision: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else stock(name))
    with pytest.raises(
        PruningError, match=rf"needs the package {package}, which is not here; .*paretoprune\[{extra}\]"
    ):
        check_precision(target, precision, "cpu")


@pytest.mark.parametrize(
    ("target", "options", "line"),
    [
        ("onnx", {"opst": 17}, "Ultralytics has no option 'opst'; do you mean opset?"),
        ("onnx", {"quantize": 8}, "quantize is not set that way, but by --precision"),
        ("ncnn", {"dynamic": True}, "ncnn does not take dynamic; it takes batch"),
    ],
)
def test_an_option_that_is_not_taken_is_one_line(target: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(PruningError, match=line.replace("?", r"\?")):
        check_options(target, options)


def test_a_quantised_file_is_judged_by_accuracy_and_others_by_outputs() -> None:
    near, far = ExportCheck(2, 5, 0.0, 0.0), ExportCheck(2, 5, 0.3, 0.1)
    good, bad = (ExportAccuracy("map50_95", file, 0.5, file - 0.5, None, 9) for file in (0.45, 0.35))
    assert verdict_on(far, good, "int8")["ok"]
    assert not verdict_on(far, good, "fp32")["ok"]
    assert not verdict_on(far, bad, "int8")["ok"]
    assert verdict_on(None, good, "fp32")["ok"]
    assert verdict_on(near, None, "fp32")["verdict"] == "the same as the checkpoint's"
