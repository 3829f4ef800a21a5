"""The command launch: a search on machines elsewhere, handed to one of the launchers of `cluster.launch`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from paretoprune.base.file_names import CONFIG
from paretoprune.base.messages import note
from paretoprune.search.commands.options import FOLDER, set_option
from paretoprune.search.commands.output import echo
from paretoprune.search.errors import ConfigError
from paretoprune.search.monitoring.interrupts import interruptible

if TYPE_CHECKING:
    from paretoprune.cluster.launch.request import LaunchRequest
    from paretoprune.search.config.run_config import RunConfig

PLACES = ("ray", "slurm", "kuberay")


class Pair(click.ParamType):
    """Two words with a sign between them; a tuple."""

    def __init__(self, name: str, sign: str) -> None:
        self.name = name
        self._sign = sign

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        left, sign, right = str(value).partition(self._sign)
        if not (left and sign and right):
            self.fail(f"it must read {self.name}, got {value!r}", param, ctx)
        return left, right


class Launch:
    """One launch: the checked configuration, the options of the command line, the place."""

    def __init__(self, file: Path, place: str, options: Mapping[str, Any]) -> None:
        self._file = file
        self._place = place
        self._options = options

    @cached_property
    def _config(self) -> RunConfig:
        """Checked before anything is submitted: an unknown key should not cost a wait in a queue."""
        from paretoprune.search.config.run_config import build_config, merge, parse_assignments, read_yaml

        over = parse_assignments(self._options["settings"])
        address = {"resources": {"address": "auto"}}
        return build_config(merge(merge(read_yaml(self._file), over), address), str(self._file))

    def start(self) -> int:
        """Submit, or with ``--dry-run`` print; returns the exit code."""
        self._check_paths()
        start = {"ray": self._ray, "slurm": self._slurm, "kuberay": self._kuberay}
        return start[self._place]()

    def _check_paths(self) -> None:
        """A path that means something else in another working directory would start another run there."""
        run = self._options["run"]
        if "://" not in run and not Path(run).is_absolute():
            raise ConfigError(f"--run must be an absolute path on storage that all machines share, but got {run}")
        if not Path(self._config.data.path).is_absolute():
            raise ConfigError(
                f"{self._file}: `data.path` must be an absolute path that all machines share, got "
                f"{self._config.data.path}; correct it"
            )

        output = self._options["output"]
        if output is not None:
            written = [output, *([self._resolved] if self._place == "slurm" else [])]
            from paretoprune.search.api.overwriting import check_output

            check_output(written, [self._file, self._config.model.path, self._config.data.path])

    @property
    def _resolved(self) -> Path:
        """Where a job script finds the whole configuration."""
        return Path(self._options["output"] or self._file).resolve().with_suffix(".resolved.yaml")

    def _command(self, program: tuple[str, ...], config: str, model: str | None = None) -> tuple[str, ...]:
        model = model or self._config.model.path
        arguments = ("search", model, self._config.data.path, "--config", config, "--run", self._options["run"])
        return (*program, *arguments, "--address", "auto")

    def _request(self, command: tuple[str, ...], setup: tuple[str, ...] = ()) -> LaunchRequest:
        from paretoprune.cluster.launch.request import LaunchRequest

        names = ("nodes", "least_nodes", "cpus", "gpus", "memory_gb", "hours")
        name = f"paretoprune-{Path(self._options['run']).name}"
        return LaunchRequest(name, command, setup=setup, **{key: self._options[key] for key in names})

    def _config_text(self) -> str:
        return yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)

    def _write(self, suffix: str, text: str) -> Path:
        path = Path(self._options["output"] or self._file.with_suffix(suffix))
        path.write_text(text, encoding="utf-8")
        note(f"wrote {path}")
        return path

    def _ray(self) -> int:
        from paretoprune.cluster.launch import ray_jobs

        address = self._options["address"] or os.environ.get("RAY_API_SERVER_ADDRESS") or ray_jobs.DEFAULT_ADDRESS
        with tempfile.TemporaryDirectory(prefix="paretoprune-job-") as scratch:
            folder = Path(scratch)
            (folder / CONFIG).write_text(self._config_text(), encoding="utf-8")
            model = Path(self._config.model.path)
            if model.is_file():  # small enough to travel; the sweep keeps it in the run folder
                shutil.copyfile(model, folder / model.name)
            command = self._command(("python", "-m", "paretoprune"), CONFIG, model.name if model.is_file() else None)
            job = ray_jobs.RayJob(command, folder, f"paretoprune-{Path(self._options['run']).name}")
            if self._options["dry_run"]:
                echo(json.dumps(job.describe(address), indent=2))
                return 0
            client, job_id = ray_jobs.submit(job, address)
            echo(job_id)
            shown, stopped = (ray_jobs.job_command(verb, address, job_id) for verb in ("logs --follow", "stop"))
            remedy = f"`{shown}` shows it, `{stopped}` stops it"
            if not self._options["follow"]:
                note(f"{job_id} runs; {remedy}")
                return 0
            with interruptible(f"showing {job_id}, which goes on", remedy):
                status = ray_jobs.follow(client, job_id, lambda text: click.echo(text, nl=False, err=True))
            note(f"{job_id}: {status.lower()}")
            return 0 if status == "SUCCEEDED" else 1

    def _slurm(self) -> int:
        from paretoprune.cluster.launch import slurm

        resolved = self._resolved
        here = f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"'
        setup = tuple(self._options["setup"]) or ((here,) if sys.prefix != sys.base_prefix else ())
        request = self._request(self._command(("paretoprune",), str(resolved)), setup)
        script = slurm.batch_script(request, dict(self._options["options"]))
        if self._options["dry_run"]:
            echo(script, newline=False)
            return 0
        resolved.write_text(self._config_text(), encoding="utf-8")
        echo(slurm.submit(self._write(".sbatch", script)))
        return 0

    def _kuberay(self) -> int:
        from importlib import metadata

        from paretoprune.cluster.launch import kuberay

        if not self._options["image"]:
            raise click.UsageError("--on kuberay needs --image, a container image that holds paretoprune")
        request = self._request(self._command(("paretoprune",), f"{kuberay.CONFIG_FOLDER}/{CONFIG}"))
        text = kuberay.as_yaml(
            kuberay.manifest(
                request,
                self._options["image"],
                {CONFIG: self._config_text()},
                {path: claim for claim, path in self._options["claims"]},
                metadata.version("ray"),
                self._options["namespace"],
            )
        )
        if self._options["dry_run"]:
            echo(text, newline=False)
            return 0
        self._write(".rayjob.yaml", text)
        echo(kuberay.submit(text))
        return 0


@click.command()
@click.argument("config", type=FOLDER)
@click.option("--on", "place", type=click.Choice(PLACES), required=True, help="Where the search is started.")
@click.option("--run", required=True, help="Run folder, as the nodes see it.")
@click.option("--dry-run", is_flag=True, help="Print the job without submitting it.")
@set_option("search.trials=100")
@click.option("-o", "--output", type=FOLDER, help="Path of the script or manifest.  [default: beside CONFIG]")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that run trials.")
@click.option("--least-nodes", type=int, help="Minimum number of nodes; autoscale up to --nodes (kuberay).")
@click.option("--cpus", type=int, default=8, show_default=True, help="CPUs per node.")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs per node.")
@click.option("--memory", "memory_gb", type=int, default=32, show_default=True, help="Memory per node, GB.")
@click.option("--hours", type=float, default=24.0, show_default=True, help="Time limit, hours (slurm, kuberay).")
@click.option("--setup", multiple=True, metavar="LINE", help="Shell command run on every node before start (slurm).")
@click.option("--address", help="ray: the cluster's job server.  [default: http://127.0.0.1:8265]")
@click.option("--follow/--no-follow", default=True, show_default=True, help="ray: show the job's output until it ends.")
@click.option("--sbatch", "options", multiple=True, type=Pair("NAME=VALUE", "="), help="slurm: e.g. partition=gpu.")
@click.option("--image", help="kuberay: container image that holds paretoprune.")
@click.option("--claim", "claims", multiple=True, type=Pair("NAME:/PATH", ":"), help="kuberay: volume claim to mount.")
@click.option("--namespace", help="kuberay: namespace of the job.")
def launch(config: Path, place: str, **options: Any) -> int:
    """Start a search of the settings in CONFIG on a cluster: by Ray Jobs, Slurm or KubeRay.

    CONFIG is a run's configuration (YAML, with model.path and data.path). Started again, a run resumes.
    """
    return Launch(config, place, options).start()
