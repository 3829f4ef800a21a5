"""A file that is there is the one that is meant: no official name, renaming or download of Ultralytics comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ultralytics.utils import downloads

from paretoprune.pruning.data.dataset import dataset_file
from paretoprune.pruning.errors import ModelError
from paretoprune.pruning.latency.runtimes.autobackend import Backend
from paretoprune.pruning.yolo.loading import load_model, model_file
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics
from tests.pruning.tiny import tiny_model

NAMES = (
    "yolov5n.pt", "yolov3.pt", "yolov5x6.pt", "yolo11n.pt", "it's.pt", " a b.pt", "ünï.pt", "yolov5/yolov3-spp.pt",
    "o'brien/m.pt",
)  # fmt: skip


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(downloads, "safe_download", refused)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("name", NAMES)
def test_a_local_checkpoint_is_read_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tiny_model(), Path(name))
    for path in (Path(name), tmp_path / name):
        model: Any = load_model(path)
        assert model.names[0] == "square"
    assert Backend(name, 64).output().shape[1] == 4 + 3
    from ultralytics import YOLO

    with quiet_ultralytics():  # as a native rival is trained
        assert YOLO(str(model_file(name))).names[0] == "square"


@pytest.mark.usefixtures("no_download")
def test_a_damaged_local_file_is_an_error_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("yolo11n.pt", "yolov5n.pt"):
        Path(name).write_bytes(b"PK\x03\x04 torn")
        with pytest.raises(ModelError, match=name):
            load_model(name)
        assert Path(name).read_bytes() == b"PK\x03\x04 torn"


@pytest.mark.parametrize("name", ["yolov5/menu.yaml", "yolov3-u.yaml", "o'brien/data.yaml"])
def test_a_local_dataset_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("names: [a]\n")
    assert dataset_file(tmp_path / name) == tmp_path / name
