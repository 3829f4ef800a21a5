"""Data alone reaches stdout, whoever else prints there: a descriptor, a process, a library while it is imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.builtin import BASELINE
from search.cli import cli
from search.output import data_alone_on_stdout, echo

ROOT = Path(__file__).resolve().parents[2]
NOISE = """
import os, subprocess, sys, threading
from search.output import data_alone_on_stdout, echo
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
    code = "import sys; from search.cli import run; sys.exit(run(['front', 'nowhere', '--format', 'json']))"
    patched = f"import search.commands.picks as p, search.output as o\n{code}"
    patched = patched.replace("from search.cli", "p.front.callback = lambda **k: o.echo('x' * 10**6); from search.cli")
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
                assert named & {"err", "file"}, f"{path.name}:{node.lineno} prints data without search.output.echo"


@pytest.mark.parametrize("home", ["fresh", "unwritable"])
def test_a_new_users_first_command_prints_json(home: str, tmp_path: Path) -> None:
    """Ultralytics speaks of its new settings, or of a HOME that cannot be written, while it is imported."""
    place = tmp_path / "home"
    if home == "fresh":
        place.mkdir()
    else:
        place.write_text("a file, which even root cannot make folders in")
    environment = {key: value for key, value in os.environ.items() if key != "YOLO_CONFIG_DIR"}
    command = [sys.executable, "-m", "search", "layers", str(BASELINE), "--format", "json"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "HOME": str(place)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"layer", "block", "group"} <= set(json.loads(done.stdout)[0])
    assert "ltralytics" in done.stderr  # else this would show nothing
