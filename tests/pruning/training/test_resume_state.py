"""A fine-tuning that died goes on from its last epoch; lack of memory and NaN have a remedy each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.base.file_names import FINETUNE_STATE
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.errors import NonFiniteError
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.retries import LOWER_RATE, RetryPolicy, is_out_of_memory
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.yolo.loading import load_model
from tests.pruning.recovery_material import (
    files_below,
    fresh_yolov8n,
    halve_bottlenecks,
    same_weights,
    shapes_dataset,
    teaching_yolov8n,
    weights,
)

pytestmark = pytest.mark.slow

TEN = FinetuneSettings(epochs=10, imgsz=96, batch=4, patience=6)  # with mosaic for the first five
THREE = FinetuneSettings(epochs=3, imgsz=64, batch=4)


class Dies:
    """An `on_epoch` that ends its process's work at an epoch; `heard`: what it was told."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.heard: list[int] = []

    def __call__(self, epoch: int, metrics: dict[str, float]) -> bool:
        self.heard.append(epoch)
        if epoch == self.at:
            raise KeyboardInterrupt
        return False


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shapes_dataset(tmp_path_factory.mktemp("shapes"), size=64))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_dataset(tmp_path_factory.mktemp("data") / "digits", train=10, val=6))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A detector whose accuracy is somewhere in between, so that its best epoch may be any."""
    torch.manual_seed(0)
    model = load_model(BASELINE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    return halve_bottlenecks(fresh_yolov8n())


def without_times(result: FinetuneResult) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    trained: nn.Module, digits: str, tmp_path: Path
) -> None:
    """In the epochs with mosaic, at the one that closes it, and after it."""
    whole = finetune(trained, digits, TEN, tmp_path / "whole")
    assert whole.best_epoch > 0
    for dies_at in (3, 6, 8):
        torch.manual_seed(dies_at)  # another process would be anywhere
        listener = Dies(dies_at)
        with pytest.raises(KeyboardInterrupt):
            finetune(trained, digits, TEN, tmp_path / "cut", on_epoch=listener)
        assert listener.heard == list(range(1, dies_at + 1))
        assert (tmp_path / "cut" / FINETUNE_STATE).is_file()
    listener = Dies()
    resumed = finetune(trained, digits, TEN, tmp_path / "cut", on_epoch=listener)
    assert listener.heard == list(range(1, whole.epochs + 1))
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert without_times(resumed) == without_times(whole)
    assert (resumed.best_epoch, resumed.metrics, resumed.start_metrics, resumed.lr) == (
        whole.best_epoch, whole.metrics, whole.start_metrics, whole.lr,
    )  # fmt: skip
    times = [row["seconds"] for row in resumed.history]
    assert times == sorted(times)
    assert files_below(tmp_path / "cut") == files_below(tmp_path / "whole")  # the state is gone


def test_resumed_work_is_not_done_twice(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_losses(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, shapes, THREE, tmp_path, on_epoch=Dies(3))
    assert steps[0] == 3 * 2
    finetune(pruned, shapes, THREE, tmp_path)
    assert steps[0] == 3 * 2 + 2  # the third epoch's two steps: its state had not been written


@pytest.mark.parametrize("damage", ["torn", "other settings", "other widths"])
def test_a_state_that_does_not_fit_is_passed_over(pruned: nn.Module, shapes: str, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, shapes, THREE, tmp_path, on_epoch=Dies(3))
    state, model, settings = tmp_path / FINETUNE_STATE, pruned, THREE
    if damage == "torn":
        state.write_bytes(state.read_bytes()[:-1000])
    elif damage == "other settings":
        settings = FinetuneSettings(**{**vars(THREE), "seed": 1})
    else:
        model = fresh_yolov8n()
    resumed = finetune(model, shapes, settings, tmp_path)
    assert same_weights(weights(resumed.model), weights(finetune(model, shapes, settings, tmp_path / "anew").model))


def test_a_listener_that_ends_it_at_an_earlier_epoch(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    """A stopping rule that knows more by now may stop at an epoch that it let pass before."""
    whole = finetune(pruned, shapes, THREE, tmp_path / "whole", on_epoch=lambda epoch, _: epoch == 2)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, shapes, THREE, tmp_path / "cut", on_epoch=Dies(3))
    resumed = finetune(pruned, shapes, THREE, tmp_path / "cut", on_epoch=lambda epoch, _: epoch == 1)
    assert same_weights(weights(resumed.model), weights(whole.model))  # what it has is used: two epochs
    assert resumed.epochs == 2


def test_a_full_disk_costs_the_state_not_the_training(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paretoprune.pruning.training.resume_state as module

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    assert finetune(pruned, shapes, THREE, tmp_path).epochs == 3
    assert "No space left on device" in (tmp_path / "train.log").read_text()
    assert not list(tmp_path.glob(f".{FINETUNE_STATE}*"))


def test_out_of_memory_goes_on_with_half_the_batch_once(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fails_at(monkeypatch, 4, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), sizes)
    listener = Dies()
    result = finetune(pruned, shapes, THREE, tmp_path, on_epoch=listener)
    assert sizes == [4, 4, 4, 4] + [2] * 8  # in the second epoch; then the last two in halves
    assert result.retries == ("half the batch after OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",)
    assert result.epochs == 3
    assert listener.heard == [1, 2, 3]


def test_out_of_memory_with_half_the_batch_is_an_error(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"), sizes := [], for_ever=True)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        finetune(pruned, shapes, THREE, tmp_path)
    assert sizes == [4, 2]


def test_nan_goes_on_from_the_last_epoch_with_a_lower_rate_once(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, 4, None, [])
    result = finetune(pruned, shapes, FinetuneSettings(epochs=3, imgsz=64, batch=4, lr=1e-3), tmp_path)
    assert result.lr == pytest.approx(LOWER_RATE * 1e-3)
    (note,) = result.retries
    assert note.startswith("0.3 of the learning rate after NonFiniteError: the training loss must stay finite, but")
    assert note.endswith("became nan in epoch 2")
    assert result.history[0]["lr"] > LOWER_RATE * 1e-3 * 0.5
    assert max(row["lr"] for row in result.history[1:]) <= LOWER_RATE * 1e-3


def test_a_remedy_is_remembered_over_a_death(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fails_at(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory"), sizes)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, shapes, THREE, tmp_path, on_epoch=Dies(2))
    assert len(finetune(pruned, shapes, THREE, tmp_path).retries) == 1
    assert sizes == [4] + [2] * 4 * 2 + [2] * 4 * 2


def test_distillation_goes_on_too(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    settings = FinetuneSettings(epochs=3, imgsz=64, batch=4, distill=True)
    teacher = teaching_yolov8n()
    whole = finetune(pruned, shapes, settings, tmp_path / "whole", teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, shapes, settings, tmp_path / "cut", teacher=teacher, on_epoch=Dies(2))
    resumed = finetune(pruned, shapes, settings, tmp_path / "cut", teacher=teacher)
    divergences = [[row["train/divergence"] for row in result.history] for result in (whole, resumed)]
    assert divergences[0] == divergences[1]
    assert min(divergences[0]) > 0
    assert resumed.lr == whole.lr  # found on the first batch, by the first attempt
    assert same_weights(weights(resumed.model), weights(whole.model))


def test_which_errors_mean_that_memory_ran_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))
    both = RetryPolicy().against(MemoryError())
    assert both is not None
    assert both.against(MemoryError()) is None
    again = both.against(NonFiniteError("the loss; lower it"))
    assert again is not None
    assert (again.parts, again.lr_scale, len(again.notes)) == (2, LOWER_RATE, 2)
    assert RetryPolicy.from_state(again.to_state()) == again


def count_losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from ultralytics.utils.loss import v8DetectionLoss

    steps, stock_loss = [0], v8DetectionLoss.loss

    def counted(self: Any, *args: Any) -> Any:
        steps[0] += 1
        return stock_loss(self, *args)

    monkeypatch.setattr(v8DetectionLoss, "loss", counted)
    return steps


def fails_at(
    monkeypatch: pytest.MonkeyPatch, step: int, error: Exception | None, sizes: list[int], for_ever: bool = False
) -> None:
    """The loss of one step raises `error`, or is NaN where there is none; `sizes` notes the images of every step."""
    from ultralytics.utils.loss import v8DetectionLoss

    stock_loss = v8DetectionLoss.loss

    def loss(self: Any, preds: Any, batch: Any) -> Any:
        sizes.append(len(batch["img"]))
        failing = len(sizes) == step or (for_ever and len(sizes) > step)
        if failing and error is not None:
            raise error
        value, items = stock_loss(self, preds, batch)
        return (value * torch.nan if failing else value), items

    monkeypatch.setattr(v8DetectionLoss, "loss", loss)
