"""What is told before the training: which program loads which adapter from which layout, and what cannot be written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorasmith.engine.compatibility import (
    PROGRAMS,
    chosen_layouts,
    compatibility_problems,
    loads_in,
    require_compatible,
    why_not,
)
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import BaseIdentity, FamilySpec, families

ALL = ("ComfyUI", "A1111", "Forge", "diffusers")


def spec(**changes: Any) -> FamilySpec:
    """A base model with a layout that everything reads, one for diffusers, and one that stores layers fused."""
    facts = {
        "name": "imaginary",
        "label": "Imaginary",
        "layouts": ("kohya", "diffusers", "comfyui"),
        "readers": {"kohya": ALL, "diffusers": ("ComfyUI", "diffusers"), "comfyui": ("ComfyUI",)},
        "fused_layouts": ("comfyui",),
    }
    return dataclasses.replace(families()["sd15"].SPEC, **facts | changes)


def kind(name: Any) -> AdapterSettings:
    return AdapterSettings(kind=name)


def config(layouts: list[Any], adapter: Any = "lora", **base: Any) -> RunConfig:
    return RunConfig(
        adapter=kind(adapter),
        export=ExportSettings(layouts=layouts),
        base=base,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("adapter", "layout", "programs"),
    [
        ("lora", "kohya", ALL),
        ("locon", "comfyui", ("ComfyUI",)),
        # dora_scale: dropped by diffusers, measured by column in A1111.
        ("dora", "kohya", ("ComfyUI", "Forge")),
        # lora_magnitude_vector: known to diffusers alone.
        ("dora", "diffusers", ("diffusers",)),
        ("loha", "kohya", ("ComfyUI", "A1111", "Forge")),
        ("lokr", "diffusers", ("ComfyUI",)),
        # oft_blocks: unknown to Forge and diffusers.
        ("oft", "kohya", ("ComfyUI", "A1111")),
        ("boft", "diffusers", ("ComfyUI",)),
        # Fused layers hold products only.
        ("dora", "comfyui", ()),
        ("lokr", "comfyui", ()),
    ],
)
def test_each_kind_loads_where_the_programs_rules_say(adapter: str, layout: str, programs: tuple[str, ...]) -> None:
    assert loads_in(spec(), kind(adapter), layout) == programs
    for program in PROGRAMS:
        assert (why_not(spec(), kind(adapter), layout, program) == "") == (program in programs)


def test_a_family_states_what_is_special_to_it() -> None:
    own = spec(readers={"kohya": ALL, "diffusers": ("ComfyUI", "diffusers"), "diffusers/lokr": ("diffusers",)})
    assert loads_in(own, kind("lokr"), "diffusers") == ("diffusers",)
    assert loads_in(own, kind("loha"), "diffusers") == ("ComfyUI",)


def test_auto_is_the_layout_that_most_programs_load_and_each_layout_is_written_once() -> None:
    assert chosen_layouts(ExportSettings(layouts=["auto", "kohya", "comfyui"]), spec()) == ["kohya", "comfyui"]


def test_a_plain_lora_in_the_usual_layout_is_nothing_to_talk_about() -> None:
    assert compatibility_problems(config(["auto"]), spec()) == []


def test_a_layout_that_the_base_does_not_have_ends_the_run_with_those_that_it_has() -> None:
    with pytest.raises(ConfigError, match=r"Imaginary has no comfyui layout\. Choose of kohya, diffusers, or auto"):
        require_compatible(config(["comfyui"]), spec(layouts=("kohya", "diffusers")))


def test_a_kind_that_cannot_be_fused_is_refused_for_that_layout() -> None:
    with pytest.raises(ConfigError, match=r"fused with others, which a LoHa cannot be.*kohya or diffusers"):
        require_compatible(config(["comfyui"], "loha"), spec())


def test_who_does_not_load_a_kind_is_told_with_what_to_do() -> None:
    (words,) = compatibility_problems(config(["kohya"], "dora"), spec())
    assert "loaded by ComfyUI and Forge, not by A1111 and diffusers" in words
    assert words.endswith("add diffusers to export.layouts.")
    # With both layouts, diffusers has its file.
    problems = compatibility_problems(config(["kohya", "diffusers"], "dora"), spec())
    assert "A DoRA in the diffusers layout is loaded by diffusers, not by ComfyUI" in problems[1]


def test_a_file_that_nothing_loads_is_called_that() -> None:
    only = spec(layouts=("diffusers",), readers={"diffusers": ("diffusers",)})
    (words,) = compatibility_problems(config(["diffusers"], "oft"), only)
    assert words.startswith("No program that lorasmith knows loads an OFT from the diffusers layout")
    assert words.endswith("Choose adapter.kind = lora.")


def test_an_encoder_without_names_in_a_layout_ends_the_run() -> None:
    trained = config(["comfyui"]).model_copy(update={"adapter": AdapterSettings(text_encoder=True)})
    real = families()["sd15"].SPEC
    with pytest.raises(ConfigError, match=r"no names for the text_encoder.*kohya or diffusers"):
        require_compatible(trained, dataclasses.replace(real, layouts=("kohya", "diffusers", "comfyui")))
    require_compatible(trained.model_copy(update={"export": ExportSettings(layouts=["kohya"])}), real)


def test_a_distilled_base_without_its_training_adapter_is_a_warning() -> None:
    details = {"training_adapter": "someone/adapter"}
    identity = BaseIdentity("imaginary", "Imaginary Turbo", "turbo", "velocity", 64, 1, "fp32", details=details)
    (words,) = compatibility_problems(config(["auto"], training_adapter="off"), spec(), identity)
    assert "Imaginary Turbo is distilled" in words
    assert "someone/adapter" in words
    assert compatibility_problems(config(["auto"]), spec(), identity) == []


@pytest.mark.parametrize("name", sorted(families()))
def test_every_layout_of_every_family_says_who_loads_it(name: str) -> None:
    own = families()[name].SPEC
    for layout in own.layouts:
        assert own.readers[layout]
        assert set(own.readers[layout]) <= set(PROGRAMS)
    for key in own.readers:
        layout, _, of_kind = key.partition("/")
        assert layout in own.layouts
        assert of_kind in ("", "dora", "loha", "lokr", "oft", "boft")
