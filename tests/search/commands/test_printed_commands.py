"""The commands that a report prints are run as they stand: they make the pick's network, trial and training again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from paretoprune.results.analysis.repeat_commands import SESSION_FACTOR
from paretoprune.results.analysis.summary import summarise
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import cli, run
from paretoprune.search.trial.joint_evaluation import SECONDS_FACTOR

pytestmark = pytest.mark.slow

# Nothing as it is by default, so that a setting that a command forgets shows.
SETTINGS = (
    "--imgsz 96 --epochs 0 --trials 2 --recover refit+bn --set recover.calibration_images=12 --set search.seed=5 "
    "--set recover.importance=taylor --set space.round_to=4 --set data.val_batch=3 --set latency.batch=2 "
    "--set latency.max_seconds=0.25 --set latency.span=predict --set finetune.batch=6 --set search.warm_start=true"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> tuple[RunFolder, str]:
    """A run below a name that a shell must quote, and the id of its finished pick."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    place = tmp_path_factory.mktemp("printed") / "with blank"
    data = build_dataset(place / "digits", train=24, val=12)
    folder = RunFolder(place / "run")
    assert run(["search", str(BASELINE), str(data), "--run", str(folder.path), *shlex.split(SETTINGS)]) == 0
    assert run(["finetune", str(folder.path), "--pick", "best", "--epochs", "1", "--distill"]) == 0
    (selected,) = folder.read_selected()
    return folder, selected.trial_id


def printed(folder: RunFolder) -> dict[str, list[list[str]]]:
    """Title of a group -> its commands, as a shell would take them apart."""
    groups = summarise(folder).commands
    return {group.title: [shlex.split(line) for _, line in group.lines] for group in groups}


def test_latency_is_given_the_seconds_that_the_final_session_had_for_a_pair() -> None:
    assert SESSION_FACTOR == 2 * SECONDS_FACTOR


def test_every_printed_command_is_one(finished: tuple[RunFolder, str]) -> None:
    from ultralytics.cfg import get_cfg, parse_key_value_pair

    folder, pick = finished
    groups = printed(folder)
    assert [len(groups[title]) for title in ("The whole run", pick)] == [1, 6]
    for words in (words for group in groups.values() for words in group):
        if words[:2] == ["yolo", "val"]:
            args = get_cfg(overrides=dict(map(parse_key_value_pair, words[2:])))  # refuses what it does not know
            assert (args.imgsz, args.batch, args.device) == (96, 3, "cpu")
        else:
            assert words[0] == "paretoprune"
            cli.commands[words[1]].make_context(words[1], words[2:])


def test_the_printed_prune_makes_the_network_of_the_trial(
    finished: tuple[RunFolder, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paretoprune.pruning.yolo.loading import load_model, model_stats

    folder, pick = finished
    monkeypatch.chdir(tmp_path)
    (command,) = [words for words in printed(folder)[pick] if words[1] == "prune"]
    assert run(command[1:]) == 0
    record = next(record for record in folder.read_records() if record.trial_id == pick)
    plan = json.loads((tmp_path / f"{pick}.plan.json").read_text())
    assert plan == json.loads(folder.trial_plan(pick).read_text())
    assert plan["hash"] == record.plan_hash
    ours, theirs = load_model(tmp_path / f"{pick}.pt"), load_model(folder.trial_checkpoint(pick))
    assert model_stats(ours, 96).params_m == record.metrics["params_m"]
    weights = theirs.state_dict()  # a trial without an epoch: as it was before any training
    assert ours.state_dict().keys() == weights.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_printed_search_and_finetune_make_the_pick_again(finished: tuple[RunFolder, str]) -> None:
    folder, pick = finished
    chosen = [words for words in printed(folder)[pick] if words[1] in ("search", "finetune")]
    assert [words[1] for words in chosen] == ["search", "finetune"]
    for words in chosen:
        assert run(words[1:]) == 0, words
    again = RunFolder(Path(f"{folder.path}-{pick}"))
    (repeated,) = again.read_records()
    original = next(record for record in folder.read_records() if record.trial_id == pick)
    assert (repeated.plan_hash, repeated.ratios) == (original.plan_hash, original.ratios)
    (ours,), (theirs,) = again.read_selected(), folder.read_selected()
    assert ours.settings == theirs.settings
    assert ours.settings["distill"] is True
    for before, after in ((original.metrics, repeated.metrics), (theirs.after, ours.after)):
        for name in ("map50_95", "params_m", "gflops"):
            assert after[name] == pytest.approx(before[name], abs=2e-3), name


def test_the_printed_measurement_and_export_run(
    finished: tuple[RunFolder, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the package of the onnx extra is not installed: nothing was exported")
    folder, pick = finished
    commands = {words[1]: words for words in printed(folder)[pick]}
    capsys.readouterr()
    assert run([*commands["latency"][1:], "--format", "json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    (trial,) = [record.metrics for record in folder.read_records() if record.trial_id == pick]
    for name in ("imgsz", "batch", "threads", "runtime", "device", "precision", "target_halfwidth", "span"):
        assert measured[name] == trial["latency_conditions"][name], name
    assert run([*commands["export"][1:], "--seconds", "0.5"]) == 0
    assert "on 8 images" in capsys.readouterr().err
