"""The command and the table of the comparison on real trainings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.real_search import OURS, PARTS, SEARCHERS, Settings, opened, run_cell
from benchmarks.surgery import commit
from paretoprune.base.atomic import write_json, write_text
from paretoprune.cluster.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
_SHOWN = ("cpu_model", "cpu_usable", "python", "torch", "ultralytics")


def real(parser: argparse.ArgumentParser, options: argparse.Namespace, settings: Settings | None = None) -> None:
    """Run the cells that are missing, then print the table and write JSON (and the page, into the results folder)."""
    settings = settings or Settings()
    names = (options.searchers or ",".join(SEARCHERS)).split(",")
    unknown = [name for name in names if name not in SEARCHERS]
    if unknown:
        parser.error(f"--searchers: unknown {unknown[0]!r}; known with --real are {', '.join(SEARCHERS)}")
    content = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"cells": []}
    if content.setdefault("settings", asdict(settings)) != asdict(settings):
        parser.error(f"{options.json} was made with other settings; give another --json and --work")
    content.update(date=date.today().isoformat(), commit=commit(), environment=describe_environment())
    known = {(cell["searcher"], cell["seed"]) for cell in content["cells"]}
    wanted = [(name, seed) for seed in range(options.seeds or 3) for name in names if (name, seed) not in known]
    if wanted:
        with opened(options.work, settings) as comparison:
            for name, seed in wanted[: options.cells]:
                content["cells"].append(run_cell(comparison, name, seed))
                write_json(options.json, content)
    page = markdown(content)
    print(page)
    if options.json.resolve().parent == RESULTS:
        write_text(options.json.with_suffix(".md"), page)


def markdown(content: Mapping[str, Any]) -> str:
    """The result as a page."""
    settings, environment = content["settings"], content["environment"]
    shown = ", ".join(f"{key} {environment[key]}" for key in _SHOWN if key in environment)
    lines = [
        "# Ours and what people do instead, on the demo data",
        "",
        f"{content['date']}, commit {content['commit']}; {shown}. The built-in detector, {settings['train_images']} "
        f"training and {settings['val_images']} validation images; at most {settings['trials'] * settings['epochs']} "
        f"epochs a searcher and seed, {settings['epochs']} a trial. After each part of them {settings['picks']} picks "
        f"of the front so far, fine-tuned fully ({settings['full_epochs']} epochs, not counted); hypervolume of "
        f"accuracy above 0 and {settings['cost']} below the unpruned model's: mean (least of the seeds). The rivals "
        "have our surgery, refit and training, which is more than people have who do it by hand. Written by "
        "`python -m benchmarks.search --real`.",
        "",
        *table(content["cells"]),
        "",
        *verdict(content["cells"]),
        "",
    ]
    return "\n".join(lines)


def table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a searcher."""
    heads = " | ".join(f"{part:.0%} of the epochs" for part in PARTS)
    lines = [
        f"| searcher | seeds | trials | {heads} | minutes of trials |",
        "|---|---|---|" + "---|" * (len(PARTS) + 1),
    ]
    for name in dict.fromkeys(cell["searcher"] for cell in cells):
        own = [cell for cell in cells if cell["searcher"] == name]
        volumes = [[cell["rows"][i]["hypervolume"] for cell in own] for i in range(len(PARTS))]
        shares = " | ".join(f"{mean(v):.3f} ({min(v):.3f})" for v in volumes)
        trials, minutes = mean(cell["trials"] for cell in own), mean(cell["trial_minutes"] for cell in own)
        lines.append(f"| {name} | {len(own)} | {trials:.0f} | {shares} | {minutes:.1f} |")
    return lines


def verdict(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether ours, after a third of the epochs, is where the best rival ends."""
    finals: dict[str, list[float]] = {}
    for cell in cells:
        finals.setdefault(cell["searcher"], []).append(cell["rows"][-1]["hypervolume"])
    rivals = {name: mean(volumes) for name, volumes in finals.items() if name != OURS}
    if OURS not in finals or not rivals:
        return []
    best = max(rivals, key=lambda name: rivals[name])
    reached = [mean(c["rows"][i]["hypervolume"] for c in cells if c["searcher"] == OURS) for i in range(len(PARTS))]
    early = "reaches" if reached[0] >= rivals[best] else "does not reach"
    return [
        f"After a third of the epochs ours has {reached[0]:.3f} and {early} the best rival's final front ({best}, "
        f"{rivals[best]:.3f}); with all of them it has {reached[-1]:.3f}. {_price(cells, best)}"
    ]


def _price(cells: Sequence[Mapping[str, Any]], best: str) -> str:
    """What equal epochs leave out."""
    trials, minutes = (
        {name: mean(cell[what] for cell in cells if cell["searcher"] == name) for name in (OURS, best)}
        for what in ("trials", "trial_minutes")
    )
    return (
        f"Epochs are not the whole price: ours may end a trial after refit and validation, without an epoch, and so "
        f"tried {trials[OURS]:.0f} plans in {minutes[OURS]:.1f} minutes where {best} tried {trials[best]:.0f} in "
        f"{minutes[best]:.1f}. And after {trials[best]:.0f} trials a sampler has hardly begun: this compares ways to "
        "spend few epochs; how samplers compare over many trials is in search_synthetic.md."
    )
