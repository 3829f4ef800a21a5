"""The command ``paretoprune``. Thin: each command's module does its work, and imports what is heavy when it runs.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from paretoprune.base.errors import UserError
from paretoprune.search.commands.agent import agent
from paretoprune.search.commands.compare import compare
from paretoprune.search.commands.config import config
from paretoprune.search.commands.demo import demo
from paretoprune.search.commands.doctor import doctor
from paretoprune.search.commands.export import export
from paretoprune.search.commands.finetune import finetune
from paretoprune.search.commands.front import front
from paretoprune.search.commands.latency import latency
from paretoprune.search.commands.launch import launch
from paretoprune.search.commands.layers import layers
from paretoprune.search.commands.output import unbroken, with_arguments_as_options, with_data_alone_on_stdout
from paretoprune.search.commands.prune import prune
from paretoprune.search.commands.report import report
from paretoprune.search.commands.resume import resume
from paretoprune.search.commands.search import search
from paretoprune.search.commands.status import status
from paretoprune.search.monitoring.interrupts import leave

# What people can cause. Anything else is a fault of the program and keeps its traceback.
EXPECTED = (UserError, OSError)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of an error (may stand anywhere).")
@click.version_option(None, "--version", package_name="paretoprune", message="%(prog)s %(version)s")
def cli(debug: bool) -> None:
    """Find the best accuracy/latency trade-offs that channel pruning reaches for a trained YOLO model.

    Try it: `paretoprune demo` needs no download and no GPU.
    """


COMMANDS = (
    demo, layers, prune, search, resume, status, front, finetune, report, latency, export, compare, agent, launch,
    config, doctor,
)  # fmt: skip
for _command in COMMANDS:
    assert _command.callback is not None
    _command.callback = with_arguments_as_options(with_data_alone_on_stdout(_command.callback))
    cli.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an expected error is one line on stderr."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result = cli.main(args=arguments, prog_name="paretoprune", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        _complain(error)
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        return 1
    except BrokenPipeError:
        # Who read our output has gone (`| head`); a further write at exit would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        if debug:
            raise
        click.echo(f"error: {unbroken(str(error))}", err=True)
        return 1


def main() -> NoReturn:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # a name that is not UTF-8 is printed as it is, like ls does
    leave(run(sys.argv[1:]))


def _complain(error: click.UsageError) -> None:
    where = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
    click.echo(f"error: {unbroken(error.format_message())}{where}", err=True)
