"""The command doctor: is this machine, or cluster, fit for a run?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paretoprune.search.commands.options import FILE, FOLDER, address_option, agent_options, format_option
from paretoprune.search.commands.output import echo, print_rows

if TYPE_CHECKING:
    from paretoprune.cluster.doctor import Check


@click.command()
@address_option
@click.option("--data", type=FILE, help="Dataset (data.yaml) to check for readability, on every cluster node.")
@click.option("--run", type=FOLDER, help="Run folder; checked to be the same on every node.")
@click.option("--exports", is_flag=True, help="Try every format and precision of `export` here; takes a minute.")
@agent_options
@format_option
def doctor(
    address: str | None,
    data: str | None,
    run: Path | None,
    latency_target: str | None,
    token_file: str | None,
    exports: bool,
    form: str,
) -> int:
    """Check that this machine (and every cluster node) can run trials, and suggest fixes.

    With --latency-target: what that device has instead, and how steady it is.
    """
    from paretoprune.cluster.doctor import examine
    from paretoprune.search.api.edge_devices import examine_devices

    if latency_target is not None:
        found: Iterator[Check] = examine_devices(latency_target, token_file)
    else:
        paths, unread = _paths_of(data)
        tried = _exports() if exports else ()
        found = chain(unread, examine(run.resolve() if run else None, address, paths), tried)
    checks = []
    for check in found:
        checks.append(check)
        if form == "table":
            echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.detail}")
            if check.remedy:
                echo(f"      {'':<16} -> {check.remedy}")
    if form != "table":
        print_rows([asdict(check) for check in checks], form)
    return 0 if all(check.ok for check in checks) else 1


def _paths_of(data: str | None) -> tuple[list[str], list[Check]]:
    """The files that training on ``data`` reads, and a failed check if they cannot be listed."""
    if data is None:
        return [], []
    from paretoprune.cluster.doctor import Check
    from paretoprune.pruning.data.dataset import dataset_places
    from paretoprune.pruning.errors import PruningError

    try:
        return dataset_places(data), []
    except PruningError as error:
        return [], [Check("dataset", False, str(error), "give the path of a data.yaml whose images are there")]


def _exports() -> Iterator[Check]:
    """A check of each format: its precisions that work here, and why the others do not."""
    from paretoprune.cluster.devices import default_device
    from paretoprune.cluster.doctor import Check
    from paretoprune.pruning.export.tried import try_formats

    for tried in try_formats(default_device()):
        reasons = [f"{name}: {why}" for name, why in {**tried.failed, **tried.left_out}.items()]
        detail = ", ".join(tried.works) or "none"
        yield Check(f"export {tried.name}", not tried.failed, detail, "; ".join(reasons))
