"""Skip: remove channels as one would without knowing the graph, and leave whole what then no longer fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretoprune.base.errors import first_line
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.strategies.common import conv_of, in_turn, left_whole, touched, tuned
from paretoprune.pruning.strategies.cutting import cut_inputs, cut_outputs
from paretoprune.pruning.surgery.cloning import clone
from paretoprune.pruning.surgery.equivalence import set_mode
from paretoprune.pruning.surgery.surgery import choose_kept, resolve
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.saving import plain_copy

_PROBE_SIZE = 128  # pixels; which channels fit does not depend on it


class Skip:
    """Layer by layer: the convolution, its batch norm and its direct consumer; undone where a forward pass then fails.

    The direct consumer is taken to be the next convolution, in execution order, that reads the layer's width. Layers
    of which the layer table says that they cannot lose channels are not tried: some of them would pass the forward
    pass and be wrong (a head views what it gets in a shape of its own).
    """

    name = "skip"
    exact = False

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
        """See `Strategy.run`."""
        table = bench.table
        widths = resolve(table, ratios, bench.round_to)
        stays = choose_kept(table, widths, bench.scores)
        wanted = set(touched(table, ratios))
        model, cut, kept, why = plain_copy(bench.model), {}, {}, {}
        for layer, conv in conv_of(table).items():  # in execution order
            group = table.group_of.get(layer)
            if group is None or group.id not in widths or layer not in wanted:
                continue
            bench.turn.pause()
            indices = tuple(int(i) for i in stays[table.convs[conv].outputs].nonzero()[0])
            candidate = clone(model, {})
            _remove_naively(candidate, table, conv, indices)
            reason = first_mismatch(candidate)
            if reason:
                why[layer] = reason  # the candidate is dropped: that is the undoing
            else:
                model, kept[conv] = candidate, indices
                cut[layer] = round(1 - widths[group.id] / group.channels, 6)
        plan = Plan(dict(sorted(cut.items())), kept)
        bench.recover(model, plan, recover)
        model = tuned(bench, tune, model, epochs, folder / "tune")
        return Outcome(self.name, plain_copy(model), plan, tuple(cut), left_whole(table, ratios, cut, why), epochs)


def _remove_naively(model: nn.Module, table: LayerTable, conv: str, kept: tuple[int, ...]) -> None:
    """Cut the convolution's outputs and what looks like its consumer's inputs."""
    width = _convolution(model, conv).out_channels
    order = list(table.convs)
    behind = (_convolution(model, name) for name in order[order.index(conv) + 1 :])
    consumer = next((c for c in behind if c.in_channels == width), None)
    cut_outputs(model.get_submodule(table.layer_of[conv]), kept)
    if consumer is not None:
        cut_inputs(consumer, kept)


def _convolution(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def first_mismatch(model: nn.Module) -> str:
    """The module in which a forward pass fails and the first line of its error; empty where it passes.

    Passes are run as in inference and along the branches that only training takes. The model is not touched.
    """
    model = clone(model, {})
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            continue
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(lambda *_: void(inside.pop()))
    image = torch.rand(1, input_channels(model), _PROBE_SIZE, _PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        set_mode(model, training)  # one image of one position has no variance
        try:
            with torch.no_grad():
                model(image)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"{inside[-1] or 'the model'}: {first_line(error)}"
    return ""


def void(_: object) -> None:
    """Drop a value: what a forward hook returns would replace the module's output."""
