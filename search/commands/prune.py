"""The command prune: one plan, by hand or to a budget."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from paretoprune.pruning.names import RECOVERIES, STRUCTURAL
from paretoprune.search.commands.options import FILE, FOLDER, SIZE, check_output, format_option, trust_option
from paretoprune.search.commands.output import echo, emit, emit_one
from paretoprune.search.errors import SearchError

PLAN, SESSIONS = ".plan.json", ".sessions"  # beside OUT.pt


@click.command()
@click.argument("model", type=FILE)
@click.option("--ratio", type=float, help="Fraction of channels removed from every prunable layer, in [0, 1).")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan.json, in place of --ratio.")
@click.option(
    "--keep-macs", type=float, help="Share of the multiply-adds that stays, in (0, 1]; widths by sensitivity."
)
@click.option("--keep-params", type=float, help="Share of the parameters that stays, alike.")
@click.option("--speedup", type=float, help="At least so many times as fast, as plans timed now (or --run) predict it.")
@click.option("--data", type=FILE, help="data.yaml with images to look at; without it nothing is recovered.")
@click.option("--importance", help="Criterion for the channels.  [default: reconstruction with --data, else l2]")
@click.option("--recover", type=click.Choice(RECOVERIES), help="Afterwards.  [default: refit with --data, else none]")
@click.option("--strategy", default=STRUCTURAL, show_default=True, help="sequential, adapter, skip or mask; no epochs.")
@click.option("--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Widths in steps of this.")
@click.option("--imgsz", type=SIZE, default=640, show_default=True, help="Side of the input, pixels.")
@click.option(
    "--calibration-images", type=click.IntRange(min=1), default=512, show_default=True, help="Images looked at."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the choice of images.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The pruned checkpoint, OUT.pt.")
@click.option("--dry-run", is_flag=True, help="Write nothing: say what the plan brings.")
@click.option(
    "--measure", type=click.IntRange(min=6), help="Dry run, --speedup: foretell latency from so many plans timed now."
)
@click.option("--run", type=FOLDER, help="Dry run, --speedup: foretell latency from this run's trials.")
@click.option("--device", help="cpu, cuda:0, ...  [default: the first GPU, else cpu]")
@trust_option
@format_option
def prune(
    model: str,
    ratio: float | None,
    plan: Path | None,
    keep_macs: float | None,
    keep_params: float | None,
    speedup: float | None,
    data: str | None,
    importance: str | None,
    recover: str | None,
    strategy: str,
    round_to: int,
    imgsz: int,
    calibration_images: int,
    seed: int,
    output: Path | None,
    dry_run: bool,
    measure: int | None,
    run: Path | None,
    device: str | None,
    trust_checkpoint: bool,
    form: str,
) -> None:
    """Remove channels from MODEL; writes OUT.pt (loads in stock Ultralytics) and OUT.plan.json beside it."""
    if sum(given is not None for given in (ratio, plan, keep_macs, keep_params, speedup)) != 1:
        raise click.UsageError("give exactly one of --ratio, --plan, --keep-macs, --keep-params and --speedup")
    from paretoprune.search.commands.prune_budget import goal_of

    goal = goal_of(keep_macs, keep_params, speedup)
    _check_dry_run(dry_run, measure, run, strategy, output, speedup)
    _check_goal(goal, data, strategy)
    recover = _recovery(recover, data)
    wanted: Any = _ratios(ratio, plan) if goal is None else None
    from paretoprune.search.sweep.preflight import check_model_file

    check_model_file(model)
    if output is not None:
        sessions = [(output.with_suffix(SESSIONS), "session-*.pt")] if strategy != STRUCTURAL else []
        check_output([output, output.with_suffix(PLAN)], [model, data, plan], sessions)
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import device_key
    from paretoprune.pruning.data.dataset import check_dataset
    from paretoprune.pruning.importance import known_criterion
    from paretoprune.pruning.workbench import Workbench

    chosen = None if strategy == STRUCTURAL else _strategy(strategy)
    criterion = known_criterion(importance or ("reconstruction" if data and (goal or not dry_run) else "l2"))
    bench = Workbench(
        model,
        data,
        imgsz,
        _device(device),
        calibration_images=calibration_images,
        importance=criterion.name,
        round_to=round_to,
        seed=seed,
        trust_checkpoint=trust_checkpoint,
        gate=DeviceLock(device_key(_device(device))),
    )
    if data is not None:
        for remark in check_dataset(data, bench.model):
            click.echo(remark, err=True)
    if goal is not None:
        _cut_to_goal(bench, goal, recover, (measure, run, _device(device)), output, form)
        return
    if output is None:  # a dry run
        _foretell(bench, wanted, _measured(bench, wanted, measure, run, _device(device)), {}, form)
        return
    if chosen is not None:
        emit_one(_by_strategy(bench, chosen, wanted, recover, imgsz, output, form), form)
        return
    pruned, applied = bench.prune(wanted)
    bench.recover(pruned, applied, how=recover)
    emit_one(_written(bench, pruned, applied, recover, imgsz, output), form)


def _recovery(recover: str | None, data: str | None) -> str:
    """How to recover; what looks at images is refused without data."""
    if recover not in (None, "none") and data is None:
        raise click.UsageError(f"--recover {recover} looks at images: give --data, or --recover none")
    return recover or ("refit" if data else "none")


def _ratios(ratio: float | None, plan: Path | None) -> Any:
    """What to remove, checked before anything heavy is loaded."""
    from paretoprune.pruning.plan import Plan, check_ratio

    if plan is not None:
        return Plan.load(plan)
    check_ratio("--ratio", ratio)
    return {"*": ratio}


def _check_goal(goal: Any, data: str | None, strategy: str) -> None:
    """A budget needs images, and channels that leave as the structural strategy takes them."""
    if goal is not None and data is None:
        raise click.UsageError(
            "--keep-macs, --keep-params and --speedup choose widths by what images show of each layer: give --data"
        )
    if goal is not None and strategy != STRUCTURAL:
        raise click.UsageError(f"a budget is for the structural strategy, got --strategy {strategy}; give --ratio")


def _check_dry_run(
    dry_run: bool, measure: int | None, run: Path | None, strategy: str, output: Path | None, speedup: float | None
) -> None:
    """Either a dry run or a file to write, each with its own options only."""
    if dry_run and output is not None:
        raise click.UsageError("--dry-run writes nothing: leave -o out")
    if dry_run and strategy != STRUCTURAL:
        raise click.UsageError(f"--dry-run knows the structural strategy only, got --strategy {strategy}")
    if measure is not None and run is not None:
        raise click.UsageError("give either --measure or --run")
    if not dry_run and speedup is None and (measure is not None or run is not None):
        raise click.UsageError("--measure and --run belong to --dry-run or --speedup")
    if not dry_run and output is None:
        raise click.UsageError("give -o OUT.pt, or --dry-run to write nothing")
    if output is not None and output.suffix != ".pt":
        raise click.UsageError(f"-o must name a .pt file, got {output}")


def _measured(bench: Any, wanted: Any, measure: int | None, run: Path | None, device: str) -> Any:
    """Timed plans of a run, or timed now, or none."""
    from paretoprune.search.commands.prune_estimate import by_measuring, from_run

    if run is not None:
        return from_run(run, bench.geometry)
    return None if measure is None else by_measuring(bench, wanted, measure, device)


def _cut_to_goal(
    bench: Any, goal: Any, recover: str, timing: tuple[int | None, Path | None, str], output: Path | None, form: str
) -> None:
    """Cut to a budget and write the network, or say what it would be; ``timing``: --measure, --run, the device."""
    from paretoprune.search.commands.prune_budget import cut_to_goal, prediction_row

    cut, measured = cut_to_goal(bench, goal, recover, *timing)
    kept = {"macs_kept": round(cut.macs_kept, 4), "params_kept": round(cut.params_kept, 4)}
    if output is None:
        _foretell(bench, cut.plan, measured or _measured(bench, cut.plan, *timing), kept, form)
        return
    row = _written(bench, cut.model, cut.plan, recover, bench.imgsz, output, str(goal))
    emit_one({**row, **kept, **prediction_row(bench, cut, measured)}, form)


def _foretell(bench: Any, wanted: Any, measured: Any, kept: Mapping[str, float], form: str) -> None:
    """Print what a plan brings; the latency from timed plans, where there are any; ``kept``: what a budget left."""
    from paretoprune.search.commands.prune_estimate import foretell

    row = {**kept, **foretell(bench, wanted, measured)}
    if form == "table":
        widths = row.pop("widths")
        emit_one(row, form)
        echo()
        emit(widths, form, ("group", "channels", "width"))
    else:
        emit_one(row, form)


def _device(given: str | None) -> str:
    """What was asked for, else the first GPU, else the CPU."""
    from paretoprune.cluster.devices import default_device

    return given or default_device()


def _strategy(name: str) -> Any:
    """A strategy by its name; an unknown one is an error that names the known ones."""
    from paretoprune.pruning.strategies import get_strategy

    return get_strategy(name)


def _by_strategy(
    bench: Any, strategy: Any, wanted: Any, recover: str, imgsz: int, output: Path, form: str
) -> Mapping[str, Any]:
    """Prune by another strategy than the structural one, without an epoch; intermediate networks go to OUT.sessions."""
    from paretoprune.pruning.plan import Plan

    ratios = wanted.ratios if isinstance(wanted, Plan) else wanted
    output.parent.mkdir(parents=True, exist_ok=True)
    # A fresh folder: sessions that an earlier call left would be taken up again.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as scratch:
        outcome = strategy.run(bench, ratios, 0, Path(scratch), _untuned, recover)
        if not outcome.layers:
            reason = outcome.skipped[0][1] if outcome.skipped else "the ratios are too small"
            raise SearchError(f"strategy {strategy.name} found no layer to prune ({reason}); choose another --strategy")
        sessions = output.with_suffix(SESSIONS)
        if outcome.sessions:
            shutil.rmtree(sessions, ignore_errors=True)
            sessions.mkdir()
            for path in outcome.sessions:
                shutil.move(path, sessions / path.name)
    skipped = [{"layer": layer, "reason": reason} for layer, reason in outcome.skipped]
    return {
        **_written(bench, outcome.model, outcome.plan, recover, imgsz, output),
        "layers_cut": len(outcome.layers),
        "strategy": strategy.name,
        "sessions": [str(sessions / path.name) for path in outcome.sessions],
        "skipped": len(skipped) if form == "table" else skipped,
        "notes": "; ".join(f"{key} {value}" for key, value in outcome.notes.items()),
    }


def _untuned(network: Any, epochs: int, folder: Path) -> Any:
    """The fine-tuning of a strategy that is given no epoch."""
    return network


def _written(
    bench: Any, pruned: Any, plan: Any, recover: str, imgsz: int, output: Path, budget: str | None = None
) -> Mapping[str, Any]:
    """Save the network and its plan, and say what changed and how it was made."""
    from paretoprune.pruning.evaluation.evaluator import refuse_non_finite
    from paretoprune.pruning.yolo.loading import model_stats
    from paretoprune.pruning.yolo.saving import save_checkpoint
    from paretoprune.search.commands.prune_estimate import check_cuts

    check_cuts(plan)
    refuse_non_finite(pruned)
    plan_path = output.with_suffix(PLAN)
    made = {"importance": bench.importance, "recovery": recover} | ({"budget": budget} if budget else {})
    save_checkpoint(pruned, output, {"imgsz": imgsz})
    plan.save(plan_path, made)
    before, after = model_stats(bench.model, imgsz), model_stats(pruned, imgsz)
    return {
        "checkpoint": str(output),
        "plan": str(plan_path),
        "layers_cut": len(plan.ratios),
        **made,
        "params_m": after.params_m,
        "params_m_before": before.params_m,
        "gflops": after.gflops,
        "gflops_before": before.gflops,
    }
