"""A batch script for Slurm: one Ray over the nodes of the allocation, beside whatever else the user runs there."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.launch.request import LaunchRequest


def batch_script(request: LaunchRequest, options: Mapping[str, str] | None = None) -> str:
    """The script's text. `options`: further directives by their long names (`partition`, `account`, `qos` ...).

    Ray wants a token, which all nodes find in the shared home directory; its dashboard is left out. Called again after
    a preemption (`--requeue`), the same command goes on where the run folder ends.
    """
    minutes = math.ceil(request.hours * 60)
    directives = {
        "job-name": request.slug,
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(request.cpus),
        **({"gpus-per-node": str(request.gpus)} if request.gpus else {}),
        "mem": f"{request.memory_gb}G",
        "time": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "output": "%x-%j.log",
        "open-mode": "append",
        **_checked(options or {}),
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items()] + ["#SBATCH --requeue"]
    command = shlex.join(request.command)
    return "\n".join(["#!/usr/bin/env bash", *lines, "", _BODY.format(
        setup="\n".join(request.setup) or ":", gpus=request.gpus, command=command
    )])  # fmt: skip


_BODY = """\
set -euo pipefail
umask 077
{setup}

# One token for the cluster, known to its owner only; every node finds it in the home directory.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null
export RAY_USAGE_STATS_ENABLED=0

# The address that the last node got a connection from this one by: what a node calls itself may be 127.0.1.1.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${{hosts[-1]}}" printenv SLURM_LAUNCH_NODE_IPADDR)
if [[ $head_ip == 127.* ]]; then head_ip=127.0.0.1; fi  # one node alone: Ray takes its outside address for this
head_port=$((20000 + 2 * SLURM_JOB_ID % 12000))  # this one and the next; other jobs on the node have others
export RAY_ADDRESS="$head_ip:$head_port"

start_ray() {{  # NODES OPTION_OF_SRUN OPTION_OF_RAY...; srun does not take a task's CPUs from the job
  exec srun --nodes="$1" --ntasks="$1" "$2" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \\
    ray start "${{@:3}}" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus={gpus} --log-color=false --block
}}
trap 'echo "ending Ray" >&2; kill $(jobs -p) 2> /dev/null; wait' EXIT
start_ray 1 --nodelist="${{hosts[0]}}" --head --node-ip-address="$head_ip" --port="$head_port" \\
  --ray-client-server-port=$((head_port + 1)) --include-dashboard=false &
until (: < "/dev/tcp/$head_ip/$head_port") 2> /dev/null; do
  kill -0 $! 2> /dev/null || {{ echo "error: Ray did not start on ${{hosts[0]}}; see above" >&2; exit 1; }}
  sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then  # trials begin without them, and use them when they have joined
  start_ray $((SLURM_JOB_NUM_NODES - 1)) --exclude="${{hosts[0]}}" --address="$RAY_ADDRESS" &
fi

{command}
"""


def _checked(options: Mapping[str, str]) -> Mapping[str, str]:
    """A directive is one word: a space or a line end would begin another one, or a command."""
    for name, value in options.items():
        if not value or any(letter.isspace() or not letter.isprintable() for letter in name + value):
            raise ClusterError(f"a Slurm option must be one word, but got {name}={value!r}; correct it")
    return options


def submit(script: Path) -> str:
    """Hand the script to `sbatch`; returns what it printed. Raises ClusterError where Slurm is not here or refuses."""
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=True, timeout=120)
    except FileNotFoundError as error:
        raise ClusterError(
            f"submitting needs Slurm's sbatch, but there is none on this machine; copy {script} to a login node and "
            "call sbatch there"
        ) from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise ClusterError(f"sbatch refused {script} ({said[-1] if said else error}); correct the options") from error
    return done.stdout.strip()
