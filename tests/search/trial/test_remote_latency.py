"""Latency measured elsewhere: by a real Ray, with a real small network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paretoprune.cluster.ray_patience import PATIENCE
from paretoprune.cluster.resources import ClusterInfo
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.images import image_stream
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.errors import ConfigError, TrialError
from paretoprune.search.trial import remote_latency
from paretoprune.search.trial.remote_latency import RemoteMeasurement, RemoteMeasurer, check_target

ROOT = Path(__file__).resolve().parents[3]


def config(**latency: Any) -> RunConfig:
    settings = {"max_seconds": 0.5, "target": "cpu:1", **latency}
    model = {"path": str(BASELINE), "imgsz": 64}
    return build_config({"model": model, "data": {"path": "d.yaml"}, "latency": settings})


@pytest.mark.parametrize(("runtime", "span"), [("torch", "network"), ("torch", "predict"), ("onnx", "network")])
def test_the_cpu_of_this_host_as_of_a_trial_on_its_gpu(runtime: str, span: str, ray_session: ClusterInfo) -> None:
    settings = config(runtime=runtime, span=span)
    baseline = load_model(BASELINE)
    stream = image_stream(baseline) if span == "predict" else None
    measurer = RemoteMeasurer(settings, LatencyTarget(threads=1), baseline, lambda: stream)
    pending = [measurer.start(baseline, 64), measurer.start(load_model(BASELINE), 64)]
    for result in (each.result() for each in pending):
        assert (result["runtime"], result["threads"], result["device"], result["imgsz"]) == (runtime, 1, "cpu", 64)
        assert (result["span"], result["images"]) == (span, stream and stream.source)
        assert result["speedup_ci95"][0] <= result["speedup"] <= result["speedup_ci95"][1]
    assert pending[0].known() == pending[0].result()


def test_what_went_wrong_there_is_said_here(ray_session: ClusterInfo) -> None:
    baseline = load_model(BASELINE)
    measurer = RemoteMeasurer(config(runtime="tensorrt"), LatencyTarget(threads=1), baseline, lambda: None)
    with pytest.raises(PruningError, match="tensorrt runs on a CUDA device"):
        measurer.start(baseline, 64).result()


def test_a_node_that_is_not_there_is_one_line(ray_session: ClusterInfo) -> None:
    check_target(LatencyTarget())
    with pytest.raises(ConfigError, match=r"latency.target=node:edge needs a node .* `ray start .*'{\"edge\": 1}'`"):
        check_target(LatencyTarget(resource="edge"))


def test_a_node_that_left_ends_the_wait(ray_session: ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(remote_latency, "LOST_AFTER_S", 0.0)
    monkeypatch.setattr(remote_latency, "_LOOK_EVERY_S", 0.01)
    never = ray.remote(num_cpus=0, resources={"edge": 1})(lambda: 0).remote()
    pending = RemoteMeasurement(never, LatencyTarget(resource="edge"))
    assert pending.known() is None
    with pytest.raises(TrialError, match="a node with the resource edge, but it has left the cluster"):
        pending.result()


SWEEP = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset

if __name__ == "__main__":
    root = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    # locks of its own: a device that is used or measured there leaves its file in that folder
    cluster.add_node(num_cpus=0, resources={"edge": 1}, env_vars={"PARETOPRUNE_LOCK_DIR": str(root / "edge")})
    from paretoprune.cluster.ray_connection import connect
    from paretoprune.search.config.run_config import build_config
    from paretoprune.search.sweep.preflight import prepare
    from paretoprune.search.sweep.sweep import run_sweep
    data = build_dataset(root / "data", train=32, val=16)
    settings = {
        "model": {"path": str(BASELINE), "imgsz": 64}, "data": {"path": str(data)},
        "search": {"trials": 2}, "trial": {"epochs": 1}, "recover": {"calibration_images": 8, "importance": "l2"},
        "latency": {"target": "node:edge", "runtime": "onnx", "max_seconds": 1.0},
        "resources": {"address": cluster.address, "cpus_per_trial": 1},
    }
    outcome = run_sweep(prepare(build_config(settings), root / "run"))
    records = [json.loads(line) for line in (root / "run" / "trials.jsonl").read_text().splitlines()]
    print(json.dumps({
        "outcome": [outcome.finished, outcome.failed],
        "records": records,
        "baseline": json.loads((root / "run" / "baseline.json").read_text())["metrics"],
    }))
    ray.shutdown(); cluster.shutdown()
"""


@pytest.mark.slow
def test_a_sweep_whose_latency_is_measured_on_an_edge_node(tmp_path: Path) -> None:
    """Two nodes on one machine, the second with the resource `edge` and no CPUs: trials run on the first only."""
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    environment = {**os.environ, **PATIENCE, "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content = json.loads(done.stdout.splitlines()[-1])
    assert content["outcome"] == [2, 0]
    for metrics in (*(record["metrics"] for record in content["records"]), content["baseline"]):
        assert metrics["latency_conditions"]["runtime"] == "onnx"
        assert metrics["latency_measured_ms"] > 0
    assert all("wait_for_latency" in record["seconds"] for record in content["records"])
    assert (tmp_path / "edge" / "cpu" / "room").is_file()
