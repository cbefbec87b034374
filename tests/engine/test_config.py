"""Every setting is typed, bounded and documented, and refuses what it does not mean."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lorasmith.engine.config import RunConfig, contradictions
from lorasmith.engine.run_file import setting_fields

KEYS = [key for key, _ in setting_fields()]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def default_of(key: str) -> Any:
    value: Any = RunConfig()
    for part in key.split("."):
        value = getattr(value, part)
    return value


def build(**flat: Any) -> RunConfig:
    """Build a config from `section__key=value` pairs."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return RunConfig.model_validate(values)


def test_the_defaults_are_valid_and_do_not_contradict_each_other() -> None:
    assert contradictions(RunConfig()) == []


@pytest.mark.parametrize(("key", "field"), list(setting_fields()), ids=KEYS)
def test_every_setting_explains_itself_in_a_sentence(key: str, field: Any) -> None:
    assert field.description, key
    assert field.description.rstrip().endswith("."), key
    assert "\n\n" not in field.description, key


def test_every_section_has_a_docstring_and_no_setting_lies_outside_a_section() -> None:
    for name, field in RunConfig.model_fields.items():
        if name == "version":
            continue
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        assert field.annotation.__doc__


@pytest.mark.parametrize("key", [key for key in KEYS if not isinstance(default_of(key), str)])
def test_numbers_switches_and_lists_are_never_converted_from_text(key: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate(nested(key, str(default_of(key)).lower()))


@pytest.mark.parametrize("key", [key for key in KEYS if key != "version"])
def test_a_setting_refuses_a_table_and_none(key: str) -> None:
    for wrong in (None, {"a": 1}):
        with pytest.raises(ValidationError):
            RunConfig.model_validate(nested(key, wrong))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 0),
        ("train.steps", 10_000_001),
        ("train.steps", 3.0),
        ("train.steps", True),
        ("train.batch_size", -1),
        ("dataset.resolution", 500),
        ("dataset.resolution", 0),
        ("dataset.bucket_step", 12),
        ("captions.dropout", 1.5),
        ("captions.dropout", float("nan")),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.name", "sgd"),
        ("adapter.dropout", 1.0),
        ("adapter.alpha", -4.0),
        ("previews.seeds", []),
        ("previews.seeds", [-1]),
        ("previews.prompts", ["x" * 2001]),
        ("export.layouts", []),
        ("export.layouts", ["zip"]),
        ("run.seed", 2**31),
        ("run.name", ""),
        ("version", 2),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate(nested(key, value))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer__name": "prodigy"}, "optimizer.learning_rate"),
        (
            {"optimizer__name": "prodigy", "optimizer__learning_rate": 1.0, "optimizer__lora_plus_ratio": 16.0},
            "optimizer.lora_plus_ratio",
        ),
        ({"train__steps": 100, "schedule__warmup_steps": 100}, "schedule.warmup_steps"),
        ({"train__steps": 100, "schedule__start_step": 60, "schedule__warmup_steps": 40}, "smaller than the 40 steps"),
        ({"train__steps": 100, "schedule__start_step": 100}, "schedule.start_step (100) must be smaller"),
    ],
)
def test_a_contradiction_is_one_sentence_that_names_the_setting(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**settings)
    assert named in str(caught.value)


def test_a_run_name_cannot_leave_the_output_folder() -> None:
    for name in ("../up", "a/b", "/root", "..", ".", "a\x00b", "a\nb", " "):
        with pytest.raises(ValidationError, match=r"run\.name"):
            build(run__name=name)


def test_a_run_name_may_be_any_words_in_any_script() -> None:
    for name in ("my lora", "日本の猫", "größe-2", "a.b_c"):
        assert build(run__name=name).run.name == name
