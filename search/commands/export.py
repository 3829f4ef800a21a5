"""The command export: another runtime's file, checked against the checkpoint and timed beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from search.output import echo, trust_option


@click.command()
@click.argument("model")
@click.option("--format", "target", default="onnx", show_default=True, help="onnx, openvino, engine, torchscript, ...")
@click.option("--imgsz", type=click.IntRange(min=32), help="Side of the input, pixels.  [default: as it was trained]")
@click.option("--data", help="data.yaml with images to check on.  [default: two that Ultralytics brings along]")
@click.option("--against", help="Also export this unpruned model and time it beside.  [default: MODEL in PyTorch]")
@click.option("--check/--no-check", default=True, help="Compare with MODEL on real images and measure the latency.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=8.0, show_default=True, help="Longest timing.")
@click.option("--device", help="cpu, cuda:0, ...  [default: the first GPU, else cpu]")
@trust_option
def export(
    model: str,
    target: str,
    imgsz: int | None,
    data: str | None,
    against: str | None,
    check: bool,
    seconds: float,
    device: str | None,
    trust_checkpoint: bool,
) -> int:
    """Export MODEL through Ultralytics' exporter; prints the path of what was written.

    Then its answers on real images are compared with MODEL's and its latency is measured in turn with MODEL's in
    PyTorch (or with the same export of --against); the figures go to stderr and to PATH.check.json. Exit code 1 where
    the answers differ by more than another runtime's arithmetic explains.
    """
    from search.preflight import check_model_file

    for path in filter(None, (model, against)):
        check_model_file(path)
    from cluster.device_lock import DeviceLock
    from cluster.devices import default_device, device_key
    from pruning.export import export_model, trained_size

    size, place = imgsz or trained_size(model, trust_checkpoint), device or default_device()
    with DeviceLock(device_key(place)).using():
        written = export_model(model, target, size, place, trust_checkpoint)
    echo(str(written))
    if not check:
        return 0
    found = checked(written, model, target, size, place, data, against, seconds)
    for line in lines(found):
        click.echo(line, err=True)
    return 0 if found["ok"] else 1


def checked(
    written: Path,
    model: str,
    target: str,
    imgsz: int,
    device: str,
    data: str | None,
    against: str | None,
    seconds: float,
) -> dict[str, Any]:
    """What the check and the timing found, also written beside the export as ``<export>.check.json``."""
    import tempfile
    from dataclasses import asdict

    from cluster.device_lock import DeviceLock
    from cluster.devices import device_key
    from pruning.export import export_model
    from pruning.export_check import check_export, measure_export
    from results.atomic import write_json
    from search.preflight import measuring_threads

    lock = DeviceLock(device_key(device))
    with lock.using():
        comparison = check_export(written, model, imgsz, device, data)
    with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        rival = Path(model)
        if against is not None:
            copy = Path(scratch) / Path(against).name
            copy.write_bytes(Path(against).read_bytes())
            rival = export_model(copy, target, imgsz, device)
        with lock.measuring():
            times = measure_export(written, rival, imgsz, device, measuring_threads(), seconds)
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
    write_json(written.with_name(f"{written.name}.check.json"), found)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    low, high = found["speedup_ci95"]
    return [
        f"answers: {found['verdict']} on {found['images']} images ({found['objects']} objects, scores "
        f"differ by {found['score_difference']:.1e} at most, boxes by {found['box_difference']:.1e} of the image)",
        f"latency: {found['median_ms']:.2f} ms, {found['speedup']:.2f}x ({low:.2f} to {high:.2f}) as fast as "
        f"{found['against']} beside it ({found['against_median_ms']:.2f} ms)",
    ]
