"""Files between workers and a run folder that only the driver's machine sees, through Ray's object store.

A worker then works in a scratch folder of its node: what it needs is fetched before, what it made is delivered after,
`record.json` last, so that a record never stands without its files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from results.atomic import write_bytes
from results.run_folder import RunFolder
from search.joined import MODEL_FOLDER
from search.judge import judge_of
from search.kept_scores import SCORES_NAME
from search.request import RECORD_NAME
from search.rungs import RungReport
from search.stopping import StoppingRule

if TYPE_CHECKING:
    from search.worker import WorkerContext


class Courier:
    """The actor on the driver's machine; ``root`` is the run folder there."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def fetch(self, places: Sequence[str]) -> dict[str, bytes]:
        """Relative path -> content, of files and of everything below folders; what is not there is left out."""
        found = {}
        for place in places:
            path = self._root / _inside(place)
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file() and not file.is_symlink():
                    found[file.relative_to(self._root).as_posix()] = file.read_bytes()
        return found

    def deliver(self, files: dict[str, bytes]) -> None:
        """Write files below the root, each whole or not at all, records last."""
        for name in sorted(files, key=lambda name: (PurePosixPath(name).name == RECORD_NAME, name)):
            target = self._root / _inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, files[name])

    def stops(self, report: RungReport, rule: StoppingRule) -> bool:
        """The decision about a trial at a rung, from what the run folder holds (see :mod:`search.judge`)."""
        return judge_of(RunFolder(self._root), rule).stops(report)


def start_courier(root: Path) -> Any:
    """The actor's handle; the actor lives on this node and ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    return remote(num_cpus=0, max_concurrency=4, scheduling_strategy=here)(Courier).remote(str(root))


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
    missing = [name for name in needs if name not in (MODEL_FOLDER, SCORES_NAME) or not (scratch / name).exists()]
    for name, content in ray.get(context.courier.fetch.remote([*missing, *gives])).items():
        target = scratch / _inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, content)
    try:
        yield context.at(scratch)
    finally:
        made = Courier(str(scratch)).fetch(gives)
        ray.get(context.courier.deliver.remote(made))
        for name in made:
            (scratch / name).unlink(missing_ok=True)


def scratch_folder(run: str) -> Path:
    """This process's own place for a run's files; the same one for all its trials."""
    if run not in _SCRATCH:
        _SCRATCH[run] = tempfile.TemporaryDirectory(prefix="paretoprune-work-")
    return Path(_SCRATCH[run].name)


_SCRATCH: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _inside(name: str) -> PurePosixPath:
    """A relative path that stays below its root; anything else is a fault of the program."""
    path = PurePosixPath(name)
    assert not path.is_absolute(), name
    assert ".." not in path.parts, name
    return path
