"""The meaning of every setting: read from the fields of `RunConfig`, shown as rows, YAML to start from, or Markdown.

There is no second list: names, types, defaults and bounds come from the fields, meanings from their docstrings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml
from pydantic import BaseModel

from paretoprune.search.config.run_config import FREE_KEYS, RunConfig, unknown_setting
from paretoprune.search.config.sections import BY_TASK
from paretoprune.search.errors import ConfigError

# JSON schema's words for bounds, with the sign that people write.
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "null"}
_COMMENT_WIDTH = 88
_MARKDOWN_HEAD = """\
# Settings

Written by `paretoprune config --format markdown`, from the docstrings of `search/config/sections.py`.

A setting is given on the command line (`--set space.round_to=16`, or an option of its own, see `--help`) or in a
file (`--config config.yaml`). `--set` overrides an option, an option overrides the file.

```
paretoprune config --format yaml > config.yaml     # a file to start from, every setting with its meaning
paretoprune config recover 'search.max_*'          # explains a section, or what matches a pattern
```

`config.yaml` in a run's folder holds the value of every setting: `--config` with it repeats the run. Between two starts
on one run folder these may change, since they do not alter what its figures mean: {free}.
"""


@dataclass(frozen=True)
class Setting:
    """One key of ``config.yaml``; ``schema`` is the field's JSON schema."""

    name: str
    required: bool
    schema: Mapping[str, Any]

    @property
    def section(self) -> str:
        """The part before the dot; "" for what belongs to no section."""
        return self.name.rpartition(".")[0]

    @property
    def type(self) -> str:
        """The type, or the values there are, in the words of Python."""
        return _type_text(self.schema)

    @property
    def bounds(self) -> dict[str, float]:
        """Bounds of the value, or of each number in it, in JSON schema's words."""
        return dict(_bounds(self.schema))

    @property
    def bounds_text(self) -> str:
        """``>= 0, < 1``; "" where there are none."""
        return ", ".join(f"{sign} {self.bounds[word]:g}" for word, sign in _SIGNS.items() if word in self.bounds)

    @property
    def default(self) -> str:
        """The default in YAML's notation, or "required"."""
        return "required" if self.required else _in_yaml(self.schema["default"])

    @property
    def kind(self) -> str:
        """Type, bounds and default as one text."""
        default = self.default if self.required else f"default {self.default}"
        return "; ".join(filter(None, (self.type, self.bounds_text, default)))

    @property
    def meaning(self) -> str:
        """The field's docstring on one line, with Markdown's quotes."""
        return _plain(self.schema["description"])

    def to_row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "type": self.type,
            "required": self.required,
            "default": self.schema.get("default"),
            "bounds": self.bounds,
            "meaning": self.meaning,
        }


def all_settings() -> list[Setting]:
    """Every setting in the order of ``config.yaml``."""
    found = []
    own = RunConfig.model_json_schema()
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            schema = kind.model_json_schema()
            required = schema.get("required", [])
            found += [Setting(f"{name}.{key}", key in required, each) for key, each in schema["properties"].items()]
        else:
            found.append(Setting(name, name in own.get("required", []), own["properties"][name]))
    return found


def select_settings(patterns: Sequence[str]) -> list[Setting]:
    """Settings that are named by a section, a dotted name or a pattern (``search.max_*``); without any: all.

    Raises :class:`ConfigError` for what names none.
    """
    settings = all_settings()
    if not patterns:
        return settings
    for pattern in patterns:
        if not any(_names(pattern, each) for each in settings):
            raise ConfigError(unknown_setting(pattern))
    return [each for each in settings if any(_names(pattern, each) for pattern in patterns)]


def as_yaml(settings: Iterable[Setting]) -> str:
    """A ``config.yaml`` of ``settings``, each with its default and a comment; examples stand for what has none."""
    lines = _comment("Settings for `paretoprune search --config` and `paretoprune launch`. Each stands at its default.")
    lines += _comment("What is required holds an example: put your own in its place.")
    for section, members in _by_section(settings):
        indent = "  " if section else ""
        lines.append("")
        if section:
            lines += [*_comment(_meaning_of(section)), f"{section}:"]
        for each in members:
            lines += _comment(f"{each.meaning} [{each.kind}]", indent)
            # A default that depends on the model's task must not be written: it would count as chosen.
            off = "# " if each.schema.get(BY_TASK) else ""
            value = _in_yaml(each.schema["examples"][0]) if each.required else each.default
            lines.append(f"{indent}{off}{each.name.rpartition('.')[2]}: {value}")
    return "\n".join(lines)


def as_markdown(settings: Iterable[Setting]) -> str:
    """A page with one table a section."""
    free = ", ".join(f"`{key}*`" if key.endswith(".") else f"`{key}`" for key in FREE_KEYS)
    parts = [_MARKDOWN_HEAD.format(free=free)]
    for section, members in _by_section(settings):
        title, meaning = (f"`{section}`", _meaning_of(section)) if section else ("The file", "")
        parts += [f"## {title}\n", *([f"{meaning}\n"] if meaning else [])]
        rows = [("setting", "type", "default", "bounds", "meaning"), ("---",) * 5]
        rows += [(f"`{e.name}`", _cell(e.type), _cell(e.default), _cell(e.bounds_text), e.meaning) for e in members]
        parts.append("\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows) + "\n")
    return "\n".join(parts).rstrip("\n")


def _names(pattern: str, setting: Setting) -> bool:
    return pattern == setting.section or fnmatchcase(setting.name, pattern)


def _by_section(settings: Iterable[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    grouped: dict[str, list[Setting]] = {}
    for each in settings:
        grouped.setdefault(each.section, []).append(each)
    yield from grouped.items()


def _meaning_of(section: str) -> str:
    return _plain(RunConfig.model_fields[section].annotation.__doc__ or "")


def _plain(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


def _comment(text: str, indent: str = "") -> list[str]:
    head = f"{indent}# "
    # Names of settings and values hold hyphens and must stay whole
    return textwrap.wrap(
        text, _COMMENT_WIDTH, initial_indent=head, subsequent_indent=head, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _cell(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _in_yaml(value: Any) -> str:
    """``value`` as YAML writes it on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()[1:-1]


def _type_text(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return "settings"
    if "anyOf" in schema:
        return " | ".join(map(_type_text, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum") or [schema["const"]]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type_text, schema['prefixItems']))}]"
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}"
    if schema["type"] == "object":
        values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return f"mapping of str to {_type_text(values)}"
    if "pattern" in schema:
        return str(schema["title"])  # in words
    return _TYPES[schema["type"]]


def _bounds(schema: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((word, schema[word]) for word in _SIGNS if word in schema)
    inner = [*schema.get("anyOf", ()), *schema.get("prefixItems", ())]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), Mapping)]
    for each in inner:
        yield from _bounds(each)
