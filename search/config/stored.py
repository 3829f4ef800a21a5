"""A run's own config.yaml: what lies in the run folder is named relative to it, so it is read on any machine."""

from __future__ import annotations

from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig, build_config, read_yaml


def load_run_config(folder: RunFolder) -> RunConfig:
    """The run's configuration, with paths as they are here; ConfigError names the file and what is wrong in it."""
    return build_config(folder.with_places(read_yaml(folder.config)), str(folder.config))


def save_run_config(folder: RunFolder, config: RunConfig) -> None:
    """Write it atomically."""
    model, data = (
        section.model_copy(update={"path": folder.inside(section.path)}) for section in (config.model, config.data)
    )
    config.model_copy(update={"model": model, "data": data}).save(folder.config)
