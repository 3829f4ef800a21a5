"""The command config: what each setting means, and a file to start from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from paretoprune.search.commands.options import complete_setting
from paretoprune.search.commands.output import as_table, echo, stdout_width

if TYPE_CHECKING:
    from paretoprune.search.config.settings import Setting


COLUMNS = ("name", "type", "default", "bounds", "meaning")


@click.command()
@click.argument("patterns", nargs=-1, metavar="[SECTION|PATTERN]...", shell_complete=complete_setting)
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "yaml", "markdown")),
    default="table",
    show_default=True,
    help="Output format; yaml: a config.yaml to start from.",
)
def config(patterns: tuple[str, ...], form: str) -> None:
    """Print every setting with its type, default, bounds and meaning.

    Select some by section, name or pattern, as in `paretoprune config recover 'search.max_*'`.
    """
    from paretoprune.search.config.settings import as_markdown, as_yaml, select_settings

    settings = select_settings(patterns)
    if form == "json":
        echo(json.dumps([each.to_row() for each in settings], indent=2))
    elif form == "yaml":
        echo(as_yaml(settings))
    elif form == "markdown":
        echo(as_markdown(settings))
    else:
        echo(_as_table(settings))


def _as_table(settings: Sequence[Setting]) -> str:
    """A line per setting, for grep; on a terminal, where such lines would break anywhere, a paragraph."""
    width = stdout_width()
    if width is None:
        return as_table(
            [{**each.to_row(), "default": each.default, "bounds": each.bounds_text} for each in settings], COLUMNS
        )
    lines = []
    for each in settings:
        lines += [
            f"{each.name}: {each.kind}",
            *textwrap.wrap(each.meaning, width, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines)
