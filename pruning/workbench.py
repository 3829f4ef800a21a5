"""What one worker keeps between trials: the baseline, its layer table, calibration images, scores and refit targets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from paretoprune.base.device_gate import Gate
from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.data.calibration import (
    AUGMENTATIONS,
    FLIPS,
    Calibration,
    TrainingImages,
    load_calibration,
    shortcomings,
)
from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.data.sampling import training_files
from paretoprune.pruning.device import DeviceSlot, NullGate, device_synchronizer, torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.graph.branches import Branches, find_branches, name_after
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.graph.geometry_reading import read_geometry
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.importance import Evidence, known_criterion, score
from paretoprune.pruning.importance.allocation import Cost, Unit, allocate, conv_costs, parameter_costs
from paretoprune.pruning.importance.branch_losses import branch_losses
from paretoprune.pruning.names import RECOVERIES
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.recovery.refit import RefitSettings, Targets, recalibrate_batch_norm, refit
from paretoprune.pruning.recovery.refit_targets import images_that_fit, record_targets
from paretoprune.pruning.surgery.branches import cut_branches, without_branches
from paretoprune.pruning.surgery.equivalence import EquivalenceCheck
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import canonical_ratios, prune, replay, resolve
from paretoprune.pruning.training.distillation import distil
from paretoprune.pruning.training.teacher import check_teacher
from paretoprune.pruning.yolo.image_size import check_image_size, check_shape, stride_of
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.output_distribution import class_weights
from paretoprune.pruning.yolo.saving import plain_copy, task_of

LOSS_CRITERIA = ("reconstruction", "taylor")  # of one scale in all layers, so that widths can be chosen by them
_HELD_OUT = 8  # one calibration image in so many is not learned from
_SCORED = 128  # images that a criterion looks at, and the refits between two looks; the time grows with them


def check_recovery(how: str) -> None:
    """Raise `PruningError` unless `how` is one of `RECOVERIES`."""
    if how not in RECOVERIES:
        raise PruningError(f"`recover` must be one of {', '.join(RECOVERIES)}, but got '{how}'.")


class Workbench:
    """Prunes and recovers one baseline again and again. Everything costly is made at first use and kept.

    Args:
        model_path: the unpruned checkpoint.
        data: data.yaml for calibration; None where neither the criterion nor the recovery looks at images.
        imgsz: size of the calibration images: a square's side, or height and width, pixels.
        trust_checkpoint: load `model_path` without a look at what it would run.
        device: where importance, refit and recalibration compute ("cpu", "cuda:0").
        gate: entered for whatever it computes, and given up between the parts: a measurement waits for one part.
    """

    def __init__(
        self,
        model_path: str,
        data: str | None = None,
        imgsz: ImageSize = 640,
        device: str = "cpu",
        calibration_images: int = 128,
        importance: str = "reconstruction",
        round_to: int = 8,
        seed: int = 0,
        refit_settings: RefitSettings | None = None,
        trust_checkpoint: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self.model_path, self.data, self.imgsz, self.device = str(model_path), data, imgsz, device
        self.calibration_images, self.importance = calibration_images, importance
        self.round_to, self.seed = round_to, seed
        self.refit_settings = refit_settings or RefitSettings()
        self.trust_checkpoint = trust_checkpoint
        self.gate = gate or NullGate()
        self._first: Workbench | None = None  # see `on` and `at`

    @cached_property
    def turn(self) -> DeviceSlot:
        """The use of the device while it prunes and recovers."""
        return DeviceSlot(self.gate, device_synchronizer(torch_device(self.device)))

    @cached_property
    def model(self) -> nn.Module:
        """The unpruned baseline, float32 on the CPU; never changed."""
        with self.turn:
            model = load_model(self.model_path, self.trust_checkpoint)
        check_image_size(self.imgsz, stride_of(model), self.model_path)
        check_shape(task_of(model), self.imgsz)
        return model

    @cached_property
    def table(self) -> LayerTable:
        with self.turn:
            return build_layer_table(self.model)

    @cached_property
    def branches(self) -> Branches:
        """What can be removed whole."""
        return find_branches(self.model)

    @cached_property
    def calibration(self) -> Calibration:
        if self._first is not None and self._first.imgsz == self.imgsz:
            return self._first.calibration
        if self.data is None:
            raise PruningError("calibration images are needed, but no dataset was given; pass --data DATA.")
        with self.turn:
            images, among = self.calibration_images, self.training_files
            found = load_calibration(self.data, self.model, self.imgsz, images, self.seed, among)
        return replace(found, pause=self.turn.pause)

    @cached_property
    def training_files(self) -> list[str]:
        """All of them, of which the calibration images are drawn; listed once for all sizes."""
        if self._first is not None:
            return self._first.training_files
        assert self.data is not None, "calibration asked for them"
        task = task_of(self.model)
        return training_files(dataset_file(self.data, task), task)

    @cached_property
    def scored_images(self) -> Calibration:
        """The calibration images that a criterion looks at."""
        return self.calibration.spread(_SCORED)

    @cached_property
    def augmented(self) -> TrainingImages:
        """The training images as augmentation changes them."""
        if self._first is not None and self._first.imgsz == self.imgsz:
            return self._first.augmented
        return self._training_images()

    def _training_images(self, changes: Sequence[str] = AUGMENTATIONS) -> TrainingImages:
        if self.data is None:
            raise PruningError("training images are needed, but no dataset was given; pass --data DATA.")
        return TrainingImages(self.data, self.model, self.imgsz, changes)

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """What an error of each class counts, shape (classes,); None: all alike (`output_distribution`)."""
        if self._first is not None:
            return self._first.class_weights
        with self.turn:
            model = copy.deepcopy(self.model).to(self.device)
            return class_weights(model, self.calibration.images, pause=self.turn.pause)

    @cached_property
    def evidence(self) -> Evidence:
        """What the criterion looks at."""
        images = self.scored_images if known_criterion(self.importance).needs_data else None
        return self.evidence_for(self.model, self.table, images)

    def evidence_for(self, network: nn.Module, table: LayerTable, images: Calibration | None) -> Evidence:
        """The same of the network that a cut left; `table` has what is left in it."""
        return Evidence(network, table, images, self.seed, self.device, lambda: self.class_weights)

    @cached_property
    def scores(self) -> np.ndarray:
        """Importance per class, shape (class_count,); those of another process may be set."""
        if self._first is not None and self._first.imgsz != self.imgsz:
            return self._first.scores
        with self.turn:
            return score(self.importance, self.evidence)

    @cached_property
    def loss_scores(self) -> np.ndarray:
        """Loss that each class's removal is estimated to cost, on one scale for all layers, shape (class_count,)."""
        if self.importance == self.loss_criterion:
            return self.scores
        evidence = self.evidence_for(self.model, self.table, self.scored_images)
        with self.turn:
            return score(self.loss_criterion, evidence)

    @cached_property
    def branch_losses(self) -> dict[str, float]:
        """What each removable branch's removal is estimated to cost, on the scale of `loss_scores`."""
        evidence = self.evidence_for(self.model, self.table, self.scored_images)
        with self.turn:
            return branch_losses(evidence, self.branches)

    @property
    def loss_criterion(self) -> str:
        """The criterion that widths are chosen by."""
        return self.importance if self.importance in LOSS_CRITERIA else LOSS_CRITERIA[0]

    def allocated(self, keep: float, of: Unit = "macs") -> dict[str, float] | None:
        """Ratios by layer that leave the share `keep` of the multiply-adds (or params), where the loss suffers least.

        None where even the narrowest widths leave more.
        """
        widths = allocate(self.table, self.loss_scores, self.costs(of), keep, self.round_to)
        return None if widths is None else canonical_ratios(self.table, widths)

    @cached_property
    def geometry(self) -> NetworkGeometry:
        """What plans are judged by before they are applied."""
        with self.turn:
            return read_geometry(self.model, self.table, self.imgsz)

    @cached_property
    def conv_costs(self) -> tuple[Cost, ...]:
        """Multiply-adds of every convolution at full width, for one image of `imgsz`."""
        with self.turn:
            return conv_costs(self.model, self.table, self.imgsz)

    def costs(self, of: Unit) -> tuple[Cost, ...]:
        """What a budget of this unit is spent on."""
        return self.conv_costs if of == "macs" else parameter_costs(self.model, self.table)

    @cached_property
    def images(self) -> torch.Tensor:
        """The images that a recovery looks at, (images, channels, height, width).

        The calibration images; where the training images are fewer than were asked for, augmented ones besides. COCO's
        yolov8n, 45 % fewer multiply-adds: 128 images 0.125 mAP50-95, 384 augmented ones besides 0.136.
        """
        if self._first is not None and self._first.imgsz == self.imgsz:
            return self._first.images
        plain, asked = self.calibration.images, self.calibration_images
        if len(plain) < asked and self.data is not None:
            with self.turn:
                more = (number % len(plain) for number in range(asked - len(plain)))
                plain = torch.cat([plain, self.augmented.take(more, self.seed)])
        return images_that_fit(self.model, plain, self.refit_settings.memory_gb)

    @cached_property
    def targets(self) -> Targets:
        """The baseline's answers that refits aim at, with the images that it answered."""
        settings, pause = self.refit_settings, self.turn.pause
        return record_targets(
            self.model, self.table, self.images, settings, self.seed, pause, self.device, lambda: self.class_weights
        )

    @cached_property
    def equivalence(self) -> EquivalenceCheck:
        """What every pruned network is compared by with the masked baseline."""
        return EquivalenceCheck(self.model, self.imgsz)

    def prune(self, plan: Plan | Mapping[str, float]) -> tuple[nn.Module, Plan]:
        """Apply ratios (names or patterns) or a plan; one that records its kept channels gives that very network.

        Branches leave besides. Ratios and kept channels go by the names that the unpruned network has. The plan that
        comes back is for the same input size and precision as the one that was given.

        Raises:
            PlanError: the plan does not fit the model.
            NotEquivalentError: the pruned network does not compute what the masked baseline does.
        """
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        branches = self.branches.checked(plan.branches)
        with self.turn:
            if plan.kept:
                pruned, applied = replay(self.model, self.table, plan)
            else:
                widths = resolve(self.table, plan.ratios, self.round_to)
                pruned, applied = prune(self.model, self.table, widths, self.scores)
            checked = self._checked(pruned, applied, branches)
            return pruned, replace(checked, imgsz=plan.imgsz, precision=plan.precision)

    def _checked(self, pruned: nn.Module, applied: Plan, branches: tuple[str, ...]) -> Plan:
        """Remove the branches from a pruned network, in place, and compare it with the masked baseline."""
        cut_branches(pruned, self.branches, branches)
        applied = without_branches(applied, self.branches, branches)
        self.equivalence.check(pruned, applied.kept, branches)
        return applied

    def shortcomings(self) -> list[str]:
        """What the calibration images lack for a good recovery, a line each (`pruning.data.calibration`)."""
        with self.turn:
            try:
                return shortcomings(self.calibration, self.model.to(self.device))
            finally:
                self.model.to("cpu")

    def check_surgery(self, plan: Plan | Mapping[str, float]) -> None:
        """Apply a plan to channels drawn at random, which needs no images, and compare; raises as `prune` does."""
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        branches = self.branches.checked(plan.branches)
        scores = np.random.default_rng(self.seed).random(self.table.class_count)
        with self.turn:
            pruned, applied = prune(self.model, self.table, resolve(self.table, plan.ratios, self.round_to), scores)
            self._checked(pruned, applied, branches)

    def recover(
        self,
        pruned: nn.Module,
        plan: Plan,
        how: str = "refit",
        names: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Regain accuracy without a label, in place; the network comes back on the device it was on.

        Only distillation takes gradient steps. `names`: of the table's layers that `pruned` has under another name for
        another reason than the plan's branches, table's name -> its own. `report` is told how far distillation is.
        """
        check_recovery(how)
        if how == "none":
            return
        if "distill" in how:
            check_teacher(self.model, self.imgsz)
        home, pause = next(pruned.parameters()).device, self.turn.pause
        gone, others = self.branches.removed_modules(plan.branches), names or {}

        def renamed(name: str) -> str | None:
            return others.get(name) or name_after(name, gone)

        with self.turn:
            pruned.to(self.device).eval()
            if "refit" in how:
                kept = {new: indices for name, indices in plan.kept.items() if (new := renamed(name)) is not None}
                targets = self.targets.renamed(renamed)
                refit(pruned, self.table.renamed(renamed), kept, targets, self.refit_settings, pause)
            if "bn" in how:
                recalibrate_batch_norm(pruned, self.images, pause=pause)
            if "distill" in how:
                teacher = plain_copy(self.model).to(self.device).eval()
                seen = self.calibration
                held_out, taken = seen.images[::_HELD_OUT], set(seen.files[::_HELD_OUT])
                mirrored = self._training_images(FLIPS)  # as of a short fine-tuning, see `training.single_device`
                numbers = [number for number, file in enumerate(mirrored.files) if file not in taken]
                distil(
                    pruned, teacher, mirrored.take, numbers, held_out, self.class_weights, self.seed,
                    pause=pause, report=report,
                )  # fmt: skip
            pruned.to(home)

    def on(self, checkpoint: str) -> Workbench:
        """The same with another baseline, made of this one's: it looks at the same images, in the same turn."""
        other = Workbench(
            checkpoint,
            self.data,
            self.imgsz,
            self.device,
            self.calibration_images,
            self.importance,
            self.round_to,
            self.seed,
            self.refit_settings,
            self.trust_checkpoint,
            self.gate,
        )
        other.turn, other._first = self.turn, self._first or self
        return other

    def at(self, imgsz: ImageSize) -> Workbench:
        """The same baseline on images of another size; importance stays that of this one's size."""
        check_image_size(imgsz, stride_of(self.model), self.model_path)
        check_shape(task_of(self.model), imgsz)
        other = self.on(self.model_path)
        other.imgsz, other._first = imgsz, self
        other.model, other.table = self.model, self.table
        return other

    def free_cached_memory(self) -> None:
        """Give the device memory that torch keeps for later back, for other processes on the same GPU."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
