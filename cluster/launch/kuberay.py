"""A manifest for KubeRay: a RayJob, which makes its own cluster, runs the command on it and takes it down again."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from paretoprune.cluster.errors import ClusterError
from paretoprune.cluster.launch.request import LaunchRequest

CONFIG_FOLDER = "/etc/paretoprune"
GPU_RESOURCE = "nvidia.com/gpu"
HEAD_MEMORY_GB = 8
RETRIES = 2


def manifest(
    request: LaunchRequest,
    image: str,
    files: Mapping[str, str],
    claims: Mapping[str, str],
    ray_version: str,
    namespace: str | None = None,
) -> list[dict[str, Any]]:
    """A ConfigMap with the small `files` (mounted at CONFIG_FOLDER) and the RayJob.

    image: holds this project. claims: mount path -> PersistentVolumeClaim, for the dataset and the run folder.
    Token authentication is on (KubeRay makes the secret), nothing is exposed outside the cluster of pods. The head
    holds the driver and no trial. A job that dies is submitted again and goes on from the run folder.
    """
    for path in claims:
        if not path.startswith("/"):
            raise ClusterError(f"a volume is mounted at an absolute path, but got {path!r}; give CLAIM:/path")
    place = {"namespace": namespace} if namespace else {}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{request.slug}-config", **place},
        "data": dict(files),
    }
    spec = {
        "entrypoint": shlex.join(request.command),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "activeDeadlineSeconds": int(request.hours * 3600),
        "backoffLimit": RETRIES,
        "rayClusterSpec": {
            "rayVersion": ray_version,
            "authOptions": {"mode": "token"},
            **({"enableInTreeAutoscaling": True} if request.fewest < request.nodes else {}),
            "headGroupSpec": _head(request, image, claims),
            "workerGroupSpecs": [_workers(request, image, claims)],
        },
    }
    metadata = {"name": request.slug, **place}
    return [config_map, {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}]


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """The documents as one file for `kubectl apply -f`."""
    return yaml.safe_dump_all(documents, sort_keys=False)


def _head(request: LaunchRequest, image: str, claims: Mapping[str, str]) -> dict[str, Any]:
    resources = {"cpu": "2", "memory": f"{HEAD_MEMORY_GB}Gi"}
    template = _pod("head", request, image, claims, resources)
    return {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": template}


def _workers(request: LaunchRequest, image: str, claims: Mapping[str, str]) -> dict[str, Any]:
    resources = {"cpu": str(request.cpus), "memory": f"{request.memory_gb}Gi"}
    if request.gpus:
        resources[GPU_RESOURCE] = str(request.gpus)
    return {
        "groupName": "trials",
        "replicas": request.fewest,
        "minReplicas": request.fewest,
        "maxReplicas": request.nodes,
        "rayStartParams": {},
        "template": _pod("worker", request, image, claims, resources),
    }


def _pod(
    role: str, request: LaunchRequest, image: str, claims: Mapping[str, str], resources: Mapping[str, str]
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{request.slug}-config"}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # the 64 MB of a pod are too few for loading images
    ]
    mounts = [{"name": "config", "mountPath": CONFIG_FOLDER}, {"name": "shm", "mountPath": "/dev/shm"}]
    for index, (path, claim) in enumerate(claims.items()):
        volumes.append({"name": f"data-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"data-{index}", "mountPath": path})
    container = {
        "name": f"ray-{role}",
        "image": image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"limits": dict(resources), "requests": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    return {"spec": {"containers": [container], "volumes": volumes}}


def submit(text: str) -> str:
    """`kubectl apply`; returns what it printed. Raises ClusterError where kubectl is not here or refuses."""
    try:
        done = subprocess.run(
            ["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=True, timeout=120
        )
    except FileNotFoundError as error:
        raise ClusterError("submitting needs kubectl, but there is none here; see --dry-run") from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise ClusterError(f"kubectl refused the manifest ({said[-1] if said else error}); correct it") from error
    return done.stdout.strip()
