"""What an agent's device has, and how steady it is: the built-in network timed against itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paretoprune.base.messages import speaking
from paretoprune.cluster.agent.client import AgentClient, AgentPool, read_token
from paretoprune.cluster.doctor import Check
from paretoprune.cluster.errors import AgentError
from paretoprune.search.config.latency_target import AGENT_RUNTIMES, LatencyTarget
from paretoprune.search.errors import ConfigError
from paretoprune.search.trial.agent_latency import AgentJob, measure_on_agents

STEADY = 0.02  # a network against itself may be so far from 1
SECONDS = 10.0
_SIDE = 160
_CALMER = (
    "fix its clock (sudo cpupower frequency-set -g performance; on a Jetson sudo jetson_clocks), end other programs, "
    "and see that it stays cool"
)


def examine_devices(target: str, token_file: str | None) -> Iterator[Check]:
    """Checks of every device of a latency target. ConfigError where it names none, AgentError without a token."""
    try:
        agents = LatencyTarget.parse(target).agents
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not agents:
        raise ConfigError(
            f"the latency target must be http://HOST:PORT here, but got {target!r}; give an agent's address"
        )
    token = read_token(token_file)
    for address in agents:
        yield from _examine(AgentClient(address, token), token)


def _examine(client: AgentClient, token: str) -> Iterator[Check]:
    try:
        health, info = client.health(), client.info()
    except AgentError as error:
        condition, _, remedy = str(error).rpartition("; ")
        yield Check("agent", False, condition, remedy)
        return
    busy = f"{health['queue']} measurements wait or run" if health["queue"] else "free"
    yield Check("agent", True, f"{client.address}, version {health['version']}, {busy}")
    yield Check("device", True, _described(info))
    yield _clock(info["state"])
    runtimes = [*info["runtimes"].values(), *info["commands"]]
    remedy = "" if runtimes else "pip install onnxruntime for the Python that runs the agent"
    yield Check("runtimes", bool(runtimes), ", ".join(runtimes) or "none", remedy)
    runtime = next((name for name in AGENT_RUNTIMES if name in info["runtimes"]), None)
    if runtime is not None:
        yield _steadiness(client.address, token, runtime)


def _described(info: dict[str, Any]) -> str:
    memory = f"{info['memory_mb'] / 1024:.1f} GB" if info["memory_mb"] else "unknown memory"
    return (
        f"{info['host']}: {info['model']}, {info['cores']} cores, {memory}, {info['system']}, Python {info['python']}"
    )


def _clock(state: dict[str, Any]) -> Check:
    """What may change while it measures; None: the device does not tell."""
    names = {"clock_mhz": "MHz", "governor": "", "temperature_c": "°C", "power_mode": "", "load": "load"}
    told = [f"{state[name]} {unit}".strip() for name, unit in names.items() if state[name] is not None]
    throttled = state["throttled_now"] is True
    floats = state["governor"] not in (None, "performance")
    detail = ", ".join(told) + (", throttled now" if throttled else "")
    return Check("clock", not throttled, detail, _CALMER if throttled or floats else "")


def _steadiness(address: str, token: str, runtime: str) -> Check:
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.latency.runtimes import ExportCache
    from paretoprune.pruning.yolo.loading import load_model

    network = load_model(BASELINE)
    job = AgentJob(runtime, _SIDE, max_seconds=SECONDS)
    try:
        with speaking() as say:
            say(f"a network is timed against itself on {address}")
            found = measure_on_agents(AgentPool([address], token), network, network, job, ExportCache())
    except AgentError as error:
        return Check("steadiness", False, str(error), "see the agent's log on the device")
    low, high = found.speedup_ci95
    detail = (
        f"a network against itself by {runtime}: {found.speedup:.3f} [{low:.3f}, {high:.3f}] in {found.seconds:.0f} s, "
        f"{found.median_ms:.2f} ms, nine of ten below {found.p90_ms:.2f} ms"
    )
    ok = abs(found.speedup - 1) <= STEADY and not found.conditions.throttled
    return Check("steadiness", ok, detail, "" if ok else _CALMER)
