"""Joining a Ray cluster, or starting one on this machine that nobody else can reach."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

from paretoprune.base.errors import first_line
from paretoprune.cluster.environment import usable_cpus
from paretoprune.cluster.errors import ClusterError, RayUnreachableError
from paretoprune.cluster.packages import import_root, package_directories
from paretoprune.cluster.ray_patience import PATIENCE, noticing_deaths
from paretoprune.cluster.ray_place import RayPlace
from paretoprune.cluster.ray_watch import RayWatch
from paretoprune.cluster.resources import ClusterInfo, Node

# What every worker runs with, on whatever node: Ultralytics must neither install packages nor look for the network.
WORKER_ENVIRONMENT = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
LOCAL = "local"

# Weights and records travel as files; what goes through Ray is small, and a container's /dev/shm often is, too.
_OBJECT_STORE_BYTES = 256 * 2**20
_ANSWER_SECONDS = 5.0
_connected_to: str | None = None  # by this module; a connection somebody else made is used as it is
_place: RayPlace | None = None
_watch: RayWatch | None = None
_died = ""
TOKEN_REMEDY = (
    "put the cluster's token (`ray get-auth-token` on its head node) into ~/.ray/auth_token or RAY_AUTH_TOKEN, "
    "set RAY_AUTH_MODE=token, and use the cluster's version of Ray"
)
_HOST_PORT = re.compile(r"(\[[^\]]+\]|[^:/\s]+):(\d{1,5})")


def connect(
    address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    log_level: str = "ERROR",
    worker_environment: Mapping[str, str] | None = None,
    stuck: Callable[[str], None] | None = None,
) -> ClusterInfo:
    """Be connected to Ray afterwards, and say what is there. A second call answers from the same connection.

    A joined cluster's workers get this process's own package, whatever is installed there.

    address: None or "local" starts Ray on this machine: no dashboard, every port on the loopback interface, Ray's token
        authentication left on. "auto" and "host:port" join a running cluster, from one of its machines.
    num_cpus, num_gpus: of a local Ray; None means what this process may use.
    worker_environment: further variables for the workers, beside WORKER_ENVIRONMENT. It counts for the first call.
    stuck: called in a thread where Ray died and this process may be stuck in a call to it (see `ray_watch`).
    Raises RayUnreachableError where nothing answers or Ray does not start, ClusterError for an address that is none.
    """
    import ray

    global _connected_to, _place, _watch
    wanted = address or LOCAL
    if _died:
        raise RayUnreachableError(wanted, f"this process's Ray ended ({_died})", "start it again")
    if ray.is_initialized():
        if wanted != (_connected_to or wanted):
            raise ClusterError(
                f"one process talks to one Ray, but it is connected to {_connected_to} and was asked for {wanted}; "
                "disconnect first"
            )
        return describe_cluster(wanted)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = WORKER_ENVIRONMENT | dict(worker_environment or {})
    runtime: dict[str, Any] = {}
    options: dict[str, Any] = {"logging_level": log_level, "log_to_driver": False}
    if wanted == LOCAL:
        _stay_on_loopback()
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        options |= {
            "num_cpus": num_cpus or usable_cpus(),
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        _place = RayPlace()
        variables |= _import_path() | _place.variables
        options |= _place.options
    else:
        _check_answers(wanted)
        runtime = _travelling(variables)
    try:
        with own_sigterm(), _named_in_utf8(), noticing_deaths() if wanted == LOCAL else muted():
            ray.init(address=wanted, runtime_env={"env_vars": variables, **runtime}, **options)
        _watch = _watch_of(ray, wanted, stuck)
    except Exception as error:  # Ray raises a bare one where its processes do not come up in time
        _end_of(ray)
        raise RayUnreachableError(wanted, *_why(wanted, error)) from error
    except KeyboardInterrupt:
        _end_of(ray)
        raise
    _connected_to = wanted
    return describe_cluster(wanted)


@contextmanager
def _named_in_utf8() -> Iterator[None]:
    """Inside, a job's name holds UTF-8 alone: Ray makes it of the command line, where a path may hold other bytes."""
    import ray._private.utils

    whole = getattr(ray._private.utils, "get_entrypoint_name", None)
    if whole is None:
        yield
        return

    def name() -> str:
        return str(whole()).encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    with patch.object(ray._private.utils, "get_entrypoint_name", name):
        yield


def shutdown() -> None:
    """Leave the cluster; a local one ends. Does nothing where there is no connection."""
    import ray

    global _connected_to, _place, _watch, _died
    _died = what_died()
    if _watch:
        _watch.close()
    if _died:  # leaving in order would wait for it, or crash
        worker: Any = ray._private.worker
        if worker._global_node is not None:
            worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
    elif ray.is_initialized():
        ray.shutdown()
    if _place:
        _place.close()
    _connected_to = _place = _watch = None


def what_died() -> str:
    """What of the Ray that `connect` reached is dead, so that nothing can go on; "" where all is well.

    Then this process should end by `os._exit`: what Ray's core does at an orderly exit waits for it, or crashes.
    """
    return _died or (_watch.look() if _watch else "")


def _watch_of(ray: Any, wanted: str, stuck: Callable[[str], None] | None) -> RayWatch:
    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    raylet = str(ray._private.worker.global_worker.node.raylet_socket_name)
    return RayWatch(raylet, (host.strip("[]"), int(port)), wanted == LOCAL, stuck)


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Ray puts its own handlers of SIGTERM when it starts, in Python and in its core, which ends with a stack dump.

    Afterwards this process's is there again; what comes meanwhile is KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # neither do they
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that is what Ray's handler raises
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def describe_cluster(address: str = LOCAL) -> ClusterInfo:
    """The living nodes of the connected cluster, the driver's own first, then by name."""
    import ray

    nodes = []
    for entry in ray.nodes():
        if entry["Alive"]:
            resources = entry["Resources"]
            name = str(entry["NodeManagerHostname"] or entry["NodeManagerAddress"])
            node = Node(name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), str(entry["NodeID"]))
            nodes.append((name != socket.gethostname(), name, node))
    found = tuple(node for _, _, node in sorted(nodes, key=lambda item: item[:2]))
    return ClusterInfo(found, sum(node.cpus for node in found), sum(node.gpus for node in found), address)


def _stay_on_loopback() -> None:
    """Make a Ray that starts now listen on 127.0.0.1 only.

    Ray 2.60 turns an explicit 127.0.0.1 into the machine's outside address and then listens on all interfaces. This
    switch, made for desktop systems whose firewall asks, is what it does honour; it is read when ray is imported, so a
    ray that was imported before gets its constant set.
    """
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if variable in os.environ:
        return  # somebody decided
    os.environ[variable] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if hasattr(constants, "ENABLE_RAY_CLUSTER"):
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[union-attr]


def _import_path() -> dict[str, str]:
    """From a checkout, workers must find the package wherever the command was called from."""
    root = import_root()
    if not (root / "pyproject.toml").is_file():
        return {}  # installed: the workers' interpreter has it
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def _travelling(variables: dict[str, str]) -> dict[str, Any]:
    """What a joined cluster is sent. A submitted job's driver was sent it already, and Ray refuses to be told twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = job.get("runtime_env") or {}
    for name in given.get("env_vars") or {}:
        variables.pop(name, None)
    return {} if given.get("py_modules") else {"py_modules": package_directories()}


def _why(address: str, error: BaseException) -> tuple[str, str]:
    """Reason and remedy for a Ray that could not be joined or started."""
    text = str(error)
    if address != LOCAL and "uthenticat" in text:
        return "this process has no token for it", TOKEN_REMEDY
    if address != LOCAL and text.startswith("Failed to connect to Ray cluster"):  # and yet the port answered
        return "it lets nobody in with this process's token, or is of another Ray version", TOKEN_REMEDY
    if address != LOCAL and "node" in text and "ip" in text.lower() and "address" in text:
        remedy = f"run `ray start --address={address}` here, or use `paretoprune launch`"
        return "this machine is not one of its nodes", remedy
    return first_line(error), _remedy(address)


@contextmanager
def muted() -> Iterator[None]:
    """Nothing on stderr: where a token is wrong, Ray's core writes a line per second there for twenty seconds."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _end_of(ray: Any) -> None:
    """A half-made connection would make the next attempt fail for another reason."""
    with suppress(Exception):
        ray.shutdown()
    shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for most of a minute before it gives up on a host that does not answer.

    Raises ClusterError for what is no address, RayUnreachableError where nobody listens.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ClusterError(
            f"a driver must run inside the cluster, but {address} is a client's entry, whose connection a night would "
            "not survive; use `paretoprune launch --on ray`, which hands the search to the cluster's job server"
        )
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        raise ClusterError(
            f"a Ray address must be local, auto or host:port, but got {address!r}; "
            "leave it out to use this machine alone"
        )
    try:
        socket.create_connection((match.group(1).strip("[]"), int(match.group(2))), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RayUnreachableError(address, first_line(error), _remedy(address)) from error


def _remedy(address: str) -> str:
    if address == LOCAL:
        return "check free memory and the disk space below the temporary directory"
    return "start it with `ray start --head`, correct the address, or leave it out to use this machine alone"
