"""The memory tables of the presets: what they say fits the specs, and deriving them anew gives them again."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.advisor import read_preset
from lorasmith.engine.block_checkpointing import checkpoint_blocks
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.memory import ModelMemory, find_memory, model_memories
from lorasmith.engine.memory.constants import Law, StepLaws, parse_memory
from lorasmith.engine.simulation import derive, references
from lorasmith.engine.simulation.measured_parts import blocks_of, sizes_of
from lorasmith.engine.simulation.measured_steps import POINTS, RANK, StepCounter, run_config
from lorasmith.engine.simulation.shallow import whole_kernels

# qwen_image: one group of equal blocks, so that a few copies tell of 60 of them.
QUICKEST = ("qwen_image", "qwen-image", "diffusers")
ALL = [(family, memory.name) for family in families() for memory in model_memories(family)]
KNOWN_ENCODERS = {
    # Numbers of weights in millions, of what is read: without heads that predict words and layers behind the last.
    ("sdxl", "base", "text_encoder"): 123,
    ("sdxl", "base", "text_encoder_2"): 695,
    ("flux1", "dev", "text_encoder_2"): 4762,
    ("qwen_image", "qwen-image", "text_encoder"): 7071,
    ("lumina2", "lumina2", "text_encoder"): 2536,
    ("anima", "anima", "text_encoder"): 596,
}


def memory_of(family: str, name: str) -> ModelMemory:
    return next(memory for memory in model_memories(family) if memory.name == name)


def close(law: Law, other: Law, megapixels: float = 1.0) -> bool:
    return other.mib(1, megapixels) == pytest.approx(law.mib(1, megapixels), rel=0.005, abs=0.01)


def test_every_family_has_the_model_that_its_spec_is_about() -> None:
    for family, module in families().items():
        memory = find_memory(family, module.SPEC.denoiser_parameters)
        assert memory is not None, family
        assert memory.parameters == module.SPEC.denoiser_parameters
        assert find_memory(family, module.SPEC.denoiser_parameters * 10) is None


@pytest.mark.parametrize(("family", "name"), ALL)
def test_a_table_is_whole(family: str, name: str) -> None:
    memory, spec = memory_of(family, name), families()[family].SPEC
    assert set(memory.steps) == set(spec.targets)
    assert set(memory.text) == set(spec.text_parts)
    assert {group.name for group in memory.blocks} <= set(spec.block_classes)
    in_blocks = sum(group.count * (group.packed + group.plain) for group in memory.blocks)
    assert memory.parameters / 2 < in_blocks < memory.parameters
    assert memory.hub in spec.hub_ids or family == "flux2"
    assert memory.denoiser.layer * 2 < memory.denoiser.packed
    assert memory.autoencoder.packed == 0
    assert memory.autoencoder.decode.mib(1, 1.0) > memory.draw.mib(1, 0.0)
    # A picture's forward pass takes at least two operations a weight for each token.
    assert sum(memory.tflop) > 0


@pytest.mark.parametrize(("family", "name"), ALL)
def test_more_checkpointing_and_fewer_bits_take_less(family: str, name: str) -> None:
    memory = memory_of(family, name)
    assert memory.kernels[0] < memory.kernels[1] < 2 * memory.kernels[0]
    for step in memory.steps.values():
        assert step.per_rank > 0
        for laws in (step.fp32, step.base):
            for megapixels in (0.25, 1.0, 2.0):
                none, half, full = (law.mib(1, megapixels) for law in (laws.none, laws.half, laws.all))
                assert none > half > full > 0
                assert laws.none.mib(4, megapixels) > 3.5 * none
            assert laws.rank_none.mib(1, 1.0) > laws.rank_all.mib(1, 1.0) >= 0
        assert step.base.none.mib(1, 1.0) < step.fp32.none.mib(1, 1.0)
    wider = [memory.steps[targets].fp32.none.mib(1, 1.0) for targets in ("attention", "attention-mlp")]
    assert wider[0] <= wider[1]
    # The blocks' inputs are what full checkpointing keeps, so that they cannot take more than its peak.
    assert 0 < memory.inputs.mib(1, 1.0) < memory.steps["attention"].base.all.mib(1, 1.0)


def test_text_encoders_have_their_known_sizes() -> None:
    for (family, name, part), millions in KNOWN_ENCODERS.items():
        encoder = memory_of(family, name).text[part]
        assert round((encoder.packed + encoder.plain) / 1e6) == millions


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*model, marks=() if model[0] in ("chroma", "anima") else pytest.mark.campaign) for model in ALL],
)
def test_the_configurations_give_the_sizes(family: str, name: str) -> None:
    skeleton = references.load_reference(family, references.reference_files(family, name))
    memory = memory_of(family, name)
    assert skeleton.identity.parameters == memory.parameters
    assert sizes_of(skeleton.denoiser).packed == memory.denoiser.packed
    assert blocks_of(skeleton) == memory.blocks
    for part, encoder in skeleton.text_encoders.items():
        sizes = sizes_of(encoder)
        assert (sizes.packed, sizes.plain) == (memory.text[part].packed, memory.text[part].plain)
    with pytest.raises(ConfigError, match="has no model nothing"):
        references.reference_files(family, "nothing")


def test_deriving_anew_gives_the_table() -> None:
    family, name, targets = QUICKEST
    counter = StepCounter(references.load_reference(family, references.reference_files(family, name)), 256)
    memory = memory_of(family, name)
    laws: StepLaws = counter.step_laws(targets, "fp32")
    known = memory.steps[targets].fp32
    for megapixels in (0.25, 1.0, 4.0):
        assert close(known.none, laws.none, megapixels)
        assert close(known.half, laws.half, megapixels)
        assert close(known.all, laws.all, megapixels)
        assert close(known.rank_none, laws.rank_none, megapixels)
    assert sum(counter.layers(targets).values()) == memory.steps[targets].per_rank


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("family", "name"), ALL)
def test_deriving_a_whole_table_anew_gives_it(family: str, name: str) -> None:
    table = read_preset(family)["memory"][name]
    again = parse_memory(family, name, derive.derive_model(family, name, table))
    known = memory_of(family, name)
    assert (again.denoiser, again.blocks) == (known.denoiser, known.blocks)
    assert again.tflop == pytest.approx(known.tflop, rel=0.005, abs=0.001)
    for targets, step in known.steps.items():
        for kind in ("none", "half", "all"):
            assert close(getattr(step.fp32, kind), getattr(again.steps[targets].fp32, kind))
            assert close(getattr(step.base, kind), getattr(again.steps[targets].base, kind))


def small_klein() -> Any:
    """FLUX.2 klein 4B with fewer blocks: two groups of equal blocks."""
    table = read_preset("flux2")["memory"]["klein-4b"]
    changed = {**table["configs"]["transformer"], "num_layers": 3, "num_single_layers": 5}
    return references.from_table("small", {**table, "configs": {**table["configs"], "transformer": changed}})


def test_shallow_copies_tell_what_the_whole_model_takes() -> None:
    whole = references.load_reference("flux2", small_klein())
    counter, point = StepCounter(whole, 256), POINTS[0]
    assert [len(group.paths) for group in counter.groups] == [3, 5]
    told = counter.peaks("attention", "fp32", RANK, (point,))[point]
    counted = [counter.whole_steps("attention", "fp32", RANK, share, [point])[point] for share in (0.0, 0.5, 1.0)]
    assert told == pytest.approx([peak.peak_mib for peak in counted], rel=0.005)
    kernels = whole_kernels(counter.group_steps("attention", "fp32", RANK, [point])[point])
    assert kernels == pytest.approx((counted[0].kernels, counted[2].kernels), rel=0.01)
    # And the model is as it was.
    assert len(list(whole.denoiser.parameters())) == len(
        [n for n, _ in whole.denoiser.named_parameters() if "lora" not in n]
    )
    assert checkpoint_blocks(whole, 0.0).total == 8


def test_writing_keeps_what_stands_above_to_the_byte_and_is_stable(tmp_path: Path) -> None:
    above = '# A comment\n[defaults]\n"train.steps" = { value = 3, why = "ü" }  # kept\n\n[goal.style]\n'
    path = tmp_path / "some.toml"
    path.write_text(above, encoding="utf-8")
    model = read_preset("sd15")["memory"]["v1"]
    derive.write_preset(path, {"v1": model})
    text = path.read_text(encoding="utf-8")
    assert text.startswith(above)
    assert derive.COMMAND in text
    assert tomllib.loads(text)["memory"]["v1"] == model
    assert parse_memory("sd15", "v1", tomllib.loads(text)["memory"]["v1"]) == memory_of("sd15", "v1")
    derive.write_preset(path, {"v1": model})
    assert path.read_text(encoding="utf-8") == text
    assert run_config("attention").adapter.rank == RANK
