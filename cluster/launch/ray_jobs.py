"""A job for a running cluster, through Ray's own job server: the code and small files travel with it."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretoprune.base.errors import one_line
from paretoprune.cluster.errors import ClusterError, RayUnreachableError
from paretoprune.cluster.packages import package_directories
from paretoprune.cluster.ray_connection import WORKER_ENVIRONMENT

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# A job server answers before the agent that starts jobs is there, and says so after 10 s of its own.
AGENT_SECONDS = 120.0
_NO_AGENT = "No available agent"


@dataclass(frozen=True)
class RayJob:
    """A submission: the command, the folder of small files it starts in, and what the driver's environment holds."""

    command: tuple[str, ...]
    files: Path
    name: str

    @property
    def entrypoint(self) -> str:
        """The command line, quoted for the shell that runs it on the head node."""
        return shlex.join(self.command)

    def runtime_env(self) -> dict[str, Any]:
        """What travels: the small files as working directory, and this process's own package."""
        return {
            "working_dir": str(self.files),
            "py_modules": package_directories(),
            "env_vars": dict(WORKER_ENVIRONMENT),
        }

    def describe(self, address: str) -> dict[str, Any]:
        """What would be submitted, as data."""
        files = sorted(str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file())
        return {"address": address, "entrypoint": self.entrypoint, "files": files, "runtime_env": self.runtime_env()}


def connect(address: str) -> Any:
    """The job server's client. RayUnreachableError, one line, where none answers or it wants a token."""
    if os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported; without it no token is sent
    from ray.exceptions import RayError

    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError as error:
        raise ClusterError('submitting Ray jobs needs more of Ray; pip install "ray[default]"') from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise RayUnreachableError(address, *_why(error)) from error


def _why(error: BaseException) -> tuple[str, str]:
    text = one_line(error)
    if "token" in text.lower() or "401" in text or "403" in text or "uthenticat" in text:
        return (
            "its job server wants the cluster's token",
            "put it (`ray get-auth-token` on the head node) into ~/.ray/auth_token or RAY_AUTH_TOKEN and set "
            "RAY_AUTH_MODE=token",
        )
    if _NO_AGENT in text:
        remedy = (
            "see dashboard_agent.log in /tmp/ray/session_latest/logs on the head: its port may be taken by another Ray "
            "(`ray start --head --dashboard-agent-listen-port=PORT`)"
        )
        return f"its job server has had nobody to start the job for {AGENT_SECONDS:g} s", remedy
    return (
        f"no job server answers ({text[:120]})",
        "start the cluster's head with its dashboard (`ray start --head`, ray[default] installed), or forward its "
        "port: ssh -L 8265:127.0.0.1:8265 HEAD",
    )


def submit(job: RayJob, address: str) -> tuple[Any, str]:
    """Hand the job in; returns the client and the job's id. Waits a while for a cluster that has just been started."""
    client = connect(address)
    from ray.exceptions import RayError

    metadata = {"job_submission_name": job.name}
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            job_id = client.submit_job(entrypoint=job.entrypoint, runtime_env=job.runtime_env(), metadata=metadata)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            if _NO_AGENT not in str(error) or time.monotonic() > end:
                raise RayUnreachableError(address, *_why(error)) from error
            time.sleep(1)
        else:
            return client, str(job_id)


def job_command(verb: str, address: str, job_id: str) -> str:
    """Ray's own command about a job, to be printed: pasted into a shell, it is these words and finds the token."""
    mode = os.environ.get("RAY_AUTH_MODE")
    words = shlex.join(["ray", "job", *verb.split(), "--address", address, job_id])
    return f"RAY_AUTH_MODE={shlex.quote(mode)} {words}" if mode else words


def follow(client: Any, job_id: str, write: Callable[[str], None]) -> str:
    """Hand the job's output to `write` as it comes, until it ends; returns SUCCEEDED, FAILED or STOPPED."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    asyncio.run(tail())
    while (status := str(getattr(client.get_job_status(job_id), "value", ""))) not in ENDED:
        time.sleep(0.5)  # the log may end a moment before the job does
    return status
