"""Ray Tune's view of the search: it asks for configurations, we hand out trial requests.

Ray's own ``OptunaSearch`` records a trial that errored after reporting as complete, leaves one with NaN running for
ever, and cannot be given finished trials of several objectives; so the study is ours (:mod:`search.samplers.study`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from ray.tune.search import Searcher

from paretoprune.base.device_gate import Gate
from paretoprune.search.sweep.state import SweepState


class Transient:
    """Pickles to nothing. Tune pickles its searcher, callbacks and stopper for a restore that is never done here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class RequestSearcher(Transient, Searcher):
    """Hands out the sweep's requests, at most ``slots`` at a time.

    More in flight than can run would be suggested without the results that arrive during the wait. Results do not
    come back this way: :class:`search.sweep.tune_trainable.SweepCallback` gives whole records to the state.
    """

    def __init__(self, state: SweepState, slots: Callable[[], int], gate: Gate | None = None) -> None:
        """``slots`` is asked every time, since nodes join and leave.

        ``gate``: of the device that the driver's own thinking would disturb; None where trials run elsewhere."""
        super().__init__(metric=None, mode=None)
        self._gate = gate
        self._state = state
        self._slots = slots
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """``trial_id`` is Ray's; ours is inside the request."""
        if len(self._live) >= self._slots():
            return None
        # A model-based sampler computes for seconds: not beside a measurement on the same CPU.
        with self._gate.using() if self._gate else nullcontext():
            request = self._state.next()
        if request is None:
            # Nothing now. With trials in flight one may still fail to finish, so only an empty sweep is over.
            return None if self._live else Searcher.FINISHED
        self._live.add(trial_id)
        return {"request": request.to_text()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Frees the slot."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the run's records are the truth, Ray's snapshots are not used."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a sweep is resumed from its records."""
        raise NotImplementedError
