"""What a measurement or a run stood on, and how many threads a worker may use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = (
    "paretoprune", "torch", "torchvision", "ultralytics", "torch-pruning", "ray", "optuna", "numpy", "pandas",
    "scikit-learn", "onnxruntime", "openvino", "tensorrt",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_GPU_QUERY = ("name", "uuid", "memory.total", "driver_version")


def describe_environment() -> dict[str, str | int | float]:
    """Versions and hardware of this process's host, flat and ready for JSON. No path, no user, no variable.

    Keys: python, platform, cpu_model, cpu_cores (physical), cpu_threads (logical), cpu_usable (of this process),
    memory_gb, gpu_count, per GPU gpu<i>_name and gpu<i>_memory_mb (nvidia-smi's order), gpu_driver, and one per
    installed package. What is absent has no key.
    """
    facts: dict[str, str | int | float] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_model": _cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False) or 0,
        "cpu_threads": psutil.cpu_count() or 0,
        "cpu_usable": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
    }
    gpus = query_gpus()
    facts["gpu_count"] = len(gpus)
    for i, gpu in enumerate(gpus):
        facts[f"gpu{i}_name"] = gpu["name"]
        if gpu["memory.total"].isdigit():
            facts[f"gpu{i}_memory_mb"] = int(gpu["memory.total"])
        facts["gpu_driver"] = gpu["driver_version"]
    return facts | installed_versions()


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions by distribution name, of those that are installed; nothing is imported."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def usable_cpus() -> int:
    """Logical CPUs that this process may keep busy (>= 1): a job or a container often has fewer than the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file outside a container; "max" is no number
        return allowed


def query_gpus() -> list[dict[str, str]]:
    """One dictionary per NVIDIA GPU of the host (keys: name, uuid, memory.total in MiB, driver_version); [] without."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(_GPU_QUERY, row, strict=True)) for row in rows if len(row) == len(_GPU_QUERY)]


def pin_threads(count: int) -> None:
    """Give this process and its children `count` threads for numerical work (count >= 1).

    The variables count for libraries loaded from now on. Torch, where it is loaded already, is told directly: it read
    them when it was imported.
    """
    assert count >= 1, count
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware", "cpu model"):
            return value.strip()
    return platform.machine()
