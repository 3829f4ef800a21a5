"""Bad input: one clear line each, found before Ray starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from paretoprune.cluster.devices import CudaDriver
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.paths import resolve_paths
from paretoprune.search.errors import ConfigError, RunFolderError, SpaceError
from paretoprune.search.storage.driver_lock import DriverLock
from paretoprune.search.sweep.preflight import (
    _with_newer_settings_of,
    check_device,
    check_energy,
    check_files,
    check_model,
    check_model_file,
    check_run_folder,
    check_writable,
    existing_run,
    prepare,
)
from tests.search.fakes import make_config


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "data", "line"),
    [
        ("models/none.pt", "data.yaml", "the model must exist, but there is no file models/none.pt; check the path"),
        ("mymodel.pt", "data.yaml", "the model must exist, but there is no file mymodel.pt"),
        ("model.onnx", "data.yaml", r"a model must be an Ultralytics checkpoint \(.pt\), got model.onnx"),
        ("yolov8n.pt", "no/data.yaml", "dataset not found: no/data.yaml"),
    ],
)
def test_missing_files(model: str, data: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        check_files(make_config(**{"model.path": model, "data.path": data}))


@pytest.mark.skipif(CudaDriver().uuid(0) is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("setting", [{"model.device": "cuda"}, {"resources.gpus_per_trial": 0.5}])
def test_a_gpu_that_is_not_there(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"the settings ask for a GPU .* but this machine shows none"):
        check_device(make_config(**setting))
    check_device(make_config(**{**setting, "resources.address": "auto"}))


@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"latency.target": "cpu:2"}, r"but latency.target is cpu:2; take energy_j out, or set latency.target to own"),
        ({"latency.target": "node:orin"}, r"but latency.target is node:orin; take energy_j out"),
        ({"model.device": "cpu"}, "trials would run on the CPU; take energy_j out"),
        ({"resources.gpus_per_trial": 0}, "trials would run on the CPU; take energy_j out"),
    ],
)
def test_energy_that_no_gpu_would_count(
    setting: dict[str, object], line: str, address: str | None, tmp_path: Path
) -> None:
    settings = {**setting, "resources.address": address, "search.objectives": ["map50_95", "energy_j"]}
    with pytest.raises(ConfigError, match=f"^search.objectives: energy_j .*{line}") as error:
        prepare(make_config(**{**settings, "model.path": "yolov8n.pt", "data.path": "coco8.yaml"}), tmp_path / "run")
    assert one_line(error)
    check_energy(make_config(**setting))  # without the objective there is nothing against it


def test_run_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunFolderError, match=r"must be writable, but .*file is not \(Not a directory\); choose another --run"
    ):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match="Permission denied"):
        check_writable(tmp_path / "closed" / "run")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_run_folder_on_a_file_system_that_takes_no_files() -> None:
    with pytest.raises(RunFolderError, match="run folder /proc/run must be writable, but /proc is not"):
        check_writable(Path("/proc/run"))


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_in_the_folder(tmp_path: Path) -> None:
    make_config(**{"space.round_to": 16, "model.imgsz": 320}).save(tmp_path / "config.yaml")
    line = (
        r"already holds another configuration: `model.imgsz` is 320 there, got 640 and 1 more settings; choose another"
    )
    with pytest.raises(RunFolderError, match=line) as caught:
        check_run_folder(RunFolder(tmp_path), make_config())
    assert one_line(caught)


def test_same_configuration_with_more_trials_goes_on(tmp_path: Path) -> None:
    make_config().save(tmp_path / "config.yaml")
    check_run_folder(RunFolder(tmp_path), make_config(**{"search.trials": 80}))


def test_a_run_keeps_its_sizes_where_none_are_given(tmp_path: Path) -> None:
    """One of an older version has a single size, although a new run would have several."""
    folder, config = RunFolder(tmp_path), make_config(**{"model.imgsz": 320})
    for stored, sizes in (("schema_version: 1\n", [320]), ("space: {imgsz: [256]}\n", [320, 256])):
        folder.config.write_text(f"{stored}model: {{path: model.pt, imgsz: 320}}\ndata: {{path: data.yaml}}\n")
        ours = _with_newer_settings_of(folder, config)
        assert ours.space.imgsz == sizes
        assert ours.space.depth == ("version" not in stored)
        check_run_folder(folder, ours)
        with pytest.raises(RunFolderError, match=r"already holds another configuration: `space\.(depth|imgsz)` is"):
            check_run_folder(folder, make_config(**{"model.imgsz": 320, "space.imgsz": [288]}))


def test_trials_without_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"holds trials but no config\.yaml"):
        check_run_folder(RunFolder(tmp_path), make_config())


def test_a_folder_in_use(tmp_path: Path) -> None:
    with DriverLock(tmp_path), pytest.raises(RunFolderError, match=f"pid {os.getpid()}"):
        check_run_folder(RunFolder(tmp_path), make_config())


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="must be a run folder, but it does not exist"):
        existing_run(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"must be a run folder, but it holds no config\.yaml"):
        existing_run(tmp_path)


def test_paths_become_absolute_where_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").write_text("")
    monkeypatch.chdir(tmp_path)
    values = {"model": {"path": "a.pt"}, "data": {"path": "coco8.yaml"}, "space": {"round_to": 4}}
    resolved = resolve_paths(values)
    assert resolved["model"]["path"] == str(tmp_path.resolve() / "a.pt")
    assert resolved["data"]["path"] == "coco8.yaml"
    assert values["model"]["path"] == "a.pt"


def test_real_model_and_dataset_fit(assets: Path, tmp_path: Path) -> None:
    config = make_config(**bccd(assets))
    prepared = prepare(config, tmp_path / "run")
    assert prepared.config.latency.threads is not None  # decided, so that the run can be repeated
    assert len(prepared.space.axes) > 20
    assert not (tmp_path / "run").exists()


def test_dataset_of_other_classes(assets: Path) -> None:
    settings = {**bccd(assets), "data.path": str(assets / "coco" / "data.yaml")}
    with pytest.raises(PruningError, match=r"classes must be the model's, but .* 80 and the model 3") as caught:
        check_model(make_config(**settings))
    assert one_line(caught)


def test_pattern_criterion_and_broken_file(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"the pattern 'model.99.\*' matches no layer"):
        check_model(make_config(**{**bccd(assets), "space.exclude": ["model.99.*"]}))
    with pytest.raises(PruningError, match="`importance` must be one of"):
        check_model(make_config(**{**bccd(assets), "recover.importance": "beauty"}))
    (tmp_path / "broken.pt").write_text("no checkpoint")
    with pytest.raises(PruningError, match=r"must be a checkpoint .* it is a file of another kind"):
        check_model(make_config(**{**bccd(assets), "model.path": str(tmp_path / "broken.pt")}))


def bccd(assets: Path) -> dict[str, object]:
    return {
        "model.path": str(assets / "weights" / "bccd_yolov8n.pt"),
        "data.path": str(assets / "bccd" / "data.yaml"),
        "model.imgsz": 320,
    }


def test_paths_that_libraries_cannot_write_are_said_and_models_of_any_name_are_read(
    assets: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    model, data = odd / os.fsdecode(b"mod\xe8le.pt"), odd / "data.yaml"
    shutil.copy(assets / "weights" / "bccd_yolov8n.pt", model)
    data.write_text("names: [a]")
    check_model_file(str(model))
    assert sum(p.numel() for p in load_model(model).parameters()) > 3e6
    for act in (
        lambda: check_files(make_config(**{**bccd(assets), "data.path": str(data)})),
        lambda: check_run_folder(RunFolder(odd / "run"), make_config(**bccd(assets))),
    ):
        with pytest.raises(ConfigError, match=r"the path of the (dataset|run folder) must be UTF-8, since"):
            act()
