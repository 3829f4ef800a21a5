"""Is this machine fit for a run? A check is data: what was looked at, whether it is well, what to do if it is not.

Nothing here prints. The checks are made one by one as the iterator is asked, because some take seconds.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from paretoprune.cluster import ray_connection
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.environment import query_gpus, usable_cpus
from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.lock_directory import REMEDY, lock_place
from paretoprune.cluster.nodes import Probe, ask_nodes, count_entries, faults, token_in
from paretoprune.cluster.packages import PACKAGE, import_root, package_directory

DISTRIBUTION = "paretoprune"
MIN_PYTHON = (3, 10)
MIN_DISK_GB = 5.0
MIN_TEMPORARY_GB = 2.0
MIN_MEMORY_GB = 2.0
MIN_SHARED_MEMORY_GB = 0.25

# In a process of its own: loading torch takes seconds, and a broken pair can take its process down.
_TORCH_PROBE = """
import json, torch, torchvision
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
seen = {"torch": torch.__version__, "torchvision": torchvision.__version__, "gpus": torch.cuda.device_count()}
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` says what to do and is empty where all is well; with `ok`, what would be better."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine(run_directory: Path | None = None, address: str | None = None, data: Sequence[str] = ()) -> Iterator[Check]:
    """All checks of this host, the quick ones first. Starts (and ends) a local Ray, or joins the one at `address`.

    `data`: the dataset's paths, which must be readable here; and on every node of a joined cluster, which gets a check
    of its own. A `run_directory` must then be the same folder everywhere.
    """
    yield check_python()
    yield check_own_package()
    yield check_packages()
    yield check_memory()
    yield check_disk("disk", run_directory or Path.cwd(), MIN_DISK_GB)
    yield check_disk("temporary disk", Path(tempfile.gettempdir()), MIN_TEMPORARY_GB)
    yield check_shared_memory()
    yield check_lock()
    yield from check_torch()
    if data:
        yield check_data(data)
    yield from check_ray(address, run_directory, data)


def check_data(paths: Sequence[str]) -> Check:
    """The dataset's files and folders can be read here."""
    missing = [path for path in paths if not count_entries(path)]
    if missing:
        return Check("dataset", False, f"{missing[0]} is not there or cannot be read", "correct the paths in data.yaml")
    return Check("dataset", True, f"{len(paths)} paths below {Path(paths[0]).parent}")


def check_python() -> Check:
    """Version of the interpreter."""
    wanted = ".".join(map(str, MIN_PYTHON))
    ok = sys.version_info >= MIN_PYTHON
    return Check("python", ok, platform.python_version(), "" if ok else f"use Python {wanted} or newer")


def check_own_package() -> Check:
    """Something else on the path may answer to the package's name: workers would import that."""
    home = import_root().resolve()
    found = package_directory()
    if found is not None and found.parent == home:
        return Check("package", True, f"{PACKAGE} from {home}")
    spec = importlib.util.find_spec(PACKAGE)
    where = (spec.origin if spec else None) or "missing"
    remedy = f"take the other {PACKAGE} off the path, or call the command from another directory"
    return Check("package", False, f"not this project's: {PACKAGE}: {where}", remedy)


def check_packages(distribution: str = DISTRIBUTION) -> Check:
    """Every required distribution is there in a version that the project's metadata allows."""
    remedy = "pip install --upgrade paretoprune, or make setup in a checkout"
    try:
        required = [Requirement(line) for line in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return Check("versions", False, f"{distribution} is not installed", remedy)
    here = [need for need in required if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = list(filter(None, map(_shortfall, here)))
    if wrong:
        return Check("versions", False, "; ".join(wrong), remedy)
    return Check("versions", True, f"{len(here)} packages as required")


def _shortfall(need: Requirement) -> str:
    try:
        have = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return f"{need.name} is missing"
    # A pre-release somebody installed on purpose counts by its number.
    return "" if need.specifier.contains(have, prereleases=True) else f"{need.name} {have} is not {need.specifier}"


def check_memory() -> Check:
    """Memory that can be had now; a trial takes one to two GB."""
    free = psutil.virtual_memory().available / 2**30
    detail = f"{free:.1f} GB free, {usable_cpus()} CPUs"
    return _enough("memory", free, MIN_MEMORY_GB, detail, "end other programs, or run fewer trials at a time")


def check_disk(name: str, folder: Path, minimum_gb: float) -> Check:
    """Free space where `folder` is or would be made."""
    there = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    return _enough(name, free, minimum_gb, f"{free:.1f} GB free at {there}", "free some space, or use another disk")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Data-loading workers and Ray pass batches through shared memory; containers get 64 MB by default."""
    if not folder.is_dir():
        return Check("shared memory", True, "none on this system")
    size = shutil.disk_usage(folder).free / 2**30
    remedy = "start the container with --shm-size=2g, or set the number of data-loading workers to 0"
    return _enough("shared memory", size, MIN_SHARED_MEMORY_GB, f"{size:.2f} GB free", remedy)


def check_lock() -> Check:
    """The lock that keeps other work off a device while its latency is measured."""
    try:
        with DeviceLock("doctor").measuring():
            pass
    except (ClusterError, OSError) as error:
        return Check("device lock", False, str(error), REMEDY)
    place = lock_place()
    return Check("device lock", True, place.caveat or str(place.base), REMEDY if place.caveat else "")


def check_torch(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[Check]:
    """torch and torchvision fit each other, and torch sees the GPUs that the driver sees."""
    try:
        done = run([sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=180, check=True)
        seen = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = said[-1] if said else "no answer"
        return [Check("torch", False, why, "reinstall torch and torchvision together, from the same index")]
    versions = Check("torch", True, f"torch {seen['torch']}, torchvision {seen['torchvision']}")
    names = [gpu["name"] for gpu in query_gpus()]
    if names and not seen["gpus"]:
        remedy = "install a torch built for this driver's CUDA version, or check CUDA_VISIBLE_DEVICES"
        return [versions, Check("gpu", False, f"the driver has {', '.join(names)}, torch sees none", remedy)]
    detail = f"{seen['gpus']} of {', '.join(names)}" if names else "none: trials run on the CPU"
    return [versions, Check("gpu", True, detail)]


def check_ray(
    address: str | None = None, run_directory: Path | None = None, data: Sequence[str] = ()
) -> Iterator[Check]:
    """Ray starts here, or answers at `address` with every node fit. A connection that was there before stays."""
    import ray

    connected = ray.is_initialized()
    try:
        info = ray_connection.connect(address)
        detail = f"ray {ray.__version__}, {info.address}: {len(info.nodes)} nodes, {info.cpus} CPUs, {info.gpus} GPUs"
        yield Check("ray", True, detail)
        if info.address != ray_connection.LOCAL:
            yield from check_nodes(data, run_directory)
    except ClusterError as error:
        condition, _, remedy = str(error).rpartition("; ")
        yield Check("ray", False, condition, remedy)
    finally:
        if not connected:
            ray_connection.shutdown()


def check_nodes(data: Sequence[str], run_directory: Path | None = None) -> Iterator[Check]:
    """One check per node of the connected cluster: code, versions, dataset, run folder, device lock, space."""
    with token_in(run_directory) as token:
        run = str(run_directory) if run_directory else None
        question = Probe({path: count_entries(path) for path in data}, run, token)
        answers = ask_nodes(question)
    for node, answer in answers.items():
        wrong = faults(answer, question)
        if isinstance(answer, str) or wrong:
            condition = "; ".join(condition for condition, _ in wrong)
            yield Check(f"node {node}", False, condition, "; ".join(dict.fromkeys(remedy for _, remedy in wrong)))
            continue
        free = f"{answer.disk_gb:.1f} GB disk and {answer.memory_gb:.1f} GB memory free"
        detail = f"this project's code, python {answer.python}, {answer.gpus} GPUs, {free}"
        enough = _enough(f"node {node}", answer.memory_gb, MIN_MEMORY_GB, detail, "end other programs there")
        if enough.ok:
            remedy = "free some space below its temporary directory"
            enough = _enough(f"node {node}", answer.disk_gb, MIN_TEMPORARY_GB, detail, remedy)
        yield enough


def _enough(name: str, have_gb: float, minimum_gb: float, detail: str, remedy: str) -> Check:
    if have_gb >= minimum_gb:
        return Check(name, True, detail)
    return Check(name, False, f"{detail}, at least {minimum_gb:g} GB are needed", remedy)
