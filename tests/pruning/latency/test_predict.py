"""Whole predictions as what is timed: they are Ultralytics' own, and both networks see the same images."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.nn.tasks import (
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    RTDETRDetectionModel,
    SegmentationModel,
    SemanticSegmentationModel,
)

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.export.engine import make_engine
from paretoprune.pruning.latency import pair
from paretoprune.pruning.latency.images import IMAGES, RANDOM_SIZE, ImageStream, image_stream
from paretoprune.pruning.latency.memory import _peak_resident_mb, peak_memory
from paretoprune.pruning.latency.pair import images_per_second, measure_pair, time_pair
from paretoprune.pruning.latency.runtimes import ExportCache, OnnxFile, SessionSpec, check_runtime, open_session
from paretoprune.pruning.latency.runtimes.predict_session import PredictSession
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

PARTS = ("boxes", "masks", "keypoints", "probs", "obb")
# The network, and which of its predictions says what it finds
KINDS: dict[str, tuple[type[Any], str, str]] = {
    "detect": (DetectionModel, "yolov8n.yaml", "boxes"),
    "without suppression": (DetectionModel, "yolo26n.yaml", "boxes"),
    "segment": (SegmentationModel, "yolov8n-seg.yaml", "masks"),
    "pose": (PoseModel, "yolov8n-pose.yaml", "keypoints"),
    "obb": (OBBModel, "yolo11n-obb.yaml", "obb"),
    "classify": (ClassificationModel, "yolov8n-cls.yaml", "probs"),
    "rtdetr": (RTDETRDetectionModel, "rtdetr-l.yaml", "boxes"),
}


def stream_of(kind: str, *shapes: tuple[int, int]) -> ImageStream:
    random = np.random.default_rng(0)
    images = tuple(random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes)
    return ImageStream(kind, images, "made here")


def assert_same(ours: Any, theirs: Any) -> None:
    for part in PARTS:
        one, other = getattr(ours, part), getattr(theirs, part)
        assert (one is None) == (other is None), part
        if one is not None:
            torch.testing.assert_close(one.data, other.data, rtol=1e-5, atol=1e-5, msg=part)


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS)
def test_it_is_what_stock_predict_gives(case: str, tmp_path: Path) -> None:
    """Oracle: Ultralytics' `predict` of the checkpoint, image by image and two at a time."""
    build, yaml, part = KINDS[case]
    torch.manual_seed(0)
    network = build(yaml, verbose=False).eval()
    for name, parameter in network.named_parameters():  # scores of about 0.5, of which predict keeps hundreds
        if ("cv3" in name and name.endswith("2.bias")) or ("score_head" in name and name.endswith("bias")):
            parameter.data.zero_()
    save_checkpoint(network, tmp_path / "network.pt")
    size, kind = (160, "rtdetr") if case == "rtdetr" else (96, "detect" if case == "without suppression" else case)
    stream = stream_of(kind, (60, 120), (130, 90), (60, 120))
    session: Any = open_session(network, SessionSpec(size, "cpu", stream=stream), "torch", ExportCache())
    with quiet_ultralytics():
        stock = (RTDETR if case == "rtdetr" else YOLO)(tmp_path / "network.pt")
        for image in stream.images[:2]:
            (theirs,) = stock.predict(image, imgsz=size, verbose=False)
            (ours,) = session.predict([image])
            assert len(getattr(theirs, part)) > 0
            assert_same(ours, theirs)
        pair_of_theirs = stock.predict(list(stream.images[1:]), imgsz=size, batch=2, verbose=False)
    for ours, theirs in zip(session.predict(list(stream.images[1:])), pair_of_theirs, strict=True):
        assert_same(ours, theirs)
    assert session.time_ms() > 0
    assert len(session.output()) > 0
    assert (session.precision, session.threads) == ("fp32", torch.get_num_threads())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchscript", "onnx", "openvino"])
def test_a_file_predicts_as_stock_does(target: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(target, target if target == "openvino" else "torch"))
    network = load_model(BASELINE)
    data = build_dataset(tmp_path / "digits", train=1, val=3)
    stream = image_stream(network, str(data))
    engine = make_engine(network, target, 96)
    session: Any = open_session(engine, SessionSpec(96, "cpu", stream=stream), target, ExportCache())
    assert f" predict, {'torch' if target == 'torchscript' else target}" in session.version
    found = 0
    with engine.written() as path, quiet_ultralytics():
        stock = YOLO(path, task="detect")
        for image in stream.images:
            (theirs,) = stock.predict(image, imgsz=96, verbose=False)
            (ours,) = session.predict([image])
            found += len(theirs.boxes)
            if target == "openvino":  # which by itself may compute in bf16, while here it is told fp32
                assert abs(len(ours.boxes) - len(theirs.boxes)) <= 1
            else:
                assert_same(ours, theirs)
    assert found > 0


def test_a_measured_call_is_every_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Counted(DetectionPredictor):
        def preprocess(self, im: Any) -> Any:
            calls.append("preprocess")
            return super().preprocess(im)

        def inference(self, im: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append("network")
            return super().inference(im, *args, **kwargs)

        def postprocess(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("postprocess")
            return super().postprocess(*args, **kwargs)

    monkeypatch.setattr("paretoprune.pruning.latency.runtimes.predict_session.predictor_of", lambda kind: Counted)
    network = load_model(BASELINE)
    spec = SessionSpec(96, "cpu", stream=stream_of("detect", (50, 80), (50, 80), (80, 50)))
    session = open_session(network, spec, "torch", ExportCache())
    assert calls.count("network") == 2  # each shape once
    calls.clear()
    session.time_ms()
    session.time_ms()
    assert calls == ["preprocess", "network", "postprocess"] * 2
    calls.clear()
    open_session(network, SessionSpec(96, "cpu"), "torch", ExportCache()).time_ms()
    assert calls == []


def test_within_a_round_both_networks_see_the_same_images() -> None:
    stream = stream_of("detect", (1, 1), (2, 2), (3, 3))
    now, seen = [0.0], {"candidate": list[tuple[int, ...]](), "baseline": list[tuple[int, ...]]()}

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def time_ms(self) -> float:
            now[0] += self.seconds
            seen[self.name].append(tuple(len(image) for image in stream.take(2)))
            return 1e3 * self.seconds

    times = time_pair(
        Fake("candidate", 0.5), Fake("baseline", 1.0), 10.0, 0.01, lambda: now[0], advance=lambda: stream.advance(2)
    )
    rounds = len(times.quads)
    assert rounds >= 4
    warm = times.warmup_iterations
    expected = [((2 * k) % 3 + 1, (2 * k + 1) % 3 + 1) for k in range(rounds)]
    # A block of one, then the uncounted inference after the other network, then a block of one
    assert seen["baseline"][warm:] == [image for image in expected for _ in range(3)]
    ours = seen["candidate"][warm + 1 :]
    assert ours[:3] == [expected[0]] * 3
    assert ours[3:] == [image for image in expected[1:] for _ in range(4)]  # and one after each new image


def test_the_pair_says_what_was_timed(tmp_path: Path) -> None:
    network = load_model(BASELINE)
    stream = image_stream(network, str(build_dataset(tmp_path / "digits", train=1, val=20)))
    found = measure_pair(network, network, 96, threads=1, max_seconds=0.3, stream=stream, batch=2).to_dict()
    assert (found["span"], found["images"]) == ("predict", f"{IMAGES} validation images of {tmp_path}/digits/data.yaml")
    assert found["runtime_version"].startswith("ultralytics ")
    assert found["median_ms"] <= found["p90_ms"] <= found["p99_ms"]
    alone = measure_pair(network, network, 96, threads=1, max_seconds=0.1).to_dict()
    assert (alone["span"], alone["images"], alone["streams"]) == ("network", None, 1)


def test_images_are_spread_over_the_split_and_of_the_networks_channels(tmp_path: Path) -> None:
    network = load_model(BASELINE)
    data = build_dataset(tmp_path / "digits", train=1, val=33)
    stream = image_stream(network, str(data))
    assert (stream.kind, len(stream.images)) == ("detect", IMAGES)
    files = sorted((tmp_path / "digits" / "images" / "val").iterdir())
    from ultralytics.utils.patches import imread

    taken = {path.name for path in files for image in stream.images if np.array_equal(imread(str(path)), image)}
    assert {files[0].name, files[-1].name} <= taken
    for path in files:
        path.write_text("no image")
    with pytest.raises(PruningError, match=r"none can be read \('.*' cannot be read .*\); correct the dataset"):
        image_stream(network, str(data))
    drawn = image_stream(network)
    assert drawn.images[0].shape == (*RANDOM_SIZE, 3)
    assert drawn.source == f"{IMAGES} of random pixels, 1280x720"


def test_a_task_without_a_predictor_is_refused() -> None:
    with pytest.raises(PruningError, match="task 'semantic'"):
        image_stream(SemanticSegmentationModel("yolo26n-sem.yaml", verbose=False))


@pytest.mark.parametrize(
    ("runtime", "half", "line"),
    [
        ("torch-cuda-graph", False, "not replayed from a CUDA graph; use the runtime torch"),
        ("torch", True, "computes in fp32 in PyTorch on a CPU; measure it without half precision"),
    ],
)
def test_what_predict_cannot_do_is_refused(runtime: str, half: bool, line: str) -> None:
    with pytest.raises(PruningError, match=line):
        check_runtime(runtime, "cpu", half, "predict")


def test_the_export_for_another_runtime_alone_does_not_predict() -> None:
    spec = SessionSpec(96, "cpu", stream=stream_of("detect", (50, 80)))
    for network, runtime in ((OnnxFile(b""), "torch"), (nn.Identity(), "onnx")):
        with pytest.raises(PruningError, match="runs a network in PyTorch, or what it was exported to"):
            open_session(network, spec, runtime, ExportCache())


def test_what_does_not_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.torchscript").write_bytes(b"nothing")
    spec = SessionSpec(96, "cpu", stream=stream_of("detect", (50, 80)))
    line = r"'broken\.torchscript' cannot predict here on images of 96 \(RuntimeError: "
    with pytest.raises(PruningError, match=line) as caught:
        PredictSession(tmp_path / "broken.torchscript", spec)
    assert "\n" not in str(caught.value)


class Counting:
    """Takes `seconds` of a clock of the test's own."""

    def __init__(self, now: list[float], seconds: float) -> None:
        self._now, self._seconds = now, seconds

    def time_ms(self) -> float:
        self._now[0] += self._seconds
        return 1e3 * self._seconds


def test_images_per_second_of_a_known_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, advanced = [0.0], []
    monkeypatch.setattr(pair.time, "perf_counter", lambda: now[0])
    sessions = [Counting(now, 0.01)], [Counting(now, 0.04)]
    rates = images_per_second(*sessions, batch=4, seconds=1.0, advance=lambda: advanced.append(1))
    assert rates == pytest.approx((400.0, 100.0))
    assert len(advanced) == pytest.approx(50 + 13, abs=3)


def test_the_streams_run_at_the_same_time() -> None:
    class Waiting:
        def __init__(self, meeting: threading.Barrier) -> None:
            self._meeting = meeting

        def time_ms(self) -> float:
            self._meeting.wait(timeout=20)  # for all the others: one after the other they would wait for ever
            return 1.0

    sessions = [[Waiting(meeting) for _ in range(3)] for meeting in (threading.Barrier(3), threading.Barrier(3))]
    assert min(images_per_second(*sessions, batch=1, seconds=0.0)) > 0


def test_streams_of_real_networks() -> None:
    network = load_model(BASELINE)
    found = measure_pair(network, network, 96, threads=1, max_seconds=0.2, streams=2)
    assert found.streams == 2
    assert min(found.images_per_s, found.baseline_images_per_s) > 0
    with pytest.raises(PruningError, match="`streams > 0` must hold, but got streams=0"):
        measure_pair(network, network, 96, streams=0)


@pytest.mark.slow
def test_peak_memory_holds_what_is_run_and_nothing_of_this_process() -> None:
    """Oracle: the input of 16 more images, at least."""
    ballast = np.ones(200_000_000, dtype=np.uint8)
    one, many = (peak_memory(BASELINE, SessionSpec(320, "cpu", batch, threads=1)) for batch in (1, 17))
    assert one.device_mb is None
    if one.process_mb is None or many.process_mb is None:
        pytest.skip("the kernel does not tell it")
    assert many.process_mb - one.process_mb > 16 * 3 * 320 * 320 * 4 / 1e6
    here = _peak_resident_mb()
    assert here is not None
    assert one.process_mb < here
    assert ballast.all()
    with pytest.raises(PruningError, match=r"the memory of 'none\.pt' cannot be measured"):
        peak_memory(Path("none.pt"), SessionSpec(64, "cpu"))
