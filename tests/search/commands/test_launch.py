"""The command launch: what --dry-run prints, what it refuses, and every command of docs/cluster.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from paretoprune.search.cli import cli
from paretoprune.search.errors import InterruptedRunError

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "cluster.md"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: /data/my.pt}\ndata: {path: /data/my/data.yaml}\nsearch: {trials: 9}\n")
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, ["launch", *map(str, words)])


@pytest.mark.parametrize("follow", [True, False])
def test_a_job_goes_on_without_us_and_is_said_to(config: Path, monkeypatch: pytest.MonkeyPatch, follow: bool) -> None:
    """Ctrl-C while its output is shown: the job, how to see it again and how to end it."""
    from paretoprune.cluster.launch import ray_jobs

    def log(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return "SUCCEEDED"

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray_jobs, "submit", lambda job, address: (None, "job 7"))
    monkeypatch.setattr(ray_jobs, "follow", log)
    words = (
        "--on",
        "ray",
        "--run",
        "/runs/a",
        "--address",
        "http://head:1/?a=b",
        *(() if follow else ("--no-follow",)),
    )
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
    try:
        result = invoke(config, *words)
    finally:
        signal.signal(signal.SIGINT, own)
    commands = (
        "`RAY_AUTH_MODE=token ray job logs --follow --address 'http://head:1/?a=b' 'job 7'` shows it, "
        "`RAY_AUTH_MODE=token ray job stop --address 'http://head:1/?a=b' 'job 7'` stops it"
    )
    assert result.stdout == "job 7\n"
    if follow:
        assert isinstance(result.exception, InterruptedRunError)
        assert str(result.exception) == f"interrupted while showing job 7, which goes on; {commands}"
    else:
        assert result.exit_code == 0
        assert f"job 7 runs; {commands}" in result.stderr


def test_slurm_gets_the_whole_search(config: Path) -> None:
    words = ("--on", "slurm", "--run", "/runs/a b", "--nodes", 3, "--sbatch", "partition=gpu")
    result = invoke(config, *words, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=3" in result.stdout
    assert "#SBATCH --partition=gpu" in result.stdout
    last = result.stdout.strip().splitlines()[-1]
    assert shlex.split(last) == [
        "paretoprune", "search", "/data/my.pt", "/data/my/data.yaml", "--config",
        str(config.with_suffix(".resolved.yaml")), "--run", "/runs/a b", "--address", "auto",
    ]  # fmt: skip
    assert list(config.parent.iterdir()) == [config]  # a dry run writes nothing


def test_kuberay_gets_the_resolved_configuration(config: Path) -> None:
    words = ("--image", "me/pp:1", "--claim", "disk:/data", "--set", "search.trials=5", "--dry-run")
    result = invoke(config, "--on", "kuberay", "--run", "s3://bucket/run", *words)
    assert result.exit_code == 0, result.output
    files, job = yaml.safe_load_all(result.stdout)
    resolved = yaml.safe_load(files["data"]["config.yaml"])
    assert (resolved["search"]["trials"], resolved["resources"]["address"]) == (5, "auto")
    assert "--run s3://bucket/run" in job["spec"]["entrypoint"]


def test_ray_gets_model_and_configuration(config: Path, tmp_path: Path) -> None:
    (tmp_path / "my.pt").write_bytes(b"weights")
    config.write_text(config.read_text().replace("/data/my.pt", str(tmp_path / "my.pt")))
    result = invoke(config, "--on", "ray", "--run", "/runs/a", "--dry-run")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["files"] == ["config.yaml", "my.pt"]
    assert shown["entrypoint"].startswith("python -m paretoprune search my.pt /data/my/data.yaml --config config.yaml")
    assert [Path(module).name for module in shown["runtime_env"]["py_modules"]] == ["paretoprune"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "slurm", "--run", "runs/a"), "--run must be an absolute path"),
        (("--on", "slurm", "--run", "/a", "--nodes", "0"), "nodes must be at least 1, but got 0"),
        (("--on", "slurm", "--run", "/a", "--sbatch", "qos=a b"), "must be one word"),
        (("--on", "slurm", "--run", "/a", "--set", "search.trails=3"), "the nearest known one is `search.trials`"),
        (("--on", "kuberay", "--run", "/a", "--image", "x", "--claim", "disk:data"), "absolute path"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_submitted(config: Path, words: tuple[str, ...], said: str) -> None:
    result = invoke(config, *words)
    assert result.exit_code == 1
    assert said in str(result.exception)


def test_an_unknown_key_of_the_file_is_named_with_the_nearest_known_one(config: Path) -> None:
    config.write_text(config.read_text() + "spce: {round_to: 8}\n")
    result = invoke(config, "--on", "slurm", "--run", "/a", "--dry-run")
    assert "unknown setting `spce`; the nearest known one is `space" in str(result.exception)


@pytest.mark.parametrize("words", [("--on", "kuberay"), ("--on", "moon"), ()])
def test_wrong_usage_is_two(config: Path, words: tuple[str, ...]) -> None:
    assert invoke(config, "--run", "/a", *words).exit_code == 2


def commands() -> list[str]:
    """The `paretoprune launch` lines of the document, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip().startswith("paretoprune")]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_document_is_one(line: str, config: Path) -> None:
    words = [str(config) if word == "run.yaml" else word for word in shlex.split(line)[1:]]
    if words[0] == "launch":
        result = CliRunner().invoke(cli, [*words, "--dry-run"])
        assert result.exit_code == 0, (result.output, result.exception)
    else:  # they need the cluster: the words are checked
        cli.commands[words[0]].make_context(words[0], words[1:])
