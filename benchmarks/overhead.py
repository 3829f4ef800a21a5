"""What the search itself costs beside the trials' own work.

``python -m benchmarks.overhead --run RUN``: the share of a finished sweep's worker time that is not spent in removal,
recovery, training, evaluation and latency, from the records' own phases.

``python -m benchmarks.overhead --pretend [--trials 2000] [--slots 64] [--seconds 30] --json OUT``: the driver's real
code (study, sampler, journal, records, request files) with trials that only pass time on a simulated clock. Every
operation of the driver takes on that clock what it took in CPU time, plus ``--tune`` seconds a trial for Ray Tune's own
loop; a slot that waits for the driver is idle.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.surgery import commit
from benchmarks.synthetic import SyntheticProblem, make_problem
from paretoprune.base.atomic import write_json, write_text
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.samplers.observations import Observation, ObservationBuilder
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.samplers.warm_start import warm_start
from paretoprune.search.storage.event_log import WAITING
from paretoprune.search.storage.request import TrialRequest, plan_of
from paretoprune.search.sweep.state import SweepState

WORK = ("prune", "recover", "finetune", "evaluate", "latency")
OBJECTIVES = {"map50_95": "max", "latency_ms": "min"}
RESULTS = Path(__file__).parent / "results"


def at_once(records: Sequence[TrialRecord]) -> int:
    """The most trials that were under way together."""
    spans = [(record.finished_at - sum(record.seconds.values()), record.finished_at) for record in records]
    return max(sum(begin <= begun < end for begin, end in spans) for begun, _ in spans)


def overhead_of(records: Sequence[TrialRecord], slots: int) -> dict[str, float]:
    """Worker time from the first trial's begin to the last one's end, and its share that is no trial's own work.

    ``standing_share`` of it: workers stood still because the device was another trial's for its latency. The rest,
    ``driver_share``, is what the search itself costs; the first trial of every worker process also imports torch and
    loads the baseline, which counts there.
    """
    begins = [record.finished_at - sum(record.seconds.values()) for record in records]
    worker_s = slots * (max(record.finished_at for record in records) - min(begins))
    work_s = sum(record.seconds.get(phase, 0.0) for record in records for phase in WORK)
    mean_s = sum(sum(record.seconds.values()) for record in records) / len(records)
    standing_s = sum(record.seconds.get(WAITING, 0.0) for record in records)
    return {
        "worker_s": worker_s, "work_s": work_s, "trial_s": mean_s, "overhead_share": 1.0 - work_s / worker_s,
        "standing_share": standing_s / worker_s, "driver_share": 1.0 - (work_s + standing_s) / worker_s,
    }  # fmt: skip


def make_state(problem: SyntheticProblem, folder: RunFolder, trials: int) -> SweepState:
    """As a sweep makes it, with the journal on disk."""
    unpruned = problem.space.uniform(0.0)
    study = SearchStudy(
        problem.space, OBJECTIVES, "gp", 0, warm_start(problem.space, trials), journal=folder.study
    )  # fmt: skip
    study.replay(unpruned, Observation(problem.observe(unpruned, np.random.default_rng(0))), "baseline")
    return SweepState(folder, problem.space, study, [], trials, ObservationBuilder(tuple(OBJECTIVES)))


def pretend(trials: int, slots: int, seconds: float, tune_s: float, folder: RunFolder) -> dict[str, Any]:
    """Simulate a sweep; the driver does one thing at a time, workers wait for it."""
    problem, random = make_problem(), np.random.default_rng(0)
    folder.trials_dir.mkdir(parents=True)
    state = make_state(problem, folder, trials)
    running: list[tuple[float, int, TrialRequest]] = []
    free_at = end = 0.0  # the driver's clock, and the last trial's end
    order, busy = 0, 0.0
    thinking: list[float] = []

    def hand_out(now: float) -> float:
        nonlocal order, busy
        began = time.process_time()
        request = state.next()
        spent = time.process_time() - began + tune_s
        thinking.append(spent)
        if request is not None:
            lasts = seconds * random.uniform(0.9, 1.1)
            busy += lasts
            order += 1
            heapq.heappush(running, (now + spent + lasts, order, request))
        return now + spent

    for _ in range(slots):
        free_at = hand_out(free_at)
    while running:
        arrived, _, request = heapq.heappop(running)
        end = max(end, arrived)
        now = max(arrived, free_at)
        levels = problem.space.levels_of(plan_of(request))
        assert levels is not None
        record = TrialRecord(
            trial_id=request.trial_id, state=TrialState.COMPLETED, plan_hash=request.trial_id, ratios=request.ratios,
            metrics=problem.observe(levels, random), epochs=1, fidelity="epochs", finished_at=arrived,
            seconds={"finetune": seconds},
        )  # fmt: skip
        began = time.process_time()
        state.finish(record)
        now += time.process_time() - began
        free_at = hand_out(now) if state.remaining > len(state.running) else now
    state.close()
    tail = seconds * slots / 2  # the last wave ends slot by slot, whatever the driver does
    last = sorted(thinking)[-len(thinking) // 10 :]
    return {
        "trials": trials, "slots": slots, "trial_s": seconds, "tune_s": tune_s, "simulated_s": end,
        "busy_share": busy / (slots * end), "busy_share_without_last_wave": busy / (slots * end - tail),
        "suggestion_mean_s": sum(thinking) / len(thinking), "suggestion_slowest_tenth_s": sum(last) / len(last),
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """The result as a page."""
    row = content["pretended"]
    return (
        "# What the search itself costs\n\n"
        f"{content['date']}, commit {content['commit']}. Written by `python -m benchmarks.overhead --pretend`.\n\n"
        f"{row['trials']} trials of {row['trial_s']:g} s over {row['slots']} pretended GPUs, one driver on one CPU "
        f"core, {row['tune_s']:g} s a trial for Ray Tune's loop: slots are busy {row['busy_share']:.1%} of the time "
        f"({row['busy_share_without_last_wave']:.1%} before the last trials run out). The driver needs "
        f"{row['suggestion_mean_s']:.3f} s a trial, {row['suggestion_slowest_tenth_s']:.3f} s in the slowest tenth.\n"
    )


def main() -> None:
    """Run what was asked for, print it, write JSON and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="A finished run's folder.")
    parser.add_argument("--slots", type=int, help="Trials at a time.  [default: as many as RUN had, or 64 pretended]")
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tune", type=float, default=0.1, help="Seconds of Ray Tune's own loop a trial.")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    if options.run:
        records = RunFolder(options.run).read_records()
        found = overhead_of(records, options.slots or at_once(records))
        print(
            f"{found['overhead_share']:.1%} of {found['worker_s']:.0f} s of worker time is no trial's own work "
            f"(trials of {found['trial_s']:.1f} s): {found['standing_share']:.1%} is standing still while another "
            f"trial's latency is measured, {found['driver_share']:.1%} is the search itself and all else"
        )
    if options.pretend:
        with tempfile.TemporaryDirectory() as scratch:
            row = pretend(
                options.trials, options.slots or 64, options.seconds, options.tune, RunFolder(Path(scratch) / "run")
            )
        content = {"date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(), "pretended": row}
        page = markdown(content)
        print(page)
        if options.json:
            write_json(options.json, content)
            if options.json.resolve().parent == RESULTS:
                write_text(options.json.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
