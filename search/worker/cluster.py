"""What a joined cluster needs beyond a local Ray: checks of nodes, the model copied there, slots that follow its size.

Everything else is the same as on one machine.
"""

from __future__ import annotations

import filecmp
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretoprune.base.atomic import write_bytes
from paretoprune.base.file_names import MODEL_FOLDER
from paretoprune.base.messages import note
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.classes import dataset_of
from paretoprune.search.errors import RunFolderError
from paretoprune.search.storage.object_store import remote_of

if TYPE_CHECKING:
    from paretoprune.cluster.joining_nodes import Newcomers
    from paretoprune.cluster.resources import ClusterInfo, TrialResources
    from paretoprune.search.config.run_config import RunConfig

LOOK_AGAIN_SECONDS = 2.0


def is_joined(config: RunConfig) -> bool:
    """Whether the run uses a cluster that somebody else started."""
    return config.resources.address not in (None, "local")


def with_model_copied(config: RunConfig, folder: RunFolder, copy: bool) -> RunConfig:
    """``config`` with the model in the run folder, which every node sees and which outlives a submitted job's files.

    ``copy`` False: only where an earlier start left the same file there, so that a second start counts as the same run.
    """
    given = Path(config.model.path)
    kept = folder.path / MODEL_FOLDER / given.name
    stays = not is_joined(config) and remote_of(folder.path) is None
    if stays or given == kept or not given.is_file():
        return config
    if kept.is_file():
        if not filecmp.cmp(given, kept, shallow=False):
            raise RunFolderError(
                f"run folder {folder.path} belongs to another model ({kept} differs from {given}); choose another --run"
            )
    elif copy:
        write_bytes(kept, given.read_bytes())  # a torn checkpoint would be taken for the model at the next start
    else:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(kept)})})


def check_cluster(config: RunConfig, folder: RunFolder | None, resources: TrialResources) -> int:
    """Every node that trials may run on is ready: NodeError, one line, before the first trial. Returns their number.

    ``folder`` None: the run folder need not be shared.
    """
    from paretoprune.cluster.nodes import check_nodes

    def may_hold_a_trial(entry: dict[str, Any]) -> bool:
        have = entry["Resources"]
        return bool(have.get("CPU", 0) >= resources.cpus and have.get("GPU", 0) >= resources.gpus)

    return check_nodes(data_paths(config), folder.path if folder else None, may_hold_a_trial)


def data_paths(config: RunConfig) -> list[str]:
    """The dataset's files and folders that trials read."""
    from paretoprune.pruning.data.dataset import dataset_places

    data = dataset_of(config)  # what a run of some classes says of it travels with the model
    return dataset_places(data) if Path(data).exists() else []


def watch_joining_nodes(config: RunConfig, folder: RunFolder | None, resources: TrialResources) -> Newcomers | None:
    """The check of nodes that join from now on; ``folder`` as for ``check_cluster``. None on a local Ray."""
    if not is_joined(config):
        return None
    from paretoprune.cluster.joining_nodes import Newcomers
    from paretoprune.cluster.ray_connection import describe_cluster

    present = describe_cluster(config.resources.address or "local")
    return Newcomers(present, resources, data_paths(config), folder.path if folder else None, note)


class DynamicSlots:
    """How many trials fit at this moment: nodes may join and leave during a sweep. Call it for the number."""

    def __init__(self, config: RunConfig, resources: TrialResources, newcomers: Newcomers | None = None) -> None:
        """``newcomers``: looks at nodes that join; None counts them at once."""
        self._resources = resources
        self._newcomers = newcomers
        self._most = config.resources.max_concurrent_trials
        self._address = config.resources.address or "local"
        self._slots = resources.slots
        self._looked = time.monotonic()
        self._asked = is_joined(config) and self._most is not None and self._most > resources.slots
        if self._asked:
            from paretoprune.cluster.waiting import ask_autoscaler

            ask_autoscaler({"CPU": resources.cpus, "GPU": resources.gpus}, self._most or 0)

    def __call__(self) -> int:
        if time.monotonic() - self._looked >= LOOK_AGAIN_SECONDS:
            from paretoprune.cluster.ray_connection import describe_cluster

            self._looked = time.monotonic()
            info = describe_cluster(self._address)
            self._slots = self._fitting(self._newcomers.admitted(info) if self._newcomers else info)
        return min(self._slots, self._most or self._slots)

    def _fitting(self, info: ClusterInfo) -> int:
        from paretoprune.cluster.errors import NoRoomError
        from paretoprune.cluster.resources import slots

        try:
            return slots(info, self._resources.gpus, self._resources.cpus).slots
        except NoRoomError:  # every node that could hold a trial has left; another may come
            return 0

    def close(self) -> None:
        """The sweep is over: an autoscaler may take its nodes back."""
        if self._newcomers:
            self._newcomers.close()
        if self._asked:
            from paretoprune.cluster.waiting import ask_autoscaler

            ask_autoscaler({}, 0)
