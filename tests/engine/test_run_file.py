"""Reading, merging and writing settings: nothing is lost, guessed or accepted by accident."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.run_file import (
    Layer,
    ResolvedConfig,
    flatten,
    load_run_file,
    parse_assignments,
    resolve_config,
    setting_fields,
    to_toml,
    update_toml,
)

KEYS = [key for key, _ in setting_fields()]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def value_of(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def strategy_for(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a setting of this type may hold, by its own bounds."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        bounds = [part for entry in more for part in getattr(entry, "metadata", [entry])]
        return strategy_for(inner, [*metadata, *bounds])
    bound = {name: getattr(entry, name) for entry in metadata for name in _BOUNDS if hasattr(entry, name)}
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        sizes = {name: bound[key] for name, key in (("min_size", "min_length"),) if key in bound}
        return st.lists(strategy_for(typing.get_args(annotation)[0], []), max_size=4, **sizes)
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=30, min_size=bound.get("min_length", 0))
    if annotation is int:
        step = bound.get("multiple_of", 1)
        low = bound.get("ge", bound.get("gt", -1) + 1)
        high = bound.get("le", bound.get("lt", 2**31) - 1)
        return st.integers(-(-low // step), high // step).map(lambda number: number * step)
    assert annotation is float, annotation
    return st.floats(
        bound.get("ge", bound.get("gt", 0.0)),
        bound.get("le", bound.get("lt", 1e6)),
        exclude_min="gt" in bound,
        exclude_max="lt" in bound,
    )


_BOUNDS = ("ge", "gt", "le", "lt", "multiple_of", "min_length")
PATTERNS = st.lists(st.from_regex(r"[a-z_.0-9]{1,12}", fullmatch=True), max_size=3)
OF_THEIR_OWN = {
    "adapter.include": PATTERNS,
    "adapter.exclude": PATTERNS,
    "adapter.block_ranks": st.lists(st.from_regex(r"[a-z_.]{1,9}=[0-9]{1,3}", fullmatch=True), max_size=3),
    "adapter.block_learning_rates": st.lists(st.from_regex(r"[a-z_.]{1,9}=[1-9]\.[0-9]", fullmatch=True), max_size=3),
}
"""Texts with a form that a type cannot tell."""
STRATEGIES = {
    key: strategy_for(field.annotation, list(field.metadata)) for key, field in setting_fields()
} | OF_THEIR_OWN


@st.composite
def resolved_configs(draw: st.DrawFn) -> ResolvedConfig:
    """Any valid configuration, with some settings from a layer of foreign name."""
    chosen = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=12))
    values: dict[str, Any] = {}
    for key in chosen:
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = draw(STRATEGIES[key])
    origin = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
    try:
        return resolve_config([Layer(origin, values)])
    except ConfigError:
        return resolve_config([])


def outcome(read: Callable[[], Layer]) -> RunConfig | ConfigError:
    """The configuration, or the error that the user would see; any other exception fails the test."""
    try:
        return resolve_config([read()]).config
    except ConfigError as error:
        return error


def test_the_strategies_cover_every_setting() -> None:
    assert set(STRATEGIES) == set(KEYS)
    assert len(KEYS) > 50


@QUICK
@given(resolved=resolved_configs())
def test_a_written_file_reads_back_as_the_same_configuration(tmp_path_factory: Any, resolved: ResolvedConfig) -> None:
    path = written(tmp_path_factory.mktemp("round"), to_toml(resolved))
    assert resolve_config([load_run_file(path)]).config == resolved.config


@QUICK
@given(data=st.data(), key=st.sampled_from([key for key in KEYS if key != "version"]))
def test_each_valid_value_of_each_setting_survives_a_file(tmp_path_factory: Any, data: st.DataObject, key: str) -> None:
    value = data.draw(STRATEGIES[key])
    section, _, name = key.rpartition(".")
    config = RunConfig()
    try:
        part = getattr(config, section).__class__.model_validate({name: value})
    except ValidationError:
        pytest.fail(f"{key} refuses {value!r}, which its bounds allow")
    resolved = ResolvedConfig(config.model_copy(update={section: part}), {})
    read = load_run_file(written(tmp_path_factory.mktemp("value"), to_toml(resolved))).values
    assert flatten(read)[key] == value


@QUICK
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_a_file_of_anything_is_settings_or_a_config_error(tmp_path_factory: Any, text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    path = written(tmp_path_factory.mktemp("noise"), raw)
    assert isinstance(outcome(lambda: load_run_file(path)), RunConfig | ConfigError)


@QUICK
@given(assignments=st.lists(st.text(max_size=40), max_size=3))
def test_assignments_of_anything_are_settings_or_a_config_error(assignments: list[str]) -> None:
    assert isinstance(outcome(lambda: parse_assignments(assignments)), RunConfig | ConfigError)


def test_later_layers_win_and_every_value_knows_where_it_came_from() -> None:
    resolved = resolve_config(
        [
            Layer("preset", {"train": {"steps": 10, "batch_size": 2}}),
            Layer("run.toml", {"train": {"steps": 20}}),
            parse_assignments(["train.log_every=5"]),
        ]
    )
    assert (resolved.config.train.steps, resolved.config.train.batch_size, resolved.config.train.log_every) == (
        20,
        2,
        5,
    )
    assert resolved.origins["train.steps"] == "run.toml"
    assert resolved.origins["train.batch_size"] == "preset"
    assert resolved.origins["train.log_every"] == "--set"
    assert resolved.origins["train.precision"] == "default"
    assert set(resolved.origins) == set(KEYS)


def test_resolving_changes_no_layer() -> None:
    values = {"train": {"steps": 10}}
    resolve_config([Layer("a", values), Layer("b", {"train": {"steps": 11}})])
    assert values == {"train": {"steps": 10}}


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("train.steps=500", "train.steps", 500),
        (" train.steps = 500 ", "train.steps", 500),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("adapter.alpha=8", "adapter.alpha", 8.0),
        ("dataset.flip=true", "dataset.flip", True),
        ("captions.trigger=true", "captions.trigger", "true"),
        ("captions.trigger=123", "captions.trigger", "123"),
        ("run.name=a=b", "run.name", "a=b"),
        ("dataset.folder=/tmp/ünï côdé 日本", "dataset.folder", "/tmp/ünï côdé 日本"),
        ("optimizer.name=lion", "optimizer.name", "lion"),
        ('previews.prompts=["a, b", "[trigger] c"]', "previews.prompts", ["a, b", "[trigger] c"]),
        ("previews.seeds=[1, 2]", "previews.seeds", [1, 2]),
        ("base.model=", "base.model", ""),
    ],
)
def test_set_reads_each_kind_of_value(assignment: str, key: str, value: Any) -> None:
    config = resolve_config([parse_assignments([assignment])]).config
    assert value_of(config, key) == value
    assert type(value_of(config, key)) is type(value)


@pytest.mark.parametrize("assignment", ["train.steps", "=5", "", "  =5"])
def test_set_without_key_and_value_shows_how_to_write_it(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignments([assignment])
    assert "key=value" in caught.value.fix


@pytest.mark.parametrize("assignments", [["train=5", "train.steps=5"], ["train.steps=5", "train=5"], ["run.name.x=1"]])
def test_set_that_takes_a_section_for_a_setting_is_refused(assignments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train|run\.name"):
        resolve_config([parse_assignments(assignments)])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.lr_rate", "optimizer.learning_rate"),
        ("adapter.rnak", "adapter.rank"),
        ("triger", "captions.trigger"),
        ("Train.Steps", "train.steps"),
    ],
)
def test_an_unknown_setting_names_the_nearest_known_one(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([parse_assignments([f"{wrong}=1"])])
    assert f"Unknown setting {wrong}" in caught.value.what
    assert caught.value.fix == f"Did you mean {near}?"


def test_an_unknown_setting_near_to_nothing_points_to_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([Layer("run.toml", {"zzzzqqq": 1})])
    assert "lorasmith plan" in caught.value.fix
    assert "run.toml" in caught.value.what


def test_an_empty_unknown_section_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="trian"):
        resolve_config([Layer("run.toml", {"trian": {}})])


def test_an_empty_known_section_changes_nothing() -> None:
    assert resolve_config([Layer("run.toml", {"train": {}})]).config == RunConfig()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"steps": "500"}}, ["train.steps", "'500'", "whole number"]),
        ({"dataset": {"flip": "False"}}, ["dataset.flip", "'False'", "true or false"]),
        ({"train": {"steps": 3.5}}, ["train.steps", "3.5", "whole number"]),
        ({"train": {"steps": 0}}, ["train.steps", "0", "at least 1"]),
        ({"adapter": {"alpha": 0}}, ["adapter.alpha", "0", "more than 0"]),
        ({"dataset": {"resolution": 500}}, ["dataset.resolution", "500", "multiple of 64"]),
        ({"optimizer": {"name": "sgd"}}, ["optimizer.name", "'sgd'", "adamw8bit"]),
        ({"previews": {"seeds": [1, "x"]}}, ["previews.seeds", "'x'", "whole number"]),
        ({"run": {"name": ""}}, ["run.name", "must not be empty"]),
        ({"run": 5}, ["run", "section"]),
        ({"optimizer": {"name": "prodigy"}}, ["optimizer.learning_rate", "prodigy"]),
        ({"captions": {"trigger": "   "}}, ["captions.trigger", "blank"]),
        ({"captions": {"trigger": "a, b"}}, ["captions.trigger", "comma"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_its_place_and_what_is_allowed(values: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([Layer("run.toml", values)])
    for part in said:
        assert part in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([Layer("run.toml", {"train": {"steps": 0}, "adapter": {"rank": "x"}})])
    assert "train.steps" in str(caught.value)
    assert "adapter.rank" in str(caught.value)


def test_a_huge_wrong_value_is_shown_cut_short() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([Layer("run.toml", {"train": {"steps": "9" * 5000}})])
    assert len(str(caught.value)) < 400


def test_a_path_that_is_not_unicode_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.folder"):
        resolve_config([parse_assignments(["dataset.folder=/tmp/\udcff"])])


@pytest.mark.parametrize(
    "content",
    [b"train = [", b"\xff\xfe", b"[train]\nsteps = 1\nsteps = 2\n", b"steps =", b"[" * 20_000, b"a = " + b"[" * 50_000],
)
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_run_file(written(tmp_path, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_run_file(path)
        assert str(path) in caught.value.what


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        load_run_file(Path("/dev/zero"))


def test_a_file_saved_by_windows_editors_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert resolve_config([load_run_file(path)]).config.train.steps == 7


def test_the_written_file_explains_each_setting_and_where_it_came_from() -> None:
    text = to_toml(resolve_config([Layer("run.toml", {"train": {"steps": 7}})]))
    assert "# Optimizer steps in the whole run.\nsteps = 7 # from run.toml\n" in text
    assert "from default" not in text
    for key in KEYS:
        assert f"{key.rpartition('.')[2]} = " in text


def test_updating_a_file_keeps_its_comments() -> None:
    text = "# mine\n[train]\nsteps = 5 # few\n\n[adapter]\nrank = 4\n"
    changed = update_toml(text, {"train.steps": 6, "train.batch_size": 2, "captions.trigger": "zqx"})
    assert "# mine" in changed
    assert "# few" in changed
    assert "rank = 4" in changed
    values = flatten(load_values(changed))
    assert values == {"train.steps": 6, "train.batch_size": 2, "adapter.rank": 4, "captions.trigger": "zqx"}


def test_setting_types_are_only_those_a_form_can_show() -> None:
    for key, field in setting_fields():
        origin = typing.get_origin(field.annotation)
        assert origin is not types.UnionType, key
        assert origin in (None, list, typing.Literal, typing.Annotated), key


def load_values(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)
