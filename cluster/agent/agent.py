#!/usr/bin/env python3
"""Time networks on the device that they are for. One file, the standard library, Python 3.8 or newer; copy it there.

    python3 agent.py --token-file token --port 8765

A client sends files once (``PUT /models/<sha256>``) and asks for a measurement (``POST /measure``): candidate and
baseline are timed in turn, in rounds of blocks A B B A, and every sample is sent back as it is taken; statistics are
the client's. One measurement runs at a time, in a process of its own that is ended where its client is gone or its time
is up. Everything but ``GET /health`` needs the token, as ``Authorization: Bearer TOKEN``.

What a client with the token can do is use the device and fill its quota: names of files are made here, commands come
from the command line, nothing that was sent is unpickled or evaluated or given to a shell. What the runtime's own
parser does with a file is the runtime's matter: the worker runs as the user who started the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import hmac
import json
import math
import os
import platform
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, ClassVar, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple

VERSION = "1"
NAME = "paretoprune-agent"
HEAD_SECONDS = 10.0  # for the head of a request, idle time before it included
UPLOAD_BYTES_S = 64 * 1024  # a slower upload is ended
WRITE_SECONDS = 30.0  # a client that does not read for so long is gone
HEARTBEAT_SECONDS = 5.0
MOST_CONNECTIONS = 64
MOST_BODY = 64 * 1024  # of a request that is no file
FEWEST_ROUNDS = 4
MOST_INFERENCES = 200  # of a block
LAZY = 2  # inferences in which a runtime allocates memory and chooses kernels
SEND_SECONDS = 0.25  # rounds are sent in groups, so that sending seldom falls into a timing
COMMAND_OUTPUT = 1 << 20

_SHA = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class RefusedError(Exception):
    """A request that cannot be answered: its HTTP status, and one line for the client."""

    @property
    def status(self) -> int:
        """Of the answer."""
        return int(self.args[0])

    def __str__(self) -> str:
        return str(self.args[1])


class ClientGoneError(Exception):
    """Whoever asked for a measurement has closed the connection, or does not read."""


# ---------------------------------------------------------------- runners: one network in one runtime, in the worker


class Runner:
    """One network, ready to run on a fixed input.

    ``roles``: its files, role -> end of the name that it gets; one of several such sets where it reads several formats.
    """

    package = ""
    roles: ClassVar[Sequence[Dict[str, str]]] = ()
    starts_a_process = False  # a run is not one inference but a program with its own warm-up
    placed_by_chance = False  # where its memory happens to lie decides a few per cent of its time, load for load
    version = ""
    precision = "fp32"
    device = "cpu"
    threads: Optional[int] = None

    def time_ms(self) -> float:
        """Run once to the end; milliseconds by the clock."""
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) * 1e3

    def run(self) -> None:
        """One whole inference."""
        raise NotImplementedError


def _images(shape: Sequence[int], kind: str = "float32") -> Any:
    """The fixed input, values in [0, 1)."""
    import numpy

    return numpy.random.RandomState(0).rand(*shape).astype(kind)


def _precision_of(path: str, otherwise: str) -> str:
    """What a file of ONNX or OpenVINO is in: int8 where it says how values are quantised."""
    content = Path(path).read_bytes()
    return "int8" if b"QuantizeLinear" in content or b'type="FakeQuantize"' in content else otherwise


class OnnxRuntime(Runner):
    """ONNX Runtime on its CPU provider, or its CUDA provider where it has one."""

    package, roles = "onnxruntime", [{"model": ".onnx"}]

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import onnxruntime

        there = onnxruntime.get_available_providers()
        gpu = spec["device"] != "cpu" and "CUDAExecutionProvider" in there
        if spec["device"] == "gpu" and not gpu:
            raise RefusedError(400, "this build of onnxruntime has no CUDA provider, only {}".format(", ".join(there)))
        if spec["half"]:
            raise RefusedError(400, "onnxruntime computes in the precision of the file; measure without half precision")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if spec["threads"]:
            options.intra_op_num_threads = spec["threads"]
        # Threads of a model that has just run spin for the next call: they would do so while the other model is timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = "CUDAExecutionProvider" if gpu else "CPUExecutionProvider"
        self._session = onnxruntime.InferenceSession(files["model"], options, providers=[provider])
        taken = self._session.get_inputs()[0]
        kind = "float16" if "float16" in taken.type else "float32"
        place = ("cuda", 0) if gpu else ("cpu", 0)
        self._input = onnxruntime.OrtValue.ortvalue_from_numpy(_images(spec["shape"], kind), *place)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(taken.name, self._input)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name, *place)
        self.version = f"onnxruntime {onnxruntime.__version__} {self._session.get_providers()[0]}"
        self.precision = _precision_of(files["model"], "fp16" if kind == "float16" else "fp32")
        self.device, self.threads = ("gpu", None) if gpu else ("cpu", spec["threads"])

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OpenVino(Runner):
    """OpenVINO with the latency hint and one stream; it reads ONNX and its own format."""

    package, roles = "openvino", [{"model": ".onnx"}, {"xml": ".xml", "bin": ".bin"}]

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import openvino

        core = openvino.Core()
        device = "GPU" if spec["device"] == "gpu" else "CPU"
        can = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        native = [name for word, name in (("FP16", "f16"), ("BF16", "bf16")) if word in can]
        if spec["half"] and not native:
            raise RefusedError(400, f"OpenVINO says that this {device} computes in no 16-bit type natively")
        hint = native[0] if spec["half"] else "f32"
        settings: Dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": hint}
        if device == "CPU":
            settings["ENABLE_CPU_PINNING"] = False
            if spec["threads"]:
                settings["INFERENCE_NUM_THREADS"] = spec["threads"]
        compiled = core.compile_model(self._read(core, files), device, settings)
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(openvino.Tensor(_images(spec["shape"])))
        self.version = "openvino {} {}".format(openvino.__version__.split("-")[0], device)
        computes = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}[hint]
        self.precision = _precision_of(files.get("model") or files["xml"], computes)
        self.device = device.lower()
        if device == "CPU":
            self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))

    @staticmethod
    def _read(core: Any, files: Dict[str, str]) -> Any:
        return core.read_model(files["model"]) if "model" in files else core.read_model(files["xml"], files["bin"])

    def run(self) -> None:
        self._request.infer()


class TensorRt(Runner):
    """TensorRT: the engine is built here from ONNX and kept beside the files. Not yet run on a device."""

    package, roles, device = "tensorrt", [{"model": ".onnx"}], "gpu"

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        engine = trt.Runtime(logger).deserialize_cuda_engine(self._engine(trt, logger, files, spec))
        if engine is None:
            raise RefusedError(400, "TensorRT cannot load the engine that it built; see the agent's log")
        self._cuda = ctypes.CDLL("libcudart.so")
        self._context = engine.create_execution_context()
        self._kept = [engine]
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            if is_input:
                self._context.set_input_shape(name, tuple(spec["shape"]))
            shape = tuple(self._context.get_tensor_shape(name))
            data = _images([max(1, side) for side in shape], trt.nptype(engine.get_tensor_dtype(name)))
            pointer = ctypes.c_void_p()
            self._ask("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(data.nbytes))
            if is_input:
                source = ctypes.c_void_p(data.ctypes.data)
                self._ask("cudaMemcpy", pointer, source, ctypes.c_size_t(data.nbytes), 1)  # host to device
            self._context.set_tensor_address(name, pointer.value)
        self._stream = ctypes.c_void_p()
        self._ask("cudaStreamCreate", ctypes.byref(self._stream))
        self.version = f"tensorrt {trt.__version__}"
        self.precision = "fp16" if spec["half"] else "fp32"

    @staticmethod
    def _engine(trt: Any, logger: Any, files: Dict[str, str], spec: Dict[str, Any]) -> bytes:
        made_from = json.dumps([spec["sha"], spec["shape"], spec["half"], trt.__version__])
        kept = Path(spec["store"]) / ("engine-" + hashlib.sha256(made_from.encode()).hexdigest())
        if kept.is_file():
            os.utime(str(kept))
            return kept.read_bytes()
        builder = trt.Builder(logger)
        explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        network = builder.create_network(0 if explicit is None else 1 << int(explicit))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(Path(files["model"]).read_bytes()):
            raise RefusedError(400, f"TensorRT cannot read the ONNX file: {_line(parser.get_error(0))}")
        config = builder.create_builder_config()
        if spec["half"]:
            config.set_flag(trt.BuilderFlag.FP16)
        built = builder.build_serialized_network(network, config)
        if built is None:
            raise RefusedError(400, "TensorRT cannot build an engine of this network; see the agent's log")
        fresh = kept.with_name(".upload-" + secrets.token_hex(8))
        fresh.write_bytes(bytes(built))
        fresh.replace(kept)
        return bytes(built)

    def _ask(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            raise RefusedError(500, f"{function} failed with CUDA error {code}")

    def run(self) -> None:
        self._context.execute_async_v3(self._stream.value)
        self._ask("cudaStreamSynchronize", self._stream)


class Ncnn(Runner):
    """ncnn on the CPU, or on a GPU by Vulkan where it is asked for."""

    package, roles = "ncnn", [{"param": ".param", "bin": ".bin"}]
    placed_by_chance = True  # on x86-64 two copies of yolov8n differed by up to 3 % for as long as they were loaded

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import ncnn

        self._net = ncnn.Net()
        self._net.opt.use_vulkan_compute = spec["device"] == "gpu"
        self._net.opt.use_fp16_arithmetic = self._net.opt.use_fp16_storage = spec["half"]
        self._net.opt.use_fp16_packed = self._net.opt.use_bf16_storage = spec["half"]
        self._net.opt.num_threads = self.threads = spec["threads"] or os.cpu_count()
        if self._net.load_param(files["param"]) or self._net.load_model(files["bin"]):
            raise RefusedError(400, "ncnn cannot read these files")
        self._images = _images(spec["shape"])
        self._input, self._outputs = self._net.input_names()[0], self._net.output_names()
        self._mat = ncnn.Mat
        self.version = "ncnn {}".format(getattr(ncnn, "__version__", ""))
        self.precision = "fp16" if spec["half"] else "fp32"
        self.device = "gpu" if spec["device"] == "gpu" else "cpu"

    def run(self) -> None:
        for image in self._images:  # ncnn knows no batches
            with self._net.create_extractor() as extractor:
                extractor.input(self._input, self._mat(image))
                for name in self._outputs:
                    extractor.extract(name)


class LiteRt(Runner):
    """LiteRT (TensorFlow Lite) on the CPU."""

    package, roles = "ai_edge_litert", [{"model": ".tflite"}]
    others = ("tflite_runtime", "tensorflow.lite")

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import importlib

        module: Any = None
        for name in (self.package + ".interpreter", "tflite_runtime.interpreter", "tensorflow.lite.python.interpreter"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(name)
                break
        if module is None:
            raise RefusedError(400, "LiteRT is not installed on the device; pip install ai-edge-litert")
        self._interpreter = module.Interpreter(model_path=files["model"], num_threads=spec["threads"])
        taken = self._interpreter.get_input_details()[0]
        self._interpreter.allocate_tensors()
        kind = taken["dtype"]
        data = _images(taken["shape"])
        self._interpreter.set_tensor(taken["index"], (data * 255 if "int" in str(kind) else data).astype(kind))
        self.version = "{} {}".format(module.__name__.split(".")[0], _version_of("ai-edge-litert", "tflite-runtime"))
        self.precision = "int8" if "int" in str(kind) else "fp32"
        self.threads = spec["threads"]

    def run(self) -> None:
        self._interpreter.invoke()


class Rknn(Runner):
    """Rockchip's NPU by RKNN Lite. Not yet run on a device."""

    package, roles, device = "rknnlite", [{"model": ".rknn"}], "npu"

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        from rknnlite.api import RKNNLite

        self._rknn = RKNNLite(verbose=False)
        if self._rknn.load_rknn(files["model"]) or self._rknn.init_runtime():
            raise RefusedError(400, "RKNN Lite cannot load this file on this chip; convert it for this platform")
        batch, channels, height, width = spec["shape"]
        self._images = (_images([batch, height, width, channels]) * 255).astype("uint8")
        self.version = "rknnlite {}".format(_version_of("rknn-toolkit-lite2"))
        self.precision = "int8"

    def run(self) -> None:
        self._rknn.inference(inputs=[self._images])


class Hailo(Runner):
    """A Hailo accelerator by HailoRT. Not yet run on a device."""

    package, roles, device = "hailo_platform", [{"model": ".hef"}], "npu"

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        import hailo_platform as hailo

        self._stack = contextlib.ExitStack()
        hef, target = hailo.HEF(files["model"]), self._stack.enter_context(hailo.VDevice())
        settings = hailo.ConfigureParams.create_from_hef(hef, interface=hailo.HailoStreamInterface.PCIe)
        group = target.configure(hef, settings)[0]
        inputs = hailo.InputVStreamParams.make(group, format_type=hailo.FormatType.UINT8)
        outputs = hailo.OutputVStreamParams.make(group, format_type=hailo.FormatType.FLOAT32)
        self._pipeline = self._stack.enter_context(hailo.InferVStreams(group, inputs, outputs))
        self._stack.enter_context(group.activate(group.create_params()))
        taken = hef.get_input_vstream_infos()[0]
        data = (_images([spec["shape"][0], *taken.shape]) * 255).astype("uint8")
        self._data = {taken.name: data}
        self.version = "hailort {}".format(_version_of("hailort"))
        self.precision = "int8"

    def run(self) -> None:
        self._pipeline.infer(self._data)


class Command(Runner):
    """A program of the device that prints milliseconds. Its template and pattern come from the agent's own start."""

    starts_a_process = True

    def __init__(self, files: Dict[str, str], spec: Dict[str, Any]) -> None:
        template, self._pattern = spec["command"]
        self._command = [word.replace("{model}", files["model"]) for word in shlex.split(template)]
        self.version, self.threads = self._command[0], spec["threads"]
        self.precision = "as the command does"

    def time_ms(self) -> float:
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(self._command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False)
            said.seek(0)
            text = said.read(COMMAND_OUTPUT).decode(errors="replace")
        found = re.search(self._pattern, text)
        if done.returncode or found is None:
            lines = text.strip().splitlines() or ["nothing"]
            raise RefusedError(400, f"{self._command[0]} ended with {done.returncode} and said: {_line(lines[-1])}")
        return float(found.group(1))


RUNNERS = {
    "onnx": OnnxRuntime, "openvino": OpenVino, "tensorrt": TensorRt, "ncnn": Ncnn, "litert": LiteRt, "rknn": Rknn,
    "hailo": Hailo,
}  # fmt: skip


def roles_of(runner: str) -> Sequence[Dict[str, str]]:
    """The files of a network for a runner, one set for each format: role -> end of the name that the file gets here."""
    return RUNNERS[runner].roles if runner in RUNNERS else [{"model": ".onnx"}]


def _version_of(*distributions: str) -> str:
    from importlib import metadata

    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def _line(said: object, most: int = 300) -> str:
    return " ".join(str(said).split())[:most]


# ---------------------------------------------------------------- pairing: as paretoprune's own measuring does


def settled(times: Sequence[float], window: int = 5, tolerance: float = 0.03) -> bool:
    """Whether a series (ms) has stopped falling: the medians of its last two windows differ by little."""
    if len(times) < 2 * window:
        return False
    later = statistics.median(times[-window:])
    return statistics.median(times[-2 * window : -window]) <= later * (1 + tolerance)


def warm_up(
    candidate: Runner, baseline: Runner, end: float, clock: Callable[[], float]
) -> Tuple[List[float], List[float]]:
    """Run both in turn until the times of both have stopped falling or `end` is reached; their times, ms."""
    ours: List[float] = []
    theirs: List[float] = []
    while True:
        ours.append(candidate.time_ms())
        theirs.append(baseline.time_ms())
        if (settled(ours) and settled(theirs)) or clock() >= end:
            return ours, theirs


def rounds(
    candidate: Runner,
    baseline: Runner,
    warm: Sequence[Sequence[float]],
    block_ms: float,
    load: Optional[Callable[[bool], Tuple[Runner, Runner]]] = None,
) -> Iterator[Any]:
    """Rounds A B B A without end: (candidate's two blocks, baseline's two blocks), each a list of milliseconds.

    The first inference after a change of model is run but not counted: the caches hold the other's.
    `load`, called with whether the baseline is loaded first, gives both anew before every round but the first: what a
    place in memory costs or saves then falls on either as often, and shows in the interval instead of in the figure.
    """
    baseline_first = False
    if candidate.starts_a_process:
        counts = [1, 1]
    else:
        counts = [_inferences(series, block_ms) for series in warm]
        candidate.time_ms()  # the warm-up ended with the baseline
    while True:
        first = _block(candidate, counts[0])
        if not candidate.starts_a_process:
            baseline.time_ms()
        second, third = _block(baseline, counts[1]), _block(baseline, counts[1])
        if not candidate.starts_a_process:
            candidate.time_ms()
        yield [first, _block(candidate, counts[0])], [second, third]
        if load is not None:
            baseline_first = not baseline_first
            del candidate, baseline  # two of each at once may be more than the device holds
            candidate, baseline = load(baseline_first)


def _inferences(warm_ms: Sequence[float], block_ms: float) -> int:
    """Of a block: by the fastest of the warm-up's last ones, which nothing interrupted."""
    return min(MOST_INFERENCES, max(1, math.ceil(block_ms / max(min(warm_ms[-10:]), 1e-6))))


def _block(runner: Runner, count: int) -> List[float]:
    return [runner.time_ms() for _ in range(count)]


# ---------------------------------------------------------------- the device: None where it does not tell


def device_facts() -> Dict[str, Any]:
    """What does not change: model, cores, memory, system, and the runtimes that are installed."""
    import importlib.util

    there = {}
    for name, runner in RUNNERS.items():
        for package in (runner.package, *getattr(runner, "others", ())):
            with contextlib.suppress(ImportError, ValueError):
                if importlib.util.find_spec(package) is not None:
                    there[name] = package
                    break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": platform.node(),
        "model": _device_model(),
        "cores": cores,
        "memory_mb": _memory_mb("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "runtimes": {name: f"{package} {_installed(package)}" for name, package in there.items()},
    }


def _installed(package: str) -> str:
    names = {
        "ai_edge_litert": ("ai-edge-litert",), "tflite_runtime": ("tflite-runtime",),
        "rknnlite": ("rknn-toolkit-lite2",), "hailo_platform": ("hailort",),
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    }  # fmt: skip
    return _version_of(*names.get(package, (package.split(".")[0],)))


def device_state() -> Dict[str, Any]:
    """What changes: clock (mean over the cores), governor, temperature, throttling, free memory, load."""
    cpus = Path("/sys/devices/system/cpu")
    clocks = [_number(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [clock / 1000 for clock in clocks if clock is not None] or _cpuinfo_mhz()
    governors = sorted({_text(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""})
    zones = Path("/sys/class/thermal").glob("thermal_zone*/temp")
    heat = [value / 1000 for value in map(_number, zones) if value is not None and 0 < value < 200000]
    counts = [_number(path) for path in cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    throttled = [count for count in counts if count is not None]
    return {
        "clock_mhz": round(sum(known) / len(known), 1) if known else None,
        "governor": ",".join(governors) or None,
        "temperature_c": max(heat) if heat else None,
        "throttle_count": int(sum(throttled)) if throttled else None,
        "throttled_now": _pi_throttled(),
        "power_mode": _jetson_mode(),
        "memory_free_mb": _memory_mb("MemAvailable"),
        "load": round(os.getloadavg()[0], 2),
    }


def _device_model() -> str:
    named = _text(Path("/proc/device-tree/model")).strip("\0")
    if named:
        return named
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _pi_throttled() -> Optional[bool]:
    """A Raspberry Pi's own word (bits 0 to 3: under-voltage, clock held down, throttled, soft limit)."""
    said = _said("vcgencmd", "get_throttled").partition("=")[2]
    return bool(int(said, 16) & 0xF) if re.fullmatch(r"0x[0-9a-fA-F]+", said) else None


def _jetson_mode() -> Optional[str]:
    return _said("nvpmodel", "-q").replace("\n", " ") or None


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(list(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False)
        return done.stdout[:500].decode(errors="replace").strip()
    return ""


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def _number(path: Path) -> Optional[float]:
    with contextlib.suppress(ValueError):
        return float(_text(path))
    return None


def _cpuinfo_mhz() -> List[float]:
    lines = (line for line in _text(Path("/proc/cpuinfo")).splitlines() if line.startswith("cpu MHz"))
    return [float(line.partition(":")[2]) for line in lines]


def _memory_mb(name: str) -> Optional[int]:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) // 1024
    return None


# ---------------------------------------------------------------- the worker: a process for each measurement


def work() -> None:
    """In the worker: a job from stdin, events to stdout, a line each. Ends where stdin does: then the agent is gone."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no event
    with contextlib.suppress(OSError):  # where memory runs out, this goes before the agent
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the agent, however that ends
    job = json.loads(sys.stdin.readline())

    def tell(event: str, **fields: Any) -> None:
        out.write(json.dumps({"event": event, **fields}) + "\n")

    try:
        _measure(job, tell)
    except RefusedError as error:
        tell("error", status=error.status, error=str(error))
    except Exception as error:  # noqa: BLE001  whatever a runtime raises at a file that it does not take
        tell("error", status=400, error=f"{type(error).__name__}: {_line(error)}")


def _measure(job: Dict[str, Any], tell: Callable[..., None]) -> None:
    kind = Command if job["command"] else RUNNERS[job["runner"]]

    def load(baseline_first: bool = False) -> Tuple[Runner, Runner]:
        loaded = {}
        for which in ("baseline", "candidate") if baseline_first else ("candidate", "baseline"):
            loaded[which] = kind(job[which]["files"], {**job, **job[which]})
        for which in ("baseline", "candidate"):  # a round begins with the candidate
            for _ in range(1 if kind.starts_a_process else LAZY):
                loaded[which].time_ms()
        return loaded["candidate"], loaded["baseline"]

    try:
        candidate, baseline = load()
    except ImportError as error:
        raise RefusedError(400, f"the device has no {kind.package} ({_line(error)}); install it there") from error
    said = {name: getattr(candidate, name) for name in ("version", "precision", "device", "threads")}
    tell("prepared", **said)
    if sys.stdin.readline().strip() != "go":
        return
    gc.collect()
    gc.disable()
    begun = time.perf_counter()
    if kind.starts_a_process:
        warm: Any = ([0.0], [0.0])
    else:
        warm = warm_up(candidate, baseline, begun + job["warmup_seconds"], time.perf_counter)
    tell("warm", iterations=len(warm[0]))
    held: List[Any] = []
    sent, count = time.perf_counter(), 0
    timed = rounds(candidate, baseline, warm, job["block_ms"], load if kind.placed_by_chance else None)
    del candidate, baseline  # where they are loaded anew, the first ones go
    for pair in timed:
        held.append([[[round(ms, 6) for ms in block] for block in blocks] for blocks in pair])
        count += 1
        now = time.perf_counter()
        over = count >= FEWEST_ROUNDS and now - begun >= job["seconds"]
        if over or now - sent >= SEND_SECONDS:
            tell("rounds", rounds=held)
            held, sent = [], time.perf_counter()
        asked = bool(select.select([sys.stdin], [], [], 0)[0])  # "enough", or the agent is gone
        if over or asked:
            break
    if held:
        tell("rounds", rounds=held)
    tell("end", rounds=count, reason="time" if over else "enough")


# ---------------------------------------------------------------- the store of files


class Store:
    """Files by the hash of what they hold, at most `quota` bytes; what was not used for longest goes first."""

    def __init__(self, folder: Path, most_file: int, quota: int) -> None:
        self.folder, self.most_file, self.quota = folder, most_file, quota
        self._lock = threading.Lock()
        self._pinned: Dict[str, int] = {}
        self._coming = 0  # bytes of uploads under way
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in [*folder.glob(".upload-*"), *folder.glob("work-*")]:
            shutil.rmtree(str(left)) if left.is_dir() else left.unlink()

    def path(self, sha: str) -> Path:
        """Where the file with this hash lies or would lie."""
        if not _SHA.fullmatch(sha):
            raise RefusedError(400, "a file is named by 64 hexadecimal digits (SHA-256)")
        return self.folder / sha

    def has(self, sha: str) -> bool:
        """Whether it is there; it then counts as used now."""
        path = self.path(sha)
        with contextlib.suppress(OSError):
            os.utime(str(path))
            return True
        return False

    def put(self, sha: str, size: int, read: Callable[[int], bytes]) -> None:
        """Take in `size` bytes; a file with another hash, or one that is cut off, is not kept."""
        path = self.path(sha)
        if size > self.most_file:
            raise RefusedError(413, f"a file may have {self.most_file} bytes, but this one has {size}")
        with self._lock:
            self._make_room(size)
            self._coming += size
        fresh = self.folder / (".upload-" + secrets.token_hex(8))
        try:
            digest, left = hashlib.sha256(), size
            with fresh.open("wb") as file:
                while left:
                    piece = read(min(left, 1 << 16))
                    if not piece:
                        raise RefusedError(400, f"the upload ended {left} bytes early")
                    digest.update(piece)
                    file.write(piece)
                    left -= len(piece)
            if not hmac.compare_digest(digest.hexdigest(), sha):
                raise RefusedError(422, "the content has another hash than its name says")
            fresh.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RefusedError(507, "the device's disk is full") from None
        finally:
            with self._lock:
                self._coming -= size
            with contextlib.suppress(OSError):
                fresh.unlink()

    @contextlib.contextmanager
    def pinned(self, names: Sequence[str]) -> Iterator[None]:
        """These files stay while the context lasts. 404 where one is not there."""
        with self._lock:
            for sha in names:
                if not self.has(sha):
                    raise RefusedError(404, f"the device has no file {sha}; send it first")
            for sha in names:
                self._pinned[sha] = self._pinned.get(sha, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for sha in names:
                    self._pinned[sha] -= 1

    def trim(self) -> None:
        """Keep the quota again."""
        with self._lock, contextlib.suppress(RefusedError):
            self._make_room(0)

    def _make_room(self, size: int) -> None:
        kept = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if path.is_file() and not path.name.startswith("."):
                    kept.append((path.stat().st_mtime, path.stat().st_size, path))
        used = self._coming + sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if used + size <= self.quota:
                break
            if not self._pinned.get(path.name):
                path.unlink()
                used -= bytes_
        if used + size > self.quota:
            raise RefusedError(507, f"the quota of {self.quota} bytes is used up by what is being measured; try later")


# ---------------------------------------------------------------- a request for a measurement


def checked_request(content: Any, agent: Agent) -> Dict[str, Any]:
    """The job of a request's JSON. RefusedError (400) for anything that is not as it must be."""
    if not isinstance(content, dict):
        raise RefusedError(400, "a request is a JSON object")
    known = {
        "candidate", "baseline", "runner", "device", "half", "threads", "seconds", "warmup_seconds", "block_ms",
    }  # fmt: skip
    if set(content) - known:
        raise RefusedError(400, _line(f"fields must be of {sorted(known)}, but got {sorted(set(content) - known)}"))
    runner = content.get("runner")
    runner = runner if isinstance(runner, str) else ""
    is_command = runner.startswith("command:")
    name = runner[len("command:") :] if is_command else runner
    if name not in (agent.commands if is_command else RUNNERS):
        have = [*RUNNERS, *("command:" + each for each in agent.commands)]
        raise RefusedError(400, "`runner` must be one of {}".format(", ".join(have)))
    device, half = content.get("device", "auto"), content.get("half", False)
    if device not in ("auto", "cpu", "gpu") or not isinstance(half, bool):
        raise RefusedError(400, "`device` must be auto, cpu or gpu, and `half` true or false")
    roles = roles_of(runner)
    threads = content.get("threads")
    seconds = _bounded(content, "seconds", 4.0, agent.most_seconds)
    return {
        "runner": runner,
        "command": agent.commands[name] if is_command else None,
        "device": device,
        "half": half,
        "threads": None if threads is None else int(_bounded(content, "threads", 1, 1024, whole=True)),
        "seconds": seconds,
        "warmup_seconds": _bounded(content, "warmup_seconds", 0.3 * seconds, agent.most_seconds),
        "block_ms": _bounded(content, "block_ms", 20.0, 1000.0),
        **{which: _checked_model(content.get(which), which, roles) for which in ("candidate", "baseline")},
    }


def _checked_model(content: Any, which: str, roles: Sequence[Dict[str, str]]) -> Dict[str, Any]:
    if not isinstance(content, dict) or set(content) != {"files", "shape"}:
        raise RefusedError(400, f'`{which}` must be {{"files": {{role: sha256}}, "shape": [batch, ...]}}')
    files, shape = content["files"], content["shape"]
    named = isinstance(files, dict) and any(set(files) == set(each) for each in roles)
    if not named or not all(isinstance(sha, str) and _SHA.fullmatch(sha) for sha in files.values()):
        wanted = " or ".join(", ".join(each) for each in roles)
        raise RefusedError(400, f"`{which}.files` must give the SHA-256 of each of {wanted}")
    sides = isinstance(shape, list) and 1 <= len(shape) <= 6
    if not sides or not all(type(side) is int and 1 <= side <= 1 << 16 for side in shape):
        raise RefusedError(400, f"`{which}.shape` must be a list of positive whole numbers")
    size = 1
    for side in shape:
        size *= side
    if size > 1 << 28:
        raise RefusedError(400, f"`{which}.shape` has more than 2^28 values")
    return {"files": files, "shape": shape}


def _bounded(content: Dict[str, Any], name: str, default: float, most: float, whole: bool = False) -> float:
    value = content.get(name, default)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value <= most:
        raise RefusedError(400, f"`{name}` must be a number above 0 and at most {most:g}")
    return value


class Measurement:
    """One request from its place in the queue to the end of its worker."""

    def __init__(self, job: Dict[str, Any], client: str) -> None:
        self.id = secrets.token_hex(16)
        self.job, self.client = job, client
        self.phase, self.begun = "queued", time.monotonic()
        self.deadline = math.inf
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.count = 0

    def names(self) -> List[str]:
        """The hashes of its files."""
        return [sha for which in ("candidate", "baseline") for sha in self.job[which]["files"].values()]

    def say(self, line: bytes) -> None:
        """A line to the worker; one that has ended is noticed where its events are read."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(line + b"\n")
                self.process.stdin.flush()

    def line(self) -> str:
        """Of its models, for the log."""
        shas = [next(iter(self.job[which]["files"].values()))[:8] for which in ("candidate", "baseline")]
        return "{} {} {} against {}".format(self.id[:8], self.job["runner"], *shas)


class Agent:
    """The device: its store, its queue and what it was allowed at its start."""

    def __init__(self, options: argparse.Namespace, token: bytes, exclusive: Callable[[], ContextManager[Any]]) -> None:
        self.token = hashlib.sha256(token).digest()
        self.commands: Dict[str, Tuple[str, str]] = options.commands
        self.most_seconds, self.prepare_seconds = options.max_seconds, options.prepare_seconds
        self.most_queued = options.max_queue
        self.store = Store(Path(options.store), options.max_file_mb << 20, options.quota_mb << 20)
        self.exclusive = exclusive
        self.measured, self.failed = 0, 0
        self._begun = time.monotonic()
        self._queue: deque[Measurement] = deque()
        self._turn = threading.Condition()

    def allows(self, header: Optional[str]) -> bool:
        """Whether a header holds the token, in a time that does not depend on what it holds."""
        given = header[len("Bearer ") :] if header is not None and header.startswith("Bearer ") else ""
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self.token)

    def health(self) -> Dict[str, Any]:
        """For everybody: that it lives, and how busy it is."""
        with self._turn:
            waiting = list(self._queue)
        now = time.monotonic()
        running = None
        if waiting:
            first = waiting[0]
            running = {"phase": first.phase, "seconds": round(now - first.begun, 1), "rounds": first.count}
        return {
            "name": NAME,
            "version": VERSION,
            "status": "ok",
            "queue": len(waiting),
            "running": running,
            "measured": self.measured,
            "failed": self.failed,
            "uptime_seconds": round(now - self._begun, 1),
        }

    def find(self, name: str) -> Measurement:
        """The measurement of an id."""
        with self._turn:
            for each in self._queue:
                if hmac.compare_digest(each.id.encode(), name.encode("utf-8", "surrogateescape")):
                    return each
        raise RefusedError(404, "there is no such measurement")

    def answer(self, job: Dict[str, Any], client: str, tell: Callable[..., None]) -> None:
        """Queue, measure and tell every event; `tell` raises ClientGoneError."""
        this = Measurement(job, client)
        with self.store.pinned(this.names()):
            with self._turn:
                if len(self._queue) >= self.most_queued:
                    raise RefusedError(503, f"{len(self._queue)} measurements are waiting already; try later")
                self._queue.append(this)
            state, begun = "failed", time.monotonic()
            try:
                self._wait_for_turn(this, tell)
                begun = time.monotonic()
                last = self._measured(this, tell)
                state = "done"
            except ClientGoneError:
                state = "client gone"
                raise
            except RefusedError as error:
                state = str(error)
                raise
            except OSError as error:  # no memory for a process, a full disk
                state = _line(error)
                raise RefusedError(500, state) from error
            finally:
                with self._turn:
                    self._queue.remove(this)
                    self.measured += state == "done"
                    self.failed += state != "done"
                    self._turn.notify_all()
                self.store.trim()  # of engines that were built
                took = time.monotonic() - begun
                log(f"{this.line()} for {client}: {state}, {this.count} rounds in {took:.1f} s")
        tell(**last)

    def _wait_for_turn(self, this: Measurement, tell: Callable[..., None]) -> None:
        while True:
            with self._turn:
                place = self._queue.index(this)
                if place == 0:
                    return
            tell("queued", id=this.id, before=place)
            with self._turn:
                self._turn.wait_for(lambda: self._queue[0] is this, 1.0)

    def _measured(self, this: Measurement, tell: Callable[..., None]) -> Dict[str, Any]:
        """The worker's life; its last event, which is not told yet: the device is free when the client hears it."""
        this.phase = "preparing"
        tell("started", id=this.id, facts=device_facts())
        folder = Path(tempfile.mkdtemp(prefix="work-", dir=str(self.store.folder)))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, str(folder), True)
            process = this.process = self._worker(this, folder)
            stack.callback(_end, process)
            this.say(json.dumps(self._job(this, folder)).encode())
            assert process.stdout is not None
            this.deadline = time.monotonic() + self.prepare_seconds
            for event in _events(process.stdout, this, tell):
                kind = event["event"]
                if kind == "prepared":
                    this.phase = "waiting for the device"
                    stack.enter_context(self.exclusive())
                    this.phase, before = "measuring", device_state()
                    tell("state", **before)
                    this.say(b"go")
                    this.deadline = time.monotonic() + 2 * this.job["seconds"] + 120
                if kind == "rounds":
                    this.count += len(event["rounds"])
                if kind == "end":
                    event["state"] = device_state()
                    return event
                if kind == "error":
                    raise RefusedError(event["status"], _line(event["error"]))
                tell(**event)
        raise AssertionError("`_events` ends by an exception")

    def _job(self, this: Measurement, folder: Path) -> Dict[str, Any]:
        """What the worker is told: the files under names of ours in a folder of its own."""
        job = {**this.job, "store": str(self.store.folder)}
        ends = {role: end for each in roles_of(job["runner"]) for role, end in each.items()}
        for which in ("candidate", "baseline"):
            files = {}
            for role, sha in job[which]["files"].items():
                link = folder / (which + ends[role])
                link.symlink_to(self.store.path(sha).resolve())
                files[role] = str(link)
            job[which] = {**job[which], "files": files, "sha": sorted(job[which]["files"].values())}
        return job

    def _worker(self, this: Measurement, folder: Path) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        # glibc hands freed memory back or not as addresses lie, and the page faults would count as the network's time
        environment.update(MALLOC_TRIM_THRESHOLD_=str(1 << 30), MALLOC_MMAP_THRESHOLD_=str(32 << 20))
        if this.job["threads"]:
            environment["OMP_NUM_THREADS"] = str(this.job["threads"])
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=str(folder),
            start_new_session=True,  # so that programs that it starts end with it
        )


def _events(stdout: Any, this: Measurement, tell: Callable[..., None]) -> Iterator[Dict[str, Any]]:
    """The worker's events; heartbeats meanwhile, so that a client that is gone is noticed. RefusedError at its end."""
    rest, said = b"", time.monotonic()
    while True:
        ready = select.select([stdout], [], [], 0.5)[0]
        now = time.monotonic()
        if now > this.deadline:
            raise RefusedError(504, "the measurement took too long and was ended")
        if not ready:
            is_due = now - said >= HEARTBEAT_SECONDS
            tell("alive" if is_due else None)  # None: only looks whether the client is there
            said = now if is_due else said
            continue
        piece = os.read(stdout.fileno(), 1 << 16)
        if not piece:
            raise RefusedError(500, "the measuring process ended by itself: the runtime crashed, or memory ran out")
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


# ---------------------------------------------------------------- HTTP


class Handler(BaseHTTPRequestHandler):
    """One request on one connection, which is closed afterwards."""

    server: Server
    server_version, sys_version = NAME + "/" + VERSION, ""
    protocol_version = "HTTP/1.1"
    timeout = WRITE_SECONDS

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # every method, so that an unknown one without the token is 401 as well
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        self.close_connection = True
        agent = self.server.agent
        try:
            if self.path == "/health" and self.command in ("GET", "HEAD"):
                self._send(200, agent.health())
                return
            self._check_token()
            self.server.trusted(self.connection)
            self._routed(agent)
        except RefusedError as error:
            self._send(error.status, {"error": str(error)})
        except RecursionError:
            self._send(400, {"error": "the JSON is nested too deeply"})

    def _check_token(self) -> None:
        if not self.server.agent.allows(self.headers.get("Authorization")):
            raise RefusedError(401, "the token is missing or wrong (Authorization: Bearer TOKEN)")

    def handle_expect_100(self) -> bool:
        """A body is not invited without the token."""
        if not self.server.agent.allows(self.headers.get("Authorization")):
            self._answer()
            return False
        return super().handle_expect_100()

    def _routed(self, agent: Agent) -> None:
        verb, parts = self.command, self.path.split("/")[1:]
        if verb == "GET" and self.path == "/info":
            commands = {"command:" + name: command for name, (command, _) in agent.commands.items()}
            limits = {"max_seconds": agent.most_seconds, "max_file_bytes": agent.store.most_file}
            self._send(200, {**device_facts(), "state": device_state(), "commands": commands, **limits})
        elif parts[0] == "models" and len(parts) == 2 and verb in ("GET", "HEAD"):
            there = agent.store.has(parts[1])
            self._send(200 if there else 404, {"there": there, "max_file_bytes": agent.store.most_file})
        elif parts[0] == "models" and len(parts) == 2 and verb == "PUT":
            size = self._length(agent.store.most_file)
            agent.store.path(parts[1])
            self.server.deadline(self.connection, 30 + size / UPLOAD_BYTES_S)
            agent.store.put(parts[1], size, self.rfile.read1)
            self._send(201, {"there": True})
        elif self.path == "/measure" and verb == "POST":
            self._stream(agent)
        elif parts[0] == "measure" and len(parts) == 3 and parts[2] == "enough" and verb == "POST":
            agent.find(parts[1]).say(b"enough")  # it ends after its round
            self._send(200, {"ended": True})
        else:
            raise RefusedError(404, f"there is nothing at this path for {_line(verb, 20)}")

    def _length(self, most: int) -> int:
        """Of the body: it must be said, once, in digits."""
        said = self.headers.get_all("Content-Length") or []
        if self.headers.get("Transfer-Encoding") is not None or len(said) != 1:
            raise RefusedError(411, "a body needs one Content-Length and no Transfer-Encoding")
        if not re.fullmatch(r"[0-9]{1,15}", said[0]):
            raise RefusedError(400, "the Content-Length is not a number")
        if int(said[0]) > most:
            raise RefusedError(413, f"a body here may have {most} bytes, but this one has {said[0]}")
        return int(said[0])

    def _stream(self, agent: Agent) -> None:
        body = self.rfile.read(self._length(MOST_BODY))
        try:
            content = json.loads(body.decode("utf-8"))
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {_line(error, 100)}") from None
        job = checked_request(content, agent)
        self.server.deadline(self.connection, None)
        begun: List[bool] = []

        def tell(event: Optional[str], **fields: Any) -> None:
            try:
                if event is not None:
                    if not begun:
                        begun.append(True)
                        self._head(200, "application/x-ndjson", None)
                    self.wfile.write(json.dumps({"event": event, **fields}).encode() + b"\n")
                closed = bool(select.select([self.connection], [], [], 0)[0])
                closed = closed and not self.connection.recv(1, socket.MSG_PEEK)
            except OSError as error:
                raise ClientGoneError from error
            if closed:
                raise ClientGoneError

        try:
            agent.answer(job, self.client_address[0], tell)
        except ClientGoneError:
            return
        except RefusedError as error:
            if not begun:
                raise
            with contextlib.suppress(ClientGoneError):
                tell("error", status=error.status, error=str(error))

    def _head(self, status: int, kind: str, length: Optional[int]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, status: int, content: Dict[str, Any]) -> None:
        data = json.dumps(content).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._head(status, "application/json", len(data))
            if self.command != "HEAD":
                self.wfile.write(data)

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """Of a request that is no HTTP: as JSON too, without a word of what was sent."""
        self.close_connection = True
        if not hasattr(self, "command"):
            self.command = ""
        self.request_version = "HTTP/1.1"
        self._send(code, {"error": self.responses.get(code, ("bad request",))[0]})

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Nothing: the log has a line for each measurement."""


class Server(ThreadingHTTPServer):
    """Holds a bounded number of connections; one that keeps a thread waiting is closed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: Tuple[str, int], agent: Agent) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.agent = agent
        self._lock = threading.RLock()
        self._open: Dict[Any, List[Any]] = {}  # socket -> [deadline or None, whether it showed the token]
        threading.Thread(target=self._close_overdue, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """With all connections taken, the oldest that has not shown the token makes room for the new one."""
        with self._lock:
            if len(self._open) >= MOST_CONNECTIONS:
                strangers = [each for each, (_, trusted) in self._open.items() if not trusted]
                if not strangers:
                    self.shutdown_request(request)
                    return
                _shut(strangers[0])
                del self._open[strangers[0]]
            self._open[request] = [time.monotonic() + HEAD_SECONDS, False]
        super().process_request(request, client_address)

    def trusted(self, connection: Any) -> None:
        """The connection has shown the token."""
        with self._lock:
            if connection in self._open:
                self._open[connection][1] = True

    def deadline(self, connection: Any, seconds: Optional[float]) -> None:
        """The connection is closed after so many seconds from now; None: never."""
        with self._lock:
            if connection in self._open:
                self._open[connection][0] = None if seconds is None else time.monotonic() + seconds

    def shutdown_request(self, request: Any) -> None:
        """The connection's end, whatever ended it."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's fault; anything else is a line of the log."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log(f"error: {type(error).__name__}: {_line(error)}")

    def _close_overdue(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            with self._lock:
                for connection, (deadline, _) in self._open.items():
                    if deadline is not None and now > deadline:
                        _shut(connection)


def _shut(connection: Any) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def log(line: str) -> None:
    """One line on stderr, with the time."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the start


def parser() -> argparse.ArgumentParser:
    """The options."""
    name = "paretoprune agent" if "paretoprune" in sys.modules else "agent.py"
    found = argparse.ArgumentParser(prog=name, description="Time networks on this device for paretoprune.")
    found.add_argument("--token-file", required=True, help="file that holds the token which clients must send")
    found.add_argument("--port", type=int, default=8765, help="port to listen at (0: a free one; default 8765)")
    found.add_argument("--host", default="127.0.0.1", help="address to listen at; 127.0.0.1 is reached by ssh -L")
    found.add_argument("--store", default="~/.cache/paretoprune-agent", help="folder for the files that clients send")
    found.add_argument("--max-file-mb", type=int, default=512, help="largest file")
    found.add_argument("--quota-mb", type=int, default=4096, help="all files together; the longest unused go first")
    found.add_argument("--max-seconds", type=float, default=600.0, help="longest measurement")
    found.add_argument(
        "--prepare-seconds", type=float, default=1800.0, help="longest making ready (building an engine)"
    )
    found.add_argument("--max-queue", type=int, default=32, help="measurements that may wait")
    found.add_argument(
        "--command", action="append", default=[], metavar="NAME=COMMAND", help="with {model} for the file"
    )
    found.add_argument("--pattern", action="append", default=[], help="of each --command: group 1 is milliseconds")
    found.add_argument("--lock-file", default="", help="held by the one agent of this device")
    return found


def read_token(path: str) -> bytes:
    """The token of a file, without space around it; RefusedError where there is none."""
    try:
        token = Path(path).read_bytes().strip()
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise RefusedError(1, f"the token file {path} cannot be read ({error.strerror}); write one") from error
    if not token or len(token) > 1024 or b"\n" in token:
        raise RefusedError(1, f"the token file {path} must hold one line; write one with `openssl rand -hex 32`")
    if mode & 0o077:
        log(f"warning: others of this device can read {path}; chmod 600 it")
    if len(token) < 16:
        log(f"warning: a token of {len(token)} characters can be guessed; `openssl rand -hex 32` makes one")
    return token


def read_commands(commands: Sequence[str], patterns: Sequence[str]) -> Dict[str, Tuple[str, str]]:
    """Name -> (template, pattern). RefusedError where one is not usable."""
    if len(patterns) not in (0, 1, len(commands)):
        raise RefusedError(1, "give one --pattern for all --command, or one for each")
    found = {}
    for index, each in enumerate(commands):
        name, _, template = each.partition("=")
        if not _NAME.fullmatch(name) or "{model}" not in template:
            raise RefusedError(1, f"--command must be NAME='program ... {{model}} ...', but got {each}")
        pattern = patterns[index % len(patterns)] if patterns else r"([0-9]+(?:\.[0-9]+)?) *ms"
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise RefusedError(1, f"--pattern {pattern} is no regular expression: {error}") from error
        if groups < 1:
            raise RefusedError(1, f"--pattern {pattern} needs a group ( ) around the milliseconds")
        program = shlex.split(template)[0]
        if shutil.which(program) is None:
            raise RefusedError(1, f"--command {name}: there is no program {program}")
        found[name] = (template, pattern)
    return found


def take_lock(path: str) -> Any:
    """The lock of the device's one agent, held until the process ends, however it ends."""
    place = path or str(Path(tempfile.gettempdir()) / "paretoprune-agent.lock")
    try:
        try:
            handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            handle = os.open(place, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(1, f"another agent runs on this device (it holds {place}); stop it first") from None
    except OSError as error:
        raise RefusedError(1, f"the lock {place} cannot be taken ({error}); give another --lock-file") from error
    return handle


def main(
    arguments: Optional[Sequence[str]] = None, exclusive: Callable[[], ContextManager[Any]] = contextlib.nullcontext
) -> int:
    """Serve until interrupted. `exclusive`: held while a measurement has the device for itself."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["--worker"]:
        work()
        return 0
    options = parser().parse_args(arguments)
    try:
        token = read_token(options.token_file)
        options.commands = read_commands(options.command, options.pattern)
        options.store = str(Path(options.store).expanduser().resolve())
        lock = take_lock(options.lock_file)
        server = Server((options.host, options.port), Agent(options, token, exclusive))
    except (RefusedError, OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    host, port = options.host, server.server_address[1]
    if not host.startswith("127.") and host != "::1":
        log("warning: the token goes over the network unencrypted; 127.0.0.1 with ssh -L does not send it openly")
    log(f"{NAME} {VERSION}: listening at http://{host}:{port}, files in {options.store}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        log("stopped")
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
