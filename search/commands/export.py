"""The command export: another runtime's file, checked against the checkpoint and timed together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.search.commands.options import FILE, SIZE_OR_PAIR, trust_option
from paretoprune.search.commands.output import echo


@click.command()
@click.argument("model", type=FILE)
@click.option("--format", "target", default="onnx", show_default=True, help="onnx, openvino, engine, torchscript, ...")
@click.option(
    "--imgsz", type=SIZE_OR_PAIR, help="Side of the input, pixels, or HEIGHT,WIDTH.  [default: as it was trained]"
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A file, or a folder for it.  [default: beside MODEL]"
)
@click.option(
    "--data", type=FILE, help="data.yaml with images for the check.  [default: two images included in Ultralytics]"
)
@click.option(
    "--against",
    type=FILE,
    help="Also export this unpruned model and time it for comparison.  [default: MODEL in PyTorch]",
)
@click.option("--check/--no-check", default=True, help="Compare with MODEL on real images and measure the latency.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=8.0, show_default=True, help="Maximum seconds of timing."
)
@click.option("--device", help="cpu, cuda:0, ...  [default: the first GPU, else cpu]")
@trust_option
def export(model: str, target: str, **options: Any) -> int:
    """Export MODEL through Ultralytics' exporter; prints the path of what was written.

    Then its outputs on real images are compared with MODEL's and its latency is measured in turn with MODEL's in
    PyTorch (or with the same export of --against); the figures go to stderr and to PATH.check.json. Exit code 1 if the
    outputs differ by more than another runtime's arithmetic explains.
    """
    from paretoprune.search.api.measuring import export as export_checked

    exported = export_checked(model, target, **options)
    echo(str(exported.path))
    if exported.check is None:
        return 0
    for line in lines(exported.check):
        click.echo(line, err=True)
    return 0 if exported.ok else 1


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    low, high = found["speedup_ci95"]
    left_out = found["left_out"]
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    return [
        *([f"left out of the check: {left_out[0]}{more}"] if left_out else []),
        f"answers: {found['verdict']} on {found['images']} images ({found['objects']} objects, scores "
        f"differ by {found['score_difference']:.1e} at most, boxes by {found['box_difference']:.1e} of the image)",
        f"latency: {found['median_ms']:.2f} ms, {found['speedup']:.2f}x ({low:.2f} to {high:.2f}) as fast as "
        f"{found['against']} beside it ({found['against_median_ms']:.2f} ms)",
    ]
