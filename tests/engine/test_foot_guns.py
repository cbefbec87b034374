"""Settings that are known to spoil a LoRA: each is told, its fix silences it, and good values are quiet."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.engine.advisor import as_layers, recommend
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import BaseIdentity, families
from lorasmith.engine.foot_guns import (
    ROWS,
    Circumstances,
    FootGun,
    circumstances_of,
    find_foot_guns,
    loose_config,
)
from lorasmith.engine.plan import build_plan
from lorasmith.engine.run_file import Layer, flatten, resolve_config
from lorasmith.engine.run_setup import warn_of_foot_guns
from tests.engine.checked import dataset, picture

PICTURES = 20
KNOWN = "“dragon” is a token of its own."


@dataclass(frozen=True)
class Bad:
    """One bad value: of which family, and how one stays just inside (`good`), where that is a setting."""

    key: str
    family: str
    bad: dict[str, Any]
    good: dict[str, Any] = field(default_factory=dict)
    pictures: int = PICTURES
    known: str = ""
    around: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def _rate(value: float, **more: Any) -> dict[str, Any]:
    return {"optimizer.learning_rate": value} | {f"adapter.{key}": each for key, each in more.items()}


TABLE = (
    # FluxGym's 8e-4 has alpha 1 at rank 4, a scale of 1/4; KJ's 4e-4 so is 1e-4 in effect.
    Bad("rate-high", "flux1", _rate(8e-4, rank=4, alpha=1.0), _rate(4e-4, rank=4, alpha=1.0)),
    Bad("rate-high", "flux2", _rate(1.5e-4), _rate(1e-4)),
    Bad("rate-high", "sdxl", _rate(1e-3), _rate(3e-4)),
    Bad("rate-high", "flux1", {"optimizer.name": "lion"}, {"optimizer.name": "lion", **_rate(3e-5)}),
    Bad("rate-high", "qwen_image", {"adapter.rslora": True, "optimizer.learning_rate": 6e-5}, _rate(6e-5)),
    Bad("rate-of-older-models", "flux1", _rate(3e-4), _rate(3e-4, alpha=1.0)),
    Bad("rate-of-older-models", "krea2", _rate(5e-4), _rate(3e-4)),
    # sd-scripts' documentation: 1e-4 with alpha 1 at rank 16.
    Bad("rate-low", "sd15", _rate(1e-4, alpha=1.0), _rate(3e-4, alpha=1.0)),
    Bad("rate-low", "flux1", _rate(1e-6), _rate(2e-5)),
    # Civitai's defaults for FLUX.1.
    Bad("alpha-high", "flux1", _rate(5e-4, rank=2, alpha=16.0), {"adapter.rank": 8, "adapter.alpha": 16.0}),
    Bad("alpha-high", "z_image", {"adapter.rank": 64, "adapter.alpha": 64.0, "adapter.rslora": True}),
    Bad("alpha-low", "sdxl", _rate(1e-2, rank=64, alpha=1.0), _rate(3e-3, rank=32, alpha=1.0)),
    Bad("found-rate", "flux1", {"optimizer.name": "prodigy"}, {"optimizer.name": "prodigy", **_rate(1.0)}),
    Bad("found-rate", "sdxl", {"optimizer.name": "dadaptation", **_rate(0.5)}),
    Bad(
        "found-rate-lora-plus",
        "flux1",
        {"optimizer.name": "prodigy", **_rate(1.0), "optimizer.lora_plus_ratio": 16.0},
    ),
    Bad(
        "found-rate-decay",
        "sdxl",
        {"optimizer.name": "prodigy", **_rate(1.0), "optimizer.weight_decay": 0.5},
        {"optimizer.name": "prodigy", **_rate(1.0)},
    ),
    Bad(
        "rate-lora-plus",
        "sdxl",
        {"optimizer.lora_plus_ratio": 16.0},
        {"optimizer.lora_plus_ratio": 16.0, **_rate(5e-5)},
    ),
    Bad(
        "text-encoder-rate",
        "flux1",
        {"adapter.text_encoder": True, "adapter.text_encoder_learning_rate": 1e-4},
        {"adapter.text_encoder": True, "adapter.text_encoder_learning_rate": 5e-5},
    ),
    Bad("pictures-few", "flux1", {}, pictures=4),
    Bad("pictures-many", "sdxl", {}, pictures=300, around={"goal": "character"}),
    Bad("steps-many", "flux1", {"train.steps": 9000}, {"train.steps": 4000}),
    Bad("steps-few", "sdxl", {"train.steps": 300}, {"train.steps": 500}),
    Bad("batch-large", "sd15", {"train.batch_size": 8, "train.gradient_accumulation": 4}, {"train.batch_size": 8}),
    Bad(
        "rank-large", "sdxl", {"adapter.rank": 128, "adapter.alpha": 64.0}, {"adapter.rank": 64, "adapter.alpha": 64.0}
    ),
    Bad("resolution-low", "sdxl", {"dataset.resolution": 512}, {"dataset.resolution": 768}),
    Bad("resolution-high", "sd15", {"dataset.resolution": 1024}, {"dataset.resolution": 768}),
    Bad("resolution-high", "flux1", {"dataset.more_resolutions": [512, 2048]}, {"dataset.more_resolutions": [512]}),
    Bad("warm-up-long", "flux1", {"schedule.warmup_steps": 1000}, {"schedule.warmup_steps": 200}),
    Bad("average-slow", "flux1", {"train.ema_decay": 0.9999}, {"train.ema_decay": 0.99}),
    Bad("kept-once", "flux1", {"checkpoints.every": 0}, {"checkpoints.every": 900}),
    Bad("kept-once", "flux1", {"checkpoints.keep": 1}, {"checkpoints.keep": 2}),
    Bad("previews-long", "sdxl", {"previews.every": 20}, {"previews.every": 100}),
    Bad("previews-long", "flux1", {"previews.every": 1, "train.steps": 1000}, {"previews.every": 0}),
    Bad("no-meaning", "flux1", {"objective.min_snr_gamma": 5.0, "objective.noise_offset": 0.05}),
    Bad("no-meaning", "sdxl", {"objective.timestep_sampling": "sigmoid"}),
    Bad(
        "no-training-adapter",
        "z_image",
        {"base.training_adapter": "off"},
        {"base.training_adapter": "auto"},
        details={"training_adapter": "someone/adapter"},
    ),
    Bad("fp16-overflow", "qwen_image", {"train.precision": "fp16"}, {"train.precision": "bf16"}),
    Bad("guidance", "flux1", {"objective.guidance": 3.5}, {"objective.guidance": 1.2}),
    Bad("offset-zero-snr", "sdxl", {"objective.noise_offset": 0.05}, details={"zero_snr": True}),
    Bad("offset-zero-snr", "sd15", {"objective.zero_terminal_snr": True, "objective.multires_iterations": 6}),
    Bad("tags-for-prose", "flux1", {}, around={"captions": 20, "tag_captions": 15}),
    Bad("prose-for-tags", "sdxl", {}, around={"captions": 20, "prose_captions": 15}),
    Bad("shuffled-prose", "flux1", {"captions.shuffle": True}),
    Bad("shuffled-prose", "sdxl", {"captions.tag_dropout": 0.2}, around={"captions": 20, "prose_captions": 15}),
    Bad("real-word-trigger", "flux1", {"captions.trigger": "Woman"}, {"captions.trigger": "vqzk"}),
    Bad("real-word-trigger", "sdxl", {"captions.trigger": "dragon"}, known=KNOWN),
    Bad("flipped-sides", "sdxl", {"dataset.flip": True}, around={"goal": "character"}),
    Bad("saver-unneeded", "flux1", {"memory.quantize": "nf4"}, around={"unneeded": frozenset({"memory.quantize"})}),
    Bad("fused-backward", "sdxl", {"optimizer.fused_backward": True, "optimizer.max_grad_norm": 0.0}),
    Bad("not-commercial", "flux1", {}, details={"license": "flux-1-dev-non-commercial-license"}),
)
NOBODY_BUT_THE_USER = {"pictures-few", "pictures-many", "tags-for-prose", "prose-for-tags", "not-commercial"}


def identity_of(family: str, **changes: Any) -> BaseIdentity:
    spec = families()[family].SPEC
    details = {"license": "apache-2.0", **changes.pop("details", {})}
    usual = BaseIdentity(
        family, spec.label, "", "epsilon", spec.default_resolution, spec.denoiser_parameters, "bf16", details=details
    )
    return dataclasses.replace(usual, **changes)


def advised(family: str, goal: str = "character", vram_gib: float = 12.0) -> dict[str, Any]:
    side = families()[family].SPEC.default_resolution
    config = resolve_config(as_layers(recommend(family, goal, PICTURES, side, vram_gib))).config
    return flatten(config.model_dump()) | {"captions.trigger": "vqzk"}


def found(case: Bad, settings: dict[str, Any], known: str = "") -> dict[str, FootGun]:
    config = loose_config(advised(case.family) | settings)
    identity = identity_of(case.family, details=case.details)
    spec, around = families()[case.family].SPEC, Circumstances(**case.around)
    guns = find_foot_guns(config, spec, identity, case.pictures, known, around)
    return {gun.key: gun for gun in guns}


def _name(case: Bad) -> str:
    return f"{case.key}-{case.family}"


@pytest.mark.parametrize("case", TABLE, ids=_name)
def test_a_bad_value_is_told_with_what_it_does(case: Bad) -> None:
    gun = found(case, case.bad, case.known)[case.key]
    assert gun.message.endswith(".")
    assert gun.fix_words.endswith(".") or gun.fix_words.split()[-1].startswith("https://")
    assert gun.words == f"{gun.message} {gun.fix_words}"
    assert bool(gun.fix) is (case.key not in NOBODY_BUT_THE_USER)
    assert all(key in gun.words or key.startswith(("adapter.alpha", "captions.trigger")) for key in gun.fix)


@pytest.mark.parametrize("case", [case for case in TABLE if case.key not in NOBODY_BUT_THE_USER], ids=_name)
def test_the_fix_silences_it_and_brings_no_other(case: Bad) -> None:
    before = found(case, case.bad, case.known)
    after = found(case, case.bad | dict(before[case.key].fix))
    assert case.key not in after
    assert set(after) < set(before)


@pytest.mark.parametrize("case", [case for case in TABLE if case.good], ids=_name)
def test_a_value_just_inside_is_not_told(case: Bad) -> None:
    assert case.key not in found(case, case.good)


def test_every_row_is_in_the_table() -> None:
    assert len({case.key for case in TABLE}) == len(ROWS) + 1  # a rate that is too high has two names
    assert {case.key for case in TABLE} >= NOBODY_BUT_THE_USER


@pytest.mark.parametrize("case", [case for case in TABLE if case.family == "flux1"], ids=_name)
def test_what_only_bounds_know_is_not_told_of_a_tiny_base(case: Bad) -> None:
    spec, config = families()["flux1"].SPEC, loose_config(advised("flux1") | case.bad)
    tiny = identity_of("flux1", parameters=200_000)
    keys = {gun.key for gun in find_foot_guns(config, spec, tiny, case.pictures, case.known)}
    assert not keys & {
        "rate-high",
        "rate-low",
        "alpha-high",
        "pictures-few",
        "steps-many",
        "resolution-high",
        "guidance",
    }


def test_a_family_without_bounds_is_told_only_what_holds_for_all() -> None:
    spec = dataclasses.replace(families()["flux1"].SPEC, name="flat-earth")
    config = loose_config(advised("flux1") | {"optimizer.learning_rate": 1.0, "schedule.warmup_steps": 1500})
    assert [gun.key for gun in find_foot_guns(config, spec, None, 3)] == ["warm-up-long"]


def test_the_gravest_come_first() -> None:
    config = loose_config(
        advised("flux1") | {"optimizer.fused_backward": True, "optimizer.max_grad_norm": 0.0, "train.steps": 90_000}
    )
    guns = find_foot_guns(config, families()["flux1"].SPEC, None, PICTURES)
    assert [gun.severity for gun in guns] == ["warning", "note"]


def test_a_goal_narrows_the_steps() -> None:
    config = loose_config(advised("sdxl") | {"train.steps": 4400})
    spec = families()["sdxl"].SPEC

    def keys(goal: str) -> set[str]:
        return {gun.key for gun in find_foot_guns(config, spec, None, 30, around=Circumstances(goal=goal))}

    assert "steps-many" in keys("style")
    assert "steps-many" not in keys("") | keys("character")


def test_only_savers_that_are_on_and_not_needed_are_told() -> None:
    spec, unneeded = families()["flux1"].SPEC, frozenset({"train.gradient_checkpointing", "memory.swapped_blocks"})
    on = loose_config(advised("flux1") | {"train.gradient_checkpointing": True, "memory.quantize": "int8"})
    (gun,) = find_foot_guns(on, spec, None, PICTURES, around=Circumstances(unneeded=unneeded))
    assert gun.fix == {"train.gradient_checkpointing": False}
    assert find_foot_guns(on, spec, None, PICTURES) == []


def test_settings_that_a_run_refuses_can_be_looked_at_and_wrong_values_are_left_out() -> None:
    values = {"optimizer.name": "prodigy", "optimizer.learning_rate": 3e-4}
    with pytest.raises(ConfigError, match="must be 1"):
        resolve_config([Layer("form", {"optimizer": {"name": "prodigy", "learning_rate": 3e-4}})])
    config = loose_config(values | {"adapter.rank": -1, "train.steps": "many", "no.such": 1, "adapter.such": 1})
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("prodigy", 3e-4)
    assert config.adapter == RunConfig().adapter
    assert config.train == RunConfig().train


def test_how_captions_are_written_is_counted_without_regularization() -> None:
    tags, prose = "girl, red hair, smile, garden, sky", f"{'a woman with red hair stands in a garden ' * 3}"
    items = [
        picture("a.png", tags),
        picture("b.png", prose),
        picture("c.png", ""),
        picture("d.png", tags, regularization=True),
    ]
    told = circumstances_of(dataset(items), "style")
    assert (told.goal, told.captions, told.tag_captions, told.prose_captions) == ("style", 2, 1, 1)


def test_a_plan_tells_each_once() -> None:
    settings = {"optimizer": {"learning_rate": 8e-4}, "objective": {"min_snr_gamma": 5.0}}
    warnings = build_plan(resolve_config([Layer("run.toml", settings)]), identity_of("flux1")).warnings
    assert len([words for words in warnings if "8e-4" in words or "0.0008" in words]) == 1
    assert len([words for words in warnings if "min_snr_gamma" in words]) == 1


def test_a_starting_run_logs_what_may_be_meant_so_as_a_note() -> None:
    module, events = families()["flux1"], []
    identity = identity_of("flux1", details={"license": "flux-1-dev-non-commercial-license"})
    config = loose_config(advised("flux1") | {"optimizer.learning_rate": 8e-4})
    items = dataset([picture(f"{number}.png", "girl, red hair, smile, garden") for number in range(PICTURES)])
    base: Any = SimpleNamespace(module=module, identity=identity)
    warn_of_foot_guns(config, base, items, events.append)
    assert [(event.severity, event.message.split()[0]) for event in events] == [
        ("warning", "A"),
        ("warning", "20"),
        ("info", "The"),
    ]


def test_a_form_can_ask_at_every_change() -> None:
    values, spec, identity = advised("sdxl"), families()["sdxl"].SPEC, identity_of("sdxl")
    find_foot_guns(loose_config(values), spec, identity, PICTURES)
    began = time.perf_counter()
    for _ in range(20):
        find_foot_guns(loose_config(values), spec, identity, PICTURES)
    assert (time.perf_counter() - began) / 20 < 0.02
