"""Processes that really train, for `benchmarks.latency`: they can be stopped, and what they do is counted.

Run as a program it is one trainer: python -m benchmarks.latency_trainers DATA FOLDER LOCKS NUMBER
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_EPOCHS = 1000  # they are ended long before


class Trainers:
    """`count` processes in a folder of their own, ended with the context; each counts in a shared file how
    often it took the device: for a batch, an item that is loaded, a preparation."""

    def __init__(self, count: int, folder: Path) -> None:
        from paretoprune.pruning.builtin.dataset import build_dataset

        self.locks = folder / "locks"
        self._counts = [folder / f"batches{number}" for number in range(count)]
        data = build_dataset(folder / "data")
        self._processes = []
        for number, path in enumerate(self._counts):
            path.write_bytes(bytes(8))
            place = folder / f"trainer{number}"
            place.mkdir()
            command = [sys.executable, "-m", "benchmarks.latency_trainers", *map(str, (data, place, self.locks, path))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._processes.append(subprocess.Popen(command, env=environment))

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def batches(self) -> list[int]:
        """How often each has taken the device and left it since it began."""
        return [struct.unpack("<q", path.read_bytes())[0] for path in self._counts]

    def pause(self) -> None:
        """Stop them in the midst of whatever they do: the machine is idle."""
        self._all_begun()
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)

    def go_on(self) -> None:
        """Let them train, and return when each has taken the device twice more."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        before = self.batches()
        while any(now < then + 2 for now, then in zip(self.batches(), before, strict=True)):
            self._check_alive()
            time.sleep(0.05)

    def counting(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, with `trainer_batches`, how often the trainers took the device meanwhile."""
        before = sum(self.batches())
        result = measure()
        self._check_alive()
        return {**result, "trainer_batches": sum(self.batches()) - before}

    def _all_begun(self) -> None:
        while not all(self.batches()):
            self._check_alive()
            time.sleep(0.05)

    def _check_alive(self) -> None:
        ended = [process.poll() for process in self._processes if process.poll() is not None]
        assert not ended, f"a trainer ended with {ended}"


class CountingGate:
    """The device's lock, which counts how often it was held."""

    def __init__(self, locks: Path, counter: Path) -> None:
        from paretoprune.cluster.device_lock import DeviceLock

        self._lock = DeviceLock("cpu", locks)
        with counter.open("r+b") as file:
            self._count = mmap.mmap(file.fileno(), 8)

    @contextmanager
    def using(self) -> Iterator[None]:
        """See `base.device_gate.Gate`."""
        with self._lock.using():
            yield
            self._count[:8] = struct.pack("<q", struct.unpack("<q", self._count[:8])[0] + 1)


def train(data: str, folder: Path, locks: Path, counter: Path) -> None:
    """Fine-tune the built-in model for ever."""
    import torch

    from paretoprune.pruning.builtin import BASELINE, IMGSZ
    from paretoprune.pruning.training.finetune import finetune
    from paretoprune.pruning.training.settings import FinetuneSettings
    from paretoprune.pruning.yolo.loading import load_model

    torch.set_num_threads(1)
    settings = FinetuneSettings(epochs=_EPOCHS, imgsz=IMGSZ, seed=os.getpid())
    finetune(load_model(BASELINE), data, settings, folder, gate=CountingGate(locks, counter))


if __name__ == "__main__":
    train(sys.argv[1], *map(Path, sys.argv[2:5]))
