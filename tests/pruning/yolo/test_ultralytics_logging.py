"""Ultralytics inside a worker: silent, offline, without its integrations, and without side effects."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paretoprune.pruning.yolo.ultralytics_logging import preserved_random_state, quiet_ultralytics
from tests.pruning.recovery_material import shapes_dataset


def test_log_goes_to_the_file_and_bars_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ultralytics.utils import LOGGER, TQDM, colorstr

    heard: list[str] = []
    own = logging.Handler()  # what listened before must listen again (the stock handler keeps the stream it began with)
    own.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(own)
    with quiet_ultralytics(tmp_path / "logs" / "train.log"):
        LOGGER.info(colorstr("red", "written down"))
        for _ in TQDM(range(3), desc="a bar"):
            pass
    LOGGER.info("heard again")
    LOGGER.removeHandler(own)
    printed = "".join(capfd.readouterr())
    log = (tmp_path / "logs" / "train.log").read_text()
    assert "written down" in log
    assert "\x1b" not in log
    assert "bar" not in log + printed
    assert "written down" not in printed
    assert heard == ["heard again"]


def test_python_warnings_go_to_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import warnings

    with quiet_ultralytics(tmp_path / "log"):
        warnings.warn("beware of this", UserWarning, stacklevel=1)
    assert "beware of this" in (tmp_path / "log").read_text()
    assert capfd.readouterr() == ("", "")


def test_inner_context_without_a_path_keeps_the_outer_log(tmp_path: Path) -> None:
    from ultralytics.utils import LOGGER

    with quiet_ultralytics(tmp_path / "log"), quiet_ultralytics():
        LOGGER.info("from inside")
    assert "from inside" in (tmp_path / "log").read_text()


def test_everything_is_put_back_after_an_exception() -> None:
    from ultralytics import utils
    from ultralytics.utils import LOGGER, callbacks, torch_utils

    def state() -> tuple[object, ...]:
        return LOGGER.handlers, utils.VERBOSE, callbacks.add_integration_callbacks, torch_utils.NUM_THREADS

    before = state()

    def fail() -> None:
        with quiet_ultralytics():
            assert all(now != then for now, then in zip(state()[:3], before[:3], strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state() == before


def test_no_integration_is_attached() -> None:
    from ultralytics.utils import callbacks

    class FakePredictor(SimpleNamespace):
        """Not a trainer: for those, all integrations the settings allow would be imported here, which takes seconds."""

    quiet, loud = (FakePredictor(callbacks=defaultdict(list)) for _ in range(2))
    with quiet_ultralytics():
        callbacks.add_integration_callbacks(quiet)
    assert not quiet.callbacks
    callbacks.add_integration_callbacks(loud)
    assert loud.callbacks  # else the test would show nothing


def test_reading_a_dataset_asks_no_network_for_a_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils import checks

    asked: list[str] = []
    monkeypatch.setattr(checks, "USER_CONFIG_DIR", tmp_path)  # no font there
    monkeypatch.setattr("ultralytics.utils.downloads.is_url", lambda url, check=False: asked.append(str(url)))
    data = shapes_dataset(tmp_path / "shapes", train=1, val=1)
    with quiet_ultralytics():
        check_det_dataset(str(data))
    assert not asked


def test_threads_stay_as_pinned() -> None:
    from ultralytics.utils.torch_utils import NUM_THREADS, select_device

    before, pinned = torch.get_num_threads(), NUM_THREADS + 1
    try:
        torch.set_num_threads(pinned)
        with quiet_ultralytics():
            select_device("cpu")
            assert torch.get_num_threads() == pinned
    finally:
        torch.set_num_threads(before)


def test_random_state_is_put_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    seed()
    expected = drawn()
    seed()
    with preserved_random_state():
        torch.manual_seed(99)
        drawn()
    assert drawn() == expected


def test_importing_sets_the_environment_and_nothing_heavy() -> None:
    code = (
        "import os, sys, paretoprune.pruning.yolo.ultralytics_logging\n"
        "assert os.environ['YOLO_AUTOINSTALL'] == 'false' and os.environ['YOLO_OFFLINE'] == 'true'\n"
        "assert not {'torch', 'ultralytics', 'numpy'} & set(sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("YOLO_")}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
