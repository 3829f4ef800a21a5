"""A run folder behind an address: mirrored, sent, held by one driver; files carried by Ray where nothing is shared."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from paretoprune.base.atomic import write_bytes
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.cli import cli
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.errors import RunFolderError
from paretoprune.search.monitoring.command_line import command_line
from paretoprune.search.storage.object_store import CACHE_VARIABLE, LEASE, ObjectStoreRun, is_uri, published, remote_of
from paretoprune.search.sweep.preflight import ValidatedRun, check_run_folder, existing_run
from paretoprune.search.sweep.sweep import run_sweep
from paretoprune.search.worker.cluster import with_model_copied
from paretoprune.search.worker.context import WorkerContext
from paretoprune.search.worker.file_transfer import FileTransferActor, carried, start_courier
from tests.search.fakes import make_config, make_prepared, make_space, quick_tools


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """An address (pyarrow's local file system stands for an object store) and where its files are."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return f"file://{tmp_path}/store/team/run", tmp_path / "store" / "team" / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_sent_comes_back_elsewhere(
    store: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, there = store
    mirror = ObjectStoreRun(address).pull()
    (mirror / "trials" / "t0").mkdir(parents=True)
    (mirror / "trials" / "t0" / "pruned.pt").write_bytes(b"weights")
    (mirror / "trials.jsonl").write_text("{}\n")
    (mirror / "ray").mkdir()
    (mirror / "ray" / "scratch").write_text("x")
    remote = ObjectStoreRun(address)
    assert remote.push() == 2
    assert remote.push() == 0
    assert sorted(files(there)) == ["trials.jsonl", "trials/t0/pruned.pt"]
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another machine"))
    again = ObjectStoreRun(address)
    here = again.pull()
    assert here != mirror
    assert (here / "trials" / "t0" / "pruned.pt").read_bytes() == b"weights"
    assert again.push() == 0  # nothing changed
    (here / "trials.jsonl").write_text("{}\n{}\n")
    assert ObjectStoreRun(address).pull() == here
    assert (here / "trials.jsonl").read_text() == "{}\n{}\n", "what was not sent yet is kept"
    assert ObjectStoreRun(address).push() == 1
    assert remote_of(here).uri == address  # type: ignore[union-attr]
    assert command_line("resume", here, 7) == f"paretoprune resume {address} 7"  # not the mirror: any machine may
    assert remote_of(tmp_path) is None


def test_a_file_that_changed_elsewhere_and_kept_its_length_is_fetched_again(store: tuple[str, Path]) -> None:
    address, there = store
    there.mkdir(parents=True)
    (there / "config.yaml").write_text("search: {trials: 2}")
    here = ObjectStoreRun(address).pull() / "config.yaml"
    (there / "config.yaml").write_text("search: {trials: 5}")
    os.utime(there / "config.yaml", (time.time() + 5, time.time() + 5))
    ObjectStoreRun(address).pull()
    assert here.read_text() == "search: {trials: 5}"
    here.write_text("search: {trials: 7}")
    os.utime(here, (time.time() + 9, time.time() + 9))
    ObjectStoreRun(address).pull()
    assert here.read_text() == "search: {trials: 7}", "what was not sent yet is kept"


def test_a_second_driver_is_refused_with_the_first_ones_host_and_pid(store: tuple[str, Path]) -> None:
    address, there = store
    mirror = ObjectStoreRun(address).pull()
    with published(mirror) as is_published:
        assert is_published
        held = json.loads((there / LEASE).read_text())
        (there / LEASE).write_text(json.dumps({**held, "host": "elsewhere", "pid": 7}))
        with pytest.raises(RunFolderError, match=r"another driver \(host elsewhere, pid 7\)") as caught:
            ObjectStoreRun(address).take()
        assert (caught.value.host, caught.value.pid) == ("elsewhere", 7)
        (there / LEASE).write_text(json.dumps({**held, "host": "elsewhere", "time": held["time"] - 1000}))
        ObjectStoreRun(address).take()  # it died
    assert not (there / LEASE).exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://me:secret@bucket/run", "must not hold credentials"),
        ("moon://bucket/run", "must be an address that pyarrow knows"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(address: str, said: str) -> None:
    assert is_uri(address)
    with pytest.raises(RunFolderError, match=said) as caught:
        ObjectStoreRun(address)
    assert "secret" not in str(caught.value)
    result = CliRunner().invoke(cli, ["status", address])
    assert isinstance(result.exception, RunFolderError)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1",
        "s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http",
    ],
)
def test_a_store_that_does_not_answer_is_not_called_an_unknown_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RunFolderError, match=r"must be readable, but .*NETWORK_CONNECTION.*; check the network"):
        ObjectStoreRun(address).pull()


def test_a_store_cannot_write_outside_the_mirror(
    store: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = ObjectStoreRun(store[0])

    class Listing:
        def get_file_info(self, selector: Any) -> list[Any]:
            from pyarrow import fs

            return [fs.FileInfo(f"{store[1]}/../../x", fs.FileType.File, size=1)]

    monkeypatch.setattr(remote, "_store", Listing())
    with pytest.raises(RunFolderError, match="leaves the folder"):
        remote.pull()


def test_the_courier_stays_in_the_run_folder(tmp_path: Path) -> None:
    root = tmp_path / "run"
    courier = FileTransferActor(str(root))
    courier.deliver({"trials/a/record.json": b"{}", "trials/a/pruned.pt": b"w"})
    assert courier.fetch(["trials/a", "nothing"]) == {"trials/a/pruned.pt": b"w", "trials/a/record.json": b"{}"}
    for name in ("../x", "/x", "a/../../x"):
        with pytest.raises(AssertionError):
            courier.deliver({name: b""})
        with pytest.raises(AssertionError):
            courier.fetch([name])
    assert files(tmp_path).keys() == {"run/trials/a/pruned.pt", "run/trials/a/record.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_into_a_store_goes_on_from_another_machine(
    store: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model given there lies at another path; the run's own copy has no path that names a machine."""
    address, there = store
    mirror = ObjectStoreRun(address).pull()
    model = tmp_path / "here" / "my.pt"
    model.parent.mkdir()
    model.write_bytes(b"weights")
    run_sweep(make_prepared(mirror, **{"search.trials": 3, "model.path": str(model)}), quick_tools)
    assert yaml.safe_load((there / "config.yaml").read_text())["model"]["path"] == "model/my.pt"
    named = [name for name, content in files(there).items() if str(mirror).encode() in content]
    assert named == [], "these hold a path of the machine that began the run"
    assert len(RunFolder(there).read_records()) == 3
    assert {f"trials/t000{i}/{name}" for i in range(3) for name in ("pruned.pt", "record.json")} <= files(there).keys()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another machine"))
    other = ObjectStoreRun(address).pull()
    folder, config = existing_run(other)
    assert config.model.path == str(other / "model" / "my.pt")
    assert folder.read_config()["model"]["path"] == config.model.path
    elsewhere = model.rename(tmp_path / "my.pt")
    for given in (config, make_config(**{**_flat(config), "model.path": str(elsewhere)})):
        check_run_folder(folder, with_model_copied(given, folder, copy=False))
    config = make_config(**{**_flat(config), "search.trials": 5})
    assert run_sweep(ValidatedRun(folder, config, make_space()), quick_tools).finished == 5
    records = RunFolder(there).read_records()
    assert len({record.plan_hash for record in records}) == len(records) == 5


def _flat(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.flat().items() if value is not None}


def test_slots_follow_the_nodes_and_an_autoscaler_is_asked_for_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.autoscaler.sdk

    from paretoprune.cluster import ray_connection
    from paretoprune.cluster.resources import ClusterInfo, Node, TrialResources
    from paretoprune.search.worker import cluster
    from tests.search.fakes import make_config

    asked: list[Any] = []
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    here = [ClusterInfo((Node("a", 4, 2),), 4, 2, "auto")]
    monkeypatch.setattr(ray_connection, "describe_cluster", lambda address: here[0])
    monkeypatch.setattr(cluster, "LOOK_AGAIN_SECONDS", 0.0)
    config = make_config(**{"resources.address": "auto", "resources.max_concurrent_trials": 5})
    slots = cluster.DynamicSlots(config, TrialResources(1, 0.5, 4))
    assert asked == [[{"CPU": 1, "GPU": 0.5}] * 5]
    assert slots() == 4
    here[0] = ClusterInfo((Node("a", 4, 2), Node("b", 8, 2)), 12, 4, "auto")
    assert slots() == 5  # eight would fit
    here[0] = ClusterInfo((Node("head", 4, 0),), 4, 0, "auto")
    assert slots() == 0
    slots.close()
    assert asked[-1] == []
    alone = cluster.DynamicSlots(make_config(**{"resources.max_concurrent_trials": 9}), TrialResources(1, 0.5, 4))
    alone.close()
    assert len(asked) == 2


@pytest.mark.usefixtures("ray_session")
def test_what_a_worker_made_is_home_before_it_ends_and_another_node_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pick = tmp_path / "run", "selected/t0"
    run.mkdir()
    context = WorkerContext(
        make_config().model_dump(mode="json"), str(run), 1, 0.0, quick_tools, courier=start_courier(run)
    )
    with suppress(KeyboardInterrupt), carried(context, [], [pick]) as here:
        there = here.folder.path / pick
        write_bytes(there / "finetune_state.pt", b"epoch 1")
        write_bytes(there / "tuned.json", b"{}")
        (there / ".best.pt.ab.tmp").write_bytes(b"half")
        wait_for(run / pick / "finetune_state.pt", b"epoch 1")
        write_bytes(there / "finetune_state.pt", b"epoch 2")
        wait_for(run / pick / "finetune_state.pt", b"epoch 2")
        assert sorted(files(run)) == [f"{pick}/finetune_state.pt"], "what says that it is done comes last"
        (there / "tuned.json").unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr("paretoprune.search.worker.file_transfer._SCRATCH", {})  # as on another node
    with carried(context, [], [pick]) as here:
        there = here.folder.path / pick
        assert (there / "finetune_state.pt").read_bytes() == b"epoch 2"
        (there / "finetune_state.pt").unlink()
        write_bytes(there / "best.pt", b"weights")
        write_bytes(there / "tuned.json", b"{}")
    assert files(run) == {f"{pick}/best.pt": b"weights", f"{pick}/tuned.json": b"{}"}
    assert not files(here.folder.path)


def wait_for(path: Path, content: bytes) -> None:
    end = time.monotonic() + 60
    while not path.is_file() or path.read_bytes() != content:
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)
