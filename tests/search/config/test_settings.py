"""What `paretoprune config` says of the settings is what a configuration does; the shells complete their names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretoprune.search.api.runs import compose
from paretoprune.search.cli import run
from paretoprune.search.config.run_config import build_config, known_keys, nest
from paretoprune.search.config.settings import Setting, all_settings, as_markdown, as_yaml, select_settings
from paretoprune.search.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
REQUIRED = {"model.path": "a.pt", "data.path": "b.yaml"}
SETTINGS = all_settings()

Captured = pytest.CaptureFixture[str]


def with_setting(name: str, value: object) -> dict[str, Any]:
    return build_config(nest({**REQUIRED, name: value})).flat()


def bounded(setting: Setting, number: float) -> object:
    """``number`` as a value of the setting, in the container that it takes."""
    number = int(number) if setting.type.startswith("int") else float(number)
    return {"model.4": [number, number]} if setting.type.startswith("mapping") else number


def test_every_setting_is_there_once_with_its_default() -> None:
    sections = {each.section for each in SETTINGS}
    assert [each.name for each in SETTINGS] == [key for key in known_keys() if key not in sections]
    defaults = {each.name: each.schema["default"] for each in SETTINGS if not each.required}
    assert {**defaults, **REQUIRED} == build_config(nest(REQUIRED)).flat()
    assert {each.name for each in SETTINGS if each.required} == set(REQUIRED)
    assert [each.name for each in SETTINGS if not each.meaning] == []


@pytest.mark.parametrize("setting", [each for each in SETTINGS if each.bounds], ids=lambda each: each.name)
def test_the_bounds_are_those_that_hold(setting: Setting) -> None:
    for word, bound in setting.bounds.items():
        outwards = -1 if "inimum" in word else 1
        with pytest.raises(ConfigError, match=setting.name):
            with_setting(setting.name, bounded(setting, bound + outwards))
        if word.startswith("exclusive"):
            with pytest.raises(ConfigError, match=setting.name):
                with_setting(setting.name, bounded(setting, bound))
        elif setting.name != "space.max_ratio":  # which has min_ratio below it
            assert with_setting(setting.name, bounded(setting, bound))


@pytest.mark.parametrize(
    ("name", "kind", "default", "bounds"),
    [
        ("search.trials", "int", "50", ">= 1"),
        ("trial.lr", "float | null", "null", "> 0"),
        ("space.granularity", "layer | block", "layer", ""),
        ("search.loggers", "list of mlflow | wandb", "[]", ""),
        ("space.max_ratio", "float", "0.7", ">= 0, < 1"),
        ("space.layer_bounds", "mapping of str to [float, float]", "{}", ">= 0, < 1"),
        ("search.objectives", "list of str", "[map50_95, latency_ms]", ""),
        ("data.path", "str", "required", ""),
    ],
)
def test_types_defaults_and_bounds_in_words(name: str, kind: str, default: str, bounds: str) -> None:
    (setting,) = select_settings([name])
    assert (setting.type, setting.default, setting.bounds_text) == (kind, default, bounds)


def test_the_names_there_are_are_those_that_are_known() -> None:
    from paretoprune.pruning.names import RUNTIMES
    from paretoprune.pruning.strategies import STRATEGIES

    for name, known in (("trial.strategy", STRATEGIES), ("latency.runtime", (*RUNTIMES, "ncnn", "command:NAME"))):
        (setting,) = select_settings([name])
        assert setting.type.split(" | ") == list(known)


def test_the_file_to_start_from_is_the_defaults(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "config.yaml"
    assert run(["config", "--format", "yaml"]) == 0
    text = capsys.readouterr().out
    file.write_text(text.replace("path: my.pt", "path: a.pt").replace("path: my/data.yaml", "path: b.yaml"))
    # As `search a.pt b.yaml --config` reads it, and as `launch` does, which has the file alone.
    config = compose(file, {}, {})
    assert config == compose(None, REQUIRED, {})
    # The task of the model chooses the accuracy, which a value in the file would forbid it.
    assert "objectives" not in config.search.model_fields_set
    assert "# objectives: [map50_95, latency_ms]" in text
    assert max(map(len, text.splitlines())) <= 88
    comments = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.strip().startswith("#"))
    assert [each.name for each in SETTINGS if each.meaning not in comments] == []


def test_a_part_of_the_file_is_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "part.yaml"
    file.write_text(as_yaml(select_settings(["recover", "search.max_*"])))
    wanted = dict.fromkeys(
        ["max_latency_ms", "max_latency_ratio", "max_params_m", "max_gflops", "max_hours", "max_gpu_hours"]
    )
    found = yaml.safe_load(file.read_text())
    assert found["search"] == wanted
    assert list(found) == ["search", "recover"]
    assert compose(file, REQUIRED, {}) == compose(None, REQUIRED, {})


def test_the_committed_page_is_what_the_docstrings_say() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == as_markdown(all_settings()) + "\n", "paretoprune config --format markdown > docs/settings.md"


def test_json_has_everything_for_programs(capsys: Captured) -> None:
    assert run(["config", "--format", "json", "space.round_to", "model.path"]) == 0
    path, round_to = json.loads(capsys.readouterr().out)
    assert (path["name"], path["required"], path["default"]) == ("model.path", True, None)
    meaning = "Round widths to a multiple of this many channels."
    known = {"name": "space.round_to", "type": "int", "required": False, "default": 8, "bounds": {"minimum": 1}}
    assert round_to == {**known, "meaning": meaning}


def test_the_table_has_a_line_for_each(capsys: Captured) -> None:
    assert run(["config"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "type", "default", "bounds", "meaning"]
    assert [line.split()[0] for line in lines] == [each.name for each in SETTINGS]
    assert all(line.endswith(each.meaning) for line, each in zip(lines, SETTINGS, strict=True))


def test_a_terminal_gets_paragraphs_of_its_width(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("paretoprune.search.commands.config.stdout_width", lambda: 60)
    assert run(["config", "latency.max_seconds"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == "latency.max_seconds: float; > 0; default 2.0"
    assert max(map(len, lines)) <= 60
    assert " ".join(map(str.strip, lines)) == select_settings(["latency.max_seconds"])[0].meaning


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["space"], [each.name for each in SETTINGS if each.name.startswith("space.")]),
        (["*.epochs"], ["trial.epochs", "finetune.epochs"]),
        (["finetune.epochs", "trial.ep*", "*.epochs"], ["trial.epochs", "finetune.epochs"]),
        (["schema_version"], ["schema_version"]),
    ],
)
def test_sections_names_and_patterns_choose(patterns: list[str], names: list[str]) -> None:
    assert [each.name for each in select_settings(patterns)] == names


@pytest.mark.parametrize(
    ("patterns", "wrong", "nearest"),
    [
        (["recoverr"], "recoverr", "recover"),
        (["space", "round_to"], "round_to", "space.round_to"),
        (["serch.trials"], "serch.trials", "search.trials"),
        (["latency.max_s*s_"], "latency.max_s*s_", "latency.max_seconds"),
    ],
)
def test_what_matches_nothing_is_one_line_with_the_nearest(
    patterns: list[str], wrong: str, nearest: str, capsys: Captured
) -> None:
    assert run(["config", *patterns]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: unknown setting `{wrong}`; the nearest known one is `{nearest}`\n"


def installed(**environment: str) -> dict[str, Any]:
    """How to start a shell, or the installed command, on this tree's modules."""
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ["PATH"]])
    return {"env": {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}, "capture_output": True}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_installed_command_prints_the_script_of_each_shell(shell: str) -> None:
    command = Path(sys.executable).with_name("paretoprune")
    start = installed(_PARETOPRUNE_COMPLETE=f"{shell}_source")
    done = subprocess.run([command], text=True, check=False, **start)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_PARETOPRUNE_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("paretoprune sea", ["search"]),
        ("paretoprune config search.max_p", ["search.max_params_m"]),
        ("paretoprune search my.pt my.yaml --set space.r", ["space.round_to"]),
        ("paretoprune prune a_netw", ["a_network.pt"]),
        ("paretoprune status a_fol", ["a_folder"]),
    ],
)
def test_bash_completes_commands_settings_and_files(words: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "a_network.pt").touch()
    (tmp_path / "a_folder").mkdir()
    # What bash does at Tab; names of files are left to it by the script (`compopt`), which works at a prompt only.
    script = f"""
    compopt() {{ COMPREPLY=($(compgen -o "$2" -- "${{COMP_WORDS[COMP_CWORD]}}")); }}
    eval "$(_PARETOPRUNE_COMPLETE=bash_source paretoprune)"
    COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}
    _paretoprune_completion paretoprune
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], text=True, cwd=tmp_path, check=False, **installed())
    assert done.stdout.split() == found, done.stderr
