"""The command latency: two models timed in turn, alone on the device, by one or several runtimes."""

from __future__ import annotations

from typing import Any

import click

from paretoprune.pruning.names import RUNTIMES, SPANS, listed
from paretoprune.search.commands.options import FILE, SIZE, agent_options, format_option, trust_option
from paretoprune.search.commands.output import print_row, print_rows

COLUMNS = (
    "runtime", "precision", "median_ms", "p90_ms", "p99_ms", "baseline_median_ms", "speedup", "speedup_ci95",
    "images_per_s", "converged",
)  # fmt: skip


@click.command()
@click.argument("model", type=FILE)
@click.option("--against", type=FILE, help="Unpruned model to time in turn with MODEL.  [default: MODEL itself]")
@click.option(
    "--runtime", "runtimes", multiple=True,
    help=f"{listed(RUNTIMES)}; on an agent also ncnn and command:NAME. May be repeated.  [default: torch; on an agent "
    "onnx, or what a file is for]",
)  # fmt: skip
@click.option(
    "--span", type=click.Choice(SPANS), default=SPANS[0], show_default=True,
    help="What is timed: the network up to the decoded boxes, or Ultralytics' whole predict, with pre-processing and "
    "non-maximum suppression.",
)  # fmt: skip
@click.option(
    "--data", type=FILE, help="Dataset on whose validation images predict is timed.  [default: random pixels]"
)
@click.option("--half", is_flag=True, help="Use FP16/BF16 if the device supports it natively.")
@click.option("--imgsz", type=SIZE, default=640, show_default=True, help="Side of the input, pixels, or HEIGHT,WIDTH.")
@click.option("--against-imgsz", type=SIZE, help="Input size of --against.  [default: --imgsz]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per inference.")
@click.option(
    "--streams", type=click.IntRange(min=1), default=1, show_default=True,
    help="Inferences at the same time for images_per_s, a thread each, with --threads CPU threads each.",
)  # fmt: skip
@click.option(
    "--memory", is_flag=True, help="Also measure peak memory, each network in a process of its own (some seconds each)."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores but one, at most 8]")
@click.option(
    "--target-halfwidth", type=click.FloatRange(min=0, min_open=True), default=0.01, show_default=True,
    help="Stop once the 95 % interval of the speed-up has this half width, as a fraction of it.",
)  # fmt: skip
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Maximum seconds per runtime.",
)
@click.option("--device", help="cpu, cuda:0, ...; on an agent cpu or gpu.  [default: the first GPU, else cpu]")
@agent_options
@trust_option
@format_option
def latency(model: str, against: str | None, runtimes: tuple[str, ...], form: str, **settings: Any) -> None:
    """Measure MODEL's latency beside another model's, in turn, alone on the device; times in milliseconds.

    Stops once the speed-up is known to --target-halfwidth or --max-seconds have passed, and reports which.
    Prints one result, or one for each of several runtimes. With --latency-target the device of an agent measures
    (docs/edge.md); MODEL may then also be a file for it (.onnx, .tflite, .rknn, .hef, a folder of OpenVINO or ncnn).
    """
    from paretoprune.search.api.measuring import latencies

    found = latencies(model, against, list(dict.fromkeys(runtimes)), **settings)
    results = [{"model": model, "against": against or model, **each.to_dict()} for each in found]
    if len(results) == 1:
        print_row(results[0], form)
    else:
        print_rows(results, form, COLUMNS)
    for result in results:
        if not result["converged"]:
            click.echo(_said(result), err=True)


def _said(result: dict[str, Any]) -> str:
    return (
        f"{result['runtime']}: the time was up with the speed-up known to {result['session_halfwidth']:.1%}, not to "
        f"{result['target_halfwidth']:.1%}; give more --max-seconds, or a calmer machine"
    )
