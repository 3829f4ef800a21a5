"""The configuration: strict, resolved, and errors that name the setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from paretoprune.base.setting_names import RENAMED
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.api.runs import compose
from paretoprune.search.config.run_config import (
    build_config,
    differing_keys,
    known_keys,
    load_config,
    merge,
    nest,
    parse_assignments,
    read_yaml,
)
from paretoprune.search.errors import ConfigError
from tests.search.fakes import make_config


def test_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    config = make_config(
        **{"space.layer_bounds": {"model.4.*": (0.1, 0.3)}, "space.blocks": [2, 4], "latency.threads": 3}
    )
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


TWICE = """
space: &space
  round_to: 8
  bounds: {"model.4.*": [0.1, 0.3], "model.4.cv1": [0.0, 0.1], "model.4.*": [0.1, 0.5]}
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TWICE, r"`model\.4\.\*` again in line 4"),
        ("model: {path: a.pt}\nspace: {round_to: 8}\nmodel: {path: b.pt}\n", "`model` again in line 3"),
        ("space:\n  round_to: 8\n  max_ratio: 0.5\n  round_to: 16\n", "`round_to` again in line 4"),
    ],
)
def test_a_key_twice_is_an_error_that_names_it(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config.yaml must give every key once, got {line}; keep one"):
        read_yaml(tmp_path / "config.yaml")


def test_a_key_twice_in_a_setting_is_an_error_and_what_is_merged_in_may_be_given_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set space.layer_bounds: every key must be given once, got `a` twice"):
        parse_assignments(['space.layer_bounds={"a": [0, 1], "b": [0, 1], "a": [0, 0.5]}'])
    (tmp_path / "config.yaml").write_text("trial: &short {epochs: 1, batch: 4}\nfinetune: {<<: *short, epochs: 30}\n")
    assert read_yaml(tmp_path / "config.yaml")["finetune"] == {"epochs": 30, "batch": 4}


def test_every_field_has_a_docstring() -> None:
    from pydantic import BaseModel

    from paretoprune.search.config.run_config import RunConfig

    def undocumented(section: type[BaseModel]) -> list[str]:
        found = [name for name, info in section.model_fields.items() if not info.description]
        for info in section.model_fields.values():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                found += undocumented(info.annotation)
        return found

    assert undocumented(RunConfig) == []
    assert "space.round_to" in known_keys()


@pytest.mark.parametrize(
    ("assignment", "nearest"),
    [
        ("space.round_tu=8", "`space.round_to`"),
        ("round_to=8", "`space.round_to`"),
        ("search.trails=8", "`search.trials`"),
        ("latency.max_second=1", "`latency.max_seconds`"),
    ],
)
def test_unknown_assignment_names_the_nearest(assignment: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=f"unknown setting `{assignment.split('=')[0]}`; the nearest known one is {nearest}"
    ):
        parse_assignments([assignment])


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: a.pt}\ndata: {path: b.yaml}\nspace: {rond_to: 16}\n")
    with pytest.raises(
        ConfigError, match=r"my\.yaml: unknown setting `space.rond_to`; the nearest .* `space.round_to`"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"space.max_ratio": 1.0}, "`space.max_ratio`: input should be less than 1, got 1.0"),
        ({"space.min_ratio": 0.8}, "min_ratio must not be greater than max_ratio, got 0.8 and 0.7"),
        ({"search.trials": 0}, "`search.trials`: input should be greater than or equal to 1, got 0"),
        ({"search.sampler": "grid"}, "`search.sampler`: input should be 'gp', .*'tpe'.*, got 'grid'"),
        ({"search.objectives": ["map50_95", "beauty"]}, "objectives must be of map50_95, .*, got beauty"),
        ({"search.objectives": ["map50_95"]}, "two or three different objectives"),
        ({"latency.max_seconds": float("nan")}, "`latency.max_seconds`"),
        ({"model.imgsz": 333}, "`model.imgsz`: the image size must be a multiple of 32, but got 333: use 352"),
        (
            {"model.imgsz": [64, 100]},
            "`model.imgsz`: the image size must be a multiple of 32, but got 64,100: use 64,128",
        ),
        (
            {"model.imgsz": [64, 96, 3]},
            "`model.imgsz`: the image size must be a side in pixels, or height and width, but got",
        ),
        ({"space.imgsz": [[64, 96], "64,96"]}, "`space.imgsz`: every size must be given once, got 64,96; 64,96"),
    ],
)
def test_wrong_value_is_one_line_with_the_setting(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        make_config(**settings)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`data` is missing"):
        build_config({"model": {"path": "a.pt"}})
    with pytest.raises(ConfigError, match="--set needs key=value, got 'space'"):
        parse_assignments(["space"])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_yaml(tmp_path / "deep.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping of settings, got a list"):
        read_yaml(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_later_settings_win_and_nothing_is_changed_in_place() -> None:
    base = nest({"space.round_to": 8, "space.max_ratio": 0.5})
    merged = merge(base, parse_assignments(["space.round_to=16", "space.exclude=[model.2.*]"]))
    assert merged == {"space": {"round_to": 16, "max_ratio": 0.5, "exclude": ["model.2.*"]}}
    assert base == {"space": {"round_to": 8, "max_ratio": 0.5}}


def test_only_meaning_counts_as_difference() -> None:
    old = make_config()
    assert (
        differing_keys(
            old, make_config(**{"search.trials": 99, "resources.max_concurrent_trials": 2, "finetune.epochs": 3})
        )
        == []
    )
    assert differing_keys(old, make_config(**{"search.seed": 1, "model.imgsz": 320})) == ["model.imgsz", "search.seed"]


OF_VERSION_0_1 = """
model: {path: my.pt, imgsz: 320}
data: {path: my/data.yaml}
search: {trials: 30, sampler: nsga3, rungs: [0, 2], stopping: true}
finetune: {epochs: 20, amp: true}
"""


def test_a_file_of_an_older_version_still_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(OF_VERSION_0_1)
    config = load_config(tmp_path / "config.yaml")
    assert (config.search.sampler, config.search.trials, config.finetune.epochs) == ("nsga2", 30, 20)
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [  # of `amp: true`, which changes nothing, nothing is said
        "`search.rungs` ([0, 2]) is a setting of an older version and ignored",
        "`search.sampler: nsga3` is of an older version; taken as nsga2",
    ]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_setting_under_its_older_name_is_taken(old: str, new: str, tmp_path: Path) -> None:
    """In a file, with --set, from Python, and in what a report reads of a run; both names at once are refused."""
    value = {
        "data.batch": 3, "recover.how": "bn", "resources.parallel": 3, "resources.shared_run": False,
        "search.from_run": str(tmp_path), "search.gpu_hours": 1.5, "search.hours": 1.5,
        "search.plans": [str(tmp_path / "p.json")], "search.reduction": 4.0, "search.stopping": False,
        "space.bounds": {"model.4.*": (0.1, 0.3)},
    }[old]  # fmt: skip
    places = {"model.path": "a.pt", "data.path": "b.yaml"}
    written = json.loads(json.dumps(nest({**places, old: value})))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert load_config(tmp_path / "config.yaml").flat()[new] == written[old.split(".")[0]][old.split(".")[1]]
    (assigned,) = parse_assignments([f"{old}={json.dumps(value)}"]).items()
    assert assigned == (new.split(".")[0], {new.split(".")[1]: json.loads(json.dumps(value))})
    assert compose(None, places, nest({old: value})) == compose(None, places, nest({new: value}))
    section, name = new.split(".")
    assert name in RunFolder(tmp_path).read_config()[section]
    with pytest.raises(ConfigError, match="unknown setting"):
        build_config(nest({**places, old: value, new: value}))


def test_a_file_of_version_1_is_of_a_run_at_one_size(tmp_path: Path) -> None:
    """What was not there when it was written means what was done then, not what is the default now."""
    path = tmp_path / "config.yaml"
    path.write_text("schema_version: 1\nmodel: {path: a.pt, imgsz: 320}\ndata: {path: b.yaml}\nspace: {round_to: 16}\n")
    old = load_config(path)
    assert (old.schema_version, old.space.imgsz, old.space.round_to) == (3, [], 16)
    assert not old.space.depth
    path.write_text(path.read_text().replace("schema_version: 1\n", ""))  # as somebody writes it today
    assert load_config(path).space.imgsz is None


def test_a_file_of_version_2_is_of_a_run_on_all_images(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("schema_version: 2\nmodel: {path: a.pt}\ndata: {path: b.yaml}\nspace: {imgsz: [320]}\n")
    old = load_config(path)
    assert (old.schema_version, old.trial.steps, old.trial.val_images) == (3, 0, 0)
    assert (old.space.imgsz, old.space.depth) == ([320], True)
    path.write_text(path.read_text().replace("schema_version: 2\n", ""))
    assert load_config(path).trial.steps == 1000


def test_entries_of_a_mapping_are_set_one_by_one() -> None:
    required = nest({"model.path": "m.pt", "data.path": "d.yaml"})
    given = parse_assignments(
        ["finetune.train.mosaic=0.5", "finetune.train.scale=[0.5, 1.5]", "finetune.train.overlap_mask=no"]
    )
    config = build_config(merge(given, required))
    assert config.finetune.train == {"mosaic": 0.5, "scale": [0.5, 1.5], "overlap_mask": False}
    assert config.flat()["finetune.train"] == config.finetune.train
    with pytest.raises(ConfigError, match=r"unknown setting `finetune\.trian\.mosaic`"):
        parse_assignments(["finetune.trian.mosaic=0.5"])
    with pytest.raises(ConfigError, match=r"`finetune\.train\.mosaic"):
        build_config(merge(parse_assignments(["finetune.train.mosaic={a: 1}"]), required))
