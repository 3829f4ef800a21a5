"""The free moves of a run: the unpruned model at each smaller input of the space and in each of its precisions,
measured once, beside the first trials."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from paretoprune.base.formatting import times
from paretoprune.base.messages import speaking
from paretoprune.results.store.accuracy import accuracy_text
from paretoprune.results.store.run_files import free_move_name, unpruned_words
from paretoprune.search.worker.ray_tasks import failure_of
from paretoprune.search.worker.worker import work_on_free_moves

if TYPE_CHECKING:
    from paretoprune.pruning.plan import Plan
    from paretoprune.results.store.run_folder import RunFolder
    from paretoprune.search.space.space import Space
    from paretoprune.search.worker.context import WorkerContext

LOOK_SECONDS = 1.0


def missing_moves(folder: RunFolder, space: Space) -> list[Plan]:
    """The plans without a cut, but the run's own size and precision together, that are still to be measured."""
    known = {move.trial_id for move in folder.read_free_moves()}
    return [plan for plan in space.unpruned[1:] if _name(plan) not in known]


def _name(plan: Plan) -> str:
    return free_move_name(plan.imgsz, plan.precision)


class FreeMoves:
    """Their measuring in a worker of its own, which holds a trial's share of the machine meanwhile."""

    def __init__(self, context: WorkerContext, space: Space, say: Callable[[str], None]) -> None:
        """Begin it, where anything is missing; each figure that comes is handed to ``say``."""
        self._folder, self._say = context.folder, say
        self._plans = missing_moves(context.folder, space)
        self._over = threading.Event()
        self._task: Any = None
        if not self._plans:
            return
        import ray

        # One task for all: a queue of them would wait for the end of the sweep, whose trials take what comes free.
        task = ray.remote(num_cpus=context.cpus, num_gpus=context.gpus, max_retries=1)(work_on_free_moves)
        self._task = task.remote(context, self._plans)
        say(f"measuring the unpruned model {self._where(self._plans)}, too, beside the first trials")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="free moves")
        self._thread.start()

    def wait(self) -> None:
        """Until they are measured; where that failed, a line says why, and the next start tries again."""
        if self._task is None:
            return
        if not self._over.is_set():
            with speaking() as say:
                say(f"waiting for the unpruned model {self._where(self._plans)}")
                self._over.wait()
        self._thread.join()
        self._task = None

    def close(self) -> None:
        """End it where it still goes on: what is measured is kept."""
        if self._task is not None and not self._over.is_set():
            import ray

            self._say = lambda text: None
            ray.cancel(self._task, force=True)
            self._thread.join(LOOK_SECONDS)

    def _watch(self) -> None:
        import ray

        left = {_name(plan): plan for plan in self._plans}
        while left:
            ended = bool(ray.wait([self._task], timeout=LOOK_SECONDS)[0])
            for move in self._folder.read_free_moves():
                if left.pop(move.trial_id, None) is not None:
                    speed = times(float(move.metrics["speedup"]))
                    self._say(f"{move.trial_id}: {accuracy_text(move.metrics)}, {speed} (unpruned)")
            if ended:
                break
        if reason := failure_of(self._task):
            where = self._where(list(left.values()))
            self._say(f"the unpruned model could not be measured {where} ({reason}); the search goes on")
        self._over.set()

    @staticmethod
    def _where(plans: Sequence[Plan]) -> str:
        return ", ".join(unpruned_words(_name(plan)) for plan in plans)
