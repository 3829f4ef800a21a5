"""Adapter: every layer is cut alone, and a 1x1 mapping behind it restores the width that its consumers expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv, RepConv

from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies.base import Outcome, Tune
from paretoprune.pruning.strategies.common import conv_of, in_turn, left_whole, touched, tuned
from paretoprune.pruning.strategies.mapping import Cut, fold, insert, reconstruct, renamed
from paretoprune.pruning.strategies.readers import sole_readers
from paretoprune.pruning.surgery.surgery import choose_kept, resolve
from paretoprune.pruning.workbench import Workbench, check_recovery
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.saving import plain_copy

_DEPTHWISE = "a depthwise convolution gives back the channels it reads: a mapping behind it cannot spare any"
_FUSED = "its {parent} is merged into one convolution for inference, and a mapping inside would be lost"


class Adapter:
    """Narrow layers with mappings behind them, so no layer needs to know of another.

    The mapping starts as the linear reconstruction of the removed channels from the kept ones on the calibration
    images; with recover="none" or "bn" it gives zeros for them, and needs no images. Then the convolutions are
    refitted as everywhere, and all is tuned. Afterwards a mapping that one convolution alone reads is folded into it,
    exactly; what stays is overhead, and the notes say how much:

    `mappings`, `folded`: how many stay, how many are gone. `overhead_params_m`, `overhead_gflops`: parameters
    (millions) and GFLOPs (2 x multiply-adds of one image of `imgsz`) of those that stay.
    """

    name = "adapter"
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
        check_recovery(recover)
        cuts, plan, why = plan_cuts(bench, ratios)
        model = plain_copy(bench.model)
        found = {}
        if "refit" in recover:
            found = reconstruct(
                deepcopy(bench.model).to(bench.device),
                cuts,
                bench.images,
                bench.refit_settings.positions,
                bench.refit_settings.ridge,
                bench.seed,
                pause=bench.turn.pause,
            )
        for cut in cuts:
            insert(model, cut, found.get(cut.layer))
        bench.recover(model, plan, recover, renamed(cuts))
        model = plain_copy(tuned(bench, tune, model, epochs, folder / "tune"))
        folded = fold(model, cuts, renamed(cuts))
        rest = [c for c in cuts if c.layer not in folded]
        skipped = left_whole(bench.table, ratios, plan.ratios, why)
        notes = {"folded": len(folded), "mappings": len(rest), **_overhead(model, rest, bench.imgsz)}
        return Outcome(self.name, model, plan, tuple(plan.ratios), skipped, epochs, notes=notes)


def plan_cuts(bench: Workbench, ratios: Mapping[str, float]) -> tuple[list[Cut], Plan, dict[str, str]]:
    """What is cut and where its mapping can be folded to, as a plan too; and why other layers are not."""
    table = bench.table
    widths = resolve(table, ratios, bench.round_to)
    stays = choose_kept(table, widths, bench.scores)
    wanted, why = set(touched(table, ratios)), {}
    cuts, realised = [], {}
    for layer, conv in conv_of(table).items():
        group = table.group_of.get(layer)
        if group is None or group.id not in widths or layer not in wanted:
            continue
        reason = _why_not(bench.model, layer, table.convs[conv].depthwise)
        if reason:
            why[layer] = reason
            continue
        kept = tuple(int(i) for i in stays[table.convs[conv].outputs].nonzero()[0])
        cuts.append(Cut(layer, conv, kept, len(table.convs[conv].outputs)))
        realised[layer] = round(1 - widths[group.id] / group.channels, 6)
    readers = sole_readers(bench.model, table, [(c.layer, c.conv) for c in cuts])
    cuts = [replace(c, reader=readers.get(c.conv), biased=_may_add(bench.model, readers.get(c.conv))) for c in cuts]
    return cuts, Plan(dict(sorted(realised.items())), {c.conv: c.kept for c in cuts}), why


def _why_not(model: nn.Module, layer: str, depthwise: bool) -> str:
    parent = model.get_submodule(layer.rpartition(".")[0])
    if isinstance(parent, (RepConv, RepVGGDW)):
        return _FUSED.format(parent=type(parent).__name__)
    return _DEPTHWISE if depthwise else ""


def _may_add(model: nn.Module, reader: str | None) -> bool:
    """Whether a mapping may have constants: not where its reader pads with zeros or has nowhere to put them."""
    if reader is None:
        return True
    conv: Any = model.get_submodule(reader)
    wrapped = isinstance(model.get_submodule(reader.rpartition(".")[0]), Conv)
    return not any(conv.padding) and (conv.bias is not None or wrapped)


def _overhead(model: nn.Module, cuts: Sequence[Cut], imgsz: ImageSize) -> dict[str, float]:
    model = plain_copy(model)
    operations: list[int] = []
    mappings: list[Any] = [model.get_submodule(f"{c.layer}.1") for c in cuts]
    for mapping in mappings:
        mapping.register_forward_hook(lambda m, _, out: operations.append(m.weight.numel() * out[0, 0].numel()))
    with torch.no_grad():
        model(torch.zeros(1, input_channels(model), *height_width(imgsz)))
    parameters = sum(p.numel() for m in mappings for p in m.parameters())
    return {"overhead_params_m": parameters / 1e6, "overhead_gflops": 2 * sum(operations) / 1e9}
