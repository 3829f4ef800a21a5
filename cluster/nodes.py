"""Is every node of a joined cluster ready for trials? Each node looks at itself, the driver compares.

What a node needs: the dataset at the same path, the run folder as the same folder, this project's code and not
somebody else's package of the same name, the driver's versions of the libraries, a usable device lock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.environment import installed_versions
from paretoprune.cluster.errors import ClusterError, NodeError
from paretoprune.cluster.packages import source_digests

# Equal everywhere: a checkpoint and Ray's messages are exchanged between them.
SHARED_VERSIONS = ("torch", "ultralytics", "ray")
ANSWER_SECONDS = 180.0
_MOST_ENTRIES = 100_000


@dataclass(frozen=True)
class Probe:
    """What a node is to look at. `data`: path -> number of entries that the driver sees there (1 for a file).

    `run`: the folder that must be shared, with a `token` file in it; None where nothing is shared.
    """

    data: dict[str, int] = field(default_factory=dict)
    run: str | None = None
    token: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What a node saw: see `look`."""

    node: str
    python: str
    versions: dict[str, str]
    code: dict[str, str]
    data: dict[str, int]
    run: str
    lock: str
    disk_gb: float
    memory_gb: float
    gpus: int


def count_entries(path: str) -> int:
    """Entries of a folder, 1 for a readable file, 0 where there is nothing that can be read."""
    try:
        if Path(path).is_dir():
            with os.scandir(path) as entries:
                return sum(1 for _ in zip(range(_MOST_ENTRIES), entries, strict=False))
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError:
        return 0
    return 1


def look(question: Probe, node: str, gpus: int = 0) -> NodeReport:
    """On a node: look at everything. `run` and `lock` are empty where they are well, else say why not."""
    import platform

    return NodeReport(
        node=node,
        python=".".join(platform.python_version_tuple()[:2]),
        versions=installed_versions(SHARED_VERSIONS),
        code=source_digests(),
        data={path: count_entries(path) for path in question.data},
        run=_look_at_run(question),
        lock=_look_at_lock(),
        disk_gb=shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        memory_gb=psutil.virtual_memory().available / 2**30,
        gpus=gpus,
    )


def _look_at_run(question: Probe) -> str:
    if question.run is None:
        return ""
    folder = Path(question.run)
    try:
        seen = (folder / question.token).read_text(encoding="utf-8")
    except OSError:
        return "is another folder there or none"
    if seen != question.token:
        return "is another folder there"
    try:
        (folder / f"{question.token}.{os.getpid()}-{uuid.uuid4().hex[:8]}").write_text(question.token, encoding="utf-8")
    except OSError as error:
        return f"cannot be written there ({error.strerror})"
    return ""


def _look_at_lock() -> str:
    try:
        with DeviceLock("doctor").measuring():
            return ""
    except (ClusterError, OSError) as error:
        return str(error)


def ask_nodes(question: Probe, wanted: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, NodeReport | str]:
    """Every living node's answer by its name, or one line where it gave none; `wanted` picks by `ray.nodes()` entry."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[str, Any] = {}
    for entry in ray.nodes():
        if not entry["Alive"] or (wanted is not None and not wanted(entry)):
            continue
        name = _unique(str(entry["NodeManagerHostname"] or entry["NodeManagerAddress"]), entry["NodeID"], asked)
        place = NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0)(look).options(scheduling_strategy=place)
        asked[name] = task.remote(question, name, int(entry["Resources"].get("GPU", 0)))
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    return {name: _answer(reference, reference in ready) for name, reference in asked.items()}


def _answer(reference: Any, ready: bool) -> NodeReport | str:
    import ray

    if not ready:
        return f"gave no answer within {ANSWER_SECONDS:g} s"
    try:
        answer: NodeReport = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"cannot run this project's code ({lines[-1][:200] if lines else type(error).__name__})"
    return answer


def _unique(name: str, node_id: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else f"{name}/{node_id[:6]}"


def faults(answer: NodeReport | str, question: Probe) -> list[tuple[str, str]]:
    """What is wrong with a node, as pairs of condition and remedy; the worst first, [] where all is well."""
    if isinstance(answer, str):
        return [(answer, "install the project's requirements there, and look at the node's Ray logs")]
    return [*_code_faults(answer), *_folder_faults(answer, question)]


def _code_faults(answer: NodeReport) -> Iterator[tuple[str, str]]:
    here = source_digests()
    strange = [part for part, digest in here.items() if answer.code.get(part) != digest]
    if strange:
        yield (
            f"it has other code of paretoprune: {', '.join(strange)}",
            "take paretoprune out of its environment and PYTHONPATH: it is sent along",
        )
    versions = installed_versions(SHARED_VERSIONS)
    different = [f"{name} {answer.versions.get(name, 'missing')}, here {versions.get(name, 'missing')}"
                 for name in SHARED_VERSIONS if answer.versions.get(name) != versions.get(name)]  # fmt: skip
    if different:
        yield f"it has {'; '.join(different)}", "install the same versions on every node"


def _folder_faults(answer: NodeReport, question: Probe) -> Iterator[tuple[str, str]]:
    for path, count in question.data.items():
        found = answer.data.get(path, 0)
        if not found:
            yield f"the dataset's {path} is not there or cannot be read", "mount or copy it to the same path"
        elif found != count:
            yield f"the dataset's {path} holds {found} entries, here {count}", "bring both to the same state"
    if answer.run:
        yield (
            f"the run folder {question.run} {answer.run}",
            "put it on a file system that all nodes mount at the same path, or give an object store's URI",
        )
    if answer.lock:
        yield answer.lock, "set PARETOPRUNE_LOCK_DIR on that node to a local directory that all its users can write"


@contextmanager
def token_in(run: Path | None) -> Iterator[str]:
    """A token file in the run folder, for nodes to find; gone afterwards with what they wrote beside it."""
    if run is None:
        yield ""
        return
    token = f".paretoprune-{uuid.uuid4().hex}"
    run.mkdir(parents=True, exist_ok=True)
    (run / token).write_text(token, encoding="utf-8")
    try:
        yield token
    finally:
        for path in run.glob(f"{token}*"):
            with suppress(OSError):
                path.unlink()


def check_nodes(data: Sequence[str], run: Path | None, wanted: Callable[[dict[str, Any]], bool] | None = None) -> int:
    """Ask every node that trials may run on; NodeError, one line, names the first one that is not ready and the remedy.

    data: paths that must be readable everywhere, with as many entries as here. run: the shared run folder, if any.
    Returns how many nodes were asked.
    """
    with token_in(run) as token:
        question = Probe({path: count_entries(path) for path in data}, str(run) if run else None, token)
        answers = ask_nodes(question, wanted)
    wrong = {node: found for node, answer in answers.items() if (found := faults(answer, question))}
    if wrong:
        node, found = next(iter(wrong.items()))
        condition, remedy = found[0]
        more = sum(map(len, wrong.values())) - 1
        also = f" ({more} more: see `paretoprune doctor --address ...`)" if more else ""
        raise NodeError(f"every node must be ready for trials, but on {node} {condition}; {remedy}{also}", node)
    return len(answers)
