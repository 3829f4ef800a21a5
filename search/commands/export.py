"""The command export: another runtime's file, checked against the checkpoint and timed beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paretoprune.search.commands.options import FILE, SIZE_OR_PAIR, check_output, trust_option
from paretoprune.search.commands.output import echo

if TYPE_CHECKING:
    from paretoprune.pruning.export.check import RealImages
    from paretoprune.pruning.yolo.image_size import ImageSize

CHECK = ".check.json"  # beside the export: what its check found


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
    "--data", type=FILE, help="data.yaml with images to check on.  [default: two that Ultralytics brings along]"
)
@click.option(
    "--against", type=FILE, help="Also export this unpruned model and time it beside.  [default: MODEL in PyTorch]"
)
@click.option("--check/--no-check", default=True, help="Compare with MODEL on real images and measure the latency.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=8.0, show_default=True, help="Longest timing.")
@click.option("--device", help="cpu, cuda:0, ...  [default: the first GPU, else cpu]")
@trust_option
def export(model: str, target: str, check: bool, device: str | None, trust_checkpoint: bool, **options: Any) -> int:
    """Export MODEL through Ultralytics' exporter; prints the path of what was written.

    Then its answers on real images are compared with MODEL's and its latency is measured in turn with MODEL's in
    PyTorch (or with the same export of --against); the figures go to stderr and to PATH.check.json. Exit code 1 where
    the answers differ by more than another runtime's arithmetic explains.
    """
    from paretoprune.search.sweep.preflight import check_model_file

    for path in filter(None, (model, options["against"])):
        check_model_file(path)
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import default_device, device_key
    from paretoprune.pruning.export.check import real_images
    from paretoprune.pruning.export.exporter import export_model, export_path
    from paretoprune.pruning.yolo.image_size import check_image_size, stride_of, trained_size
    from paretoprune.pruning.yolo.loading import load_model

    goes_to = export_path(model, target, options["output"])
    if options["output"] is not None:
        folders = [(goes_to, "*")] if goes_to.is_dir() else []
        files = [goes_to.with_name(goes_to.name + CHECK), *([] if folders else [goes_to])]
        check_output(files, [model, options["against"], options["data"]], folders)
    network: Any = load_model(model, trust_checkpoint)
    size = options.pop("imgsz") or trained_size(getattr(network, "args", None), stride_of(network))
    check_image_size(size, stride_of(network), model)
    place = device or default_device()
    images = real_images(network, size, options.pop("data")) if check else None
    with DeviceLock(device_key(place)).using():
        written = export_model(model, target, size, place, trust_checkpoint, options.pop("output"))
    echo(str(written))
    if images is None:
        return 0
    found = checked(written, model, target, size, place, images, trust_checkpoint, **options)
    for line in lines(found):
        click.echo(line, err=True)
    return 0 if found["ok"] else 1


def checked(
    written: Path,
    model: str,
    target: str,
    imgsz: ImageSize,
    device: str,
    images: RealImages,
    trust: bool,
    against: str | None,
    seconds: float,
) -> dict[str, Any]:
    """What the check and the timing found, also written beside the export as ``<export>.check.json``."""
    import tempfile
    from dataclasses import asdict

    from paretoprune.base.atomic import write_json
    from paretoprune.cluster.device_lock import DeviceLock
    from paretoprune.cluster.devices import device_key
    from paretoprune.pruning.export.check import check_export, measure_export
    from paretoprune.pruning.export.exporter import export_model
    from paretoprune.pruning.yolo.loading import load_model
    from paretoprune.search.trial.exclusive_device import measuring_threads

    lock = DeviceLock(device_key(device))
    with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        rival = Path(model)
        with lock.using():
            comparison = check_export(written, load_model(model, trust), imgsz, device, images=images)
            if against is not None:
                rival = export_model(against, target, imgsz, device, trust, scratch)
        with lock.measuring():
            times = measure_export(written, rival, imgsz, device, measuring_threads(), seconds, trust=trust)
    found = {
        "export": written.name,
        "format": target,
        "imgsz": imgsz,
        "device": device,
        "ok": comparison.ok,
        "verdict": comparison.verdict,
        **asdict(comparison),
        **times.to_dict(),
    }
    write_json(written.with_name(written.name + CHECK), found)
    return found


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
