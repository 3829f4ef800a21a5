"""What of a command line goes to a cluster behind a client's entry, and how it is named there."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretoprune.search.commands.ray_client import check_run, client_address, packed, value_of
from paretoprune.search.errors import ConfigError

ENTRY = "ray://head:10001"


@pytest.mark.parametrize(
    ("line", "address"),
    [
        (f"search m.pt d.yaml --address {ENTRY}", ENTRY),
        (f"resume /r --address={ENTRY} --trials 3", ENTRY),
        (f"finetune /r --address auto --address {ENTRY}", ENTRY),
        ("search m.pt d.yaml --address auto", ""),
        ("search m.pt d.yaml --address", ""),
        (f"launch c.yaml --on ray --address {ENTRY}", ""),
        ("", ""),
    ],
)
def test_which_commands_go_inside(line: str, address: str) -> None:
    assert client_address(line.split()) == address


def test_the_last_value_counts() -> None:
    assert value_of(["--run", "a", "--run=b=c"], "--run") == "b=c"
    assert value_of(["--runs", "a"], "--run") == ""


def test_models_plans_and_settings_travel_and_the_data_do_not(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for name in ("m.pt", "n.pt", "data.yaml", "c.yaml", "plan.json"):
        (here / name).write_text(name)
    words = ["search", f"{here}/m.pt", f"{here}/data.yaml", "--config", f"{here}/c.yaml", f"--plan={here}/plan.json",
             "--native", f"{here}/n.pt", "--native", "/cluster/o.pt", "--set", f"model.path={here}/m.pt"]  # fmt: skip
    found = packed(words, there)
    assert found == ["search", "1/m.pt", f"{here}/data.yaml", "--config", "4/c.yaml", "--plan=5/plan.json",
                     "--native", "7/n.pt", "--native", "/cluster/o.pt", "--set", f"model.path={here}/m.pt"]  # fmt: skip
    travelled = {path.relative_to(there).as_posix(): path.read_text() for path in there.rglob("*") if path.is_file()}
    assert travelled == {"1/m.pt": "m.pt", "4/c.yaml": "c.yaml", "5/plan.json": "plan.json", "7/n.pt": "n.pt"}


@pytest.mark.parametrize(("given", "got"), [([], "none"), (["--run", "runs/x"], "runs/x")])
def test_a_run_folder_that_would_go_away_is_refused(given: list[str], got: str) -> None:
    with pytest.raises(ConfigError, match=f"must be an absolute path on the cluster, but got {got}"):
        check_run(["search", "m.pt", "d.yaml", *given])


@pytest.mark.parametrize("run", ["/runs/x", "s3://bucket/x"])
def test_a_run_folder_of_the_cluster_is_taken(run: str) -> None:
    check_run(["search", "m.pt", "d.yaml", "--run", run])
    check_run(["resume", "runs/x"])  # the cluster says whether there is one
