"""The command that starts a search on machines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paretoprune.search.commands.output import FOLDER, set_option

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


@click.command()
@click.argument("config", type=FOLDER)
@click.option("--on", "place", type=click.Choice(PLACES), required=True, help="What starts it.")
@click.option("--run", required=True, help="The run's folder, as the machines see it.")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and do nothing.")
@set_option("search.trials=100")
@click.option("-o", "--output", type=FOLDER, help="Where the script or manifest is written.  [default: beside CONFIG]")
@click.option("--nodes", type=int, default=1, show_default=True, help="Machines that run trials.")
@click.option("--least-nodes", type=int, help="Machines from the start, the others as needed (kuberay).")
@click.option("--cpus", type=int, default=8, show_default=True, help="CPUs of a machine.")
@click.option("--gpus", type=int, default=1, show_default=True, help="GPUs of a machine.")
@click.option("--memory", "memory_gb", type=int, default=32, show_default=True, help="Memory of a machine, GB.")
@click.option("--hours", type=float, default=24.0, show_default=True, help="Longest time (slurm, kuberay).")
@click.option("--setup", multiple=True, metavar="LINE", help="Shell line for every machine first (slurm).")
@click.option("--address", help="ray: the cluster's job server.  [default: http://127.0.0.1:8265]")
@click.option("--follow/--no-follow", default=True, show_default=True, help="ray: show the job's output to its end.")
@click.option("--sbatch", "options", multiple=True, type=Pair("NAME=VALUE", "="), help="slurm: e.g. partition=gpu.")
@click.option("--image", help="kuberay: container image that holds paretoprune.")
@click.option("--claim", "claims", multiple=True, type=Pair("NAME:/PATH", ":"), help="kuberay: volume claim, mounted.")
@click.option("--namespace", help="kuberay: where the job is made.")
def launch(config: Path, place: str, **options: Any) -> int:
    """Start a search of the settings in CONFIG on a cluster: by Ray Jobs, Slurm or KubeRay.

    CONFIG is a run's configuration (YAML, with model.path and data.path). Started again, a run goes on where it ended.
    """
    from paretoprune.search.commands.launching import Launch

    return Launch(config, place, options).start()
