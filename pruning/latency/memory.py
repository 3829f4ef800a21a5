"""Peak memory of a process of its own that loads one network and runs it: `python -m` this module, told on stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretoprune.base.errors import one_line
from paretoprune.base.image_size import plain_size, read_size
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.images import ImageStream
from paretoprune.pruning.latency.runtimes import ExportCache, SessionSpec, open_session
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.latency.runtimes.predict_session import PredictSession
from paretoprune.pruning.yolo.loading import load_model

_INFERENCES = 10
_IMAGES = "images.npz"


@dataclass(frozen=True)
class PeakMemory:
    """In megabytes. `process_mb`: the largest resident memory, Python and its libraries included; None where the kernel
    does not tell it. `device_mb`: the most that was taken of a GPU beside CUDA's own context; None on a CPU."""

    process_mb: float | None
    device_mb: float | None


def peak_memory(
    network: Path, spec: SessionSpec, runtime: str = "torch", precision: str = "fp32", trust: bool = False
) -> PeakMemory:
    """Of a checkpoint in `runtime`, or an exported file or folder in Ultralytics' backend, which computes in
    `precision`; by Ultralytics' predict where `spec` has a stream, whose images are then in it, too.

    A figure of this process would hold everything that it did before. The caller keeps the device free of others.
    Raises PruningError where the network cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="paretoprune-memory-") as folder:
        job: dict[str, Any] = {**asdict(replace(spec, stream=None)), "imgsz": plain_size(spec.imgsz)}
        if spec.stream is not None:
            images = Path(folder) / _IMAGES
            np.savez(images, *spec.stream.images)
            job["stream"] = [spec.stream.kind, str(images)]
        job = {"network": str(network.absolute()), "runtime": runtime, "precision": precision, "trust": trust} | job
        root = str(Path(__file__).absolute().parents[3])  # what `import paretoprune` is found in
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job), capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    if done.returncode != 0:
        said = one_line(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}", 200)
        raise PruningError(f"the memory of '{network.name}' cannot be measured ({said}); leave it out (--memory)")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    job = json.loads(sys.stdin.read())
    network, runtime, precision, trust = (job.pop(name) for name in ("network", "runtime", "precision", "trust"))
    if job["stream"] is not None:
        kind, images = job["stream"]
        job["stream"] = ImageStream(kind, tuple(np.load(images).values()), "")
    spec = SessionSpec(**{**job, "imgsz": read_size(job["imgsz"])})
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    free = [_free_mb(spec.device)]
    session = _session(Path(network), spec, runtime, precision, trust)
    for _ in range(_INFERENCES):
        session.time_ms()
        if spec.stream is not None:
            spec.stream.advance(spec.batch)
        free.append(_free_mb(spec.device))
    device_mb = None if free[0] is None else free[0] - min(each for each in free if each is not None)
    print(json.dumps(asdict(PeakMemory(_peak_resident_mb(), device_mb))))


def _session(network: Path, spec: SessionSpec, runtime: str, precision: str, trust: bool) -> Any:
    given = load_model(network, trust) if network.suffix == ".pt" else network
    if spec.stream is not None:
        return PredictSession(given, spec, precision)
    if isinstance(given, Path):
        return Backend(given, spec.imgsz, spec.device, precision=precision, batch=spec.batch)
    return open_session(given, spec, runtime, ExportCache())


def _free_mb(device: str) -> float | None:
    place = torch_device(device)
    return torch.cuda.mem_get_info(place)[0] / 1e6 if place.type == "cuda" else None


def _peak_resident_mb() -> float | None:
    """By the kernel's count of this program alone: `ru_maxrss` begins with that of the process it was started from."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    _main()
