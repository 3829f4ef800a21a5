"""A real run on hostile input, in a process of its own with secrets in its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pruning.hostile import running, zipped

ROOT = Path(__file__).resolve().parents[3]
SECRETS = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-aws-0123456789", "HF_TOKEN": "s3cr3t-hf-0123456789",
           "RAY_AUTH_TOKEN": "53c73700" * 4, "WANDB_API_KEY": "s3cr3t-wandb-012345"}  # fmt: skip
NAMES = ["<script>alert(1)</script>", "../../x", "$(touch made)", "`touch made`; touch made", "a\nb", "x" * 300,
         "{{7*7}}", "' OR 1=1", "\u202egpj", "nul"]  # fmt: skip


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder that everything happens in, and the run's; searched, fine-tuned and reported by the command."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    place = tmp_path_factory.mktemp("place") / "a" / "b"
    place.mkdir(parents=True)
    data = build_dataset(place / "data", train=16, val=8)
    content = yaml.safe_load(data.read_text())
    content["names"] = dict(enumerate(NAMES))
    content["download"] = f"open({str(place / 'made')!r}, 'w')"
    data.write_text(yaml.safe_dump(content))
    run = place / "runs" / "<b>run & co"
    settings = {"recover.calibration_images": 4, "latency.max_seconds": 0.2, "latency.threads": 1,
                "finetune.epochs": 1, "recover.importance": "l2", "search.warm_start": "false",
                "resources.max_concurrent_trials": 1}  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    search = ["search", str(BASELINE), str(data), "--imgsz", "64", "--trials", "2", "--epochs", "1", "--run", str(run)]
    given = os.environ | SECRETS | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    for command in ([*search, *words], ["finetune", str(run), "--trial", "t0000"], ["report", str(run)]):
        done = subprocess.run(
            [sys.executable, "-m", "paretoprune", *command], cwd=place, env=given, capture_output=True, text=True,
            timeout=1500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert not [secret for secret in SECRETS.values() if secret in done.stdout + done.stderr]
    return place, run


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_the_run_folder(hostile_run: tuple[Path, Path]) -> None:
    _, run = hostile_run
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@pytest.mark.slow
def test_names_reach_no_shell_no_path_and_no_markup(hostile_run: tuple[Path, Path]) -> None:
    place, run = hostile_run
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in report
    assert "<b>run" not in report
    assert "&lt;b&gt;run" in report
    outside = {path.relative_to(place).parts[0] for path in place.rglob("*")}
    assert outside == {"data", "runs"}  # neither `made` nor `x`
    assert {path.name for path in place.parent.iterdir()} == {"b"}
    assert list(place.parent.parent.iterdir()) == [place.parent]
    assert {path.name for path in (run / "trials").iterdir()} == {"t0000", "t0001"}


@pytest.mark.slow
def test_a_missing_image_folder_does_not_run_the_download_entry(hostile_run: tuple[Path, Path]) -> None:
    from paretoprune.pruning.errors import PruningError
    from paretoprune.pruning.evaluation.evaluator import evaluate
    from paretoprune.pruning.yolo.loading import load_model

    place, run = hostile_run
    content = yaml.safe_load((place / "data" / "data.yaml").read_text())
    other = place / "data" / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "val": "images/nowhere"}))
    try:
        with pytest.raises(PruningError, match="must exist, but got"):
            evaluate(load_model(run / "trials" / "t0000" / "pruned.pt"), str(other), 64, "cpu")
    finally:
        other.unlink()
    assert not (place / "made").exists()


def test_nothing_is_installed_in_a_worker(ray_session: object) -> None:
    import ray

    def ask_for_a_package() -> list[str]:
        from unittest.mock import patch

        from ultralytics.utils import checks

        import paretoprune.pruning.yolo.ultralytics_logging  # noqa: F401  as every worker does before ultralytics

        called: list[str] = []

        def note(command: object, **options: object) -> bytes:
            called.append(str(command))
            return b""

        with patch.object(checks.subprocess, "check_output", note), patch.object(checks.subprocess, "run", note):
            checks.check_requirements("surely-no-such-package-0")
        return called

    assert [call for call in ray.get(ray.remote(ask_for_a_package).remote()) if "install" in call] == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [("layers", "evil.pt"), ("search", "evil.pt", "data.yaml")])
def test_a_checkpoint_that_would_run_code_is_refused_by_the_commands(words: tuple[str, ...], tmp_path: Path) -> None:
    zipped(running(str(tmp_path / "made"))["reduce"], tmp_path / "evil.pt")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: {0: a}\n")
    (tmp_path / "images").mkdir()
    more = ("--run", str(tmp_path / "run")) if words[0] == "search" else ()
    done = subprocess.run(
        [sys.executable, "-m", "paretoprune", *words, *more], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "so far" not in line)  # said where a machine is slow
    assert line.startswith("error: ")
    assert "calls posix.mkdir; do not load it" in line
    assert done.stdout == ""
    assert not (tmp_path / "made").exists()


def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    from paretoprune.search.config.run_config import build_config
    from paretoprune.search.errors import ConfigError

    for key, nearest in (("trails", "search.trials"), ("samplr", "search.sampler")):
        with pytest.raises(ConfigError, match=f"nearest known one is `{nearest}`"):
            build_config({"model": {"path": "a"}, "data": {"path": "b"}, "search": {key: 1}})
    with pytest.raises(ConfigError) as caught:
        build_config(json.loads('{"model": {"path": "a"}, "data": {"path": "b"}, "<script>": 1}'))
    assert "\n" not in str(caught.value)
