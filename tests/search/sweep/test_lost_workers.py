"""Faults as driver and worker see them, without Ray: tried again, recorded with a reason, or the end in one line."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState as StudyState

from paretoprune.results.store.records import RecordStore, TrialRecord, TrialState
from paretoprune.search.errors import InterruptedRunError, RunFolderError, SearchError
from paretoprune.search.monitoring.interrupts import interruptible
from paretoprune.search.storage.request import (
    AGAIN,
    CONTACT_LOST,
    MEMORY_RAN_OUT,
    NODE_LOST,
    WORKER_DIED,
    TrialRequest,
    adopt_records,
)
from paretoprune.search.sweep.failures import commonest_fault, essence
from paretoprune.search.sweep.state import SAME_FAULT, SAME_FAULT_LATER, SweepState
from paretoprune.search.sweep.sweep import _complain, _refuse_failures_alone, outcome_of
from paretoprune.search.sweep.tune_trainable import loss_reason
from paretoprune.search.trial.context import Tuned
from paretoprune.search.trial.trial import failed_record, run_trial
from tests.search.fakes import FakeTools, NoGate
from tests.search.sweep.test_state import SETTINGS, start, states, work


def asked(state: SweepState) -> TrialRequest:
    request = state.next()
    assert request is not None
    return request


@pytest.mark.parametrize("reason", [WORKER_DIED, MEMORY_RAN_OUT, NODE_LOST, CONTACT_LOST])
def test_a_lost_worker_s_trial_is_the_next_one_to_be_handed_out(tmp_path: Path, reason: str) -> None:
    state = start(tmp_path)
    first, second = asked(state), asked(state)
    for loss in range(1, AGAIN[reason] + 1):
        assert state.lose(first.trial_id, reason) is None
        again = asked(state)
        assert (again.trial_id, again.ratios, again.losses) == (first.trial_id, first.ratios, [reason] * loss)
    assert states(state) == [
        StudyState.RUNNING,
        StudyState.RUNNING,
    ]  # begun again, but one trial
    record = work(state, again)
    assert record.retries == again.losses
    state.finish(record)
    assert states(state) == [StudyState.COMPLETE, StudyState.RUNNING]
    assert second.trial_id in state.running


def test_a_trial_that_kills_its_workers_is_given_up_however_many_drivers_come(tmp_path: Path) -> None:
    state = start(tmp_path)
    request = asked(state)
    assert state.lose(request.trial_id, WORKER_DIED) is None
    again = start(tmp_path)  # the first driver died here
    assert asked(again).losses == [WORKER_DIED]
    record = again.lose(request.trial_id, WORKER_DIED)
    assert record is not None
    assert (record.state, record.error, record.retries) == (TrialState.FAILED, WORKER_DIED, [WORKER_DIED])


def test_what_is_no_accident_is_not_tried_again(tmp_path: Path) -> None:
    state = start(tmp_path)
    record = state.lose(asked(state).trial_id, "worker: ModelError: the model is gone")
    assert record is not None
    assert record.state is TrialState.FAILED


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly\n ... killed by SIGKILL", WORKER_DIED),
        ("ActorDiedError: ... Worker exit type: NODE_OUT_OF_MEMORY ...", MEMORY_RAN_OUT),
        ("ActorDiedError: The actor died because its node has died. Node Id: ab", NODE_LOST),
        ("The actor 35 is unavailable: The actor is temporarily unavailable: RpcError: Socket closed", CONTACT_LOST),
        ("Traceback\n  File x\nKeyError: 'a'", "worker: KeyError: 'a'"),
        ("", "worker: ended without a record"),
    ],
)
def test_ray_s_words_for_a_loss_become_one_line(text: str, reason: str) -> None:
    assert loss_reason(text) == reason


def test_one_fault_in_many_words_is_one_fault() -> None:
    assert essence("finetune: FileNotFoundError: Image Not Found /data/a/1.jpg") == essence(
        "finetune: FileNotFoundError: Image Not Found /data/b/22.jpg"
    )
    assert essence("prune: <obj at 0x7f3a> has 64 channels") == essence("prune: <obj at 0x11> has 8 channels")
    assert essence("prune: KeyError: 'a'") != essence("recover: KeyError: 'a'")


def fail(state: SweepState, reason: str) -> None:
    state.finish(failed_record(asked(state), reason, os.urandom(8).hex()))


def test_systematic_faults_at_the_start_and_later(tmp_path: Path) -> None:
    state = start(tmp_path, trials=100)
    for number in range(SAME_FAULT):
        assert state.systematic_fault() is None
        fail(state, f"save: OSError: {number} bytes too many")
    assert state.systematic_fault() == f"save: OSError: {SAME_FAULT - 1} bytes too many"

    mended = start(tmp_path, trials=100)  # what an earlier driver met does not end the next one
    assert mended.systematic_fault() is None
    mended.finish(work(mended, asked(mended)))
    for _ in range(SAME_FAULT_LATER - 1):
        fail(mended, "finetune: NonFiniteError: nan")
        assert mended.systematic_fault() is None
    fail(mended, "finetune: NonFiniteError: nan")
    assert mended.systematic_fault() == "finetune: NonFiniteError: nan"
    mended.finish(work(mended, asked(mended)))
    assert mended.systematic_fault() is None


def test_what_half_of_the_trials_fail_for_is_said_when_it_happens_and_once(tmp_path: Path) -> None:
    state = start(tmp_path, trials=100)
    disk, lost = "save: OSError: {} bytes too many", "prune: KeyError: 'model.{}'"
    said: list[int] = []

    def done(reason: str | None) -> None:
        fail(state, reason.format(len(state.records))) if reason else state.finish(work(state, asked(state)))
        said.append(len(state.remarks))

    for reason in (disk, None, lost, None, disk, disk, None, lost, lost, lost, lost, None, disk):
        done(reason)
    # `disk`: 1 of 1, 2 of 5, then 3 of 6; `lost`: 5 of 11 at most
    assert said == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    (line,) = state.remarks
    log = state.folder.trial_dir("t0005") / "trial.log"
    assert line == f"3 of 6 trials failed for one reason: save: OSError: 5 bytes too many; see {log}"
    for _ in range(3):
        done(lost)
    assert len(state.remarks) == 2  # another reason: 8 of 16
    assert state.remarks[1].startswith("8 of 16 trials failed for one reason: prune: KeyError: 'model.15'")
    fault = commonest_fault(state.records)
    assert fault is not None
    assert (fault.count, fault.ended, fault.trial_id) == (8, 16, "t0015")
    assert outcome_of(state.records, 100).fault == "8 of 16 trials failed for one reason: prune: KeyError: 'model.15'"
    assert outcome_of(state.records[:5], 100).fault == ""
    assert not start(tmp_path).remarks  # what an earlier driver met was said by it


def test_a_search_in_which_everything_failed_is_an_error_with_the_commonest_reason(tmp_path: Path) -> None:
    state = start(tmp_path, trials=3)
    for reason in ("recover: OSError: full", "prune: KeyError: 1", "prune: KeyError: 2"):
        _refuse_failures_alone(state.folder, state.records[:0])  # nothing ended yet: nothing to say
        fail(state, reason)
    with pytest.raises(SearchError) as error:
        _refuse_failures_alone(state.folder, state.records)
    assert "all 3 failed, 2 of them for one reason (prune: KeyError: 2); see" in str(error.value)
    assert str(error.value).endswith(f"then `paretoprune resume {tmp_path} --trials 6`")
    assert "\n" not in str(error.value)
    more = start(tmp_path, trials=4)
    more.finish(work(more, asked(more)))
    _refuse_failures_alone(more.folder, more.records)


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_that_the_disk_does_not_take_ends_the_sweep_and_is_kept_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(tmp_path)
    state.finish(work(state, asked(state)))
    request, other = asked(state), asked(state)
    record = work(state, request)
    with monkeypatch.context() as full:
        full.setattr(RecordStore, "append", no_room)
        state.finish(record)
    assert state.broken is not None
    assert state.next() is None
    assert state.lose(other.trial_id, WORKER_DIED) is None
    state.close()
    with pytest.raises(
        RunFolderError, match=r"cannot be written any more \(OSError: .*No space left.* 1 trials.*resume"
    ):
        _complain(state, interrupted=False)
    again = start(tmp_path)
    assert [known.trial_id for known in again.records] == ["t0000", "t0001"]  # its worker had written it
    assert asked(again) == other


def test_a_request_that_the_disk_does_not_take_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(tmp_path)
    monkeypatch.setattr(TrialRequest, "save", no_room)
    assert state.next() is None
    assert state.broken is not None
    assert state.running == []


def test_a_full_disk_in_a_trial_is_its_reason_and_the_record_goes_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paretoprune.search.trial.trial as module

    state = start(tmp_path)
    monkeypatch.setattr(module, "write_json", no_room)
    monkeypatch.setattr(FakeTools, "save", no_room)
    record = work(state, asked(state))
    assert record.state is TrialState.FAILED
    assert record.error == "save: OSError: [Errno 28] No space left on device"
    state.finish(record)
    assert adopt_records(state.folder) == [record]


def run(folder: Path, tools: FakeTools) -> TrialRecord:
    request = TrialRequest(trial_id="t0001", ratios={"a": 0.5}, provenance="gp")
    return run_trial(request, replace(SETTINGS, epochs=1), tools, NoGate(), folder)


def failing(phase: str, times: int, error: Exception) -> Callable[[str, Mapping[str, float]], None]:
    left = [times]

    def hook(now: str, ratios: Mapping[str, float]) -> None:
        if now == phase and left[0]:
            left[0] -= 1
            raise error

    return hook


def test_out_of_memory_outside_of_training_is_tried_once_more_with_memory_given_back(tmp_path: Path) -> None:
    import torch

    tools = FakeTools(hook=failing("evaluate", 1, torch.OutOfMemoryError("CUDA out of memory\nmore")))
    record = run(tmp_path, tools)
    assert record.state is TrialState.COMPLETED
    assert record.retries == ["evaluate: retry after OutOfMemoryError: CUDA out of memory"]
    assert tools.calls.index("release") < len(tools.calls) - 1

    twice = run(tmp_path, FakeTools(hook=failing("evaluate", 2, torch.OutOfMemoryError("CUDA out of memory"))))
    assert twice.error == "evaluate: OutOfMemoryError: CUDA out of memory"
    in_training = FakeTools(hook=failing("finetune", 1, torch.OutOfMemoryError("CUDA out of memory")))
    assert run(tmp_path, in_training).state is TrialState.FAILED  # that one has halved its batch already


def test_what_a_fine_tuning_tried_again_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def eased(self: FakeTools, model: Any, folder: Path, on_epoch: Any, start: Mapping[str, float]) -> Tuned:
        return Tuned(model, 1, 1, start, start, ("half the batch after OutOfMemoryError: CUDA out of memory",))

    monkeypatch.setattr(FakeTools, "finetune", eased)
    record = run(tmp_path, FakeTools())
    assert record.retries == ["half the batch after OutOfMemoryError: CUDA out of memory"]
    assert TrialRecord.from_json(record.to_json()) == record


def interrupted(number: signal.Signals) -> None:
    with interruptible("measuring", "go on with x"):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_while_waiting_are_one_line(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process begins without it
    try:
        with pytest.raises(InterruptedRunError, match=r"^interrupted while measuring; go on with x$") as caught:
            interrupted(number)
    finally:
        signal.signal(signal.SIGINT, own)
    assert isinstance(caught.value, SearchError)
    assert signal.getsignal(signal.SIGTERM) is before
