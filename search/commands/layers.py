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
    """List MODEL's convolutions: block, group, channels, and for what cannot be pruned the reason."""
    from paretoprune.search.sweep.preflight import check_model_file

    check_model_file(model)
    from paretoprune.pruning.graph.layers import prunable_share
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.yolo.loading import load_model

    network = load_model(model, trust_checkpoint)
    table = build_layer_table(network)
    emit(table.to_rows(), form)
    share = f"{prunable_share(network, table):.1%} of the convolution weights"
    count = f"{len(table.group_of)} of {len(table.layers)} layers"
    click.echo(f"{count} can lose channels, in {len(table.groups)} groups; they hold {share}", err=True)
