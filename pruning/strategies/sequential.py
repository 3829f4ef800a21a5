"""Sequential: the first prunable layer of one block after the other, with fine-tuning and a checkpoint in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from paretoprune.pruning.graph.layers import Group
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.strategies.common import in_turn, left_whole, touched, tuned
from paretoprune.pruning.strategies.session_file import Session, Sessions, identity
from paretoprune.pruning.surgery.surgery import resolve
from paretoprune.pruning.workbench import Workbench, check_recovery
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import plain_copy, save_checkpoint

_NOT_FIRST = "only the first layer to prune in a block is cut, here {first}"


@dataclass(frozen=True)
class Step:
    """What one session cuts, and the epochs it may spend. `ratio` leaves the group's planned width exactly."""

    group: Group
    ratio: float
    epochs: int


class Sequential:
    """One session per block: prune, recover, tune its share of the epochs, save; the next block starts from that file.

    What is cut is a whole group (the block's first prunable layer that the ratios touch, and the layers that lose
    their channels with it), so widths stay consistent everywhere. A session is finished once `sessions.json` names it;
    the same call on the same folder goes on behind the last finished one.

    Epochs are shared equally, what is left over goes to the last sessions; a budget below the number of sessions
    leaves the first ones without any, which the notes say.
    """

    name = "sequential"
    exact = True

    @in_turn
    def run(
        self,
        bench: Workbench,
        ratios: Mapping[str, float],
        epochs: int,
        folder: Path,
        tune: Tune,
        recover: str = "refit",
    ) -> Outcome:
        """See `Strategy.run`. Raises PruningError where `folder` holds another sequence's sessions."""
        check_recovery(recover)
        steps = plan_steps(bench, ratios, epochs)
        done = Sessions(folder, identity(bench, [(s.group.name, s.ratio, s.epochs) for s in steps], recover))
        finished = done.read()
        for step in steps[len(finished) :]:
            number = len(finished) + 1
            start = bench if number == 1 else bench.on(str(done.checkpoint(number - 1)))
            model, plan = start.prune({step.group.name: step.ratio})
            start.recover(model, plan, recover)
            model = tuned(bench, tune, model, step.epochs, folder / f"tune-{number}")
            save_checkpoint(model, done.checkpoint(number), {"imgsz": bench.imgsz, "data": bench.data})
            finished.append(Session(step.group.block, step.group.name, step.epochs, plan))
            done.write(finished)
            bench.turn.pause()
        return self._outcome(bench, ratios, steps, finished, done)

    def _outcome(
        self,
        bench: Workbench,
        ratios: Mapping[str, float],
        steps: Sequence[Step],
        finished: Sequence[Session],
        done: Sessions,
    ) -> Outcome:
        # Every session cuts another group, so its kept channels count from the baseline's as well.
        plan = Plan(
            dict(sorted((k, v) for s in finished for k, v in s.plan.ratios.items())),
            {k: v for s in finished for k, v in s.plan.kept.items()},
        )
        paths = tuple(done.checkpoint(k + 1) for k in range(len(finished)))
        model: nn.Module = load_model(paths[-1], bench.trust_checkpoint) if paths else bench.model
        first = {s.group.block: s.group.name for s in steps}
        why = {
            name: _NOT_FIRST.format(first=first[group.block])
            for name in touched(bench.table, ratios)
            if (group := bench.table.group_of.get(name)) is not None and group.block in first
        }
        skipped = left_whole(bench.table, ratios, plan.ratios, why)
        spent = sum(s.epochs for s in finished)
        notes: dict[str, float | str] = {"sessions": len(paths)}
        without = sum(s.epochs == 0 for s in finished)
        if without:
            notes["sessions_without_epochs"] = without
        return Outcome(self.name, plain_copy(model), plan, tuple(plan.ratios), skipped, spent, paths, notes)


def plan_steps(bench: Workbench, ratios: Mapping[str, float], epochs: int) -> list[Step]:
    """The sessions in the order of their blocks. A group counts for the block of its leading layer."""
    widths = resolve(bench.table, ratios, bench.round_to)
    first: dict[int, Group] = {}
    for group in bench.table.groups:
        if group.id in widths:
            first.setdefault(group.block, group)
    chosen = [first[block] for block in sorted(first)]
    shares = share_epochs(epochs, len(chosen))
    return [Step(g, 1 - widths[g.id] / g.channels, share) for g, share in zip(chosen, shares, strict=True)]


def share_epochs(epochs: int, sessions: int) -> list[int]:
    """Epochs per session: equal shares, the rest to the last ones, where most is pruned and most is to be mended."""
    if sessions == 0:
        return []
    share, rest = divmod(epochs, sessions)
    return [share + (k >= sessions - rest) for k in range(sessions)]
