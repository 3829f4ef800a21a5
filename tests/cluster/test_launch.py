"""Every launcher's product against its tool's own parser or schema, and Ray Jobs against a real cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.util import prepare_config, validate_config

from paretoprune.cluster.errors import ClusterError, RayUnreachableError
from paretoprune.cluster.launch import kuberay, ray_jobs, slurm
from paretoprune.cluster.launch.request import LaunchRequest
from paretoprune.cluster.packages import source_digests
from tests.cluster.joining import ROOT, TOKEN, environment, nodes

NASTY = ("paretoprune", "search", "a b.pt", "$(touch /tmp/never)", "--run", "/runs/it's; rm -rf `x`")


def request(**changes: Any) -> LaunchRequest:
    return LaunchRequest(**{"name": "My run!", "command": NASTY, "nodes": 2, "gpus": 4, **changes})


# --- the request


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 0}, "nodes must be at least 1, but got 0"),
        ({"gpus": -1}, "gpus must be at least 0"),
        ({"least_nodes": 3}, "least nodes must not be above nodes, but got 3 and 2"),
        ({"hours": 0.0}, "hours must be above 0"),
        ({"command": ("a\nb",)}, "a command must be one line"),
        ({"setup": ("a\x00",)}, "a command must be one line"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        request(**changes)


@pytest.mark.parametrize(
    ("name", "slug"), [("My run!", "my-run"), ("../../x", "x"), ("7", "run-7"), ("<script>", "script"), ("äö", "run"),
                       ("x" * 90, "x" * 40)],
)  # fmt: skip
def test_a_name_becomes_one_that_every_tool_takes(name: str, slug: str) -> None:
    assert request(name=name).slug == slug


# --- Slurm

# sbatch(1): the long options that the script may use, and the form of their values.
SBATCH = {
    "job-name": r"[\w-]+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "cpus-per-task": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+", "mem": r"\d+[KMGT]?", "time": r"\d+:[0-5]\d:[0-5]\d", "output": r"\S+",
    "open-mode": r"append|truncate", "partition": r"[\w,-]+", "account": r"\w+",
}  # fmt: skip


def directives(script: str) -> dict[str, str]:
    """As sbatch reads them: from the top, to the first line that is neither comment nor empty."""
    found = {}
    lines = script.splitlines()
    assert lines[0].startswith("#!")
    for line in lines[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name not in found, f"{name} is given twice"
            found[name] = value
    assert script.count("#SBATCH") == len(found), "a directive below the first command is not read"
    return found


def test_the_batch_script_is_one_that_slurm_reads(tmp_path: Path) -> None:
    script = slurm.batch_script(request(setup=("module load cuda",)), {"partition": "gpu", "account": "me"})
    found = directives(script)
    assert found.pop("requeue") == ""
    for name, value in found.items():
        assert re.fullmatch(SBATCH[name], value), (name, value)
    assert (found["nodes"], found["gpus-per-node"], found["time"]) == ("2", "4", "24:00:00")
    assert "gpus-per-node" not in directives(slurm.batch_script(request(gpus=0)))
    path = tmp_path / "x.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("options", [{"partition": "a b"}, {"partition": "a\nrm"}, {"x": ""}])
def test_an_option_cannot_become_a_command(options: dict[str, str]) -> None:
    with pytest.raises(ClusterError, match="must be one word"):
        slurm.batch_script(request(), options)


# Slurm's and Ray's programs, the command: what each was called with is a line of $CALLS.
NOTE = 'printf "%s\\x1f" "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
FAKES = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "hostname": "echo 127.0.1.1",
    # Options first, then the command, which really runs.
    "srun": NOTE
    + """
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_LAUNCH_NODE_IPADDR=$PEER exec "$@" """,
    "ray": NOTE
    + """
case "$RAY_AUTH_MODE $*" in
  "token get-auth-token --generate") ;;
  "token start --head "*) exec $HEAD ;;
  "token start --address="*) exec sleep 30 ;;
  *) exit 9 ;;
esac""",
    "listen": """exec python3 -c "import os, socket, time
host, port = os.environ['RAY_ADDRESS'].split(':')
server = socket.create_server((host, int(port)))
time.sleep(30)" """,
    "paretoprune": NOTE
    + """
until grep -q "^ray.start.--address=" "$CALLS"; do sleep 0.1; done  # the other node begins beside it
echo "$RAY_ADDRESS"; exit "$CODE\"""",
}


def run_script(tmp_path: Path, peer: str, head: str = "listen", code: int = 0) -> subprocess.CompletedProcess[str]:
    """The batch script by bash; `peer` is the address that the last node sees the first one by."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm_says = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2",
                  "SLURM_CPUS_PER_TASK": "8", "CALLS": str(tmp_path / "calls"), "PEER": peer, "HEAD": head,
                  "CODE": str(code)}  # fmt: skip
    path = tmp_path / "x.sbatch"
    path.write_text(slurm.batch_script(request(setup=('export PATH="$PATH:/opt/some"',))))
    given = os.environ | slurm_says | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(path)], env=given, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )


def calls(tmp_path: Path, program: str) -> list[list[str]]:
    lines = [line.split("\x1f")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    return [words for name, *words in lines if name == program]


def outside_address() -> str:
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries
             if entry.family == socket.AF_INET and not entry.address.startswith("127.")]  # fmt: skip
    return found[0] if found else pytest.skip("this machine has no address but the loopback's")


@pytest.mark.parametrize("peer", ["outside", "127.0.1.1"])
def test_the_batch_script_starts_ray_where_all_nodes_reach_it_and_runs_what_was_asked(
    tmp_path: Path, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words must arrive as they were, and what a node calls itself (127.0.1.1) must not become Ray's address."""
    seen = outside_address() if peer == "outside" else peer
    host = "127.0.0.1" if seen.startswith("127.") else seen
    done = run_script(tmp_path, seen)
    assert (done.returncode, done.stdout) == (0, f"{host}:26912\n"), done.stderr
    assert calls(tmp_path, "paretoprune") == [list(NASTY[1:])]
    assert not Path("/tmp/never").exists()
    look, *steps = calls(tmp_path, "srun")
    assert look == ["--nodes=1", "--ntasks=1", "--nodelist=node2", "printenv", "SLURM_LAUNCH_NODE_IPADDR"]
    assert [step[:4] for step in steps] == [
        ["--nodes=1", "--ntasks=1", place, "--cpus-per-task=8"] for place in ("--nodelist=node1", "--exclude=node1")
    ]
    first, *starts = calls(tmp_path, "ray")
    assert first == ["get-auth-token", "--generate"]
    for kind, where in (("--head", [f"--node-ip-address={host}", "--port=26912"]), (f"--address={host}:26912", [])):
        (words,) = [words for words in starts if words[1] == kind]
        assert words[: 2 + len(where)] == ["start", kind, *where]
        assert {"--num-cpus=8", "--num-gpus=4", "--block"} <= set(words)
        assert_ray_takes(words[1:], monkeypatch)


def assert_ray_takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own `ray start`, up to where it would start processes: a worker is refused some options of a head."""
    from ray.scripts.scripts import start

    class Reached(Exception):
        pass

    def node(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr("ray._private.node.Node", node)
    # as in a fresh process: a local Ray that this one started before keeps to itself
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    result = CliRunner().invoke(start, words)
    assert isinstance(result.exception, Reached), result.output


def test_the_batch_script_ends_as_its_command_did(tmp_path: Path) -> None:
    assert run_script(tmp_path, "127.0.0.1", code=3).returncode == 3


def test_a_ray_that_does_not_start_ends_the_job_at_once(tmp_path: Path) -> None:
    done = run_script(tmp_path, "127.0.0.1", head="false")
    assert done.returncode == 1
    assert "error: Ray did not start on node1; see above" in done.stderr
    assert calls(tmp_path, "paretoprune") == []


def test_without_slurm_it_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="to a login node"):
        slurm.submit(Path("x.sbatch"))
    with pytest.raises(ClusterError, match="needs kubectl"):
        kuberay.submit("x")


# --- KubeRay

# The fields that the manifest uses, as in KubeRay's custom resource definition (ray.io/v1 RayJob, KubeRay 1.5:
# helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml); nothing else is allowed, so that a misspelt field is found.
TEXT, COUNT = {"type": "string"}, {"type": "integer", "format": "int32", "minimum": 0}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required.split()}


POD = closed(
    "spec",
    spec=closed(
        "containers",
        containers={"type": "array", "minItems": 1, "items": closed(
            "name image", name=TEXT, image=TEXT,
            env={"type": "array", "items": closed("name", name=TEXT, value=TEXT)},
            resources=closed(limits={"type": "object"}, requests={"type": "object"}),
            securityContext=closed(allowPrivilegeEscalation={"type": "boolean"}),
            volumeMounts={"type": "array", "items": closed("name mountPath", name=TEXT, mountPath=TEXT)},
        )},
        volumes={"type": "array", "items": closed(
            "name", name=TEXT, configMap=closed(name=TEXT), emptyDir=closed(medium=TEXT),
            persistentVolumeClaim=closed("claimName", claimName=TEXT),
        )},
    ),
)  # fmt: skip
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
RAY_JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
                    namespace=TEXT),
    spec=closed(
        "entrypoint rayClusterSpec", entrypoint=TEXT, shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT, activeDeadlineSeconds=COUNT, backoffLimit=COUNT,
        rayClusterSpec=closed(
            "headGroupSpec", rayVersion=TEXT, authOptions=closed(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=closed("template", rayStartParams=PARAMETERS, template=POD),
            workerGroupSpecs={"type": "array", "items": closed(
                "groupName maxReplicas minReplicas template", groupName=TEXT, replicas=COUNT, minReplicas=COUNT,
                maxReplicas=COUNT, rayStartParams=PARAMETERS, template=POD)},
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize("least", [None, 0])
def test_the_manifest_is_one_that_kuberay_takes(least: int | None) -> None:
    made = kuberay.manifest(
        request(least_nodes=least), "me/image:1", {"config.yaml": "a: 1\n"}, {"/data": "disk"}, "2.60.0", "mine"
    )
    config, job = yaml.safe_load_all(kuberay.as_yaml(made))
    assert [config, job] == made
    jsonschema.Draft202012Validator(RAY_JOB).validate(job)
    full = os.environ.get("PARETOPRUNE_KUBERAY_CRD")  # the whole definition, where somebody has it
    if full:
        versions = yaml.safe_load(Path(full).read_text())["spec"]["versions"]
        schema = next(item for item in versions if item["name"] == "v1")["schema"]["openAPIV3Schema"]
        jsonschema.Draft7Validator(schema).validate(job)
    spec = job["spec"]["rayClusterSpec"]
    assert shlex.split(job["spec"]["entrypoint"]) == list(NASTY)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec.get("enableInTreeAutoscaling", False) == (least == 0)
    assert config["metadata"]["name"] == "my-run-config"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {volume["name"] for volume in pod["volumes"]} == {
            mount["name"] for mount in pod["containers"][0]["volumeMounts"]
        }
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # trials stay off the head


def test_a_relative_mount_is_refused() -> None:
    with pytest.raises(ClusterError, match="absolute path"):
        kuberay.manifest(request(), "x", {}, {"data": "disk"}, "2.60.0")


# --- ray up


def test_the_pages_cluster_file_is_one_that_ray_up_takes() -> None:
    """Filled up and validated by Ray's own functions, as `ray up` does."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(cluster_name.*?)```", page, flags=re.DOTALL)
    content = yaml.safe_load(text)
    validate_config(prepare_config(dict(content)))
    assert text.count("RAY_AUTH_MODE=token ray start") == 2


# --- Ray Jobs


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node with its dashboard, in a process of its own; the job server's address."""
    pytest.importorskip("aiohttp_cors", reason="the job server needs ray[default]")
    # As from an activated environment: a job's `python` is the one on the head's PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with nodes(2, 0, "dashboard", PATH=path) as head:
        yield f"http://{head.entry}"


SUBMIT = """
import json, sys
from pathlib import Path
from paretoprune.cluster.launch import ray_jobs
address, files, *command = sys.argv[1:]
try:
    client, job_id = ray_jobs.submit(ray_jobs.RayJob(tuple(command), Path(files), "a-name"), address)
except ValueError as error:
    sys.exit(f"LINE {error}")
said = []
status = ray_jobs.follow(client, job_id, said.append)
print(json.dumps([status, "".join(said), client.get_job_info(job_id).metadata]))
"""


def submitted(*arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: whether a token is sent is decided when ray is imported."""
    given = environment(PYTHONPATH=str(ROOT), RAY_AUTH_TOKEN=token)
    del given["RAY_AUTH_MODE"]
    command = [sys.executable, "-c", SUBMIT, *map(str, arguments)]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=800)


@pytest.mark.slow
def test_a_job_runs_this_code_on_a_real_cluster(job_server: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "note.txt").write_text("it's here")
    look = (
        "import sys, json, paretoprune.search; from paretoprune.cluster.packages import source_digests; "
        "from paretoprune.cluster.ray_connection import connect; info = connect('auto'); "
        "print('SEEN', json.dumps([sys.argv[1:], open('note.txt').read(), source_digests(), len(info.nodes)]))"
    )
    done = submitted(job_server, files, "python", "-c", look, *NASTY)
    assert done.returncode == 0, done.stderr
    status, said, metadata = json.loads(done.stdout.splitlines()[-1])
    assert status == "SUCCEEDED", said
    (line,) = [line for line in said.splitlines() if line.startswith("SEEN")]
    assert json.loads(line[5:]) == [list(NASTY), "it's here", source_digests(), 1]
    assert metadata["job_submission_name"] == "a-name"
    failing = submitted(job_server, files, "python", "-c", "raise SystemExit(3)")
    assert json.loads(failing.stdout.splitlines()[-1])[0] == "FAILED"


@pytest.mark.slow
def test_a_job_server_that_wants_another_token_says_so(job_server: str, tmp_path: Path) -> None:
    done = submitted(job_server, tmp_path, "true", token="7" * 32)
    assert "its job server wants the cluster's token" in done.stderr.splitlines()[-1]
    assert "7" * 32 not in done.stderr


def test_no_job_server_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp_cors", reason="the client needs ray[default]")
    with pytest.raises(RayUnreachableError) as caught:
        ray_jobs.submit(ray_jobs.RayJob(("true",), tmp_path, "x"), "http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert "no job server answers" in str(caught.value)


class AgentComesLate:
    """A job server's client; its agent is there after so many tries."""

    def __init__(self, tries: int) -> None:
        self.left = tries

    def submit_job(self, **job: Any) -> str:
        self.left -= 1
        if self.left > 0:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, please")
        return "job-1"


def test_a_cluster_that_has_just_been_started_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda seconds: None)
    job, client = ray_jobs.RayJob(("true",), tmp_path, "x"), AgentComesLate(3)
    monkeypatch.setattr(ray_jobs, "connect", lambda address: client)
    assert ray_jobs.submit(job, "here") == (client, "job-1")
    monkeypatch.setattr(ray_jobs, "AGENT_SECONDS", 0.0)
    client.left = 100
    with pytest.raises(RayUnreachableError, match=r"nobody to start the job .* --dashboard-agent-listen-port"):
        ray_jobs.submit(job, "here")
