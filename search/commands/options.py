"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from paretoprune.base.image_size import ImageSize, parse_size
from paretoprune.pruning.yolo.image_size import check_image_size

FORMATS = ("table", "json", "csv")
FOLDER = click.Path(path_type=Path)


class RunType(click.ParamType):
    """A run's folder, or its address in an object store: then the mirror here, which is sent back at the end."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from paretoprune.search.storage.object_store import ObjectStoreRun, is_uri

        if isinstance(value, Path) or not is_uri(value):
            return Path(value)
        remote = ObjectStoreRun(value)
        mirror = remote.pull()
        if ctx is not None:
            ctx.call_on_close(remote.push)
        return mirror

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class ClassesType(click.ParamType):
    """``person,car`` or ``0,2``: names or numbers of classes."""

    name = "classes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else list(value)


class ImageSizeType(click.ParamType):
    """``640``, the side of a square, or ``384,640``, height and width."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ImageSize:
        try:
            size = parse_size(str(value))
            check_image_size(size)
        except ValueError as error:  # PruningError is one
            self.fail(str(error))
        return size


def complete_setting(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: names of settings that begin so."""
    from paretoprune.search.config.run_config import known_keys

    return [key for key in known_keys() if key.startswith(incomplete)]


RUN = RunType()

# A file or an address, which the command itself checks; as a path the shell completes it.
FILE = click.Path(readable=False)
SIZE = ImageSizeType()

format_option: Callable[[Any], Any] = click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="Output format."
)

address_option: Callable[[Any], Any] = click.option(
    "--address", help="A Ray cluster: auto, host:port; local: this machine alone.  [default: local]"
)


classes_option: Callable[[Any], Any] = click.option(
    "--classes",
    type=ClassesType(),
    metavar="NAME,...",
    help="Names or numbers of the classes to keep; the others leave the network and the labels.  [default: all]",
)


def set_option(example: str) -> Callable[[Any], Any]:
    """``--set KEY=VALUE``; ``example`` is shown in the help."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=complete_setting,
        help=f"One setting, e.g. {example}; `paretoprune config` lists them.",
    )


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a run's model and dataset lie now."""
    model = click.option(
        "--model", type=FILE, metavar="MODEL", help="Current path of the run's model, if it was moved."
    )
    data = click.option("--data", type=FILE, metavar="DATA", help="Current path of the run's dataset, if it was moved.")
    return data(model(command))


trust_option: Callable[[Any], Any] = click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Load a checkpoint that contains arbitrary pickled code. This can execute code.",
)


def agent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Devices without Ray, and the token of their agents."""
    target = click.option(
        "--latency-target", metavar="http://HOST:PORT", help="An agent on the device to measure on (docs/edge.md)."
    )
    token = click.option(
        "--token-file", type=FILE, help="Holds the agent's token, if PARETOPRUNE_AGENT_TOKEN is not set."
    )
    return target(token(command))


hours_option = click.option("--hours", type=float, help="Stop starting trials after this many hours.")
gpu_hours_option = click.option(
    "--gpu-hours", type=float, help="Stop starting trials after this many GPU hours in total."
)
Command = Callable[..., Any]


def selector(command: Command) -> Command:
    """The options that say which trials: bounds, and what to pick within them."""
    options = (
        click.option("--max-latency-ms", type=click.FloatRange(min=0), help="Maximum latency, ms."),
        click.option(
            "--max-latency-ratio",
            type=click.FloatRange(min=0),
            help="Maximum latency as a fraction of the unpruned model's.",
        ),
        click.option(
            "--min-speedup",
            type=click.FloatRange(min=0, min_open=True),
            help="Minimum speed-up over the unpruned model (2: twice as fast).",
        ),
        click.option("--max-params-m", type=click.FloatRange(min=0), help="Maximum number of parameters, millions."),
        click.option("--max-gflops", type=click.FloatRange(min=0), help="Maximum GFLOPs."),
        click.option("--min-map", type=click.FloatRange(0, 1), help="Minimum accuracy (mAP50-95 or top-1)."),
        click.option(
            "--max-drop", type=float, help="Maximum loss of accuracy against the unpruned model (0.02: two points)."
        ),
        click.option(
            "--pick", multiple=True, metavar="WHAT",
            help="K (number of picks), knee, best, fastest, smallest, within:DROP (fastest that loses at most this "
            "accuracy), speedup:FACTOR (most accurate that is at least this many times as fast), spread:K or a "
            "trial's id; may be repeated.",
        ),
    )  # fmt: skip
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)
