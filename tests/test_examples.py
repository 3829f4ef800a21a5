"""The example runs as it stands, and the page on Python names what is there."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

import paretoprune

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_example_does_the_whole_job(
    tmp_path: Path, ray_session: object, small_builtin: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "python_api.py"))["main"](tmp_path)
    shown = capsys.readouterr().out
    assert "answers the same as the checkpoint's" in shown
    run = tmp_path / "run"
    assert (run / "report.html").is_file()
    assert len(pd.read_parquet(run / "trials.parquet")) == 3
    (pick,) = (run / "selected").iterdir()
    assert {"best.pt", "best.onnx", "plan.json", "MODEL_CARD.md"} <= {path.name for path in pick.iterdir()}


def named_in(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"`(paretoprune(?:\.\w+)+)[`(]", text)


def test_the_page_on_python_names_what_is_there() -> None:
    names = named_in("python.md")
    assert len(names) > 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_public_name_is_there() -> None:
    assert [name for name in paretoprune.__all__ if not hasattr(paretoprune, name)] == []
    homes = [name for names in paretoprune._HOMES.values() for name in names]
    assert sorted(homes) == sorted(paretoprune.__all__) == paretoprune.__all__
