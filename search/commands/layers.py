"""The command layers: what of a model can lose channels, or be removed whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from paretoprune.base.formatting import count, some
from paretoprune.search.commands.options import FILE, format_option, trust_option
from paretoprune.search.commands.output import echo, print_rows

BRANCH = ("branch", "block", "out_channels", "removable", "reason")


@click.command()
@click.argument("model", type=FILE)
@trust_option
@format_option
def layers(model: str, trust_checkpoint: bool, form: str) -> None:
    """List MODEL's convolutions and branches: block, group, channels, and why one cannot be pruned or removed."""
    from paretoprune.search.api.models import LAYER, layer_rows

    found = layer_rows(model, trust_checkpoint)
    convolutions = [row for row in found.rows if row["kind"] == "layer"]
    branches = [row for row in found.rows if row["kind"] == "branch"]
    if form == "table":
        print_rows(convolutions, form, LAYER)
        if branches:
            echo()
            print_rows([{**row, "branch": row["layer"], "reason": _why_not(row)} for row in branches], form, BRANCH)
    else:
        print_rows(found.rows, form)
    can = f"{sum(row['prunable'] for row in convolutions)} of {len(convolutions)} layers"
    share = f"{found.share:.1%} of the convolution weights"
    click.echo(f"{can} can lose channels, in {found.groups} groups; they hold {share}", err=True)
    click.echo(
        f"{sum(row['removable'] for row in branches)} of {len(branches)} branches can be removed whole", err=True
    )
    click.echo(f"{count(len(found.classes), 'class', 'classes')}: {some(found.classes, 10)}", err=True)


def _why_not(row: Mapping[str, Any]) -> str:
    return "" if row["removable"] else str(row["reason"])
