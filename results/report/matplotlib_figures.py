"""The PNG figures, drawn with Matplotlib from the values in `figures` and `widths`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paretoprune.base import formatting
from paretoprune.base.atomic import write_bytes
from paretoprune.results.analysis.figures import FrontFigure, HypervolumeCurve, Point, TimeFigure
from paretoprune.results.analysis.sensitivity import SensitivityFigure
from paretoprune.results.analysis.widths import WidthsFigure
from paretoprune.results.report import palette
from paretoprune.results.report.axes import label_levels, plane_axes

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # a $ in somebody's name is a dollar sign
    "axes.edgecolor": palette.AXIS,
    "axes.labelcolor": palette.TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": palette.GRID,
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "legend.frameon": False,
}


def _save(figure: Figure, path: Path) -> Path:
    """As `path` (PNG) and as SVG beside it."""
    for suffix in (".png", ".svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:])
        write_bytes(path.with_suffix(suffix), buffer.getvalue())
    return path


def draw_front(figure: FrontFigure, x_title: str, title: str, path: Path) -> Path:
    """The accuracy/latency plane as PNG, 1600 pixels wide."""
    with rc_context(_STYLE):
        canvas = Figure(figsize=(8, 5.4), dpi=200, layout="constrained")
        axes = canvas.add_subplot()
        _scatter_cloud(axes, figure)
        for name, items in figure.free_lines.items():
            x, y = _columns(items)
            look: Any = {"color": palette.FREE_MOVE, "lw": 1.3, "ls": ":", "marker": "v", "ms": 5, "zorder": 3}
            axes.plot(x, y, label=name, **look)
        _scatter_front(axes, figure)
        _scatter_picks(axes, figure)
        if figure.natives:
            x, y = _columns(figure.natives)
            axes.scatter(
                x, y, s=64, marker="s", color=palette.NATIVE, edgecolor="white", zorder=6, label="Native model"
            )
        if figure.tuned_moves:
            x, y = _columns(figure.tuned_moves)
            edge: Any = {"edgecolor": "white", "zorder": 6, "label": "Free move after fine-tuning"}
            axes.scatter(x, y, s=80, marker="v", color=palette.FREE_MOVE, **edge)
        base = figure.baseline
        axes.scatter(
            base.latency_ms, base.accuracy, s=70, marker="D", color=palette.BASELINE, zorder=6, label="Baseline"
        )
        plane = plane_axes(figure)
        axes.set(
            xlim=plane.latency_ms,
            ylim=plane.accuracy,
            xlabel=x_title,
            ylabel=f"{base.accuracy_label} on the validation split",
        )
        top = axes.secondary_xaxis("top")
        top.set_xticks([position for position, _ in plane.speedups], [label for _, label in plane.speedups])
        top.set_xlabel("Speed-up over the baseline")
        axes.legend(loc="lower right", fontsize=9)
        canvas.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=palette.BASELINE)
        return _save(canvas, path)


def _scatter_cloud(axes: Axes, figure: FrontFigure) -> None:
    many = len(figure.dominated) > 500
    if figure.dominated:
        x, y = _columns(figure.dominated)
        label = f"Trial ({figure.fidelity})"
        axes.scatter(x, y, s=9 if many else 24, color=palette.DOMINATED, alpha=0.35 if many else 0.6, lw=0, label=label)
    if figure.apart:
        x, y = _columns(figure.apart)
        axes.scatter(x, y, s=22, marker="x", lw=1, color=palette.APART, label=figure.apart_label)


def _scatter_front(axes: Axes, figure: FrontFigure) -> None:
    if not figure.front:
        return
    axes.step(*zip(*figure.line, strict=True), where="post", color=palette.FRONT, lw=1.3, alpha=0.55, zorder=3)
    x, y = _columns(figure.front)
    label = f"Front ({figure.fidelity})"
    axes.scatter(x, y, s=46, color=palette.FRONT, edgecolor="white", lw=0.8, zorder=4, label=label)
    if figure.knee:
        ring: Any = {"facecolor": "none", "edgecolor": palette.KNEE, "lw": 2, "zorder": 4}
        axes.scatter(figure.knee.latency_ms, figure.knee.accuracy, s=150, label="Knee", **ring)


def _scatter_picks(axes: Axes, figure: FrontFigure) -> None:
    labels = {True: "Pick after full fine-tuning", False: "Suggested pick"}
    levels = label_levels(figure, plane_axes(figure))
    for move, level in zip(figure.picks, levels, strict=True):
        where = move.after or move.before
        if move.after:
            start = (move.before.latency_ms, move.before.accuracy)
            arrow = {"arrowstyle": "-|>", "color": palette.PICK, "lw": 1.2, "shrinkA": 4, "shrinkB": 5}
            axes.annotate("", (where.latency_ms, where.accuracy), start, arrowprops=arrow, zorder=5)
        face = palette.PICK if move.after else "none"
        label = labels.pop(move.after is not None, None)
        axes.scatter(
            where.latency_ms,
            where.accuracy,
            s=150,
            marker="*",
            color=face,
            edgecolor=palette.PICK,
            zorder=7,
            label=label,
        )
        offset: Any = {
            "xytext": (0, 9 + 11 * level),
            "textcoords": "offset points",
            "ha": "center",
            "fontsize": 9,
            "zorder": 8,
        }
        name = move.trial_id[:24]
        axes.annotate(name, (where.latency_ms, where.accuracy), color=palette.PICK, fontweight="bold", **offset)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [item.latency_ms for item in points], [item.accuracy for item in points]


def draw_widths(figures: Sequence[WidthsFigure], path: Path) -> Path:
    """Mean width by block before and after, one panel a pick, as PNG."""
    with rc_context(_STYLE):
        canvas = Figure(figsize=(8, 0.5 + 2.3 * len(figures)), dpi=200, layout="constrained")
        for axes, figure in zip(canvas.subplots(len(figures), squeeze=False)[:, 0], figures, strict=True):
            _draw_blocks(axes, figure)
        axes.set_xlabel("Block of the network")
        return _save(canvas, path)


def _draw_blocks(axes: Axes, figure: WidthsFigure) -> None:
    numbers = [block.block for block in figure.blocks]
    axes.bar(numbers, [block.before for block in figure.blocks], width=0.8, color=palette.BEFORE, label="before")
    axes.bar(numbers, [block.after for block in figure.blocks], width=0.8, color=palette.FRONT, label="after")
    for block in figure.blocks:
        if block.after < block.before:
            text = formatting.change(block.after, block.before).replace(" ", "")
            axes.annotate(
                text, (block.block, block.before), ha="center", va="bottom", fontsize=6.5, color=palette.MUTED
            )
    axes.set_xticks(numbers, [str(number) for number in numbers], fontsize=8)
    axes.set_ylabel("Mean width (channels)")
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01, y=0.12)
    axes.set_title(f"{figure.trial_id[:40]}: {figure.kept:.0%} of the channels kept", loc="left", fontsize=10)
    axes.legend(loc="upper left", fontsize=8, ncols=2)


def draw_sensitivity(figure: SensitivityFigure, path: Path) -> Path:
    """The share of each block's channels that stays, for less and less work, as PNG."""
    with rc_context(_STYLE):
        canvas = Figure(figsize=(8, 0.9 + 0.24 * len(figure.work_kept)), dpi=200, layout="constrained")
        axes = canvas.add_subplot()
        percent = [[100 * share for share in row] for row in figure.channels_kept]
        image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(figure.blocks)), [str(block) for block in figure.blocks], fontsize=8)
        labels = [f"{keep:.0%}" for keep in figure.work_kept]
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.grid(visible=False)
        axes.set(xlabel="Block of the network", ylabel="Multiply-adds kept")
        canvas.colorbar(image, ax=axes, label="Channels kept, %")
        return _save(canvas, path)


def draw_hypervolume(curve: HypervolumeCurve, path: Path) -> Path:
    """Hypervolume over trials as PNG."""
    with rc_context(_STYLE):
        canvas = Figure(figsize=(6.4, 3.6), dpi=200, layout="constrained")
        axes = canvas.add_subplot()
        percent = [100 * share for share in curve.shares]
        axes.step(curve.trials, percent, where="post", color=palette.FRONT, lw=1.8)
        axes.fill_between(curve.trials, percent, step="post", color=palette.FRONT, alpha=0.08, lw=0)
        if 0 < curve.ladder_trials < len(curve.trials):
            axes.axvline(curve.ladder_trials + 0.5, color=palette.AXIS, lw=1, ls=":")
            axes.text(curve.ladder_trials + 0.8, 1, "sampler starts", fontsize=8, color=palette.MUTED)
        axes.set(xlabel="Completed trials", ylabel="Hypervolume (% of the baseline's box)", ylim=(0, None))
        axes.set_xlim(0, len(curve.trials) + 0.5)
        return _save(canvas, path)


def draw_time(figure: TimeFigure, path: Path) -> Path:
    """Time per phase as PNG."""
    with rc_context(_STYLE):
        canvas = Figure(figsize=(6.4, 0.9 + 0.42 * len(figure.phases)), dpi=200, layout="constrained")
        axes = canvas.add_subplot()
        names = [phase.name for phase in figure.phases]
        minutes = [phase.seconds / 60 for phase in figure.phases]
        bars = axes.barh(range(len(names)), minutes, color=palette.FRONT, height=0.62)
        axes.bar_label(bars, [f" {phase.share:.0%}" for phase in figure.phases], fontsize=9, color=palette.MUTED)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.1)
        axes.set_xlabel(f"Minutes over {formatting.count(figure.trials, 'trial')}, all workers together")
        return _save(canvas, path)
