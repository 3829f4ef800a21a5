"""One run, one model, one dataset: what else goes on with it is refused by what differs; what moved is taken there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import run
from paretoprune.search.config.inputs import (
    IDENTITY,
    ROWS_NAME,
    check_comparable,
    check_node,
    identity_of,
    keep_identity,
    placed,
    weights_hash,
)
from paretoprune.search.config.run_config import RunConfig, load_config
from paretoprune.search.errors import ConfigError, RunFolderError, SearchError
from paretoprune.search.samplers.initial_plans import read_other_run
from paretoprune.search.sweep.preflight import prepare
from paretoprune.search.trial.exclusive_device import measuring_threads
from tests.search.fakes import make_config

METRICS = {"map50_95": 0.6, "latency_ms": 10.0, "latency_ratio": 1.0, "params_m": 1.0, "gflops": 1.0, "speedup": 1.0}

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset(tmp_path_factory.mktemp("digits"), train=4, val=3)


@pytest.fixture
def begun(digits: Path, tmp_path: Path) -> RunFolder:
    """A run that was begun on a model and a dataset of its own, with a finished trial."""
    shutil.copytree(digits.parent, tmp_path / "data")
    data = tmp_path / "data" / digits.name
    text = digits.read_text()
    data.write_text(text.replace(str(digits.parent), str(data.parent)))
    shutil.copy(BASELINE, tmp_path / "model.pt")
    settings: dict[str, object] = {"model.path": str(tmp_path / "model.pt"), "data.path": str(data), "model.imgsz": 64}
    settings |= {"search.trials": 1, "trial.epochs": 0, "recover.importance": "l2"}
    config = make_config(**{**settings, "latency.threads": measuring_threads()})
    folder, identity = RunFolder(tmp_path / "run"), identity_of(config, "detect")
    folder.path.mkdir()
    config.save(folder.config)
    identity.save_rows(folder)
    known = {"weights_hash": weights_hash(tmp_path / "model.pt"), **identity.content()}
    folder.write_baseline({"metrics": METRICS, "model": "m", "data": "d", "imgsz": 64, "layers": [], **known})
    folder.store.append(
        TrialRecord(
            trial_id="t0000", state=TrialState.COMPLETED, plan_hash="x", ratios={"model.1": 0.5}, metrics=METRICS,
            epochs=0, fidelity="refit", finished_at=1.0,
        )
    )  # fmt: skip
    return folder


def config_of(folder: RunFolder) -> RunConfig:
    return load_config(folder.config)


def edit_labels(folder: RunFolder) -> None:
    for path in sorted((folder.path.parent / "data" / "labels" / "val").glob("*.txt"))[:2]:
        path.write_text("1 0.5 0.5 0.2 0.2\n")


def other_weights(folder: RunFolder) -> None:
    import torch

    path = folder.path.parent / "model.pt"
    content = torch.load(path, weights_only=False)
    for value in content["model"].parameters():
        value.data.mul_(0.5)
    torch.save(content, path)


CHANGES = pytest.mark.parametrize(
    ("change", "said"),
    [(edit_labels, "2 labels of val changed, first: "), (other_weights, "weights differ (")],
)


@CHANGES
def test_what_changed_in_place_is_refused_by_all_that_read_the_run(
    change: Callable[[RunFolder], None], said: str, begun: RunFolder, tmp_path: Path, capsys: Captured
) -> None:
    config, before = config_of(begun), begun.config.read_text()
    change(begun)
    path = str(begun.path)
    again = ["search", config.model.path, config.data.path, "--imgsz", "64", "--trials", "2", "--epochs", "0"]
    for command in (
        ["resume", path],
        [*again, "--run", path, "--set", "recover.importance=l2"],
        ["finetune", path],
        ["report", path],
        [*again, "--run", str(tmp_path / "new"), "--from-run", path],
    ):
        assert run(command) == 1, command
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        if "--from-run" not in command:
            assert said in line
            assert line.endswith("; put it back as it was, or begin a new run in another --run")
        else:
            assert "search.warm_start_run: " in line
            assert "must be of the same " in line
    assert begun.config.read_text() == before
    assert not begun.report_html.exists()


def test_what_is_unchanged_goes_on(begun: RunFolder, tmp_path: Path) -> None:
    prepare(config_of(begun), begun.path)
    settings = config_of(begun).model_dump()
    settings["search"]["warm_start_run"] = str(begun.path)
    prepare(RunConfig.model_validate(settings), tmp_path / "new")


def moved(folder: RunFolder) -> dict[str, str]:
    """The run's model and dataset at other places, and the options that say so."""
    away = folder.path.parent / "away"
    away.mkdir()
    (folder.path.parent / "data").rename(away / "digits")
    (folder.path.parent / "model.pt").rename(away / "best.pt")
    data = next((away / "digits").glob("*.yaml"))
    data.write_text(data.read_text().replace(str(folder.path.parent / "data"), str(away / "digits")))
    return {"--model": str(away / "best.pt"), "--data": str(data)}


@pytest.mark.parametrize("command", ["resume", "finetune"])
def test_what_lies_elsewhere_is_asked_for(command: str, begun: RunFolder, capsys: Captured) -> None:
    options = moved(begun)
    assert run([command, str(begun.path)]) == 1
    assert "if it lies elsewhere now, give its place: --model PATH" in capsys.readouterr().err
    assert run([command, str(begun.path), "--model", options["--model"]]) == 1
    assert "give its place: --data PATH" in capsys.readouterr().err


def test_the_run_goes_on_where_its_dataset_lies_now(begun: RunFolder, capsys: Captured) -> None:
    options = moved(begun)
    given = [word for option in options.items() for word in option]
    assert run(["resume", str(begun.path), *given]) == 0, capsys.readouterr().err  # all trials are done: only the front
    config = config_of(begun)
    assert {"--model": config.model.path, "--data": config.data.path} == options
    capsys.readouterr()
    assert run(["report", str(begun.path)]) == 0  # finds them there
    assert "not compared" not in capsys.readouterr().err


def test_a_second_search_finds_the_moved_ones_by_itself(begun: RunFolder) -> None:
    options = moved(begun)
    settings = config_of(begun).model_dump()
    settings["model"]["path"], settings["data"]["path"] = options["--model"], options["--data"]
    prepared = prepare(RunConfig.model_validate(settings), begun.path)
    assert prepared.config.data.path == options["--data"]


@pytest.mark.parametrize("measured", [True, False])
def test_a_run_that_does_not_know_its_dataset_stays_where_it_was_begun(
    measured: bool, begun: RunFolder, tmp_path: Path
) -> None:
    """A second search must not bring another one; before anything was measured, there is nothing to mix it with."""
    before = config_of(begun).model_copy(update={"latency": make_config().latency})  # threads as the machine decides
    before.save(begun.config)
    options = moved(begun)
    begun.write_baseline({name: value for name, value in begun.read_baseline().items() if name != IDENTITY})
    if not measured:
        begun.baseline.unlink()
    config = placed(before, options["--model"], options["--data"])
    if measured:
        with pytest.raises(RunFolderError, match=r"already holds another configuration: `data.path` .* --data"):
            prepare(config, begun.path)
    assert prepare(config, begun.path, moved=True).config.data.path == options["--data"]
    if not measured:
        prepare(config, begun.path)


def test_another_dataset_is_no_moved_one(begun: RunFolder, capsys: Captured) -> None:
    options = moved(begun)
    (label, *_) = sorted((Path(options["--data"]).parent / "labels" / "train").glob("*.txt"))
    label.write_text("0 0.5 0.5 0.1 0.1\n")
    before = begun.config.read_text()
    for command in ("resume", "finetune", "report"):
        assert run([command, str(begun.path), *[word for option in options.items() for word in option]]) == 1
        assert "1 labels of train changed, first: " in capsys.readouterr().err
    assert begun.config.read_text() == before


def test_a_report_is_written_where_the_dataset_is_not_at_hand(begun: RunFolder, capsys: Captured) -> None:
    options = moved(begun)
    assert run(["report", str(begun.path)]) == 0
    said = capsys.readouterr().err
    assert "the dataset of" in said
    assert "was not compared; --data says where it lies now" in said
    assert begun.report_html.is_file()
    assert run(["report", str(begun.path), "--data", options["--data"]]) == 0
    assert config_of(begun).data.path == options["--data"]
    assert run(["report", str(begun.path), str(begun.path), "--data", options["--data"]]) == 2


def test_a_run_from_before_is_taken_with_a_word_and_knows_its_dataset_then(begun: RunFolder, capsys: Captured) -> None:
    old = {name: value for name, value in begun.read_baseline().items() if name != IDENTITY}
    begun.write_baseline(old)
    (begun.path / ROWS_NAME).unlink()
    prepared = prepare(config_of(begun), begun.path)
    assert "does not know its dataset's content" in capsys.readouterr().err
    keep_identity(begun, prepared.identity)
    assert {**begun.read_baseline(), IDENTITY: None} == {**old, IDENTITY: None}
    edit_labels(begun)
    with pytest.raises(RunFolderError, match="2 labels of val changed"):
        prepare(config_of(begun), begun.path)


def test_without_its_rows_the_split_is_named(begun: RunFolder) -> None:
    (begun.path / ROWS_NAME).write_bytes(b"damaged")
    prepare(config_of(begun), begun.path)
    edit_labels(begun)
    with pytest.raises(RunFolderError, match=r"images or labels of val differ \(3 images then, 3 now\)"):
        prepare(config_of(begun), begun.path)


@pytest.mark.parametrize("damage", [{}, {"task": "detect", "dataset": [1]}, "text"])
def test_a_damaged_identity_is_one_line(damage: object, begun: RunFolder) -> None:
    begun.write_baseline({**begun.read_baseline(), IDENTITY: damage})
    with pytest.raises(SearchError, match=r"baseline\.json must say which dataset the run is of"):
        prepare(config_of(begun), begun.path)


def test_another_runs_trials_are_told_wherever_its_dataset_lies(begun: RunFolder) -> None:
    baseline, theirs = begun.read_baseline(), config_of(begun)
    ours = theirs.model_copy(
        update={
            "data": theirs.data.model_copy(update={"path": "/elsewhere/data.yaml"}),
            "search": theirs.search.model_copy(update={"warm_start_run": str(begun.path)}),
        }
    )
    found = read_other_run(ours, baseline)
    assert found is not None
    assert [record.trial_id for record in found.told] == ["t0000"]
    shipped = ours.model_copy(update={"deploy": ours.deploy.model_copy(update={"format": "onnx"})})
    as_files = read_other_run(shipped, baseline)  # theirs are of networks in PyTorch
    assert as_files is not None
    assert as_files.told == ()
    without = read_other_run(ours, {name: value for name, value in baseline.items() if name != IDENTITY})
    assert without is not None
    assert without.told == ()


def test_a_run_on_other_data_is_no_start(begun: RunFolder, tmp_path: Path) -> None:
    edit_labels(begun)
    settings = config_of(begun).model_dump()
    settings["search"]["warm_start_run"] = str(begun.path)
    with pytest.raises(ConfigError, match=r"must be of the same dataset, .* 2 labels of val changed, first: "):
        prepare(RunConfig.model_validate(settings), tmp_path / "new")


def test_runs_on_one_page_share_their_validation_images(begun: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    other.write_baseline(begun.read_baseline())
    check_comparable([begun, other])
    edit_labels(begun)
    other.write_baseline({**begun.read_baseline(), **identity_of(config_of(begun), "detect").content()})
    with pytest.raises(RunFolderError, match="runs on one page must be of the same validation images"):
        check_comparable([begun, other])


def test_every_node_has_the_drivers_dataset(begun: RunFolder) -> None:
    wanted = begun.read_baseline()[IDENTITY]
    check_node(config_of(begun), wanted)
    edit_labels(begun)
    with pytest.raises(RunFolderError, match=r"every node must have the run's dataset, but .* labels of val differ"):
        check_node(config_of(begun), wanted)
