"""Data loading stands still while something is measured, in this process and in loading workers."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.pruning.device import DeviceSlot, GatedLoader, gated_dataset
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.recovery_material import CountingGate, same_weights, shapes_dataset, weights
from tests.pruning.tiny import tiny_model

pytestmark = pytest.mark.timeout(120)  # a lock that is entered in the wrong order hangs


class Spans(Dataset):
    """Items that say when they were being made: (begin, end) on the machine's monotonic clock, seconds."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = time.monotonic()
        sum(range(20_000))
        return torch.tensor([begin, time.monotonic()], dtype=torch.float64)


class Measurer(threading.Thread):
    """Measures again and again until it is told to stop."""

    def __init__(self, lock: DeviceLock) -> None:
        super().__init__(daemon=True)
        self.lock = lock
        self.spans: list[tuple[float, float]] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            with self.lock.measuring():
                begin = time.monotonic()
                sum(range(50_000))
                self.spans.append((begin, time.monotonic()))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_loaded_or_computed_during_a_measurement(workers: int, tmp_path: Path) -> None:
    """Real processes, a real lock: no item and no batch overlaps a measurement, and neither waits for the other."""
    lock = DeviceLock("cpu", tmp_path)
    dataset = gated_dataset(Spans(160), lock)
    loader = GatedLoader(DataLoader(dataset, batch_size=4, num_workers=workers), lock)
    measurer = Measurer(lock)
    measurer.start()
    busy: list[tuple[float, float]] = []
    for items in loader:
        begin = time.monotonic()
        sum(range(20_000))
        busy += [(begin, time.monotonic()), *map(tuple, items.tolist())]
    measurer.enough.set()
    measurer.join()
    assert len(busy) == 40 + 160
    overlapping = [(a, b) for a in busy for b in measurer.spans if a[0] < b[1] and b[0] < a[1]]
    assert overlapping == []
    between = [span for span in measurer.spans if min(busy)[0] < span[0] < max(busy)[0]]
    assert between, "nothing was measured while items were loaded, so the run shows nothing"


def test_a_gated_dataset_is_what_it_was() -> None:
    dataset = Spans(3)
    gate = CountingGate()
    assert gated_dataset(dataset, gate) is dataset
    assert isinstance(dataset, Spans)
    assert len(dataset) == 3
    assert dataset[1].shape == (2,)
    assert (gate.entered, gate.inside) == (1, 0)


def test_it_travels_to_workers_that_are_not_forked(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path)
    copy = pickle.loads(pickle.dumps(gated_dataset(Spans(3), lock)))
    assert copy.count == 3
    assert copy.gate.device_key == "cpu"
    again = pickle.loads(pickle.dumps(copy))
    assert again[0].shape == (2,)


def test_the_datasets_of_a_validation_are_gated(tmp_path: Path) -> None:
    gate = CountingGate()
    evaluator = Evaluator(str(shapes_dataset(tmp_path / "data", train=2, val=3)), 64, "cpu", batch=2, gate=gate)
    evaluator.run(tiny_model())
    assert evaluator._loader is not None
    before = gate.entered
    evaluator._loader.dataset[0]
    assert gate.entered == before + 1
    evaluator.close()


def test_a_turn_lets_a_measurement_in_between_two_parts_only(tmp_path: Path) -> None:
    """Real threads, a real lock; nested as a strategy's work around a workbench's is."""
    lock = DeviceLock("cpu", tmp_path)
    turn, parts = DeviceSlot(lock), list[tuple[float, float]]()
    measurer = Measurer(lock)
    turn.pause()  # outside of it: nothing to give up
    with turn, turn:
        measurer.start()
        while len(measurer.spans) <= 5 and len(parts) < 5000:  # on a busy machine the other thread comes late
            begin = time.monotonic()
            sum(range(20_000))
            parts.append((begin, time.monotonic()))
            turn.pause()
        met = len(measurer.spans)
    measurer.enough.set()
    measurer.join()
    assert met > 5
    for begin, end in measurer.spans:
        assert all(end <= first or last <= begin for first, last in parts)
    with lock.measuring():  # and nothing is left held
        pass


def test_a_failed_part_gives_the_device_back() -> None:
    gate = CountingGate()

    def work() -> None:
        with DeviceSlot(gate) as turn:
            turn.pause()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (gate.entered, gate.inside) == (2, 0)


@pytest.mark.parametrize("criterion", ["reconstruction", "taylor"])
def test_pruning_and_recovery_let_others_in_at_every_part(criterion: str, tmp_path: Path) -> None:
    """After each chunk of images and before each layer of a refit; the network is none the worse for it."""
    save_checkpoint(tiny_model(), tmp_path / "tiny.pt")
    data, gate = str(shapes_dataset(tmp_path / "shapes")), CountingGate()
    found: list[dict[str, torch.Tensor]] = []
    entered: list[int] = []
    for given in (gate, None):
        bench = Workbench(
            str(tmp_path / "tiny.pt"), data, 64, calibration_images=8, importance=criterion, round_to=1, gate=given
        )
        pruned, plan = bench.prune({"*": 0.4})
        entered.append(gate.entered)
        bench.recover(pruned, plan, "refit+bn")
        entered.append(gate.entered)
        found.append(weights(pruned))
    before, after = entered[:2]
    assert before > len(bench.table.groups) if criterion == "reconstruction" else before > 1
    assert after - before > len(bench.table.convs) // 2
    assert gate.inside == 0
    assert same_weights(*found)
