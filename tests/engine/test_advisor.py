"""Advice: every recommended value has a reason and a source, and is a setting that the run accepts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lorasmith.engine.advisor import (
    Advice,
    as_layers,
    caption_advice,
    demo_advice,
    explain,
    goal_words,
    goals,
    recommend,
    recommended_steps,
)
from lorasmith.engine.demo_run import resolve_demo
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.run_file import Layer, flatten, resolve_config


def _value(advice: list[Advice], key: str) -> Any:
    (found,) = [item for item in advice if item.key == key]
    return found.value


def test_more_pictures_mean_more_steps_within_bounds() -> None:
    steps = [_value(recommend("sd15", "character", n, 512, 8.0), "train.steps") for n in (0, 1, 10, 20, 1000)]
    assert steps == [500, 500, 1000, 2000, 3000]


def test_a_larger_batch_needs_fewer_steps_for_as_many_passes() -> None:
    large = recommend("sd15", "character", 40, 512, 24.0)
    assert _value(large, "train.batch_size") == 4
    assert _value(large, "train.steps") == 1000
    assert _value(large, "checkpoints.every") == 200


def test_a_goal_that_needs_fewer_looks_at_each_picture_takes_fewer_steps() -> None:
    steps = {goal: _value(recommend("sd15", goal, 30, 512, 8.0), "train.steps") for goal in goals("sd15")}
    assert steps == {"character": 3000, "style": 1500, "product": 3000, "concept": 2400}
    assert recommended_steps("sd15", "style", 30, 2) == 750
    assert recommended_steps("sd15", "character", 30, 1000) == 500


def test_a_processor_computes_in_fp32_and_saves_memory_where_the_base_is_large() -> None:
    large = {item.key: item.value for item in recommend("flux1", "character", 10, 1024, None)}
    assert (large["train.precision"], large["optimizer.name"]) == ("fp32", "adamw")
    assert large["train.gradient_checkpointing"] is True
    assert "train.gradient_checkpointing" not in {item.key for item in recommend("sd15", "style", 10, 512, None)}


@pytest.mark.parametrize("gib", [3.0, 8.0, 24.0, 139.0])
def test_what_makes_a_run_fit_a_card_is_left_to_the_fit(gib: float) -> None:
    for family in families():
        advised = {item.key for item in recommend(family, "character", 10, 1024, gib)}
        assert "train.gradient_checkpointing" not in advised
        assert not [key for key in advised if key.startswith("memory.")]


def test_the_resolution_is_that_of_the_base_and_keeps_the_presets_reason() -> None:
    advice = recommend("sd15", "character", 10, 768, 12.0)
    (resolution,) = [item for item in advice if item.key == "dataset.resolution"]
    assert (resolution.value, resolution.origin) == (768, "preset sd15")
    assert "512" in resolution.disagreement
    small = recommend("sd15", "character", 10, 64, None)
    assert (_value(small, "dataset.resolution"), _value(small, "dataset.bucket_step")) == (64, 16)


def test_a_goal_wins_over_the_defaults_and_says_so() -> None:
    (rank,) = [item for item in recommend("sd15", "style", 10, 512, 12.0) if item.key == "adapter.rank"]
    assert (rank.value, rank.origin) == (32, "goal style")


def test_an_unknown_goal_or_family_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Known goals: character, style, product, concept"):
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


def test_every_goal_is_explained_where_it_is_chosen() -> None:
    assert goals("flux1") == ("character", "style", "product", "concept")
    assert all(goal_words(goal).startswith(f"a {goal}: ") for goal in goals("flux1"))


def test_captions_are_advised_by_what_the_base_reads_and_by_what_is_learnt() -> None:
    person, style = caption_advice("flux1", "character"), caption_advice("flux1", "style")
    assert (person.value, caption_advice("sdxl", "style").value) == ("prose", "tags")
    assert "sentences" in person.why
    assert "leave out what always belongs to the character" in person.why
    assert "leave out how it is painted" in style.why
    with pytest.raises(ConfigError, match="no preset for flat-earth"):
        caption_advice("flat-earth", "style")


def test_a_setting_is_explained_by_its_advice_or_by_its_own_words_and_tells_what_the_user_changed() -> None:
    advice = recommend("flux1", "style", 20, 1024, 24.0)
    own = {"adapter": {"rank": 64}, "train": {"log_every": 5}}
    resolved = resolve_config([*as_layers(advice), Layer("wizard", own)])
    flat = flatten(resolved.config.model_dump())
    told = explain({key: (value, resolved.origins[key]) for key, value in flat.items() if key != "version"}, advice)
    rank, rate, log, seed = (
        told[key] for key in ("adapter.rank", "optimizer.learning_rate", "train.log_every", "run.seed")
    )
    assert (rank.value, rank.recommended, rank.changed, rank.origin) == (64, 32, True, "wizard")
    assert (rate.value, rate.changed) == (1e-4, False)
    assert "8e-4 with alpha 1 at rank 4" in rate.disagreement
    assert (log.recommended, log.changed, log.disagreement) == (10, True, "")
    assert log.why.startswith("Steps between two readings of the loss")
    assert (seed.changed, seed.recommended) == (False, 42)
