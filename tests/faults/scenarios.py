"""The fault suite: sweeps that lose their driver, their workers, a node, their disk; each gives a row of a table.

``tests/faults/test_faults.py`` asserts on the rows, ``benchmarks/faults.py`` writes them down.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from paretoprune.cluster.ray_patience import PATIENCE
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from tests.faults.drivers import ROOT, Nursery
from tests.faults.tools import AGAIN, END, marks_of

KILLS = 20
CHAINS = 2  # so many runs share the kills
SEED = 7


@dataclass
class Row:
    """What a scenario found. ``lost``: finished trials that are gone or changed; ``repeated``: begun again although
    their record was there, worked on by two at once, or of a plan that another trial has; ``zombies``: trials that the
    study still calls running."""

    scenario: str
    faults: int
    asked: int
    finished: int
    failed: int
    lost: int
    repeated: int
    zombies: int
    seconds: float
    note: str = ""
    moments: list[str] = field(default_factory=list)


def drivers_killed(folder: Path, address: str, kills: int = KILLS, chains: int = CHAINS, seed: int = SEED) -> Row:
    """Kill the drivers of a few runs at seeded moments, resume each time, count at the end.

    Every other moment is a time after the start, the others a number of writes (see ``drivers._die_at_write``).
    """
    began, generator = time.monotonic(), random.Random(seed)
    total = Row("driver killed (SIGKILL), resumed", 0, 0, 0, 0, 0, 0, 0, 0.0)
    with Nursery() as nursery:
        for chain in range(chains):
            run, trials = folder / f"chain{chain}", 16
            known: dict[str, dict[str, Any]] = {}
            for kill in range(kills // chains):
                trials += 6 * (len(records_of(run)) >= trials - 4)  # a run that is nearly done is extended
                at_write = generator.randint(1, 150) if kill % 2 else 0
                after = generator.uniform(0.2, 6.0)
                job = {"address": address, "trials": trials, "tools": "marking_tools"}
                driver = nursery.start(run, **job, die_at_write=at_write)
                if not at_write:
                    driver.wait(after)
                elif not driver.wait(60):
                    raise AssertionError(f"not so many writes: {driver.said}")
                driver.kill()
                total.faults += 1
                total.moments.append(f"write {at_write}" if at_write else f"{after:.2f} s")
                total.lost += changed(known, run)
                known = finished_in(run)
            last = nursery.start(run, address=address, trials=trials, tools="marking_tools")
            if not last.wait(400):
                last.kill()
                raise AssertionError(f"the resumed run did not end: {last.said}")
            total.lost += changed(known, run)
            count(total, run, trials)
    total.seconds = time.monotonic() - began
    return total


def workers_killed(folder: Path, kills: int = 3, seed: int = SEED) -> Row:
    """In this process's Ray: kill the worker of a seeded running trial, three times; one plan kills every worker."""
    from paretoprune.search.sweep.sweep import run_sweep
    from tests.faults.tools import deadly_tools
    from tests.search.fakes import make_prepared

    began, run = time.monotonic(), folder / "workers"
    row = Row("workers killed (SIGKILL)", 0, 0, 0, 0, 0, 0, 0, 0.0)
    over = threading.Event()
    killer = threading.Thread(target=_kill_workers, args=(run, kills, random.Random(seed), over, row))
    killer.start()
    try:
        run_sweep(make_prepared(run, **{"search.trials": 12, "resources.cpus_per_trial": 1}), deadly_tools)
    finally:
        over.set()
        killer.join()
    count(row, run, 12)
    again = sum(bool(record.retries) for record in records_of(run))
    reasons = {record.error for record in records_of(run) if record.error}
    row.note = f"{again} trials were begun again; given up: {', '.join(sorted(reasons)) or 'none'}"
    row.seconds = time.monotonic() - began
    return row


def node_killed(folder: Path) -> Row:
    """A cluster of three simulated nodes loses one that works on two trials."""
    return _in_a_process("node", folder / "node")


def disk_full(folder: Path) -> Row | None:
    """A run folder on a disk of 2 MB; then the disk grows and the run is resumed. None where we may not mount."""
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        return None
    return _in_a_process("disk", folder / "disk", alone)


def count(row: Row, run: Path, trials: int) -> None:
    """Add one finished run to ``row``."""
    from tests.search.sweep.test_sweep import study_states

    records = records_of(run)
    row.asked += trials
    row.finished += len(records)
    row.failed += sum(record.state is TrialState.FAILED for record in records)
    row.repeated += sum(was_repeated(marks_of(path)) for path in (run / "trials").iterdir())
    row.repeated += len(records) - len({record.plan_hash for record in records})
    row.zombies += study_states(run).count("RUNNING")


def was_repeated(marks: list[dict[str, Any]]) -> bool:
    """Whether a trial was begun after its record was written, or two workers were at it at once.

    Two ends are neither: a worker that is killed between its last piece of work and its record has not finished.
    """
    steps = [(mark["what"], mark["pid"]) for mark in marks]
    strangers = any(what == END and pid != before for (_, before), (what, pid) in pairwise(steps))
    return strangers or any(what == AGAIN for what, _ in steps)


def records_of(run: Path) -> list[TrialRecord]:
    return RunFolder(run).read_records()


def finished_in(run: Path) -> dict[str, dict[str, Any]]:
    """What must never be lost: every record in the store, and every one that a worker wrote."""
    left = {path.parent.name: json.loads(path.read_text()) for path in (run / "trials").glob("*/record.json")}
    return left | {record.trial_id: record.to_json() for record in records_of(run)}


def changed(known: dict[str, dict[str, Any]], run: Path) -> int:
    """How many of the finished trials are gone or read differently now."""
    now = finished_in(run)
    return sum(now.get(name) != content for name, content in known.items())


def _kill_workers(run: Path, kills: int, generator: random.Random, over: threading.Event, row: Row) -> None:
    """Wait until some trial is worked on, kill its worker; never the one that is about to be done with it."""
    struck: set[str] = set()
    while row.faults < kills and not over.wait(0.05):
        working = [(path, pid) for path, pid in _working(run) if path.name not in struck]
        if working and generator.random() < 0.3:
            path, pid = generator.choice(working)
            struck.add(path.name)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has killed itself
                continue
            row.faults += 1
            row.moments.append(path.name)


def _working(run: Path) -> list[tuple[Path, int]]:
    """The trials that are worked on now, with the process that does."""
    last = [(path, marks[-1]) for path in sorted((run / "trials").glob("t*")) if (marks := marks_of(path))]
    return [(path, int(mark["pid"])) for path, mark in last if mark["what"] != END]


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return 0


def _in_a_process(scenario: str, run: Path, prefix: list[str] | None = None) -> Row:
    """These need a Ray or mounts of their own: in another process, which prints its row last."""
    command = [*(prefix or []), sys.executable, "-m", "tests.faults.scenarios", scenario, str(run)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=700, check=False,
        env={**os.environ, **PATIENCE, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _node(run: Path) -> Row:
    from ray.cluster_utils import Cluster

    from paretoprune.search.sweep.sweep import run_sweep
    from tests.faults.tools import lasting_tools
    from tests.search.fakes import make_prepared

    began = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    row = Row("one of three nodes killed", 0, 0, 0, 0, 0, 0, 0, 0.0)

    raylet = nodes[0].all_processes["raylet"][0].process.pid

    def strike() -> None:
        while not (working := [path.name for path, pid in _working(run) if _parent(pid) == raylet]):
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        row.faults = 1
        row.moments = working

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()
    settings = {"search.trials": 18, "resources.address": cluster.address, "resources.cpus_per_trial": 1}
    run_sweep(make_prepared(run, **settings), lasting_tools)
    count(row, run, 18)
    lost = [record for record in records_of(run) if record.retries]
    row.note = (
        f"{len(lost)} trials were begun again elsewhere ({', '.join(sorted({r for t in lost for r in t.retries}))})"
    )
    row.seconds = time.monotonic() - began
    return row


def _disk(run: Path) -> Row:
    from paretoprune.search.errors import SearchError
    from paretoprune.search.sweep.sweep import run_sweep
    from tests.faults.tools import bulky_tools
    from tests.search.fakes import make_prepared

    began = time.monotonic()
    run.mkdir(parents=True)
    _mount(run, "size=2m")
    row = Row("disk full, resumed with room", 1, 0, 0, 0, 0, 0, 0, 0.0)
    prepared = make_prepared(run, **{"search.trials": 20, "resources.cpus_per_trial": 1})
    try:
        run_sweep(prepared, bulky_tools)
        said = "it did not end early"
    except SearchError as error:
        said = str(error).replace(str(run), "RUN")
    known, before = finished_in(run), len(records_of(run))
    _mount(run, "remount,size=64m")
    run_sweep(prepared, bulky_tools)
    row.lost = changed(known, run)
    count(row, run, 20)
    row.note = f"ended after {before} trials: {said}"
    row.moments = sorted({record.error for record in records_of(run) if record.error})
    row.seconds = time.monotonic() - began
    return row


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


@contextmanager
def _as_output() -> Iterator[None]:
    """Whatever the libraries print must not follow the row."""
    yield
    sys.stdout.flush()


if __name__ == "__main__":
    with _as_output():
        found = {"node": _node, "disk": _disk}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(asdict(found)), flush=True)
    os._exit(0)  # a cluster in pieces takes its time to say goodbye
