"""A cluster file for `ray up`: machines that Ray's autoscaler rents when trials wait and gives back when they idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.launch.request import LaunchRequest

PROVIDERS = ("aws", "local")
IDLE_MINUTES = 10
# Token authentication on every node, with the token that `ray get-auth-token --generate` makes on one's own machine.
_TOKEN_FILE = "~/.ray/auth_token"
_START = "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start"


def cluster_file(
    request: LaunchRequest,
    provider: str = "aws",
    region: str = "us-west-2",
    instance: str = "g5.xlarge",
    head_instance: str = "m5.large",
    hosts: Sequence[str] = (),
    user: str = "ubuntu",
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of the file. `files`: path there -> path here, copied to every machine.

    provider: "aws" rents machines of `instance` (with GPUs) between `least_nodes` and `nodes`, and one `head_instance`
        without trials; "local" uses `hosts` (the first is the head) over ssh.
    """
    if provider not in PROVIDERS:
        raise ClusterError(f"the provider must be one of {', '.join(PROVIDERS)}, but got {provider!r}; correct it")
    if provider == "local" and len(hosts) < 2:
        raise ClusterError(f"provider local needs a head and at least one more host, but got {len(hosts)}; give --host")
    common: dict[str, Any] = {
        "cluster_name": request.slug,
        "idle_timeout_minutes": IDLE_MINUTES,
        "auth": {"ssh_user": user},
        "file_mounts": {_TOKEN_FILE: _TOKEN_FILE, **(files or {})},
        "setup_commands": list(request.setup),
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }
    if provider == "local":
        place = {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])}
        return {**common, "provider": place}
    return {
        **common,
        "max_workers": request.nodes,
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "available_node_types": {
            "head": {"node_config": {"InstanceType": head_instance}, "resources": {"CPU": 0}, "max_workers": 0},
            "trials": {
                "node_config": {"InstanceType": instance},
                "resources": {"CPU": request.cpus, **({"GPU": request.gpus} if request.gpus else {})},
                "min_workers": request.fewest,
                "max_workers": request.nodes,
            },
        },
        "head_node_type": "head",
    }


def as_yaml(content: Mapping[str, Any]) -> str:
    """The file's text."""
    return yaml.safe_dump(dict(content), sort_keys=False)
