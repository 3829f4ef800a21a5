"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from paretoprune.base.file_names import BEST, PLAN, PRUNED
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.image_size import ImageSize, check_image_size

if TYPE_CHECKING:
    from paretoprune.results.store.bounds import Bounds

FORMATS = ("table", "json", "csv")
FOLDER = click.Path(path_type=Path)


class RunType(click.ParamType):
    """A run's folder, or its address in an object store: then the mirror here, which is sent back at the end."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from paretoprune.search.storage.object_store import RemoteRun, is_uri

        if isinstance(value, Path) or not is_uri(value):
            return Path(value)
        remote = RemoteRun(value)
        mirror = remote.pull()
        if ctx is not None:
            ctx.call_on_close(remote.push)
        return mirror

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class ImageSizeType(click.ParamType):
    """``640``, the side of a square; where a ``pair`` is taken also ``384,640``, height and width."""

    name = "pixels"

    def __init__(self, pair: bool = False) -> None:
        self._pair = pair

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ImageSize:
        try:
            sides = [int(side) for side in str(value).split(",")]
        except ValueError:
            sides = []
        if len(sides) == 2 and not self._pair:
            self.fail(f"one side of a square is needed here, got {value}; height and width are for latency and export")
        if len(sides) not in (1, 2):
            pair = ", or HEIGHT,WIDTH" if self._pair else ""
            self.fail(f"a side in pixels is needed{pair}, got {value}")
        size = sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
        try:
            check_image_size(size)
        except PruningError as error:
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
SIZE_OR_PAIR = ImageSizeType(pair=True)

format_option: Callable[[Any], Any] = click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print."
)

address_option: Callable[[Any], Any] = click.option(
    "--address", help="A Ray cluster: auto, host:port; local: this machine alone.  [default: local]"
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
    model = click.option("--model", type=FILE, metavar="MODEL", help="Where the run's model lies now, after a move.")
    data = click.option("--data", type=FILE, metavar="DATA", help="Where the run's dataset lies now, after a move.")
    return data(model(command))


trust_option: Callable[[Any], Any] = click.option(
    "--trust-checkpoint", is_flag=True, help="Load a checkpoint that names unusual things; runs whatever it says."
)

hours_option = click.option("--hours", type=float, help="No trial begins after so many hours.")
gpu_hours_option = click.option("--gpu-hours", type=float, help="No trial begins after so many GPU hours in all.")
Command = Callable[..., Any]


def selector(command: Command) -> Command:
    """The options that say which trials: bounds, and what to pick within them."""
    options = (
        click.option("--max-latency-ms", type=click.FloatRange(min=0), help="Only trials at most this slow."),
        click.option("--max-params-m", type=click.FloatRange(min=0), help="Only trials of at most so many million."),
        click.option("--max-gflops", type=click.FloatRange(min=0), help="Only trials of at most so many GFLOPs."),
        click.option("--min-map", type=click.FloatRange(0, 1), help="Only trials of at least this mAP50-95 or top-1."),
        click.option("--max-drop", type=float, help="Only trials that lose at most so much of it (0.02: two points)."),
        click.option(
            "--pick", "picks", multiple=True, metavar="WHAT",
            help="K (so many), knee, best, fastest, smallest, spread:K or a trial's id; may be repeated.",
        ),
    )  # fmt: skip
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def bounds_of(values: Mapping[str, Any]) -> Bounds:
    """The bounds among the options of `selector`."""
    from paretoprune.results.store.bounds import Bounds

    return Bounds(**{item.name: values[item.name] for item in dataclasses.fields(Bounds)})


_NAMES = frozenset({PRUNED, BEST, PLAN})  # a run writes these once it gets there
_SUFFIXES = frozenset({".pt", ".json", ".jsonl", ".yaml", ".journal", ".csv", ".parquet", ".html", ".md", ".log"})


def check_output(
    written: Sequence[Path], read: Iterable[str | Path | None], folders: Sequence[tuple[Path, str]] = ()
) -> None:
    """Raise :class:`click.UsageError` where a file would be written over something that must stay.

    ``read``: what the command reads. ``folders``: that are made anew, each with the pattern of what may lie there.
    """
    inputs = [path for path in (Path(item) for item in read if item is not None) if path.exists()]
    for path in written:
        if path.is_dir():
            raise click.UsageError(f"-o must name a file, but {path} is a folder; give a name in it")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise click.UsageError(f"-o must name a file in a folder, but {above} is a file; give another name")
        for item in inputs:
            if path.exists() and path.samefile(item):
                raise click.UsageError(f"-o must not replace what is read, but {path} is {item}; give another name")
        run = _run_of(path)
        if run is not None and (path.name in _NAMES or (path.exists() and path.suffix in _SUFFIXES)):
            raise click.UsageError(f"-o must not replace a run's own file, but {path} is of the run {run}; "
                                   "give a place outside of it")  # fmt: skip
    for folder, pattern in folders:
        strange = [item.name for item in folder.glob("*") if not item.match(pattern)] if folder.is_dir() else []
        if strange or folder.is_file():
            what = f"it holds {sorted(strange)[0]}" if strange else "it is a file"
            raise click.UsageError(f"-o makes the folder {folder} anew, but {what}; give another name")
        for item in inputs:
            if folder.resolve() in item.resolve().parents:
                raise click.UsageError(f"-o makes the folder {folder} anew, but {item} is read; give another name")


def _run_of(path: Path) -> Path | None:
    """The run in whose folder a path lies."""
    from paretoprune.results.store.run_folder import RunFolder

    for folder in path.resolve().parents:
        run = RunFolder(folder)
        if run.baseline.is_file() and (run.config.is_file() or run.trials_file.is_file()):
            return folder
        if (folder / "comparison.json").is_file() and (folder / "strategies").is_dir():
            return folder
    return None
