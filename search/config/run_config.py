"""A run's configuration: composed of sections, read from a file and the command line, written resolved.

``config.yaml`` in the run folder holds every setting with its value, so that it alone repeats the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from paretoprune.base.atomic import write_text
from paretoprune.base.errors import one_line
from paretoprune.base.messages import note
from paretoprune.base.setting_names import RENAMED, with_present_names
from paretoprune.search.config.latency_target import COMMAND, FORMAT_RUNTIMES, TOLD_TO_HALVE, LatencyTarget
from paretoprune.search.config.sections import (
    DataSection,
    DeploySection,
    FinetuneSection,
    LatencySection,
    ModelSection,
    RecoverSection,
    ResourcesSection,
    SearchSection,
    Section,
    SpaceSection,
    TrialSection,
)
from paretoprune.search.errors import ConfigError

SCHEMA_VERSION = 3
"""Of config.yaml; in version 1 a run had one input size and all branches, before 3 a trial used all images: these
settings were not there, and mean now what was done then."""

# Settings that may change between two starts on one run folder: they do not alter what a trial's figures mean.
FREE_KEYS = (
    "search.trials", "search.max_hours", "search.max_gpu_hours", "search.loggers", "resources.", "finetune.",
    "latency.token_file", "latency.wait_minutes", "latency.if_away",
)  # fmt: skip

# Settings of older versions, with the value that means what is done now: a file may hold them still.
REMOVED = {"search.rungs": None, "finetune.amp": True}
MAPPINGS = ("finetune.train",)
"""Settings whose entries may be given one by one."""
REPLACED = {"search.sampler": {"nsga3": "nsga2"}}
# Settings that files of older versions do not have, by the first version with them, with the value that means what was
# done then.
SINCE: dict[int, dict[str, Any]] = {
    2: {"space.imgsz": [], "space.depth": False},
    3: {"trial.steps": 0, "trial.val_images": 0},
}


class RunConfig(Section):
    """Everything a run needs; see the sections for the meaning of each setting."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """Version of this file's layout."""
    model: ModelSection
    """The trained model."""
    data: DataSection
    """The dataset."""
    space: SpaceSection = SpaceSection()
    """Which widths, branches, input sizes and precisions may be chosen."""
    search: SearchSection = SearchSection()
    """How they are explored."""
    recover: RecoverSection = RecoverSection()
    """Recovery after the removal of channels."""
    trial: TrialSection = TrialSection()
    """The short fine-tuning of a trial."""
    finetune: FinetuneSection = FinetuneSection()
    """The full fine-tuning of the picks."""
    deploy: DeploySection = DeploySection()
    """What ships, and is judged."""
    latency: LatencySection = LatencySection()
    """How latency is measured."""
    resources: ResourcesSection = ResourcesSection()
    """Where trials run."""

    @model_validator(mode="after")
    def _timed_as_it_ships(self) -> RunConfig:
        for name, latency in self.latency.everywhere().items():
            self._check_timing(f"latency.targets.{name}." if name else "latency.", latency)
        if self.deploy.in_trials and "energy_j" in self.search.objectives:
            raise ValueError(
                "energy_j is counted in PyTorch and its runtimes: take it out, or set `deploy.when` to picks"
            )
        return self

    @model_validator(mode="after")
    def _precisions_of_files(self) -> RunConfig:
        given, deploy = self.space.precision, self.deploy
        if given is None:
            return self
        if "precision" in deploy.model_fields_set and deploy.precision != given[0]:
            raise ValueError(
                f"`space.precision` begins with that of the unpruned model, `deploy.precision` {deploy.precision}, "
                f"but got {', '.join(given)}: put it first"
            )
        in_torch = deploy.format == "torch"
        if (in_torch and given != ["fp32"]) or (len(given) > 1 and not deploy.in_trials):
            raise ValueError(
                f"`space.precision` {', '.join(given)} needs trials that are judged as files, but got "
                f"deploy.{'format=torch' if in_torch else f'when={deploy.when}'}: set `deploy.format`, e.g. openvino, "
                "and `deploy.when` to trials"
            )
        agents = any(LatencyTarget.parse(latency.target).agents for latency in self.latency.everywhere().values())
        halves = {name in ("fp16", "bf16") for name in given}
        if agents and len(halves) > 1 and deploy.format in TOLD_TO_HALVE:
            raise ValueError(
                f"an agent runs both files of a pair in 16 bits or neither with {deploy.format}, but `space.precision` "
                f"has {', '.join(given)}: leave out those of 16 bits, or all others"
            )
        return self

    @model_validator(mode="after")
    def _objectives_of_its_devices(self) -> RunConfig:
        from paretoprune.results.store.objectives import device_of

        for name in self.search.objectives:
            device = device_of(name)
            if device and device not in self.latency.targets:
                known = ", ".join(self.latency.targets) or "none"
                raise ValueError(f"the objective {name} needs `latency.targets.{device}`, but the devices are: {known}")
        return self

    def _check_timing(self, where: str, latency: LatencySection) -> None:
        """ValueError where the target cannot time what it is given; ``where`` the settings stand."""
        target, shipped, in_trials = LatencyTarget.parse(latency.target), self.deploy.format, self.deploy.in_trials
        if latency.span == "predict" and target.agents:
            raise ValueError(
                "`latency.span` predict is timed where Ultralytics runs, not on an agent's device: set it to network, "
                f"or leave out `{where}target` {latency.target}"
            )
        if latency.span == "predict" and latency.runtime != "torch" and not in_trials:
            raise ValueError(
                "`latency.span` predict is timed in PyTorch or of the file that ships, got `latency.runtime` "
                f"{latency.runtime}: leave it as it comes, and set `deploy.format` for another runtime"
            )
        if target.agents and shipped != "torch":
            if shipped not in FORMAT_RUNTIMES:
                raise ValueError(
                    f"an agent's device runs {', '.join(FORMAT_RUNTIMES)}, got `deploy.format` {shipped}; TensorRT "
                    "makes its engine there of onnx (latency.runtime=tensorrt)"
                )
            runtimes = FORMAT_RUNTIMES[shipped]
            is_command = shipped == "onnx" and latency.runtime.startswith(COMMAND)
            if latency.runtime not in runtimes and not is_command and not (in_trials and latency.runtime == "torch"):
                raise ValueError(f"{shipped} runs by {', '.join(runtimes)}, got `{where}runtime` {latency.runtime}")
        elif not in_trials:
            target.check_runtime(latency.runtime)
        elif (latency.runtime, latency.half, latency.target) != ("torch", False, "own"):
            raise ValueError(
                f"`deploy.format` {shipped} says in what trials are timed, on their own device or an agent's: leave "
                f"`{where}runtime`, `{where}half` and `{where}target` as they come, or name an agent's address"
            )

    def timed_by(self, latency: LatencySection) -> str:
        """The runtime of trials on a device's agent; ``latency``: how it is measured there."""
        return self.deploy.format if self.deploy.in_trials and latency.runtime == "torch" else latency.runtime

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, for comparing two configurations."""
        return _flatten(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write as YAML, whole or not at all."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


class _DoubleKeyError(yaml.MarkedYAMLError):
    """A mapping with a key twice: YAML's own reader takes the last one without a word."""


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe types, every key of a mapping once; a key that comes from `<<` may be given again."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise _DoubleKeyError(problem=f"`{key.value}`", problem_mark=key.start_mark)
            seen.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)))
        return node


def _parsed(text: str) -> Any:
    loader = _OnceLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key a configuration may hold, section names included."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys.extend(known_keys(annotation, f"{prefix}{name}."))
    return keys


def build_config(values: Mapping[str, Any], source: str = "the settings") -> RunConfig:
    """Validate nested ``values``.

    Raises :class:`ConfigError` with one line for the first thing that is wrong; ``source`` says where it came from.
    """
    try:
        return RunConfig.model_validate(with_present_names(values))
    except ValidationError as error:
        raise ConfigError(_first_line(error, source)) from error


def load_config(path: Path) -> RunConfig:
    """The configuration in a YAML file; :class:`ConfigError` names the file and what is wrong in it."""
    return build_config(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping)."""
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {path} cannot be read ({error.strerror}); check the path") from error
    except _DoubleKeyError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise ConfigError(
            f"configuration {path} must give every key once, got {error.problem} again in {place}; keep one"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:  # RecursionError: nested too deep
        detail = one_line(error)
        raise ConfigError(f"configuration {path} is not valid YAML ({detail}); correct it") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} must hold a mapping of settings, got a {type(values).__name__}")
    return _of_this_version(values, path)


def _of_this_version(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Without what older versions had; a line says so where that changes anything."""
    values = with_present_names(values)
    for key in (*REMOVED, *REPLACED):
        section, name = key.split(".")
        part = values.get(section)
        if not isinstance(part, dict) or name not in part:
            continue
        value = part[name]
        if key in REMOVED:
            del part[name]
            if value != REMOVED[key]:
                note(f"{path}: `{key}` ({value!r}) is a setting of an older version and ignored")
        elif isinstance(value, str) and value in REPLACED[key]:
            part[name] = REPLACED[key][value]
            note(f"{path}: `{key}: {value}` is of an older version; taken as {part[name]}")
    written = values.get("schema_version")
    if type(written) is int and 1 <= written < SCHEMA_VERSION:
        then = {key: value for version, them in SINCE.items() if version > written for key, value in them.items()}
        values = merge(merge(nest(then), values), {"schema_version": SCHEMA_VERSION})
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested mappings: ``{"space.round_to": 8}`` -> ``{"space": {"round_to": 8}}``."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts (the value in YAML) to nested settings.

    Layer patterns hold dots, so a key may stop at a section's field: ``space.layer_bounds={"model.4.*": [0.1, 0.3]}``;
    or name one entry of a mapping whose names hold none: ``finetune.train.mosaic=0.5``.
    Raises :class:`ConfigError` for a text without ``=``, an unknown key (the nearest known one is named), a bad value.
    """
    settings: dict[str, Any] = {}
    keys = known_keys()
    for text in assignments:
        key, equals, raw = text.partition("=")
        key = RENAMED.get(key.strip(), key.strip())
        if not equals or not key:
            raise ConfigError(f"--set needs key=value, got {text!r}; for instance --set space.round_to=16")
        if key not in keys and key.rpartition(".")[0] not in MAPPINGS:
            raise ConfigError(f"--set: {unknown_setting(key)}")
        try:
            settings[key] = _parsed(raw)
        except _DoubleKeyError as error:
            raise ConfigError(f"--set {key}: every key must be given once, got {error.problem} twice") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"--set {key}: the value must be YAML, got {raw!r:.80}; quote it") from error
    return nest(settings)


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ and that must not differ within one run folder."""
    before, after = old.flat(), new.flat()
    names = sorted(set(before) | set(after))
    return [key for key in names if before.get(key) != after.get(key) and not key.startswith(FREE_KEYS)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix + key in _SECTIONS:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


_SECTIONS = frozenset(key.split(".")[0] for key in known_keys() if "." in key)


def unknown_setting(key: str) -> str:
    """The error for an unknown ``key``, with the nearest known one."""
    keys = known_keys()
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:  # the section may be right or missing: compare the last part alone
        tails = {name.rsplit(".", 1)[-1]: name for name in keys}
        close = [tails[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails), n=1)]
    hint = f"the nearest known one is `{close[0]}`" if close else f"sections are {', '.join(sorted(_SECTIONS))}"
    return f"unknown setting `{key}`; {hint}"


def _first_line(error: ValidationError, source: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{source}: {unknown_setting(key)}"
    if first["type"] == "missing":
        return f"{source}: `{key}` is missing; give it a value"
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error" and not key:
        return f"{source}: {message}"  # which names its settings
    if first["type"] == "value_error":
        return f"{source}: `{key}`: {message}; correct it"
    return f"{source}: `{key}`: {message}, got {first['input']!r}; correct it or leave it out"
