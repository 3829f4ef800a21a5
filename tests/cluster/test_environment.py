from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from paretoprune.cluster import environment

ROOT = Path(__file__).resolve().parents[2]


def test_facts_are_plain_data_about_this_host() -> None:
    facts = environment.describe_environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"] == metadata.version("torch")
    assert facts["cpu_threads"] == os.cpu_count()
    assert 1 <= int(facts["cpu_usable"]) <= int(facts["cpu_threads"])
    assert facts["cpu_model"]
    total_kb = int(Path("/proc/meminfo").read_text().split()[1])
    assert facts["memory_gb"] == pytest.approx(total_kb / 2**20, abs=0.1)


def test_nothing_personal_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2-secret")
    text = json.dumps(environment.describe_environment())
    assert "hunter2-secret" not in text
    assert str(ROOT) not in text
    assert sys.prefix not in text


def test_a_package_that_is_absent_has_no_key() -> None:
    assert environment.installed_versions(["numpy", "no-such-distribution"]) == {"numpy": metadata.version("numpy")}


def test_usable_cpus_follow_the_affinity() -> None:
    pinned = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"{pinned}; from paretoprune.cluster.environment import *; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("first", ["pin", "torch"])
def test_threads_are_pinned_before_and_after_torch_is_loaded(first: str) -> None:
    pin, load = "from paretoprune.cluster.environment import pin_threads; pin_threads(1)", "import torch"
    steps = [pin, load] if first == "pin" else [load, pin]
    code = "; ".join([*steps, "import os; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"])
    two = os.environ | dict.fromkeys(environment.THREAD_VARIABLES, "2")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=two, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
