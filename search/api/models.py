"""One model: its layers, and the network that is left of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.image_size import ImageSize
from paretoprune.base.messages import Listener, heard_by, note, speaking
from paretoprune.pruning.names import STRUCTURAL
from paretoprune.pruning.plan import Plan, check_ratio
from paretoprune.search.api.overwriting import check_output
from paretoprune.search.api.prune_budget import Goal, cut_to_goal, goal_of, prediction_row
from paretoprune.search.api.prune_estimate import Measured, by_measuring, check_cuts, foretell, from_run
from paretoprune.search.errors import ArgumentError, SearchError
from paretoprune.search.sweep.preflight import check_model_file

if TYPE_CHECKING:
    from paretoprune.pruning.budget.budget import BlockCut
    from paretoprune.pruning.strategies import Strategy
    from paretoprune.pruning.workbench import Workbench
    from paretoprune.results.analysis.frames import DataFrame

PLAN, SESSIONS = ".plan.json", ".sessions"  # beside OUT.pt
DEFAULT_SIZE = 640  # pixels; Ultralytics' own

LAYER = ("layer", "block", "group", "out_channels", "prunable", "reason")

Ratios = Mapping[str, float]


@dataclass(frozen=True)
class Layers:
    """What of a model can be removed. ``rows``: one for each convolution (``kind`` "layer"), then one for each branch
    ("branch"); ``share``: of the convolutions' weights that can be pruned; ``classes``: the model's names."""

    rows: list[dict[str, Any]]
    groups: int
    share: float
    classes: tuple[str, ...]


def layer_rows(model: str | Path, trust_checkpoint: bool = False) -> Layers:
    """Block, group and channels of each convolution and branch, and for what cannot be pruned the reason."""
    check_model_file(str(model))
    from paretoprune.pruning.graph.branches import find_branches
    from paretoprune.pruning.graph.layers import prunable_share
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.yolo.loading import load_model

    network = load_model(str(model), trust_checkpoint)
    table = build_layer_table(network)
    rows = [{**row, "kind": "layer", "removable": None} for row in table.to_rows()]
    rows += [{**row, "kind": "branch"} for row in find_branches(network).to_rows()]
    names: Any = network.names
    return Layers(rows, len(table.groups), prunable_share(network, table), tuple(map(str, names.values())))


def layers(model: str | Path, *, trust_checkpoint: bool = False) -> DataFrame:
    """The convolutions of a checkpoint as a data frame: layer, block, group, out_channels, prunable, reason."""
    from paretoprune.results.analysis.frames import frame_of

    rows = layer_rows(model, trust_checkpoint).rows
    return frame_of([{name: row[name] for name in LAYER} for row in rows if row["kind"] == "layer"])


@dataclass
class Pruned:
    """A pruned network that nothing was written of yet.

    ``model``: stock classes only, float32, on the CPU. ``plan``: its ratios and kept channels. ``made_with``:
    criterion, recovery and budget. ``skipped``: (layer, reason) of what another strategy than the structural one left
    whole; ``sessions``: the names of its intermediate networks; ``notes``: what else it says. ``blocks``: what each
    block lost to a budget.
    """

    model: Any
    plan: Plan
    made_with: dict[str, str]
    baseline: Any
    imgsz: ImageSize
    reads: tuple[str | Path | None, ...]
    layers_cut: int
    figures: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[BlockCut, ...] = ()
    strategy: str = STRUCTURAL
    skipped: tuple[tuple[str, str], ...] = ()
    notes: Mapping[str, float | str] = field(default_factory=dict)
    sessions: tuple[Path, ...] = ()
    scratch: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Pruned({', '.join(f'{name}={value!r}' for name, value in self.summary().items())})"

    def summary(self) -> dict[str, Any]:
        """What was removed, how it was made, parameters and GFLOPs before and after, and what a budget left."""
        branches = {"branches_removed": list(self.plan.branches)} if self.plan.branches else {}
        return {"layers_cut": self.layers_cut, **branches, **self.made_with, **self._sizes, **self.figures}

    @cached_property
    def _sizes(self) -> dict[str, float]:
        from paretoprune.pruning.yolo.loading import model_stats

        before, after = model_stats(self.baseline, self.imgsz), model_stats(self.model, self.imgsz)
        return {
            "params_m": after.params_m,
            "params_m_before": before.params_m,
            "gflops": after.gflops,
            "gflops_before": before.gflops,
        }

    def save(self, output: str | Path) -> Path:
        """Write the checkpoint (loads in stock Ultralytics) and its ``.plan.json`` beside it; returns its path.

        Intermediate networks of a strategy go to ``.sessions`` beside it.
        """
        from paretoprune.pruning.yolo.saving import save_checkpoint

        target = Path(output)
        check_target(target, self.reads, self.strategy)
        save_checkpoint(self.model, target, {"imgsz": self.imgsz})
        self.plan.save(target.with_suffix(PLAN), self.made_with)
        if self.sessions:
            folder = target.with_suffix(SESSIONS)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for path in self.sessions:
                shutil.copyfile(path, folder / path.name)
        return target


def check_target(output: Path, reads: tuple[str | Path | None, ...], strategy: str) -> None:
    """:class:`ArgumentError` where ``output`` is no .pt file, or what is written would replace what must stay."""
    if output.suffix != ".pt":
        raise ArgumentError(f"`output` must name a .pt file, got {output}")
    sessions = [(output.with_suffix(SESSIONS), "session-*.pt")] if strategy != STRUCTURAL else []
    check_output([output, output.with_suffix(PLAN)], reads, sessions)


@dataclass(frozen=True)
class PruneJob:
    """What :func:`prune` is asked for, see there; checked when it is made, before anything heavy is loaded."""

    model: str | Path
    ratio: float | None = None
    plan: Plan | Ratios | str | Path | None = None
    keep_macs: float | None = None
    keep_params: float | None = None
    speedup: float | None = None
    data: str | Path | None = None
    importance: str | None = None
    recover: str | None = None
    strategy: str = STRUCTURAL
    round_to: int = 8
    imgsz: ImageSize | None = None
    calibration_images: int = 512
    seed: int = 0
    measure: int | None = None
    run: str | Path | None = None
    device: str | None = None
    trust_checkpoint: bool = False
    classes: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        goals = (self.ratio, self.plan, self.keep_macs, self.keep_params, self.speedup)
        count = sum(given is not None for given in goals)
        if count > 1 or (count == 0 and self.classes is None):
            raise ArgumentError("give exactly one of `ratio`, `plan`, `keep_macs`, `keep_params` and `speedup`")
        if count == 0 and self.recover not in (None, "none"):
            raise ArgumentError(
                f"`classes` alone loses nothing to regain, but got `recover` {self.recover}: leave it out"
            )
        if self.measure is not None and self.run is not None:
            raise ArgumentError("give either `measure` or `run`")
        if self.goal is not None and self.data is None:
            raise ArgumentError(
                "`keep_macs`, `keep_params` and `speedup` choose widths by what images show of each layer: give `data`"
            )
        if self.goal is not None and self.strategy != STRUCTURAL:
            raise ArgumentError(
                f"a budget is for the structural strategy, got `strategy` {self.strategy}; give `ratio`"
            )
        if self.recover not in (None, "none") and self.data is None:
            raise ArgumentError(f"`recover` {self.recover} looks at images: give `data`, or `recover` none")
        _ = self.wanted  # read and checked

    @cached_property
    def goal(self) -> Goal | None:
        """The budget, where one is given."""
        return goal_of(self.keep_macs, self.keep_params, self.speedup)

    @cached_property
    def wanted(self) -> Plan | Ratios:
        """What to remove; nothing where a budget is to say it."""
        if self.ratio is not None:
            check_ratio("`ratio`", self.ratio)
            return {"*": self.ratio}
        plan = Plan.load(self.plan) if isinstance(self.plan, (str, Path)) else self.plan or {}
        if isinstance(plan, Plan) and plan.imgsz is not None and self.imgsz is not None:
            return replace(plan, imgsz=self.imgsz)  # it is wanted for other images than those it was made for
        return plan

    @property
    def size(self) -> ImageSize:
        """Of the images, pixels: the one given, else the plan's, else 640."""
        return self.imgsz or (self.wanted.imgsz if isinstance(self.wanted, Plan) else None) or DEFAULT_SIZE

    @property
    def recovery(self) -> str:
        """How to recover."""
        return self.recover or ("refit" if self.data and not self.is_whole else "none")

    @property
    def is_whole(self) -> bool:
        """Whether no channel is removed, but classes are."""
        return self.goal is None and self.ratio is None and self.plan is None

    @property
    def reads(self) -> tuple[str | Path | None, ...]:
        """Files that must not be written over."""
        return (self.model, self.data, self.plan if isinstance(self.plan, (str, Path)) else None)

    @cached_property
    def place(self) -> str:
        """The device that was given, else the first GPU, else the CPU."""
        from paretoprune.cluster.devices import default_device

        return self.device or default_device()

    def run_pruning(self) -> Pruned:
        """The network."""
        if self.goal is None and (self.measure is not None or self.run is not None):
            raise ArgumentError("`measure` and `run` are for `speedup`, and for an estimate")
        check_model_file(str(self.model))
        with speaking(at_once=self.goal is not None) as say, self._inputs() as inputs:
            say(f"loading {self.model}")
            strategy = None if self.strategy == STRUCTURAL else _strategy(self.strategy)
            bench = self._open("reconstruction" if self.data else "l2", *inputs)
            if self.goal is not None:
                cut, measured = cut_to_goal(bench, self.goal, self.recovery, *self._timing(), say)
                kept = {"macs_kept": round(cut.macs_kept, 4), "params_kept": round(cut.params_kept, 4)}
                figures = {**kept, **prediction_row(bench, cut, measured)}
                return self._made(bench, cut.model, cut.plan, figures=figures, blocks=cut.blocks)
            if self.is_whole:
                return self._made(bench, bench.model, Plan({}))
            say(f"removing channels of {self.model}")
            if strategy is not None:
                return self._by_strategy(bench, strategy)
            model, plan = bench.prune(self.wanted)
            say(f"recovering ({self.recovery})")
            bench.recover(model, plan, how=self.recovery, report=say)
            return self._made(bench, model, plan)

    def run_estimate(self) -> dict[str, Any]:
        """What the network would be, without recovering it: the row that ``prune --dry-run`` prints."""
        if self.strategy != STRUCTURAL:
            raise ArgumentError(f"an estimate knows the structural strategy only, got `strategy` {self.strategy}")
        if self.is_whole:
            raise ArgumentError("an estimate is of removed channels: give `ratio`, `plan` or a budget beside `classes`")
        check_model_file(str(self.model))
        with speaking(at_once=self.goal is not None or self.measure is not None) as say, self._inputs() as inputs:
            say(f"loading {self.model}")
            bench = self._open("reconstruction" if self.data and self.goal else "l2", *inputs)
            kept: dict[str, float] = {}
            wanted, measured = self.wanted, None
            if self.goal is not None:
                cut, measured = cut_to_goal(bench, self.goal, self.recovery, *self._timing(), say)
                kept = {"macs_kept": round(cut.macs_kept, 4), "params_kept": round(cut.params_kept, 4)}
                wanted = cut.plan
            return {**kept, **foretell(bench, wanted, measured or self._measured(bench, wanted, say))}

    def _open(self, criterion: str, model: str, data: str | None) -> Workbench:
        from paretoprune.cluster.device_lock import DeviceLock
        from paretoprune.cluster.devices import device_key
        from paretoprune.pruning.data.dataset import check_dataset
        from paretoprune.pruning.importance import known_criterion
        from paretoprune.pruning.workbench import Workbench

        bench = Workbench(
            model,
            data,
            self.size,
            self.place,
            calibration_images=self.calibration_images,
            importance=known_criterion(self.importance or criterion).name,
            round_to=self.round_to,
            seed=self.seed,
            trust_checkpoint=self.trust_checkpoint,
            gate=DeviceLock(device_key(self.place)),
        )
        if data is not None:
            for remark in check_dataset(data, bench.model):
                note(remark)
        return bench

    @contextmanager
    def _inputs(self) -> Iterator[tuple[str, str | None]]:
        """The checkpoint and the dataset to work with: the given ones, or what is left of them with some classes."""
        data = None if self.data is None else str(self.data)
        if self.classes is None:
            yield str(self.model), data
            return
        from paretoprune.search.config.classes import restrict

        with tempfile.TemporaryDirectory(prefix="paretoprune-classes-") as scratch:
            yield restrict(str(self.model), data, self.classes, Path(scratch), self.trust_checkpoint)

    def _timing(self) -> tuple[int | None, Path | None, str]:
        return self.measure, None if self.run is None else Path(self.run), self.place

    def _measured(self, bench: Workbench, wanted: Any, say: Listener) -> Measured | None:
        """Timed plans of a run, or timed now, or none."""
        measure, run, place = self._timing()
        if run is not None:
            return from_run(run, bench.geometry)
        return None if measure is None else by_measuring(bench, wanted, measure, place, say)

    def _by_strategy(self, bench: Workbench, strategy: Strategy) -> Pruned:
        """Prune by another strategy than the structural one, without an epoch."""
        wanted = self.wanted
        ratios = wanted.ratios if isinstance(wanted, Plan) else wanted
        if isinstance(wanted, Plan) and wanted.branches:
            raise ArgumentError(
                f"a plan that removes branches is for the structural strategy, got `strategy` {strategy.name}"
            )
        scratch = tempfile.TemporaryDirectory(prefix="paretoprune-sessions-")
        outcome = strategy.run(bench, ratios, 0, Path(scratch.name), _untuned, self.recovery)
        if not outcome.layers:
            reason = outcome.skipped[0][1] if outcome.skipped else "the ratios are too small"
            raise SearchError(f"strategy {strategy.name} found no layer to prune ({reason}); choose another --strategy")
        return self._made(
            bench,
            outcome.model,
            outcome.plan,
            layers_cut=len(outcome.layers),
            strategy=strategy.name,
            skipped=outcome.skipped,
            notes=outcome.notes,
            sessions=outcome.sessions,
            scratch=scratch,
        )

    def _made(self, bench: Workbench, model: Any, plan: Plan, **more: Any) -> Pruned:
        from paretoprune.pruning.evaluation.evaluator import refuse_non_finite
        from paretoprune.pruning.yolo.loading import load_model

        if not self.is_whole:
            check_cuts(plan)
        refuse_non_finite(model)
        made = {} if self.is_whole else {"importance": bench.importance, "recovery": self.recovery}
        names: Any = bench.model.names
        made |= {"classes": ", ".join(names.values())} if self.classes is not None else {}
        made |= {"budget": str(self.goal)} if self.goal else {}
        facts = {"layers_cut": len(plan.ratios), **more}
        before = bench.model if self.classes is None else load_model(str(self.model), self.trust_checkpoint)
        return Pruned(model, plan, made, before, bench.imgsz, self.reads, **facts)


def prune(
    model: str | Path,
    *,
    ratio: float | None = None,
    plan: Plan | Ratios | str | Path | None = None,
    keep_macs: float | None = None,
    keep_params: float | None = None,
    speedup: float | None = None,
    on_progress: Listener | None = None,
    **options: Any,
) -> Pruned:
    """Remove channels from a checkpoint; ``.save(path)`` of the result writes it.

    Exactly one of these says how many, none where ``classes`` alone are to go: ``ratio``, the fraction removed from
    every prunable layer, in [0, 1); ``plan``, a :class:`Plan`, its file, or ratios by layer or pattern; ``keep_macs``
    or ``keep_params``, the share of the multiply-adds or parameters that stays, in (0, 1]; ``speedup``, how many times
    as fast, predicted from plans that are timed now (``measure`` of them) or from those of a ``run``.

    Options, as the command's: ``data`` (data.yaml with images to look at; without it nothing is recovered),
    ``importance``, ``recover``, ``strategy``, ``round_to``, ``imgsz``, ``calibration_images``, ``seed``, ``measure``,
    ``run``, ``device``, ``trust_checkpoint``, ``classes`` (names or numbers of those that are kept). ``on_progress`` is
    called with lines that else go to stderr.

    Raises :class:`paretoprune.UserError`, a ValueError, for everything that a person can put right.
    """
    goals = {"ratio": ratio, "plan": plan, "keep_macs": keep_macs, "keep_params": keep_params, "speedup": speedup}
    with heard_by(on_progress):
        return prune_job(model, **goals, **options).run_pruning()


def estimate(model: str | Path, *, on_progress: Listener | None = None, **options: Any) -> dict[str, Any]:
    """What :func:`prune` with these options would give, without recovering: widths, parameters, GFLOPs.

    Its latency is predicted where plans are timed now (``measure=12``) or were by a run on this model (``run=...``).
    """
    with heard_by(on_progress):
        return prune_job(model, **options).run_estimate()


def prune_job(model: str | Path, **options: Any) -> PruneJob:
    """The checked job; :class:`ArgumentError` for an option that there is none of."""
    known = PruneJob.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ArgumentError(f"prune takes {', '.join(list(known)[1:])}, but got `{name}`; leave it out")
    return PruneJob(model, **options)


def _strategy(name: str) -> Strategy:
    """A strategy by its name; an unknown one is an error that names the known ones."""
    from paretoprune.pruning.strategies import get_strategy

    return get_strategy(name)


def _untuned(network: Any, epochs: int, folder: Path) -> Any:
    """The fine-tuning of a strategy that is given no epoch."""
    return network
