"""Whether a pruned network computes what the unpruned one does with what was removed masked: shown by running both.

What surgery removes follows from a trace, and a trace can misread a module that somebody wrote. So the comparison does
not ask the layer table where channels go. It knows of each convolution which output channels were kept, sets the others
to zero in a copy of the unpruned network wherever that convolution runs (and again behind the norm and the activation
that follow it directly, which may move zeros), does the same with what removed branches contribute, and lets everything
else take its course. Then every convolution of the pruned network must give, channel by channel, what it gives in the
masked one, and so must the outputs: in inference and in training, batch statistics frozen, at another input size than
the trace's.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from paretoprune.base.errors import first_line
from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.errors import ModelError, NotEquivalentError
from paretoprune.pruning.graph.branches import find_branches, name_after
from paretoprune.pruning.graph.elementwise import value_at_zero
from paretoprune.pruning.graph.passes import Pass, passes_of
from paretoprune.pruning.surgery.cloning import clone
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state

# Of a channel's range. What rounds to 1e-16 shows an error even where an untrained network hardly depends on its input.
# A module may compute in float32 in between, or insist on it: then that rounding, at sums that cancel, is the limit.
_TOLERANCE, _TOLERANCE_MIXED, _TOLERANCE_FLOAT32 = 1e-5, 1e-4, 1e-3
_LEAST_RANGE = 1e-2  # of a channel's largest value
_LEAST_SIZE = 1e-6  # of the largest channel: what is below is rounding
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Sums and products are steps of a module's own, not an activation behind a convolution.
_ARITHMETIC = frozenset("add radd iadd sub rsub isub mul rmul imul div truediv rtruediv itruediv pow rpow".split())


@dataclass(frozen=True)
class Difference:
    """Where and how two networks differ first, and in which pass."""

    module: str
    text: str
    during: Pass | None = None


class EquivalenceCheck:
    """Compares pruned copies of one network with it.

    Args:
        model: the unpruned network, on the CPU; neither it nor a pruned one is touched: copies are run.
        imgsz: size of the input it is meant for; a square of its larger side is used where a small one does not run.
    """

    def __init__(self, model: nn.Module, imgsz: ImageSize) -> None:
        self._model = model
        # 128: the smallest square that gives RT-DETR its 300 anchors
        self._sizes = (2 * _stride(model), 128, max(height_width(imgsz)))

    def check(self, pruned: nn.Module, kept: Mapping[str, tuple[int, ...]], branches: Collection[str] = ()) -> None:
        """Compare `pruned` (on the CPU) with the network in which only the channels of `kept` (see `Plan.kept`) answer.

        `branches`: those that were removed; they contribute zero.

        Raises:
            NotEquivalentError: they differ, or the pruned one does not run; names the first block that does.
            ModelError: the unpruned network itself does not run.
        """
        with preserved_random_state(cuda=False), torch.no_grad():
            removal = _Removal(self._model, kept, branches)
            found = self._difference(pruned, removal)
            if found is not None:
                raise NotEquivalentError(self._message(found, self._first_block(pruned, removal, found)))

    def _difference(self, pruned: nn.Module, removal: _Removal) -> Difference | None:
        """The first one in execution order."""
        images, tolerance = self._setting
        if removal.merges:
            tolerance = max(tolerance, _TOLERANCE_MIXED)
        whole, narrow = removal.masked_copy().to(images.dtype), clone(pruned, {}).to(images.dtype)
        inside = _watch_modules(narrow)
        unseen = set(removal.kept)
        for each in passes_of(whole):
            masked, comparison = _Masked(whole, removal), _Comparison(narrow, tolerance)
            try:
                expected = _run(whole, images, each, masked)
            except Exception as error:
                raise ModelError(f"the network fails with channels masked: {first_line(error)}.") from error
            unseen -= masked.seen
            comparison.expected = masked.given
            inside.clear()
            try:
                output = _run(narrow, images, each, comparison)
            except Exception as error:  # noqa: BLE001  whatever a module raises that finds other widths than it expects
                where = inside[-1] if inside else _head(narrow)
                crash = Difference(where, f"it fails with {first_line(error)}")
                return replace(comparison.first or crash, during=each)
            first = comparison.first or comparison.rest() or _between(expected, output, _head(narrow), tolerance)
            if first is not None:
                return replace(first, during=each)
        if unseen:
            return Difference(min(unseen), "its convolution lost channels, and no forward pass runs it")
        return None

    @cached_property
    def _setting(self) -> tuple[torch.Tensor, float]:
        """Images (noise, smooth shapes) of the smallest size and highest precision that fit, and the tolerance."""
        generator = torch.Generator().manual_seed(0)
        channels = input_channels(self._model)
        problem: Exception | None = None
        for size, dtype in itertools.product(self._sizes, (torch.float64, torch.float32)):
            noise = torch.rand(1, channels, size, size, generator=generator)
            smooth = F.interpolate(torch.rand(1, channels, 5, 5, generator=generator), (size, size), mode="bilinear")
            images = torch.cat([noise, smooth]).to(dtype)
            try:
                whole = clone(self._model, {}).to(dtype)
                sites = _Sites(whole)
                for each in passes_of(whole):
                    _run(whole, images, each, sites)
            except Exception as error:  # noqa: BLE001  anybody's modules: the next size may do
                problem = error
            else:
                if dtype is torch.float32:
                    return images, _TOLERANCE_FLOAT32
                return images, _TOLERANCE_MIXED if sites.saw_float32 else _TOLERANCE
        raise ModelError(
            f"the network must run on images of {' or '.join(map(str, self._sizes))} pixels, but it fails with "
            f"{first_line(problem)}; check its modules."
        )

    def _first_block(self, pruned: nn.Module, removal: _Removal, found: Difference) -> int:
        """The block that begins it: what went wrong behind a block's last convolution shows in the next block only.

        A block's own output tells by its channels that are not zero: they must be the same ones in both networks.
        """
        images, tolerance = self._setting
        last = int(found.module.split(".")[1])
        outputs: list[list[list[torch.Tensor]]] = []
        for model in (each.to(images.dtype) for each in (removal.masked_copy(), clone(pruned, {}))):
            mode = _Masked(model, removal) if not outputs else _Sites(model)
            outputs.append([])
            for block in list(model.model)[:last]:  # type: ignore[arg-type]
                block.register_forward_hook(lambda _, __, out, seen=outputs[-1]: seen.append(_alive_parts(out)))
            with suppress(Exception):  # the pruned one may be the one that fails
                _run(model, images, found.during or passes_of(model)[0], mode)
        for number, (expected, got) in enumerate(zip(*outputs, strict=False)):
            if any(channel_error(a, b) > tolerance for a, b in zip(expected, got, strict=False)):
                return number
        return last

    def _message(self, found: Difference, number: int) -> str:
        mode = f" in {found.during.name}" if found.during else ""
        kind = type(self._model.get_submodule(f"model.{number}")).__name__
        return (
            f"the pruned network must compute what the unpruned one does with the removed channels masked, but they "
            f"differ first in block model.{number} ({kind}), seen at {found.module}{mode}: {found.text}; leave this "
            "block and those that feed it whole (in a search: space.exclude)."
        )


def set_mode(model: nn.Module, training: bool) -> None:
    """Train or eval mode, batch statistics frozen in both: with those of one small batch nothing could be compared."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a nested output, the head's pass-through feature maps left out (they get narrower)."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for key, value in output.items() if key != "feats" for t in tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def _alive_parts(output: Any) -> list[torch.Tensor]:
    """Of each tensor of an output, the channels that are not zero everywhere."""
    return [t[:, t.transpose(0, 1).flatten(1).any(dim=1)] for t in tensors(output) if t.ndim > 1]


def channel_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference of any channel (dimension 1), relative to that channel's own expected values.

    In float64 to how far they lie apart, since a network may hardly depend on its input; else to the largest of them.
    """
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    wide = (1, -1, 1) if expected.ndim < 2 else (len(expected), expected.shape[1], -1)
    a, b = expected.reshape(wide).double(), got.reshape(wide).double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf")).amax(dim=(0, 2))
    a = a.nan_to_num()
    size = a.abs().amax(dim=(0, 2))
    if expected.dtype is torch.float64:
        size = (a.amax(dim=(0, 2)) - a.amin(dim=(0, 2))).maximum(_LEAST_RANGE * size)
    return float((apart / size.maximum(_LEAST_SIZE * size.max()).clamp_min(torch.finfo(torch.float32).tiny)).max())


class _Sites(TorchFunctionMode):
    """Hears of what every convolution gives, and of what a norm or an activation directly behind it makes of that.

    Convolutions are known by their weights, so one that is called as a function counts as well. Dropout is skipped.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.saw_float32 = False
        self.names = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)}

    def gave(self, conv: str, result: torch.Tensor) -> None:
        """A convolution gave `result`."""

    def normed(self, conv: str, result: torch.Tensor) -> None:
        """A norm directly behind a convolution gave `result`."""

    def activated(self, conv: str, function: Callable[[torch.Tensor], Any], result: torch.Tensor) -> None:
        """A function of nothing but a convolution's (normed) output gave `result`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        source: Any = args[0] if args else kwargs.get("input")
        if "dropout" in name:
            return source
        behind = getattr(source, "_given_by", None)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        self.saw_float32 |= result.dtype is torch.float32
        if result is source:  # written in place: no longer what the convolution gave
            result._given_by = None  # type: ignore[attr-defined]
        if name.startswith("conv"):
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            conv = self.names.get(id(weight))
            if conv is not None:
                self.gave(conv, result)
                result._given_by = conv  # type: ignore[attr-defined]
        elif behind is not None and result.shape == source.shape:
            if "norm" in name:
                self.normed(behind, result)
                result._given_by = behind  # type: ignore[attr-defined]
            elif name not in _ARITHMETIC and not any(_is_wide(x) for x in (*args[1:], *kwargs.values())):
                self.activated(behind, lambda probe: func(probe, *args[1:], **kwargs), result)
        return result


class _Removal:
    """What was removed from a network: channels, and branches."""

    def __init__(self, model: nn.Module, kept: Mapping[str, tuple[int, ...]], branches: Collection[str]) -> None:
        self._model, self.kept = model, kept
        self._branches, self._found = branches, find_branches(model)
        self._modules = self._found.removed_modules(branches)

    @property
    def merges(self) -> bool:
        """Whether columns were added to others: their sum is rounded to float32."""
        return bool(self._branches)

    def name_after(self, conv: str) -> str | None:
        """A convolution's name in the pruned network; None where it is gone."""
        return name_after(conv, self._modules)

    def masked_copy(self) -> nn.Module:
        """A copy of the network whose removed branches contribute zero."""
        copied = clone(self._model, {})
        for name in (part for branch in self._branches for part in self._found.by_name[branch].contributions):
            copied.get_submodule(name).register_forward_hook(lambda _, __, output: _zeros(output))
        return copied


def _zeros(output: Any) -> Any:
    """Zeros in place of every tensor of a nested output."""
    if isinstance(output, (list, tuple)):
        return type(output)(_zeros(value) for value in output)
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else output


class _Masked(_Sites):
    """Zeroes the removed channels and keeps what the others answered, `given`, in execution order.

    The others go by their names in the pruned network.
    """

    def __init__(self, model: nn.Module, removal: _Removal) -> None:
        super().__init__(model)
        kept = removal.kept
        self.names_after = {conv: removal.name_after(conv) for conv in self.names.values()}
        widths = {name: model.get_submodule(name).out_channels for name in kept}
        self.kept = {name: torch.tensor(indices) for name, indices in kept.items()}
        self.gone = {n: torch.tensor(sorted(set(range(w)) - set(kept[n]))) for n, w in widths.items()}  # type: ignore[arg-type]
        self.given: deque[tuple[str, torch.Tensor]] = deque()
        self.seen: set[str] = set()

    def gave(self, conv: str, result: torch.Tensor) -> None:
        self.seen.add(conv)
        after = self.names_after[conv]
        if after is None:
            return
        self.given.append((after, result.index_select(1, self.kept[conv]) if conv in self.kept else result.clone()))
        self.normed(conv, result)

    def normed(self, conv: str, result: torch.Tensor) -> None:
        if conv in self.gone:
            result.index_fill_(1, self.gone[conv], 0.0)

    def activated(self, conv: str, function: Callable[[torch.Tensor], Any], result: torch.Tensor) -> None:
        gone = self.gone.get(conv)
        if gone is None or not result.index_select(1, gone).any():
            return
        if value_at_zero(function) is not None:
            result.index_fill_(1, gone, 0.0)


class _Comparison(_Sites):
    """Compares what the pruned network's convolutions give with what was `expected` of them."""

    def __init__(self, model: nn.Module, tolerance: float) -> None:
        super().__init__(model)
        self.tolerance = tolerance
        self.expected: deque[tuple[str, torch.Tensor]] = deque()
        self.first: Difference | None = None

    def gave(self, conv: str, result: torch.Tensor) -> None:
        if self.first is not None:
            return
        if not self.expected or self.expected[0][0] != conv:
            self.first = Difference(conv, "it is not run when it is in the unpruned network")
            return
        self.first = _of(self.expected.popleft()[1], result, conv, "its output", self.tolerance)

    def rest(self) -> Difference | None:
        """What the pruned network has not run."""
        return Difference(self.expected[0][0], "it is not run") if self.expected else None


def _of(expected: torch.Tensor, got: torch.Tensor, module: str, what: str, tolerance: float) -> Difference | None:
    if expected.shape != got.shape:
        shapes = f"{tuple(got.shape)} in place of {tuple(expected.shape)}"
        return Difference(module, f"{what} has the shape {shapes}")
    error = channel_error(expected, got)
    if error <= tolerance:
        return None
    return Difference(module, f"{what} is off by {error:.2g} of a channel's range")


def _between(expected: Any, got: Any, head: str, tolerance: float) -> Difference | None:
    """The first difference of two outputs."""
    wanted, given = tensors(expected), tensors(got)
    if len(wanted) != len(given):
        return Difference(head, f"it gives {len(given)} tensors in place of {len(wanted)}")
    pairs = zip(wanted, given, strict=True)
    return next((found for a, b in pairs if (found := _of(a, b, head, "the network's output", tolerance))), None)


def _run(model: nn.Module, images: torch.Tensor, each: Pass, mode: TorchFunctionMode) -> Any:
    """One forward pass; what is drawn at random in it is the same every time."""
    set_mode(model, each.training)
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  it is what modules draw from
    with mode:
        return each.run(model, images.clone())


def _watch_modules(model: nn.Module) -> list[str]:
    """The names of the modules that are being run, innermost last, kept up to date."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            module.register_forward_hook(lambda *_: _drop(inside.pop()))
    return inside


def _drop(_: object) -> None:
    """What a hook returns would take the place of the output."""


def _is_wide(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() != 1


def _head(model: nn.Module) -> str:
    return f"model.{len(model.model) - 1}"  # type: ignore[arg-type]


def _stride(model: nn.Module) -> int:
    stride = getattr(model, "stride", None)
    return max(32, int(max(stride))) if isinstance(stride, torch.Tensor) else 32
