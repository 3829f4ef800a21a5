"""The benchmark on COCO: what its cells hold, that it goes on where it was, and what its page compares."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coco import KEPT, NETWORKS, SIZES, main, markdown
from benchmarks.store import Store
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.yolo.loading import load_model, model_stats

MADE = {"date": "2026-01-02", "commit": "abc"}


def cell(keep: float, map50_95: float, data: str = "sample", epochs: int = 0, **more: Any) -> dict[str, Any]:
    named = {"data": data, "network": "yolov8n", "imgsz": 320, "keep": keep, "epochs": epochs}
    return {**named, "map50_95": map50_95, "gflops": 8 * keep, "params_m": 3.0, "images": 600, **more, **MADE}


def page(*cells: dict[str, Any]) -> str:
    store = Store(Path("nowhere.json"))
    store.content["cells"] = list(cells)
    store.content["notes"] = ["a note"]
    return markdown(store)


def test_a_cut_is_compared_with_the_unpruned_network_on_the_same_images() -> None:
    text = page(
        cell(1, 0.4), cell(0.5, 0.1), cell(0.5, 0.3, epochs=9),
        cell(1, 0.5, "coco", images=5000), cell(0.7, 0.4, "coco", images=5000),
    )  # fmt: skip
    assert "| yolov8n | 320 | sample | 8.0 | 1.00 | 1.00 | 0.400 | 1.00 |  |" in text
    assert "| yolov8n | 320 | sample | 4.0 | 0.50 | 1.00 | 0.100 | 0.25 | none |" in text
    assert "| yolov8n | 320 | sample | 4.0 | 0.50 | 1.00 | 0.300 | 0.75 | 9 epochs |" in text
    assert "| yolov8n | 320 | coco | 5.6 | 0.70 | 1.00 | 0.400 | 0.80 | none |" in text
    assert "- sample: 600 images, not the 5,000 of val2017" in text
    assert "- coco: 5,000 images.\n" in text
    assert "- a note\n" in text
    assert "No network of ours is trained" not in text
    assert "No network of ours is trained" in page(cell(1, 0.4))


def test_what_others_published_stands_beside_it() -> None:
    text = page(cell(1, 0.4))
    # 15.7 of 21.5 thousand FLOPs per pixel (640 x 640 of them), 34.9 of 37.3; 81.0 of 218.8 GFLOPs, 47.2 of 48.8
    assert "| YOLOv8n, torch-dag [1] | 640 | COCO | 6.4 | 0.73 | 0.84 | 0.349 | 0.94 | 200 epochs |" in text
    assert "| YOLOv5x, PAGCP [2] | 640 | val2017 | 81.0 | 0.37 | 0.34 | 0.472 | 0.97 | yes, epochs not stated |" in text


def test_what_is_not_measured_is_named() -> None:
    every = [(n, s, k) for n in NETWORKS for s in SIZES for k in (1.0, *KEPT)]
    cells = [cell(k, 0.4, network=n, imgsz=s) for n, s, k in every]
    assert "Not measured" not in page(*cells)
    assert "Not measured, in whole or in part: yolo26n at 640 px." in page(*cells[:-1])


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Options for the built-in network and few of its images."""
    (tmp_path / "weights").mkdir()
    shutil.copy(BASELINE, tmp_path / "weights" / "digits.pt")
    data = build_dataset(tmp_path / "digits", train=8, val=8)
    places = {"--data": data, "--weights": tmp_path / "weights", "--work": tmp_path / "work", "--output": tmp_path}
    return [*(str(part) for pair in places.items() for part in pair), "--networks", "digits", "--device", "cpu"]


@pytest.mark.slow
def test_cells_are_what_prune_and_finetune_give_and_are_not_made_twice(
    digits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [*digits, "--sizes", "64", "--keep", "0.6"]
    main(wanted)
    whole, cut = Store(tmp_path / "coco.json").cells
    checkpoint, data = tmp_path / "work" / "digits-digits-64-0.6.pt", str(tmp_path / "digits" / "data.yaml")
    for found, file in ((whole, BASELINE), (cut, checkpoint)):
        model = load_model(file)
        assert found["map50_95"] == round(evaluate(model, data, 64, "cpu")["map50_95"], 4)
        assert found["gflops"] == round(model_stats(model, 64).gflops, 3)
        assert found["images"] == 8
    assert 0.55 < cut["gflops"] / whole["gflops"] <= 0.61
    assert cut["macs_kept"] <= 0.6

    made = checkpoint.stat().st_mtime_ns
    main([*wanted, "--epochs", "1"])  # starts from the cut that is there
    *known, tuned = Store(tmp_path / "coco.json").cells
    assert known == [whole, cut]
    assert checkpoint.stat().st_mtime_ns == made
    assert (tuned["epochs"], tuned["gflops"]) == (1, cut["gflops"])
    assert tuned["map50_95"] >= cut["map50_95"]
    written = (tmp_path / "coco.md").read_text(encoding="utf-8")
    assert written.count("| digits | 64 | digits |") == 3
    capsys.readouterr()
    main(["table", "--output", str(tmp_path)])
    assert capsys.readouterr().out == written + "\n"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["--sizes", "300"], "the image size must be a multiple of 32, but got 300: use 320"),
        (["--keep", "1.2"], "the share of multiply-adds to keep must lie in (0, 1], but got 1.2"),
        (["--epochs", "-1"], "`epochs >= 1` must hold, but got epochs=-1"),
        (["--device", "cpu,tpu9x"], "the device must be 'cpu' or 'cuda[:N]', but got 'tpu9x'"),
        (["--networks", "digits", "yolov8z"], "the model must be an existing .pt file, but there is no '"),
        (["--data", "absent.yaml"], "there is no file 'absent.yaml'"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(
    digits: list[str], tmp_path: Path, wrong: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*digits, *wrong])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert why in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out
    assert not (tmp_path / "coco.json").exists()
