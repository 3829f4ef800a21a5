"""Real clusters of several nodes on one machine: code travels, nodes are looked at, tokens, nodes that come and go."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretoprune.cluster import nodes as looking
from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.packages import source_digests
from paretoprune.cluster.ray_connection import connect
from tests.cluster.joining import ROOT, TOKEN, Nodes, drive, environment, nodes, start_driver

ASK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from paretoprune.cluster import doctor, nodes
from paretoprune.cluster.ray_connection import connect
try:
    connect(sys.argv[1])
    answers = nodes.ask_nodes(nodes.Probe())
    print(json.dumps({name: asdict(answer) for name, answer in answers.items()}))
    print(json.dumps([asdict(check) for check in doctor.check_nodes(sys.argv[3:], Path(sys.argv[2]))]))
    print(nodes.check_nodes(sys.argv[3:], Path(sys.argv[2])))
except ValueError as error:
    print("LINE", error)
"""
SWEEP = """
import sys
from pathlib import Path
from paretoprune.cluster.ray_connection import connect, shutdown
address, root, run, settings, meeting, size = sys.argv[1:7]
connect(address, worker_environment={"PYTHONPATH": root, "MEETING": meeting, "MEETING_SIZE": size})
import json
from paretoprune.search.sweep.sweep import run_sweep
from tests.search.fakes import make_prepared, node_tools
settings = {"model.device": "cpu", "resources.address": address, **json.loads(settings)}
outcome = run_sweep(make_prepared(Path(run), **settings), node_tools)
shutdown()  # Ray's threads print about lost nodes
print(outcome.finished, outcome.failed)
"""

CONNECT = "from paretoprune.cluster.ray_connection import connect"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes: a head that holds one trial, one with two GPUs, one with one GPU; with a stranger in their way."""
    strangers = tmp_path_factory.mktemp("strangers")
    (strangers / "results.py").write_text("raise SystemExit('not this one')")
    (strangers / "paretoprune.py").write_text("raise SystemExit('not this one')")
    with nodes(1, 0, PYTHONPATH=str(strangers)) as found:
        found.add(4, 2)
        found.add(2, 1)
        yield found


@pytest.mark.slow
def test_every_node_runs_this_code_whatever_is_installed_there(cluster: Nodes, tmp_path: Path) -> None:
    done = drive(ASK, cluster.address, tmp_path / "run", __file__)
    answers = json.loads(done.stdout.splitlines()[0])
    assert len(answers) == 3
    assert [answer["code"] for answer in answers.values()] == [source_digests()] * 3
    assert sorted(answer["gpus"] for answer in answers.values()) == [0, 1, 2]
    checks = json.loads(done.stdout.splitlines()[1])
    assert [(check["ok"], check["remedy"]) for check in checks] == [(True, "")] * 3
    assert all("this project's code" in check["detail"] for check in checks)
    assert done.stdout.splitlines()[2:] == ["3"]
    assert list((tmp_path / "run").iterdir()) == []  # no token is left behind


@pytest.mark.slow
@pytest.mark.parametrize("what", ["wrong", "missing"])
def test_a_token_that_does_not_fit_is_one_line(cluster: Nodes, what: str, tmp_path: Path) -> None:
    variables = {"RAY_AUTH_TOKEN": "6" * 32} if what == "wrong" else {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    done = drive(ASK, cluster.address, tmp_path / "run", **variables)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"LINE Ray must be reachable at {cluster.address}, but ")
    assert "token" in line
    assert "`ray get-auth-token` on its head node" in line
    assert TOKEN not in line
    assert "6" * 32 not in line


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "at_a_time"), [(1, 3), (0.5, 6)])
def test_trials_spread_over_the_gpus_of_all_nodes(cluster: Nodes, gpus: float, at_a_time: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"search.trials": 8, "resources.gpus_per_trial": gpus, "resources.cpus_per_trial": 1}
    done = drive(SWEEP, cluster.address, ROOT, run, json.dumps(settings), meeting(tmp_path), at_a_time)
    assert done.stdout.split() == ["8", "0"], done.stderr
    assert f"{at_a_time} trials at a time" in done.stderr
    assert "2 nodes are ready" in done.stderr  # the head has no GPU: nothing of the run goes there
    assert len(nodes_at(tmp_path)) == 2
    assert most_at_a_time(run) == at_a_time


@pytest.mark.slow
def test_a_node_that_joins_in_mid_sweep_is_used_and_one_that_leaves_loses_nothing(tmp_path: Path) -> None:
    """The sweep starts on a head without CPUs and waits for a node. The first two trials wait for a third process, for
    which there is room only on the nodes that join: one of them cannot be used, the other can."""
    run = tmp_path / "run"
    with nodes(0) as few:
        settings = {"search.trials": 12, "resources.cpus_per_trial": 1}
        driver = start_driver(SWEEP, few.address, ROOT, run, json.dumps(settings), meeting(tmp_path), 3)
        assert driver.stderr
        assert any("waiting for a node (0 s, at most 30 min): one trial must fit" in line for line in driver.stderr)
        few.add(1)
        few.add(1)
        wait_for(lambda: len(nodes_at(tmp_path)) == 2)
        few.add(1, 0, f"PARETOPRUNE_LOCK_DIR={Path(sys.executable)}")
        few.add(1)
        wait_for(lambda: len(nodes_at(tmp_path)) == 3)
        few.remove(0)
        out, err = driver.communicate(timeout=1500)
    finished, failed = map(int, out.splitlines()[-1].split())
    records = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert finished == len(records) == 12, err
    assert len({record["trial_id"] for record in records}) == 12
    assert failed <= 1, [record["error"] for record in records]
    assert len(nodes_at(tmp_path)) == 3, "the node that cannot be used was used"
    assert "a node joined and is left out until it is ready: " in err
    assert "set PARETOPRUNE_LOCK_DIR on that node" in err


@pytest.mark.slow
def test_a_node_without_the_run_folder_or_the_data_is_named_and_can_send_its_files(tmp_path: Path) -> None:
    """The node has a mount namespace of its own, in which two folders are others. It alone can hold trials."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data):
        folder.mkdir()
    (data / "data.yaml").write_text("x")
    with nodes(0) as few:
        hide = f"mount -t tmpfs none {run} && mount -t tmpfs none {data} && exec"
        start = ["start", f"--address={few.address}", "--num-cpus=1", "--block"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", *start]
        blind = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f'{hide} "$@"', "sh", *ray], env=environment(PYTHONPATH=""),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert blind.stdout
            assert any("Ray runtime started" in line for line in blind.stdout), "the node did not start"
            _, doctor, line = drive(ASK, few.address, run, data / "data.yaml").stdout.splitlines()
            settings = {"search.trials": 3, "resources.cpus_per_trial": 1, "resources.shared_storage": False}
            carried = drive(SWEEP, few.address, ROOT, run, json.dumps(settings), meeting(tmp_path), 1)
        finally:
            blind.terminate()
            blind.communicate(timeout=60)
    name = socket.gethostname()
    assert line.startswith(f"LINE every node must be ready for trials, but on {name}")
    assert f"the dataset's {data / 'data.yaml'} is not there" in line
    assert "mount or copy it to the same path (1 more: see `paretoprune doctor --address ...`)" in line
    (bad,) = [check for check in json.loads(doctor) if not check["ok"]]  # the head is well
    assert f"the dataset's {data / 'data.yaml'} is not there" in bad["detail"]
    assert f"the run folder {run} is another folder there or none" in bad["detail"]
    assert "mount or copy it to the same path; put it on a file system" in bad["remedy"]
    assert carried.stdout.split() == ["3", "0"], carried.stderr
    assert "begun again" not in carried.stderr
    assert len(list(meeting(tmp_path).iterdir())) == 1, "one worker does all"
    for number in range(3):
        folder = run / "trials" / f"t{number:04d}"
        assert {"plan.json", "pruned.pt", "events.jsonl", "record.json"} <= {path.name for path in folder.iterdir()}


def test_no_driver_hangs_on_a_clients_entry() -> None:
    code = f"{CONNECT}\ntry: connect('ray://127.0.0.1:10001')\nexcept ValueError as e: print(e)"
    (line,) = drive(code).stdout.splitlines()
    assert "use `paretoprune launch --on ray`" in line


def test_what_is_wrong_with_a_node_comes_with_a_remedy() -> None:
    question = looking.Probe({"/data": 3}, "/runs/a", "token")
    well = looking.look(looking.Probe(), "here")
    assert looking.faults(well, looking.Probe()) == []
    there = {"code": {**well.code, "results": "other"}, "versions": {**well.versions, "torch": "1.0"},
             "data": {"/data": 2}, "run": "is another folder there", "lock": "the lock is gone"}  # fmt: skip
    bad = looking.NodeReport(**{**vars(well), **there})
    said = looking.faults(bad, question)
    assert [condition for condition, _ in said] == [
        "it has other code of paretoprune: results",
        f"it has torch 1.0, here {well.versions['torch']}",
        "the dataset's /data holds 2 entries, here 3",
        "the run folder /runs/a is another folder there",
        "the lock is gone",
    ]
    assert all(remedy for _, remedy in said)
    (fault,) = looking.faults("gave no answer within 180 s", question)
    assert "Ray logs" in fault[1]


def test_the_run_folder_is_recognised_by_its_token(tmp_path: Path) -> None:
    with looking.token_in(tmp_path) as token:
        assert looking.look(looking.Probe({}, str(tmp_path), token), "here").run == ""
        assert len(list(tmp_path.iterdir())) == 2
        elsewhere = looking.Probe({}, str(tmp_path / "other"), token)
        assert looking.look(elsewhere, "here").run == "is another folder there or none"
        (tmp_path / token).write_text("somebody else's")
        assert looking.look(looking.Probe({}, str(tmp_path), token), "here").run == "is another folder there"
    assert list(tmp_path.iterdir()) == []


def test_one_process_talks_to_one_ray(ray_session: object) -> None:
    with pytest.raises(ClusterError, match="disconnect first"):
        connect("auto")


def meeting(tmp_path: Path) -> Path:
    place = tmp_path / "meeting"
    place.mkdir(exist_ok=True)
    return place


def nodes_at(tmp_path: Path) -> set[str]:
    """The nodes that trials have run on."""
    return {path.name.split("-")[0] for path in (tmp_path / "meeting").iterdir()}


def devices(run: Path) -> list[tuple[str, float, float]]:
    """Node, begin and end of every finished trial; a fake's device is the node that it ran on."""
    path = run / "trials.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(r["device"], r["finished_at"] - sum(r["seconds"].values()), r["finished_at"]) for r in records]


def most_at_a_time(run: Path) -> int:
    spans = [(begin, end) for _, begin, end in devices(run)]
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


def wait_for(met: object, seconds: float = 1200) -> None:
    end = time.monotonic() + seconds
    while not met():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)
