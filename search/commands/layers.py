"""The command layers: what of a model can lose channels."""

from __future__ import annotations

import click

from paretoprune.search.commands.options import FILE, format_option, trust_option
from paretoprune.search.commands.output import emit


@click.command()
@click.argument("model", type=FILE)
@trust_option
@format_option
def layers(model: str, trust_checkpoint: bool, form: str) -> None:
    """List MODEL's convolutions: block, group, channels, and why a layer cannot be pruned."""
    from paretoprune.search.api.models import layer_rows

    found = layer_rows(model, trust_checkpoint)
    emit(found.rows, form)
    count = f"{sum(row['prunable'] for row in found.rows)} of {len(found.rows)} layers"
    share = f"{found.share:.1%} of the convolution weights"
    click.echo(f"{count} can lose channels, in {found.groups} groups; they hold {share}", err=True)
