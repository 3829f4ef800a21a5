"""The command export: another runtime's file, checked against the checkpoint and timed together with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.pruning.names import PRECISIONS
from paretoprune.search.commands.options import FILE, SIZE, trust_option
from paretoprune.search.commands.output import echo


def _parsed(_: Any, __: Any, assignments: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` texts, the values in YAML."""
    import yaml

    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"key=value is needed, got {text!r}; for instance opset=17")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise click.BadParameter(f"the value must be YAML, got {value!r:.80}; quote it") from None
    return found


@click.command()
@click.argument("model", type=FILE)
@click.option("--format", "target", default="onnx", show_default=True, help="onnx, openvino, engine, torchscript, ...")
@click.option("--imgsz", type=SIZE, help="Side of the input, pixels, or HEIGHT,WIDTH.  [default: as it was trained]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A file, or a folder for it.  [default: beside MODEL]"
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="bf16: for OpenVINO alone.  [default: that of the trial, else fp32]",
)
@click.option(
    "--data",
    type=FILE,
    help="data.yaml: int8 is calibrated on its training images, the check compares accuracy on its validation images.  "
    "[default: two images included in Ultralytics for the check]",
)
@click.option(
    "--calibration-images", type=click.IntRange(min=1), default=64, show_default=True, help="Training images for int8."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per inference.")
@click.option("--dynamic", is_flag=True, help="Inputs of any size.")
@click.option("--nms", is_flag=True, help="With non-maximum suppression in the file.")
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parsed,
    help="One of Ultralytics' export options, e.g. opset=17.",
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
    PyTorch (or with the same export of --against); with --data its accuracy is, too. The figures go to stderr and to
    PATH.check.json. Exit code 1 if the outputs differ by more than another runtime's arithmetic explains; in int8, if
    the file keeps less than four fifths of the accuracy.
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
    images = f" for {found['batch']} images" if found["batch"] > 1 else ""
    return [
        *_of_outputs(found),
        *([_of_accuracy(found["accuracy"])] if found["accuracy"] else []),
        f"latency: {found['median_ms']:.2f} ms{images}, {found['speedup']:.2f}x ({low:.2f} to {high:.2f}) as fast as "
        f"{found['against']} beside it ({found['against_median_ms']:.2f} ms)",
    ]


def _of_outputs(found: dict[str, Any]) -> list[str]:
    if "images" not in found:
        return [f"answers: {found['verdict']}"]
    left_out = found["left_out"]
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    return [
        *([f"left out of the check: {left_out[0]}{more}"] if left_out else []),
        f"answers: {found['verdict']} on {found['images']} images ({found['objects']} objects, scores "
        f"differ by {found['score_difference']:.1e} at most, boxes by {found['box_difference']:.1e} of the image)",
    ]


def _of_accuracy(found: dict[str, Any]) -> str:
    interval = "" if found["ci95"] is None else " ({:+.4f} to {:+.4f})".format(*found["ci95"])
    return (
        f"accuracy: {found['metric']} {found['file']:.4f}, the checkpoint's {found['model']:.4f}: "
        f"{found['difference']:+.4f}{interval} on {found['images']} images"
    )
