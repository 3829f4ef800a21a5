"""The report as Markdown: the same words and tables, with the figures as links, for a repository or a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paretoprune.base import formatting
from paretoprune.results.analysis.figures import Point
from paretoprune.results.analysis.finalists import FinishedRow
from paretoprune.results.analysis.latency_places import LatencyPlace
from paretoprune.results.analysis.layer_effects import Insight
from paretoprune.results.analysis.precisions import PrecisionCell, PrecisionTable
from paretoprune.results.analysis.summary import Summary
from paretoprune.results.store.objectives import title

_FIGURES = {
    "front": "Accuracy against latency",
    "widths": "Width of each block, before and after",
    "sensitivity": "Channels that the least harmful plan keeps of each block",
    "hypervolume": "Hypervolume over the trials",
    "time": "Where the time went",
}


def markdown(run: Summary, figures: str) -> str:
    """The text; `figures` is the folder of the PNG files, relative to it."""
    parts = [
        f"# {plain_cell(run.headline.sentence)}",
        plain_cell(run.headline.detail),
        _facts(run),
        f"![{_FIGURES['front']}]({figures}/front.png)",
    ]
    if run.judged:
        parts.append(f"Accuracy: {run.judged}.")
    if run.excluded:
        parts.append(f"Shown apart and not compared: {plain_cell('; '.join(run.excluded))}.")
    if any(row.at for row in run.finished[1:]):
        parts += [
            "## Finished networks",
            finished_table(run, run.finished),
        ]
    if run.rivalries:
        parts += ["## Against rivals with the same budget", _rivals(run)]
    if run.by_precision:
        parts += ["## Precisions", plain_cell(run.by_precision.advice), precisions_table(run.by_precision)]
    if run.front.free_moves:
        parts += ["## Free moves", FREE_MOVES, free_moves_table(run)]
    if run.front.front:
        parts += [f"## The front ({run.front.fidelity})", _front(run), f"Accuracy noise: {plain_cell(run.noise.text)}."]
    drawn = {
        "widths": bool(run.widths),
        "sensitivity": run.sensitivity is not None,
        "hypervolume": bool(run.hypervolume.trials),
        "time": bool(run.time.phases),
    }
    if run.course.hours:
        parts.append(run.course.stopping)
    if run.insight:
        parts += ["## Effect of each layer on the objectives", run.insight.reading, _layers(run.insight)]
    for name, content in drawn.items():
        parts += [f"![{_FIGURES[name]}]({figures}/{name}.png)"] if content else []
    for group in run.commands:
        lines = "\n".join(f"# {purpose}\n{line}" for purpose, line in group.lines)
        parts += [f"### {plain_cell(group.title)}", f"```sh\n{lines}\n```"]
    if run.latency_places:
        parts += ["## Where latency was measured", *(_place(place) for place in run.latency_places)]
    if run.environment:
        parts += ["## Environment", table(("What", "Version"), run.environment.items())]
    return "\n\n".join(parts) + "\n"


def _place(place: LatencyPlace) -> str:
    rows = [*place.facts.items(), ("throttled", place.throttling)]
    return table((place.name or "main device", ""), rows)


FREE_MOVES = (
    "The unpruned model at smaller inputs or in other precisions: what is to be had without pruning or training."
)


def precisions_table(found: PrecisionTable) -> str:
    """Networks in every precision, one a row."""
    own, *others = found.precisions
    head = ["network", f"{found.accuracy_label}, {own}", "latency"]
    for name in others:
        head += [f"{found.accuracy_label}, {name}", f"against {own}", "latency", f"speed-up over {own}"]
    rows = []
    for network, cells in found.rows.items():
        row = [network, formatting.plain(cells[own].accuracy), formatting.milliseconds(cells[own].latency_ms)]
        for name in others:
            row += _in_precision(cells[name]) if name in cells else [formatting.DASH] * 4
        rows.append(row)
    return table(head, rows)


def _in_precision(cell: PrecisionCell) -> Sequence[str]:
    cost = formatting.signed(cell.cost or 0.0)
    if cell.cost_ci95:
        cost += f" ({formatting.signed(cell.cost_ci95[0])} to {formatting.signed(cell.cost_ci95[1])})"
    gain = formatting.factor(cell.gain or 1.0)
    if cell.gain_ci95:
        gain += f" ({formatting.interval(cell.gain_ci95)})"
    return formatting.plain(cell.accuracy), cost, formatting.milliseconds(cell.latency_ms), gain


def free_moves_table(run: Summary) -> str:
    """The free moves, one a row, below the baseline."""
    rows = (
        (
            item.name,
            formatting.plain(item.accuracy),
            formatting.signed(item.accuracy - run.front.baseline.accuracy),
            formatting.milliseconds(item.latency_ms),
            _speedup(item),
            formatting.plain(item.gflops, 2),
        )
        for item in run.front.free_moves
    )
    label = run.front.baseline.accuracy_label
    return table(("free move", label, "against the baseline", "latency", "speed-up", "GFLOPs"), rows)


def finished_table(run: Summary, rows: Sequence[FinishedRow]) -> str:
    """Finished networks, one a row."""
    return table(_finished_head(run), (_finished_cells(row, run) for row in rows))


def _finished_head(run: Summary) -> Sequence[str]:
    label = run.front.baseline.accuracy_label
    head = ("network", "chosen as", label, "against the baseline", "test split", "latency", "speed-up", "parameters")
    own = (*_input(run, "input"), *_beaten(run, "beaten by free move"))
    return (*head, *own, *(title(name) for name in run.front.others))


def _beaten(run: Summary, cell: str) -> Sequence[str]:
    """A cell of the column about free moves, which is there only where the run has some."""
    return (cell,) if run.front.free_moves else ()


def _input(run: Summary, cell: str) -> Sequence[str]:
    """A cell of the column about input size and precision, which is there only where trials differ in them."""
    return (cell,) if run.inputs_differ else ()


def _facts(run: Summary) -> str:
    return table(
        ("model", "data", "input", "device", "trials"),
        [(run.model, run.data, run.input_of(""), run.device, run.ends or "none yet")],
    )


def _finished_cells(row: FinishedRow, run: Summary) -> Sequence[str]:
    if row.at is None:
        return (row.name, row.chosen_as, "not yet", *[""] * (len(_finished_head(run)) - 3))
    change = row.at.accuracy - run.front.baseline_of(row.at).accuracy
    interval = row.change_ci95
    around = f" ({formatting.signed(interval[0])} to {formatting.signed(interval[1])})" if interval else ""
    against = "" if row.kind == "baseline" else f"{formatting.signed(change)}{around}"
    return (
        row.name,
        row.chosen_as,
        formatting.plain(row.at.accuracy),
        against,
        formatting.plain(row.test),
        formatting.milliseconds(row.at.latency_ms),
        "1" if row.kind == "baseline" else _speedup(row.at),
        f"{formatting.plain(row.at.params_m, 2)} M",
        *_input(run, run.input_of(row.name)),
        *_beaten(run, row.beaten_by_free_move),
        *(formatting.plain(row.at.others.get(name)) for name in run.front.others),
    )


def _rivals(run: Summary) -> str:
    rows = (
        (
            item.pick,
            item.native,
            f"{formatting.signed(item.accuracy)} ({formatting.signed(item.accuracy_ci95[0])} to "
            f"{formatting.signed(item.accuracy_ci95[1])})",
            f"{formatting.factor(item.speedup)} ({formatting.interval(item.speedup_ci95)})",
            item.verdict,
        )
        for item in run.rivalries
    )
    label = f"{run.front.baseline.accuracy_label}, pick minus rival"
    return table(("pick", "rival", label, "speed-up over it", "so the pick is"), rows)


def _front(run: Summary) -> str:
    rows = []
    for item in reversed(run.front.front):
        standing = run.standings.get(item.name)
        tied = ", ".join(standing.tied_with) if standing else ""
        beaten = ", ".join(standing.beaten_by) if standing else ""
        cells = (item.name, formatting.plain(item.accuracy), formatting.milliseconds(item.latency_ms), _speedup(item))
        costs = f"{formatting.plain(item.params_m, 2)} M", formatting.plain(item.gflops, 2)
        size = _input(run, run.input_of(item.name))
        others = (formatting.plain(item.others.get(name)) for name in run.front.others)
        rows.append((*cells, *costs, *size, *others, tied, beaten, *_beaten(run, run.front.beaten.get(item.name, ""))))
    free = _beaten(run, "beaten by free move")
    label = run.front.baseline.accuracy_label
    head = ("trial", label, "latency", "speed-up", "parameters", "GFLOPs", *_input(run, "input"))
    return table((*head, *(title(name) for name in run.front.others), "tied with", "beaten by", *free), rows)


def _layers(found: Insight) -> str:
    rows = [
        (
            item.layer,
            formatting.plain(item.mean_ratio, 2),
            *(
                f"{formatting.signed(effect.per_tenth, 4)} ± {formatting.plain(effect.per_tenth_sd, 4)}"
                for effect in item.effects.values()
            ),
        )
        for item in found.layers
    ]
    return table(("layer", "mean ratio", *(f"{title(name)}, by a tenth" for name in found.objectives)), rows)


def _speedup(item: Point) -> str:
    interval = f" ({formatting.interval(item.speedup_ci95)})" if item.speedup_ci95 else ""
    return formatting.factor(item.speedup) + interval


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(plain_cell(cell) for cell in line) + " |" for line in lines)


def plain_cell(text: str) -> str:
    """On one line, with what Markdown or HTML would read as markup made plain."""
    plain = " ".join(str(text).split())
    for letter in "\\|<>*_`[]":
        plain = plain.replace(letter, f"\\{letter}")
    return plain
