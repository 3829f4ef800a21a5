"""Room for a trial on a cluster whose machines come when they are asked for: its head may hold none."""

from __future__ import annotations

import time
from collections.abc import Callable

from paretoprune.cluster.errors import NoRoomError
from paretoprune.cluster.ray_connection import LOCAL, describe_cluster
from paretoprune.cluster.resources import TrialResources, slots

LOOK_SECONDS = 2.0
SAY_SECONDS = 10.0


def wait_for_room(
    address: str,
    gpus_per_trial: float | None,
    cpus_per_trial: int | None,
    at_a_time: int,
    minutes: float,
    say: Callable[[str], None],
) -> TrialResources:
    """What a trial gets (see `slots`), as soon as one fits; what is asked for is asked of an autoscaler meanwhile.

    Which machines an autoscaler has to give, it does not tell: what does not fit may still come, so only time ends the
    wait. A Ray of this machine alone does not grow. Raises NoRoomError after `minutes`, ClusterError for figures that
    make no sense. `say`: shows a line to a person.
    """
    begin, said = time.monotonic(), -SAY_SECONDS
    try:
        while True:
            try:
                return slots(describe_cluster(address), gpus_per_trial, cpus_per_trial)
            except NoRoomError as error:
                waited = time.monotonic() - begin
                if address == LOCAL or minutes == 0:
                    raise
                if waited >= 60 * minutes:
                    raise NoRoomError(
                        f"{error.condition} after {waited / 60:.0f} minutes",
                        f"{error.remedy}, or see `ray status` for why no other node comes",
                    ) from error
                if said < 0:
                    ask_autoscaler({"CPU": cpus_per_trial or 1, "GPU": gpus_per_trial or 0}, at_a_time)
                if waited - said >= SAY_SECONDS:
                    say(f"waiting for a node ({waited:.0f} s, at most {minutes:g} min): {error.condition}")
                    said = waited
            time.sleep(LOOK_SECONDS)
    finally:
        if said >= 0:
            ask_autoscaler({}, 0)


def ask_autoscaler(trial: dict[str, float], count: int) -> None:
    """Trials that do not run yet are invisible to an autoscaler: name their number outright, until another is named."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{name: amount for name, amount in trial.items() if amount}] * count)
