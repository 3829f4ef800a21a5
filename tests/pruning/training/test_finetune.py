"""Fine-tuning: the pruned network stays pruned, never gets worse, says nothing, and stops when told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.schedule import averaging, epochs_with_mosaic, learning_rate, rate_factor
from paretoprune.pruning.training.settings import FinetuneResult, FinetuneSettings
from paretoprune.pruning.yolo.precision import training_precision
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.recovery_material import (
    CountingGate,
    blood_cells,
    files_below,
    fresh_yolov8n,
    halve_bottlenecks,
    same_weights,
    shapes_dataset,
    stock_model,
    teaching_yolov8n,
    weights,
    widths,
)

pytestmark = pytest.mark.slow

QUICK = FinetuneSettings(epochs=2, imgsz=96, batch=4)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 images to train on, 4 to validate on."""
    return str(shapes_dataset(tmp_path_factory.mktemp("shapes")))


@pytest.fixture
def pruned() -> nn.Module:
    return halve_bottlenecks(fresh_yolov8n())


def run(model: nn.Module, data: str, tmp_path: Path, settings: FinetuneSettings = QUICK, **more: Any) -> FinetuneResult:
    return finetune(model, data, settings, tmp_path / "trial", **more)


def test_trains_the_network_it_is_given(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before, cut, threads = weights(pruned), widths(pruned), torch.get_num_threads()
    gate, heard = CountingGate(), []

    def listen(epoch: int, metrics: dict[str, float]) -> bool:
        heard.append((epoch, set(metrics)))
        assert gate.inside == 0
        return False

    result = run(pruned, shapes, tmp_path, gate=gate, on_epoch=listen)
    assert capfd.readouterr() == ("", "")
    assert files_below(tmp_path) == {"trial", "trial/train.log", "trial/args.yaml"}
    assert "epoch 2/2" in (tmp_path / "trial" / "train.log").read_text()
    assert widths(result.model) == cut
    assert cut["model.2.m.0.cv1.conv"][0] == 8  # else the test would show nothing
    assert type(result.model).__module__ == "ultralytics.nn.tasks"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in result.model.parameters())
    assert not result.model.training
    assert same_weights(weights(pruned), before)
    assert heard == [(epoch, {"map50_95", "map50", "precision", "recall"}) for epoch in (1, 2)]
    assert [row["epoch"] for row in result.history] == [1.0, 2.0]
    assert result.epochs == 2
    # 2 epochs of 8 images in fours; 3 validations (the start's too) of 4 images in one batch; each image's loading;
    # the set-up
    assert (gate.entered, gate.inside) == (2 * 2 + 3 * 1 + 2 * 8 + 3 * 4 + 1, 0)
    assert torch.get_num_threads() == threads


def test_on_epoch_stops(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    result = run(
        pruned, shapes, tmp_path, FinetuneSettings(epochs=5, imgsz=96, batch=4), on_epoch=lambda epoch, _: epoch == 2
    )
    assert result.epochs == len(result.history) == 2


def test_a_start_that_was_validated_is_not_validated_again(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    known = {"map50_95": 0.9, "map50": 0.95, "precision": 0.9, "recall": 0.9}  # unattainable, so it stays the best
    result = run(pruned, shapes, tmp_path, QUICK, start_metrics=known)
    assert (result.start_metrics, result.metrics, result.best_epoch) == (known, known, 0)
    assert [row["epoch"] for row in result.history] == [1.0, 2.0]
    assert result.history[0]["map50_95"] < 0.9
    assert same_weights(weights(result.model), weights(pruned))


def test_augments_as_the_checkpoint_was_trained(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    """A detector trained without flips must not be fine-tuned with them; where nothing is said, the defaults hold."""
    pruned.args = {"fliplr": 0.0, "scale": 0.25, "box": 3.0, "mixup": None, "epochs": 999}  # type: ignore[assignment]
    used = []
    for name, model in (("trained", pruned), ("fresh", halve_bottlenecks(fresh_yolov8n()))):
        finetune(model, shapes, FinetuneSettings(epochs=1, imgsz=96, batch=4), tmp_path / name)
        used.append(yaml.safe_load((tmp_path / name / "args.yaml").read_text()))
    assert [used[0][k] for k in ("fliplr", "scale", "box", "mixup", "epochs")] == [0.0, 0.25, 3.0, 0.0, 1]
    assert [used[1][k] for k in ("fliplr", "scale", "box")] == [0.5, 0.5, 7.5]


def test_a_short_one_with_a_teacher_sees_images_as_they_are_judged(
    pruned: nn.Module, shapes: str, tmp_path: Path
) -> None:
    """Not cropped, stretched or recoloured, only mirrored where the checkpoint was trained so; a long one is."""
    pruned.args = {"fliplr": 0.25, "scale": 0.3, "mixup": 0.1, "hsv_s": 0.7}  # type: ignore[assignment]
    teacher, names = fresh_yolov8n(), ("fliplr", "scale", "mixup", "hsv_s", "translate")
    settings = FinetuneSettings(epochs=1, imgsz=96, batch=4, distill=True)
    finetune(pruned, shapes, settings, tmp_path / "short", teacher=teacher)
    used = yaml.safe_load((tmp_path / "short" / "args.yaml").read_text())
    assert [used[name] for name in names] == [0.25, 0.0, 0.0, 0.0, 0.0]
    long = replace(settings, epochs=10)
    finetune(pruned, shapes, long, tmp_path / "long", teacher=teacher, on_epoch=lambda epoch, _: True)
    used = yaml.safe_load((tmp_path / "long" / "args.yaml").read_text())
    assert [used[name] for name in names] == [0.25, 0.3, 0.1, 0.7, 0.1]


def test_same_seed_same_course(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    def course(seed: int) -> list[dict[str, float]]:
        torch.manual_seed(seed + 100)  # what went on in the process before must not matter
        settings = FinetuneSettings(epochs=2, imgsz=96, batch=4, seed=seed)
        rows = run(pruned, shapes, tmp_path, settings).history
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    first = course(1)
    assert first == course(1)
    assert first != course(2)


class TestPrecision:
    @pytest.mark.parametrize(
        ("amx", "amp", "precision"), [(True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32")]
    )
    def test_a_cpu_with_matrix_units_trains_in_bf16_and_nothing_of_it_is_left(
        self,
        pruned: nn.Module,
        shapes: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        amx: bool,
        amp: bool,
        precision: str,
    ) -> None:
        monkeypatch.setattr("paretoprune.pruning.yolo.precision._cpu_has", lambda *flags: amx and "amx_bf16" in flags)
        seen: dict[bool, set[tuple[torch.dtype, bool]]] = {True: set(), False: set()}

        def look(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d) and module.in_channels > 1 and output.shape[-1] > 1:
                seen[module.training].add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

        hook = torch.nn.modules.module.register_module_forward_hook(look)
        try:
            result = run(pruned, shapes, tmp_path, FinetuneSettings(epochs=1, imgsz=96, batch=4, amp=amp))
        finally:
            hook.remove()
        assert seen[True] == {(torch.bfloat16 if precision == "bf16" else torch.float32, True)}
        assert {dtype for dtype, _ in seen[False]} == {torch.float32}  # the validation
        assert result.precision == precision
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in result.model.parameters())
        assert result.metrics == evaluate(result.model, shapes, 96, "cpu")

    def test_matching_of_boxes_stays_in_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("paretoprune.pruning.yolo.precision._cpu_has", lambda *flags: True)
        monkeypatch.setattr("paretoprune.pruning.yolo.precision.kind_of", lambda model: "rtdetr")
        assert training_precision(nn.Identity(), "cpu") == "fp32"


@pytest.mark.parametrize(("bad_step", "epoch"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_loss_that_is_nan_is_one_line_that_names_the_epoch(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int, epoch: int
) -> None:
    from ultralytics.utils.loss import v8DetectionLoss

    steps, stock_loss, gate = [0], v8DetectionLoss.loss, CountingGate()

    def sometimes_nan(self: Any, *args: Any) -> Any:
        steps[0] += 1
        loss, items = stock_loss(self, *args)
        return (loss * torch.nan if steps[0] >= bad_step else loss), items

    monkeypatch.setattr(v8DetectionLoss, "loss", sometimes_nan)
    with pytest.raises(PruningError, match=rf"loss must stay finite, but became nan in epoch {epoch};") as caught:
        run(pruned, shapes, tmp_path, gate=gate)
    assert "lower learning rate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert gate.inside == 0


def test_weights_that_become_nan_are_one_line_that_names_the_epoch(
    pruned: nn.Module, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last step whose gradient is not finite: no later loss would tell."""

    def poisoned(self: Any) -> None:
        with torch.no_grad():
            next(iter(self.param_groups[0]["params"])).fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_, **__: poisoned(self))
    with pytest.raises(PruningError, match="finite after epoch 1 of fine-tuning"):
        run(pruned, shapes, tmp_path, FinetuneSettings(epochs=1, imgsz=96, batch=8))


def test_exception_of_the_callback_gives_everything_back(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    from ultralytics.utils import LOGGER

    gate, handlers = CountingGate(), LOGGER.handlers

    def fail(_: int, __: dict[str, float]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pruned, shapes, tmp_path, gate=gate, on_epoch=fail)
    assert gate.inside == 0
    assert LOGGER.handlers == handlers
    assert not torch.are_deterministic_algorithms_enabled()


def test_distillation_leaves_teacher_and_student_clean(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    teacher = teaching_yolov8n()
    before, trainable = weights(teacher), [p.requires_grad for p in teacher.parameters()]
    settings = FinetuneSettings(epochs=1, imgsz=96, batch=4, distill=True)
    result = run(pruned, shapes, tmp_path, settings, teacher=teacher)
    assert result.history[0]["train/divergence"] > 0
    assert widths(result.model) == widths(pruned)
    assert not any(m._forward_hooks for net in (result.model, teacher, pruned) for m in net.modules())
    assert same_weights(weights(teacher), before)
    assert [p.requires_grad for p in teacher.parameters()] == trainable
    save_checkpoint(result.model, tmp_path / "a.pt")


@pytest.fixture(scope="module")
def cells(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real images; validated on those it trains on, so that a training that works must show."""
    data = blood_cells(assets, tmp_path_factory.mktemp("cells"), train=48, val=1)
    data.write_text(data.read_text().replace("val: images/val", "val: images/train"))
    return str(data)


@pytest.fixture
def trained(assets: Path) -> nn.Module:
    return halve_bottlenecks(stock_model(assets / "weights" / "bccd_yolov8n.pt"))


class TestOnRealCells:
    """With a trained detector, so that accuracy can go either way."""

    def test_improves_and_stays_pruned_after_reloading(self, trained: nn.Module, cells: str, tmp_path: Path) -> None:
        settings = FinetuneSettings(epochs=3, imgsz=160, batch=8)
        result = run(trained, cells, tmp_path, settings)
        assert result.metrics["map50_95"] > result.start_metrics["map50_95"]
        assert result.best_epoch > 0
        assert result.metrics == evaluate(result.model, cells, 160, "cpu")
        assert result.start_metrics == evaluate(trained, cells, 160, "cpu")
        moved = dict(result.model.named_parameters())
        still = [name for name, tensor in trained.named_parameters() if torch.equal(tensor, moved[name])]
        assert still == ["model.22.dfl.conv.weight"]  # a fixed ramp, never trained
        save_checkpoint(result.model, tmp_path / "once.pt")
        again = run(stock_model(tmp_path / "once.pt"), cells, tmp_path, FinetuneSettings(epochs=1, imgsz=160, batch=8))
        assert widths(again.model) == widths(trained)
        assert again.start_metrics == result.metrics

    def test_never_worse_than_the_start(self, trained: nn.Module, cells: str, tmp_path: Path) -> None:
        result = run(trained, cells, tmp_path, FinetuneSettings(epochs=1, imgsz=160, batch=8, lr=0.01))
        assert result.history[0]["map50_95"] < result.start_metrics["map50_95"]  # the training did ruin it
        assert result.best_epoch == 0
        assert result.metrics == result.start_metrics
        assert same_weights(weights(result.model), weights(trained))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs >= 1` must hold, but got epochs=0"),
        ({"imgsz": 100}, "image size must be a multiple of 32, but got 100"),
        ({"lr": -1.0}, "lr must be in (0, 1]"),
        ({"lr": 3.0}, "lr must be in (0, 1]"),
        ({"lr": float("nan")}, "lr must be in (0, 1]"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError) as caught:
        FinetuneSettings(**change)
    assert message in str(caught.value)


def test_bad_requests(pruned: nn.Module, shapes: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="needs a teacher"):
        run(pruned, shapes, tmp_path, FinetuneSettings(distill=True))
    with pytest.raises(PruningError, match="there is no file"):
        run(pruned, str(tmp_path / "none.yaml"), tmp_path)
    assert not (tmp_path / "trial").exists()


class TestSchedule:
    def test_learning_rate_meets_the_measured_points(self) -> None:
        assert learning_rate(39) == pytest.approx(1e-4)
        assert learning_rate(195) == pytest.approx(5e-4)

    def test_learning_rate_grows_with_the_budget_within_bounds(self) -> None:
        rates = [learning_rate(steps) for steps in (0, 1, 10, 20, 39, 60, 100, 195, 400, 10**6)]
        assert rates == sorted(rates)
        assert (rates[0], rates[-1]) == (5e-5, 5e-4)
        assert 1e-4 < learning_rate(100) < 5e-4  # between the measured points

    @pytest.mark.parametrize("steps", [1, 2, 5, 39, 400])
    def test_course_of_the_rate(self, steps: int) -> None:
        course = [rate_factor(step, steps) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in course)
        top = course.index(max(course))
        assert course[: top + 1] == sorted(course[: top + 1])
        assert course[top:] == sorted(course[top:], reverse=True)
        assert max(course) == 1
        if steps > 2:
            assert top <= 40
            assert course[-1] == pytest.approx(0.05)
        assert rate_factor(steps + 7, steps) == pytest.approx(0.05)

    @pytest.mark.parametrize("steps", [1, 5, 39, 400, 100000])
    def test_average_forgets_the_start_and_the_horizon_is_a_tenth(self, steps: int) -> None:
        import math

        decay, tau = averaging(steps)
        assert 0 <= decay < 1
        kept = math.prod(decay * (1 - math.exp(-update / tau)) for update in range(1, steps + 1))
        assert kept < 1e-3 if steps > 5 else kept < 0.5

    def test_mosaic(self) -> None:
        assert [epochs_with_mosaic(epochs) for epochs in (1, 3, 9, 10, 15, 30)] == [0, 0, 0, 5, 10, 20]
