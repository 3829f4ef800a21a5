"""Data alone reaches stdout, whoever else prints there: a descriptor, a process, a library while it is imported."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE
from paretoprune.search.cli import cli, run
from paretoprune.search.commands.output import data_alone_on_stdout, echo
from paretoprune.search.errors import InterruptedRunError
from paretoprune.search.monitoring.command_line import command_line
from paretoprune.search.monitoring.interrupts import interruptible
from tests.search.fakes import make_prepared

ROOT = Path(__file__).resolve().parents[3]
NOISE = """
import os, subprocess, sys, threading
from paretoprune.search.commands.output import data_alone_on_stdout, echo
with data_alone_on_stdout():
    print("noise of a library")
    echo('{"one":', newline=False)
    sys.stdout.write("noise without an end")
    os.system("echo noise of a shell")
    subprocess.run([sys.executable, "-c", "print('noise of a process')"])
    os.write(1, b"noise of a compiler")
    echo(' "zwei ü"}')
print("after")
"""


def test_what_others_print_goes_to_stderr() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", NOISE], cwd=ROOT, capture_output=True, env=environment, check=True)
    assert done.stdout.decode() == '{"one": "zwei ü"}\nafter\n'
    assert done.stderr.count(b"noise") == 5


def test_a_captured_stdout_is_kept_clean_too(capsys: pytest.CaptureFixture[str]) -> None:
    with data_alone_on_stdout():
        print("noise")
        echo("data")
    echo("more")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("data\nmore\n", "noise\n")


def test_a_reader_that_went_is_no_traceback() -> None:
    code = "import sys; from paretoprune.search.cli import run; sys.exit(run(['front', 'nowhere', '--format', 'json']))"
    patched = f"import paretoprune.search.commands.front as p, paretoprune.search.commands.output as o\n{code}"
    patched = patched.replace(
        "from paretoprune.search.cli", "p.front.callback = lambda **k: o.echo('x' * 10**6); from paretoprune.search.cli"
    )
    with subprocess.Popen(
        [sys.executable, "-c", patched], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_every_command_prints_its_data_by_echo() -> None:
    for name, command in cli.commands.items():
        assert hasattr(command.callback, "__wrapped__"), name
    for path in sorted((ROOT / "search").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "print"):
                named = {keyword.arg for keyword in node.keywords}
                assert named & {"err", "file"}, (
                    f"{path.name}:{node.lineno} prints data without paretoprune.search.commands.output.echo"
                )


@pytest.mark.parametrize("home", ["fresh", "unwritable"])
def test_a_new_users_first_command_prints_json(home: str, tmp_path: Path) -> None:
    """Ultralytics speaks of its new settings, or of a HOME that cannot be written, while it is imported."""
    place = tmp_path / "home"
    if home == "fresh":
        place.mkdir()
    else:
        place.write_text("a file, which even root cannot make folders in")
    environment = {key: value for key, value in os.environ.items() if key != "YOLO_CONFIG_DIR"}
    command = [sys.executable, "-m", "paretoprune", "layers", str(BASELINE), "--format", "json"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "HOME": str(place)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"layer", "block", "group"} <= set(json.loads(done.stdout)[0])
    if home == "fresh":
        assert "Ultralytics Settings" in done.stderr  # else this would show nothing


@pytest.mark.parametrize("name", ["a run", "a  run", "a #1", "it's", 'say "it"', "$HOME", "a;b", "a`b`", "ü", "-x"])
def test_a_printed_command_can_be_pasted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both by an error's line and by a command's data."""
    prepared = make_prepared(tmp_path / name)
    prepared.folder.path.mkdir()
    prepared.config.save(prepared.folder.config)
    words = ["paretoprune", "resume", str(tmp_path / name)]
    assert run(["status", str(tmp_path / name)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert shlex.split(line.partition("resume with `")[2].removesuffix("`"), comments=True) == words

    def interrupted(**_: object) -> None:
        with interruptible("measuring", f"resume with `{command_line('resume', tmp_path / name)}`"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.commands["status"], "callback", interrupted)
        assert run(["status", "x"]) == 1
    line = capsys.readouterr().err
    assert shlex.split(line.partition("resume with `")[2].strip().removesuffix("`"), comments=True) == words
    assert InterruptedRunError.__name__ not in line


def test_no_command_is_put_together_without_quoting_its_words() -> None:
    """A path that stands behind `paretoprune WORD` in a message as it is would be other words when it is pasted."""
    for room in ("search", "results", "cluster", "pruning", "paretoprune"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else []
                for before, after in itertools.pairwise(parts):
                    if isinstance(before, ast.Constant) and isinstance(after, ast.FormattedValue):
                        bare = re.search(r"paretoprune [a-z]+ [^`]*$", str(before.value))
                        assert not bare, f"{path.name}:{node.lineno}"
