"""Advice: every recommended value has a reason and a source, and is a setting that the run accepts."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorasmith.presets
from lorasmith.engine.advisor import Advice, as_layers, demo_advice, goals, recommend
from lorasmith.engine.demo_run import resolve_demo
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.run_file import flatten, resolve_config, setting_fields

PRESETS = Path(next(iter(lorasmith.presets.__path__)))
MEMORY = (None, 3.0, 6.0, 8.0, 12.0, 24.0, 139.0)


def _entries(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    preset = tomllib.loads((PRESETS / f"{family}.toml").read_text(encoding="utf-8"))
    tables = [preset["defaults"], *preset["tier"].values(), *preset["goal"].values()]
    for table in tables:
        yield from ((key, entry) for key, entry in table.items() if key != "from_gib")


def _value(advice: list[Advice], key: str) -> Any:
    (found,) = [item for item in advice if item.key == key]
    return found.value


@pytest.fixture(params=sorted(families()))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_has_a_preset_and_every_preset_a_family() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} == set(families())


def test_every_preset_value_has_a_reason_and_a_source_and_is_a_known_setting(family: str) -> None:
    known = {key for key, _ in setting_fields()}
    for key, entry in _entries(family):
        assert key in known
        assert entry["why"].endswith("."), key
        assert len(entry["source"]) > 5, key
        assert len({"value", "passes", "share"} & set(entry)) == 1, key


@pytest.mark.parametrize("vram_gib", MEMORY)
@pytest.mark.parametrize("num_images", [1, 15, 400])
def test_advice_of_every_goal_and_memory_makes_a_valid_run(
    family: str, num_images: int, vram_gib: float | None
) -> None:
    for goal in goals(family):
        advice = recommend(family, goal, num_images, 512, vram_gib)
        assert len({item.key for item in advice}) == len(advice)
        resolved = resolve_config(as_layers(advice))
        for item in advice:
            section, _, name = item.key.partition(".")
            assert getattr(getattr(resolved.config, section), name) == item.value
            assert resolved.origins[item.key] == item.origin
            assert item.why
            assert item.source


def test_alpha_stays_equal_to_the_rank_in_every_goal(family: str) -> None:
    for goal in goals(family):
        adapter = resolve_config(as_layers(recommend(family, goal, 20, 512, 12.0))).config.adapter
        assert adapter.alpha == adapter.rank
        assert adapter.conv_alpha == adapter.conv_rank


def test_more_pictures_mean_more_steps_within_bounds() -> None:
    steps = [_value(recommend("sd15", "character", n, 512, 8.0), "train.steps") for n in (0, 1, 10, 20, 1000)]
    assert steps == [500, 500, 1000, 2000, 3000]


def test_a_larger_batch_needs_fewer_steps_for_as_many_passes() -> None:
    large = recommend("sd15", "character", 40, 512, 24.0)
    assert _value(large, "train.batch_size") == 4
    assert _value(large, "train.steps") == 1000
    assert _value(large, "checkpoints.every") == 200


def test_memory_is_saved_where_there_is_little_of_it() -> None:
    keys = {gib: {item.key: item.value for item in recommend("sd15", "character", 10, 512, gib)} for gib in MEMORY}
    assert keys[3.0]["train.gradient_checkpointing"] is True
    assert "train.gradient_checkpointing" not in keys[8.0]
    assert keys[None]["train.precision"] == "fp32"


def test_the_resolution_is_that_of_the_base() -> None:
    advice = recommend("sd15", "character", 10, 768, 12.0)
    assert _value(advice, "dataset.resolution") == 768


def test_a_card_that_the_base_alone_fills_trains_smaller_pictures() -> None:
    sides = [_value(recommend("flux1", "character", 10, 1024, gib), "dataset.resolution") for gib in (24.0, 32.0, 80.0)]
    assert sides == [512, 1024, 1024]
    small = recommend("sd15", "character", 10, 64, None)
    assert (_value(small, "dataset.resolution"), _value(small, "dataset.bucket_step")) == (64, 16)


def test_a_goal_wins_over_the_defaults_and_says_so() -> None:
    (rank,) = [item for item in recommend("sd15", "style", 10, 512, 12.0) if item.key == "adapter.rank"]
    assert (rank.value, rank.origin) == (32, "goal style")


def test_an_unknown_goal_or_family_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Known goals: character, object, style"):
        recommend("sd15", "world peace", 10, 512, 12.0)
    with pytest.raises(ConfigError, match="no preset for flat-earth"):
        recommend("flat-earth", "style", 10, 512, 12.0)


def test_advice_needs_no_torch() -> None:
    code = "import sys; from lorasmith.engine.advisor import recommend; recommend('sd15', 'style', 9, 512, None)"
    code += "; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_the_demo_says_why_for_settings_that_it_really_sets() -> None:
    advice = demo_advice()
    config = flatten(resolve_demo().config.model_dump())
    assert {"train.steps", "adapter.rank", "captions.trigger"} <= {item.key for item in advice}
    assert all(config[item.key] == item.value and item.why and item.source for item in advice)
