"""One fine-tuning on several devices, here two processes on the CPU: pruned in each, and the same as one alone."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from paretoprune.base.file_names import FINETUNE_STATE
from paretoprune.pruning.errors import NonFiniteError, PruningError
from paretoprune.pruning.training.ddp import split_devices
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from tests.pruning.recovery_material import (
    fresh_yolov8n,
    halve_bottlenecks,
    shapes_dataset,
    teaching_yolov8n,
    weights,
    widths,
)

pytestmark = pytest.mark.slow

STILL = dict.fromkeys("hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr".split(), 0.0)


@pytest.fixture
def pruned() -> nn.Module:
    return halve_bottlenecks(fresh_yolov8n())


def one_image_many_times(root: Path) -> str:
    """Eight times the same image: whatever two processes are given, together they see what one alone would.

    A JPEG with bytes after its end, which Ultralytics by itself would rewrite.
    """
    data = shapes_dataset(root, train=1, val=1, size=64)
    first = root / "images" / "train" / "0.png"
    Image.open(first).save(first.with_suffix(".jpg"), quality=95)
    first.with_suffix(".jpg").write_bytes(first.with_suffix(".jpg").read_bytes() + b"\0\0")
    first.unlink()
    for folder, suffix in (("images", "jpg"), ("labels", "txt")):
        for copy in range(1, 8):
            shutil.copyfile(root / folder / "train" / f"0.{suffix}", root / folder / "train" / f"{copy}.{suffix}")
    return str(data)


def test_two_processes_are_one_with_the_doubled_batch(pruned: nn.Module, tmp_path: Path) -> None:
    data = one_image_many_times(tmp_path / "data")
    pruned.args = STILL  # type: ignore[assignment]
    settings = FinetuneSettings(epochs=2, imgsz=64, batch=4, lr=1e-4)
    heard: list[int] = []

    def listen(epoch: int, metrics: dict[str, float]) -> bool:
        heard.append(epoch)
        assert "map50_95" in metrics
        return False

    alone = finetune(pruned, data, settings, tmp_path / "alone")
    caches = list((tmp_path / "data").rglob("*.npz"))
    assert len(caches) == 2
    for cache in caches:
        cache.unlink()  # the group's processes read the images anew
    together = finetune(pruned, data, settings, tmp_path / "together", device="cpu,cpu", on_epoch=listen)
    images = list((tmp_path / "data" / "images" / "train").iterdir())
    assert len(images) == 8
    assert all(image.read_bytes().endswith(b"\xff\xd9\0\0") for image in images)
    assert heard == [1, 2]
    assert widths(together.model) == widths(pruned)
    assert (together.epochs, together.lr) == (alone.epochs, alone.lr)
    courses = (together.history, alone.history)
    for name in ("train/box_loss", "train/cls_loss", "train/dfl_loss"):  # a process's own, times the images it saw
        first, second = ((theirs[name], ours[name] / 2) for theirs, ours in zip(*courses, strict=True))
        assert first[0] == pytest.approx(first[1], rel=1e-3)
        # Kernels round otherwise for half the batch, and Adam makes whole steps of gradients that are rounding only
        assert second[0] == pytest.approx(second[1], rel=5e-2)
    assert not any(p.suffix == ".pt" for p in (tmp_path / "together").rglob("*"))


def test_every_process_trains_the_pruned_network_and_stops_when_told(pruned: nn.Module, tmp_path: Path) -> None:
    """Had one rebuilt the unpruned network, the exchange of gradients would not fit; both logs say what was trained."""
    data = str(shapes_dataset(tmp_path / "data", size=64))
    before = weights(pruned)
    settings = FinetuneSettings(epochs=5, imgsz=64, batch=4, taught_by="another")
    result = finetune(
        pruned, data, settings, tmp_path / "tune", device="cpu,cpu", teacher=teaching_yolov8n(),
        on_epoch=lambda epoch, _: epoch == 1,
    )  # fmt: skip
    assert result.epochs == 1
    assert result.history[0]["train/teacher"] > 0  # beside the labels, in every process
    logs = [(tmp_path / "tune" / name).read_text() for name in ("train.log", "train.rank1.log")]
    assert all("Transferred" not in log and "10 steps" in log for log in logs)
    assert widths(result.model) == widths(pruned)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(pruned).items())


def test_a_loss_that_becomes_nan_twice_ends_all_with_its_own_line(pruned: nn.Module, tmp_path: Path) -> None:
    """The first time, all begin once more with a lower rate."""
    data = str(shapes_dataset(tmp_path / "data", size=64))
    settings = FinetuneSettings(epochs=1, imgsz=64, batch=4)
    with torch.no_grad():
        next(iter(pruned.parameters())).fill_(3e38)  # what it answers is infinite
    with pytest.raises(NonFiniteError, match=r"must (be|stay) finite") as caught:
        finetune(pruned, data, settings, tmp_path / "tune", device="cpu,cpu")
    assert "\n" not in str(caught.value)
    ours = str(os.getpid())
    children = Path(f"/proc/{ours}/task/{ours}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children if Path(f"/proc/{child}").exists()]
    assert not any(b"finetune_rank" in command for command in commands)


def test_a_group_goes_on_where_it_died(pruned: nn.Module, tmp_path: Path) -> None:
    """With a teacher, in both processes; the time of the first attempt counts."""
    data = str(shapes_dataset(tmp_path / "data", size=64))
    settings = FinetuneSettings(epochs=3, imgsz=64, batch=4, distill=True)
    heard: list[int] = []

    def dies(epoch: int, metrics: dict[str, float]) -> bool:
        heard.append(epoch)
        if heard == [1, 2]:
            raise KeyboardInterrupt
        return False

    def tune() -> FinetuneResult:
        folder, teacher = tmp_path / "tune", teaching_yolov8n()
        return finetune(pruned, data, settings, folder, device="cpu,cpu", teacher=teacher, on_epoch=dies)

    with pytest.raises(KeyboardInterrupt):
        tune()
    state = torch.load(tmp_path / "tune" / FINETUNE_STATE, weights_only=True)
    torch.save({**state, "seconds": 5000.0}, tmp_path / "tune" / FINETUNE_STATE)
    result = tune()
    assert heard == [1, 2, 1, 2, 3]
    assert [row["epoch"] for row in result.history] == [1.0, 2.0, 3.0]
    assert result.history[-1]["train/divergence"] > 0
    assert result.seconds > 5000
    logs = [(tmp_path / "tune" / name).read_text() for name in ("train.log", "train.rank1.log")]
    assert all("going on after epoch 1/3" in log for log in logs)
    assert not (tmp_path / "tune" / FINETUNE_STATE).exists()


def test_a_group_without_memory_goes_on_with_half_the_batch(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first group's processes say that there is no memory, the second's are real."""
    full, real = tmp_path / "full", tmp_path / "python"
    real.write_text(
        f"#!/bin/sh\nif mkdir {full} || mkdir {full}/too; then echo 'MemoryError: CUDA out of memory' >&2; exit 1; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    real.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(real))
    data = str(shapes_dataset(tmp_path / "data", size=64))
    settings = FinetuneSettings(epochs=1, imgsz=64, batch=4)
    result = finetune(pruned, data, settings, tmp_path / "tune", device="cpu,cpu")
    assert result.retries == ("half the batch after MemoryError: CUDA out of memory",)
    saved = (tmp_path / "tune" / "args.yaml").read_text()
    assert "batch: 2" in saved
    assert "nbs: 4" in saved  # gradients of two halves are added


def test_a_further_attempt_tells_of_no_epoch_twice(pruned: nn.Module, tmp_path: Path) -> None:
    """Memory runs out between the second epoch and the third: what was done is kept, and told once."""
    heard: list[int] = []

    def listen(epoch: int, metrics: dict[str, float]) -> bool:
        heard.append(epoch)
        if heard == [1, 2]:
            raise MemoryError("no memory left")
        return False

    data = str(shapes_dataset(tmp_path / "data", size=64))
    settings = FinetuneSettings(epochs=3, imgsz=64, batch=4)
    result = finetune(pruned, data, settings, tmp_path / "tune", device="cpu,cpu", on_epoch=listen)
    assert heard == [1, 2, 3]
    assert [row["epoch"] for row in result.history] == [1.0, 2.0, 3.0]
    assert result.retries == ("half the batch after MemoryError: no memory left",)
    assert "going on after epoch 1/3" in (tmp_path / "tune" / "train.log").read_text()


@pytest.mark.timeout(60)
def test_a_process_that_says_much_is_heard_and_does_not_stand_still(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders of images and NCCL write to standard error as they like, before and after the line that matters."""
    talker = tmp_path / "python"
    talker.write_text(
        "#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' x >&2\n"
        "echo >&2\necho 'PruningError: the loss became nan' >&2\n"
        "echo '[rank0]: process group NOT destroyed' >&2\nexit 1\n"
    )
    talker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(talker))
    data = str(shapes_dataset(tmp_path / "data", train=2, val=1, size=64))
    with pytest.raises(PruningError, match=r"^the loss became nan$"):
        finetune(pruned, data, FinetuneSettings(epochs=1, imgsz=64, batch=4), tmp_path / "tune", device="cpu,cpu")


def test_bad_devices(pruned: nn.Module, tmp_path: Path) -> None:
    assert split_devices("cpu, cpu") == ("cpu", "cpu")
    data = str(shapes_dataset(tmp_path / "data", size=64))
    with pytest.raises(PruningError, match="batch must be a multiple of the 2 devices, but got 5"):
        finetune(pruned, data, FinetuneSettings(epochs=1, imgsz=64, batch=5), tmp_path / "tune", device="cpu,cpu")
    if torch.cuda.device_count() < 2:
        with pytest.raises(PruningError, match="is not there"):
            finetune(pruned, data, FinetuneSettings(epochs=1, imgsz=64), tmp_path / "tune", device="cuda:0,cuda:1")
