"""Files between workers and a run folder that only the driver's machine sees, through Ray's object store.

A worker then works in a scratch folder of its node: what it needs is fetched before, what it makes is delivered as it
goes, so that another start, on any node, goes on after the last epoch. The files that say that something is done come
last, so that none of them stands without the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import is_temporary, write_bytes
from paretoprune.base.file_names import METRICS, MODEL_FOLDER, RECORD, SAMPLE, SESSION, TUNED
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.stopping.early_stopper import judge_of
from paretoprune.search.stopping.rule import StoppingRule
from paretoprune.search.stopping.rungs import RungReport
from paretoprune.search.storage.importance_cache import SCORES_NAME

if TYPE_CHECKING:
    from paretoprune.search.worker.context import WorkerContext

SCRATCH_PREFIX = "paretoprune-work-"
LOOK_SECONDS = 2.0
LAST = (RECORD, TUNED, METRICS, SESSION)
"""What says that something is done."""


class FileTransferActor:
    """The actor on the driver's machine; ``root`` is the run folder there."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def fetch(self, places: Sequence[str]) -> dict[str, bytes]:
        """Relative path -> content, of files and of everything below folders; what is not there is left out."""
        return {path.relative_to(self._root).as_posix(): path.read_bytes() for path in _files(self._root, places)}

    def deliver(self, files: dict[str, bytes], gone: Sequence[str] = ()) -> None:
        """Write files below the root, each whole or not at all, what says that something is done last; then remove."""
        for name in sorted(files, key=lambda name: (PurePosixPath(name).name in LAST, name)):
            target = self._root / _inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, files[name])
        for name in gone:
            (self._root / _inside(name)).unlink(missing_ok=True)

    def stops(self, report: RungReport, rule: StoppingRule) -> bool:
        """The decision about a trial at a rung, from what the run folder holds (`search.stopping.early_stopper`)."""
        return judge_of(RunFolder(self._root), rule).stops(report)


def start_courier(root: Path) -> Any:
    """The actor's handle; the actor lives on this node and ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    return remote(num_cpus=0, max_concurrency=4, scheduling_strategy=here)(FileTransferActor).remote(str(root))


@contextmanager
def carried(context: WorkerContext, needs: Sequence[str], gives: Sequence[str]) -> Iterator[WorkerContext]:
    """In a worker: the context to work with. ``needs`` and ``gives``: paths below the run folder.

    Without a courier the run folder is the same everywhere, and nothing is done. What was made is delivered also where
    the work failed: the log says why.
    """
    if context.courier is None:
        yield context
        return
    import ray

    scratch = scratch_folder(context.run)
    # These never change: once per process. Records do.
    lasting = (MODEL_FOLDER, SCORES_NAME, SAMPLE)
    missing = [name for name in needs if name not in lasting or not (scratch / name).exists()]
    fetched: dict[str, bytes] = ray.get(context.courier.fetch.remote([*missing, *gives]))
    FileTransferActor(str(scratch)).deliver(fetched)
    parcels = _Parcels(context.courier, scratch, gives)
    try:
        yield context.at(scratch)
    finally:
        parcels.close()
        for path in _files(scratch, gives):
            path.unlink(missing_ok=True)


class _Parcels:
    """In a worker: sends to the driver what changes below ``gives`` during the work, and the rest when it is closed."""

    def __init__(self, courier: Any, scratch: Path, gives: Sequence[str]) -> None:
        self._courier, self._scratch, self._gives = courier, scratch, gives
        self._sent = self._seen()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="courier")
        self._thread.start()

    def close(self) -> None:
        """Deliver what is left. Raises what Ray raises where the driver's machine cannot be reached."""
        self._closed.set()
        self._thread.join()
        self._send(self._seen())

    def _run(self) -> None:
        import ray

        while not self._closed.wait(LOOK_SECONDS):
            seen = {name: state for name, state in self._seen().items() if PurePosixPath(name).name not in LAST}
            try:
                self._send(seen)
            except (OSError, ray.exceptions.RayError):  # a full disk may get room, and a lost driver ends this worker
                continue

    def _send(self, now: dict[str, tuple[int, int]]) -> None:
        import ray

        # The state was taken before the content is read: what changes in between is sent once more.
        changed = [name for name, state in now.items() if self._sent.get(name) != state]
        made = FileTransferActor(str(self._scratch)).fetch(changed)
        gone = [name for name in self._sent if name not in now and PurePosixPath(name).name not in LAST]
        gone += [
            name for name in self._sent if PurePosixPath(name).name in LAST and not (self._scratch / name).exists()
        ]
        if made or gone:
            ray.get(self._courier.deliver.remote(made, gone))
        self._sent = {name: state for name, state in self._sent.items() if name not in gone} | {
            name: now[name] for name in made
        }

    def _seen(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in _files(self._scratch, self._gives):
            try:
                status = path.stat()
            except FileNotFoundError:  # replaced or removed a moment ago
                continue
            found[path.relative_to(self._scratch).as_posix()] = (status.st_mtime_ns, status.st_size)
        return found


def _files(root: Path, places: Sequence[str]) -> Iterator[Path]:
    """The files at and below `places`, without those that are being written."""
    for place in places:
        path = root / _inside(place)
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and not file.is_symlink() and not is_temporary(file):
                yield file


def scratch_folder(run: str) -> Path:
    """This process's own place for a run's files; the same one for all its trials, and gone with this process."""
    from paretoprune.cluster.scratch import process_folder

    if run not in _SCRATCH:
        _SCRATCH[run] = process_folder(SCRATCH_PREFIX)
    return _SCRATCH[run]


_SCRATCH: dict[str, Path] = {}


def _inside(name: str) -> PurePosixPath:
    """A relative path that stays below its root; anything else is a fault of the program."""
    path = PurePosixPath(name)
    assert not path.is_absolute(), name
    assert ".." not in path.parts, name
    return path
