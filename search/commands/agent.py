"""The command agent: answer timing requests on this device."""

from __future__ import annotations

import click

from paretoprune.search.commands.output import echo


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, options_metavar="--token-file FILE ..."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def agent(arguments: tuple[str, ...]) -> int:
    """Answer timing requests on the device that a network is for (docs/edge.md); `agent --help` lists its options.

    The same file runs alone where nothing of this project is installed: python3 agent.py --token-file FILE --port PORT.
    """
    from paretoprune.cluster.agent.agent import main, parser
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import default_device, device_key

    if {"-h", "--help"} & set(arguments):
        echo(parser().format_help())
        return 0
    try:
        # Beside a search on the same machine, its trials pause for a measurement
        return main(arguments, DeviceLock(device_key(default_device())).measuring)
    except SystemExit as left:  # wrong options, which were said
        return int(left.code or 0)
