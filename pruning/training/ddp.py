"""One fine-tuning on several devices: a process for each, all in one process group, each with the pruned network.

Ultralytics starts its own processes, which rebuild the trainer and with it the unpruned network. Here every process is
given the network itself. The first one validates, keeps the best network and speaks to the caller; what an epoch's end
decides is told to all. Nobody outlives the others: one that fails, or a caller that is gone, ends them all.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import NonFiniteError, PruningError
from paretoprune.pruning.training.retries import OncePerEpoch, RetryPolicy
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.training.single_device import saved_remedies
from paretoprune.pruning.yolo.saving import plain_copy

JOB, RESULT, RENDEZVOUS, ERRORS = "job.pt", "result.pt", "meeting", "errors.rank"
ERRORS_SAID: dict[str, type[Exception]] = {
    "PruningError: ": PruningError, "NonFiniteError: ": NonFiniteError, "MemoryError: ": MemoryError,
}  # fmt: skip
"""What stands before the line in which a process says why it ended, and what the caller raises then."""
_PATIENCE_SECONDS = 10  # for a process to end by itself once another has failed: it may be the one that knows why


@dataclass(frozen=True)
class GroupJob:
    """What every process of the group is given, through a file."""

    model: nn.Module
    data: str
    settings: FinetuneSettings
    save_dir: Path
    device_type: str
    gates: tuple[Gate | None, ...]
    teacher: nn.Module | None
    start_metrics: dict[str, float]
    remedies: RetryPolicy
    classes: torch.Tensor | None = None


def split_devices(device: str) -> tuple[str, ...]:
    """`cuda:0,cuda:1`, `0,1` or `cpu,cpu` as one device per process.

    Raises:
        PruningError: a device is not there, named twice (a CPU may be), or of another kind than the others.
    """
    names = tuple(part.strip() for part in str(device).split(","))
    places = [torch_device(name) for name in names]
    if len({place.type for place in places}) > 1:
        raise PruningError(f"one fine-tuning uses devices of one kind, but got '{device}'; give several GPUs or one")
    if places[0].type == "cuda" and len({place.index or 0 for place in places}) < len(places):
        raise PruningError(f"one fine-tuning uses each GPU once, but got '{device}'; name different ones")
    return names


def finetune_on_group(
    model: nn.Module,
    data: str,
    settings: FinetuneSettings,
    save_dir: Path,
    device: str,
    gate: Gate | None = None,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[int, dict[str, float]], bool] | None = None,
    start_metrics: Mapping[str, float] | None = None,
    classes: torch.Tensor | None = None,
) -> FinetuneResult:
    """As `pruning.training.finetune.finetune`, by one process per device of `device`; `settings.batch` is divided among
    them.

    The first device's process enters the gate around its batches, and the others wait for it at every step. Batch
    statistics are each process's own, the saved ones the first's. What one process tries by itself (see
    `retries`), a new group of all tries.

    Raises:
        PruningError, NonFiniteError: as `finetune`; `batch` is no multiple of the devices; a process died (naming it).
        MemoryError: a device had no memory left for half the batch either.
    """
    begin = time.monotonic()
    names = split_devices(device)
    if settings.batch % len(names):
        raise PruningError(f"batch must be a multiple of the {len(names)} devices, but got {settings.batch}")
    gates = (gate, *(None for _ in names[1:]))
    job = GroupJob(
        plain_copy(model),
        str(data),
        settings,
        Path(save_dir),
        torch_device(names[0]).type,
        gates,
        plain_copy(teacher) if teacher is not None and settings.learns else None,
        dict(start_metrics or {}),
        saved_remedies(model, data, settings, Path(save_dir)),
        classes,
    )
    heard = OncePerEpoch(on_epoch)  # a further attempt tells of the earlier epochs again
    while True:
        try:
            result = _run(job, names, heard)
            # The first process counts earlier attempts, too, but not how long it took to start
            return replace(result, seconds=max(result.seconds, time.monotonic() - begin))
        except (NonFiniteError, MemoryError) as error:
            further = job.remedies.against(error)
            if further is None or settings.batch % (further.parts * len(names)):
                raise
            job = replace(job, remedies=further)


def _run(job: GroupJob, names: Sequence[str], on_epoch: Callable[[int, dict[str, float]], bool]) -> FinetuneResult:
    """One attempt: a process for each device, until all have ended."""
    with tempfile.TemporaryDirectory(prefix="paretoprune-group-") as folder:
        torch.save(job, Path(folder) / JOB)
        with _processes(Path(folder), names) as (processes, line):
            _attend(processes, line, on_epoch, Path(folder))
        result: FinetuneResult = torch.load(Path(folder) / RESULT, weights_only=False)
    return result


@contextlib.contextmanager
def _processes(folder: Path, devices: Sequence[str]) -> Iterator[tuple[list[subprocess.Popen[bytes]], Connection]]:
    """The group's processes, ended at the latest when the block is left, and the line to the first one."""
    ours, theirs = Pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, device in enumerate(devices):
            command = [
                sys.executable,
                "-m",
                "paretoprune.pruning.training.ddp_worker",
                str(folder),
                str(theirs.fileno()),
            ]
            environment = _environment(rank, device, len(devices))
            # They end when their standard input does: no process is left behind by a caller that was killed.
            # Errors go to a file: nobody reads a pipe before the end, and a full one would stop the process for ever
            with (folder / f"{ERRORS}{rank}").open("wb") as errors:
                pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": errors}
                processes.append(subprocess.Popen(command, env=environment, pass_fds=(theirs.fileno(),), **pipe))  # type: ignore[call-overload]
        theirs.close()
        yield processes, ours
    finally:
        theirs.close()
        ours.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _environment(rank: int, device: str, count: int) -> dict[str, str]:
    """A process sees its own GPU only: Ultralytics rewrites the visible ones from the device's number otherwise."""
    root = str(Path(__file__).absolute().parents[3])  # what `import paretoprune` is found in
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    found = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    found |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    place = torch_device(device)
    if place.type == "cuda":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        found["CUDA_VISIBLE_DEVICES"] = visible[place.index or 0] if visible else str(place.index or 0)
    return found


def _attend(
    processes: Sequence[subprocess.Popen[bytes]],
    line: Connection,
    on_epoch: Callable[[int, dict[str, float]], bool],
    folder: Path,
) -> None:
    """Answer the first process's epochs until all have ended well."""
    ended_seconds = 0.0
    while any(process.poll() is None for process in processes):
        if processes[0].poll() == 0:  # it has left its result; a listener may have ended it before the others met it
            ended_seconds = ended_seconds or time.monotonic()
            if time.monotonic() > ended_seconds + _PATIENCE_SECONDS:
                return
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed:
            _give_up(processes, failed[0], folder)
        with contextlib.suppress(EOFError, OSError):
            if line.poll(0.2):
                epoch, metrics = line.recv()
                line.send(bool(on_epoch(epoch, metrics)))
                continue
        time.sleep(0.02)
    for process in processes:
        if process.returncode:
            _give_up(processes, process, folder)


def _give_up(processes: Sequence[subprocess.Popen[bytes]], first: subprocess.Popen[bytes], folder: Path) -> None:
    """Raise what the group failed with: the line of a process that says it, else how the first one ended."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    ended = [process for process in processes if process.poll() not in (None, 0)]
    said = [_said(folder / f"{ERRORS}{processes.index(process)}") for process in [first, *ended]]
    for text in said:
        for start, kind in ERRORS_SAID.items():
            if text.startswith(start):
                raise kind(text.removeprefix(start))
    number = processes.index(first)
    raise PruningError(f"process {number} of the fine-tuning ended with {first.returncode}: {said[0] or 'no message'}")


def _said(errors: Path) -> str:
    """The line in which a process says why it ended, else its last one: libraries may write after it."""
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    known = (line for line in reversed(lines) if line.startswith(tuple(ERRORS_SAID)))
    return next(known, lines[-1] if lines else "")
