"""One process of a multi-GPU fine-tuning: `python -m paretoprune.pruning.training.ddp_worker FOLDER FILE-DESCRIPTOR`.

Started by `pruning.training.ddp` with RANK, LOCAL_RANK and WORLD_SIZE set, which Ultralytics reads when it is first
imported; it then divides the images among the ranks and wraps the network for the exchange of gradients by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from ultralytics.utils.torch_utils import init_seeds

from paretoprune.base.errors import first_line
from paretoprune.pruning.errors import NonFiniteError, PruningError
from paretoprune.pruning.training.ddp import JOB, RENDEZVOUS, RESULT, GroupJob
from paretoprune.pruning.training.retries import is_out_of_memory
from paretoprune.pruning.training.single_device import train_here

_TIMEOUT = timedelta(hours=3)  # the others wait while the first validates


class DdpRank:
    """Mixed in before the in-place training: the process group, and decisions that the first process takes for all."""

    device: torch.device
    world_size: int
    ddp: bool
    meeting: str
    job: Any
    args: Any
    start_epoch: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size, self.ddp = int(os.environ["WORLD_SIZE"]), False  # this is one of the processes already

    def _setup_ddp(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        rank, meeting = int(os.environ["RANK"]), f"file://{self.meeting}"  # a file: a port could be taken meanwhile
        distributed.init_process_group(backend, meeting, timeout=_TIMEOUT, rank=rank, world_size=self.world_size)

    def _setup_train(self) -> None:
        with _any_device(self.device):
            super()._setup_train()  # type: ignore[misc]
        if self.job.saved is not None:  # the random states are the first process's, and so the same in all
            init_seeds(self.args.seed + 1000 * self.start_epoch + distributed.get_rank(), self.args.deterministic)

    def agreed(self, step: float) -> float:
        """The first process's: each has images of its own, and the weights must stay the same."""
        found = [step]
        distributed.broadcast_object_list(found, 0)
        return found[0]

    def validate(self) -> Any:
        """The first process's figures, told to all: whether to stop must not differ."""
        found = [super().validate()] if distributed.get_rank() == 0 else [None]  # type: ignore[misc]
        distributed.broadcast_object_list(found, 0)
        return found[0]


@contextlib.contextmanager
def _any_device(device: torch.device) -> Iterator[None]:
    """Ultralytics names the GPU to the wrapper, which a CPU's network refuses."""
    stock = nn.parallel.DistributedDataParallel
    if device.type == "cpu":

        def on_cpu(module: nn.Module, device_ids: object = None, **kwargs: Any) -> Any:
            return stock(module, **kwargs)

        nn.parallel.DistributedDataParallel = on_cpu  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = stock  # type: ignore[misc]


def _validate_alone() -> None:
    """Ultralytics' validators would collect the figures of all ranks, and only the first validates here."""
    from ultralytics.engine import validator
    from ultralytics.models.yolo.classify import val as of_classes
    from ultralytics.models.yolo.detect import val as of_boxes

    for module in (validator, of_boxes, of_classes):
        for name in ("RANK", "LOCAL_RANK"):
            setattr(module, name, -1)


def _end_with_the_caller() -> None:
    """Standard input ends when the caller does, however it dies."""
    os.read(0, 1)  # not through `sys.stdin`, whose lock the interpreter needs at its end
    os._exit(1)


def _report(line: Connection, epoch: int, metrics: dict[str, float]) -> bool:
    line.send((epoch, metrics))
    return bool(line.recv())


def _end(why: str) -> None:
    """Say it and leave at once: taking NCCL down waits for the others, who wait for this process, and is not silent."""
    print(why, file=sys.stderr, flush=True)
    os._exit(1)


def main(folder: Path, descriptor: int) -> None:
    """Train as this rank of the job in `folder`; the first one reports through the descriptor and leaves the result."""
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    rank = int(os.environ["RANK"])
    job: GroupJob = torch.load(folder / JOB, weights_only=False)
    _validate_alone()
    result = train_here(
        job.model,
        job.data,
        job.settings,
        job.save_dir,
        device=job.device_type,
        gate=job.gates[rank],
        teacher=job.teacher,
        on_epoch=partial(_report, Connection(descriptor)) if rank == 0 else None,
        start_metrics=job.start_metrics,
        classes=job.classes,
        also=(type("DdpRank", (DdpRank,), {"meeting": str(folder / RENDEZVOUS)}),),
        log=f"train.rank{rank}.log" if rank else "train.log",
        remedies=job.remedies,
    )
    if rank == 0:
        torch.save(result, folder / RESULT)
    distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except PruningError as error:  # the caller looks for this line in standard error
        _end(f"{'NonFiniteError' if isinstance(error, NonFiniteError) else 'PruningError'}: {error}")
    except Exception as error:  # noqa: BLE001  its last line says what it was
        _end(f"MemoryError: {first_line(error)}" if is_out_of_memory(error) else traceback.format_exc())
