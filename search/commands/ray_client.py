"""A command line with ``--address ray://HEAD:PORT``: the same one runs inside that cluster, with ``--address auto``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from paretoprune.search.commands.output import echo
from paretoprune.search.errors import ConfigError

OPTION = "--address"
SCHEME = "ray://"
TAKES = ("search", "resume", "finetune", "doctor")
_FILES = ("--config", "--plan", "--native")  # options whose file travels, as a model does
_MODEL = ".pt"


def client_address(arguments: Sequence[str]) -> str:
    """The client address that a command of ``TAKES`` is given; "" where it is none."""
    if not arguments or arguments[0] not in TAKES:
        return ""
    address = value_of(arguments, OPTION)
    return address if address.startswith(SCHEME) else ""


def value_of(arguments: Sequence[str], option: str) -> str:
    """What an option is given, ``--option value`` or ``--option=value``, the last one counts; "" where it is not."""
    found = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def run_inside(arguments: Sequence[str], address: str) -> int:
    """Run the command line on the cluster's head node; shows what it says, returns its exit code.

    Models, plans and settings that are files here travel along; the dataset and the run folder are the cluster's.
    """
    from paretoprune.cluster.launch.ray_client import drive

    check_run(arguments)
    with tempfile.TemporaryDirectory(prefix="paretoprune-client-") as scratch:
        words = packed(arguments, Path(scratch))
        command = ("-m", "paretoprune", *("auto" if word == address else word for word in words))
        return drive(
            address,
            tuple(f"{OPTION}=auto" if word == f"{OPTION}={address}" else word for word in command),
            Path(scratch),
            lambda text: echo(text, newline=False),
            lambda text: click.echo(text, nl=False, err=True),
        )


def check_run(arguments: Sequence[str]) -> None:
    """A relative run folder would lie in the copy of the small files, which goes away with the command."""
    if arguments[0] == "search":
        run = value_of(arguments, "--run")
        if "://" not in run and not Path(run).is_absolute():
            got = run or "none"
            raise ConfigError(f"with {OPTION} {SCHEME}... --run must be an absolute path on the cluster, but got {got}")


def packed(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments, with the files that travel copied into ``folder``, each into a folder of its own."""
    words = []
    for index, word in enumerate(arguments):
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        named = option or (arguments[index - 1] if index else "")
        travels = named in _FILES or (not named.startswith("--set") and value.endswith(_MODEL))
        if value and travels and Path(value).is_file():
            (folder / str(index)).mkdir()
            value = f"{index}/{Path(value).name}"
            shutil.copyfile(word.partition("=")[2] if sign else word, folder / value)
        words.append(f"{option}{sign}{value}")
    return words
