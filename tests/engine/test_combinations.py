"""The table of combinations that cannot hold: each is told in one sentence with its fix, and the fix mends it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lorasmith.engine import combinations
from lorasmith.engine.combinations import ONE_RATE, SCHEDULE_FREE, base_contradictions
from lorasmith.engine.config import ObjectiveSettings, RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import BaseIdentity, families
from lorasmith.engine.objectives import DdpmObjective, FlowObjective
from lorasmith.engine.run_setup import find_base
from tests.engine.running import tiny_config

# What is wrong, which settings the sentence names, and what the sentence says to do about it.
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    *(({"optimizer.name": name}, "optimizer.learning_rate", {"optimizer.learning_rate": 1.0}) for name in ONE_RATE),
    *(
        ({"optimizer.name": "prodigy", "optimizer.learning_rate": 1.0, key: value}, key, {key: fix})
        for key, value, fix in (
            ("optimizer.lora_plus_ratio", 4.0, 1.0),
            ("optimizer.text_encoder_lora_plus_ratio", 4.0, 0.0),
            ("adapter.block_learning_rates", ["mid=0.5"], []),
        )
    ),
    *(
        ({"optimizer.name": "adamw_schedulefree", key: value}, key, {key: fix})
        for key, value, fix in (("schedule.name", "cosine", "constant"), ("train.ema_decay", 0.9, 0.0))
    ),
    *(
        (
            {"optimizer.fused_backward": True, "optimizer.max_grad_norm": 0.0, key: value},
            "optimizer.fused_backward",
            {key: fix},
        )
        for key, value, fix in (
            ("optimizer.name", "came", "lion"),
            ("train.gradient_accumulation", 2, 1),
            ("optimizer.max_grad_norm", 1.0, 0.0),
            ("train.precision", "fp16", "bf16"),
        )
    ),
    (
        {"optimizer.lora_plus_ratio": 4.0, "adapter.kind": "loha"},
        "optimizer.lora_plus_ratio",
        {"optimizer.lora_plus_ratio": 1.0},
    ),
    ({"adapter.lokr_factor": 4}, "adapter.lokr_factor", {"adapter.lokr_factor": 0}),
    ({"adapter.block_size": 8}, "adapter.block_size", {"adapter.kind": "oft"}),
    ({"adapter.init": "loftq"}, "adapter.init", {"memory.quantize": "nf4"}),
    ({"memory.quantized_matmul": True}, "memory.quantized_matmul", {"memory.quantize": "int8"}),
    (
        {"memory.quantized_matmul": True, "memory.quantize": "nf4"},
        "memory.quantized_matmul",
        {"memory.quantized_matmul": False},
    ),
    (
        {"objective.min_timestep": 500, "objective.max_timestep": 500},
        "objective.min_timestep",
        {"objective.max_timestep": 501},
    ),
    (
        {"objective.min_snr_gamma": 5.0, "objective.debiased": True},
        "objective.debiased",
        {"objective.min_snr_gamma": 0.0},
    ),
    ({"objective.p2_gamma": 1.0, "objective.debiased": True}, "objective.p2_gamma", {"objective.debiased": False}),
    (
        {"objective.zero_terminal_snr": True, "base.prediction": "epsilon"},
        "objective.zero_terminal_snr",
        {"base.prediction": "v_prediction"},
    ),
    (
        {"objective.noise_offset": 0.1, "objective.multires_iterations": 6},
        "objective.noise_offset",
        {"objective.noise_offset": 0.0},
    ),
    (
        {"objective.prior_weight": 0.0, "dataset.regularization_folder": "regular"},
        "objective.prior_weight",
        {"objective.prior_weight": 1.0},
    ),
    (
        {"objective.preserve": "class", "captions.trigger": "zqx"},
        "objective.preserve_class",
        {"objective.preserve_class": "woman"},
    ),
    (
        {"objective.preserve": "class", "objective.preserve_class": "woman"},
        "captions.trigger",
        {"captions.trigger": "zqx"},
    ),
    ({"objective.preserve_class": "woman"}, "objective.preserve_class", {"objective.preserve_class": ""}),
    (
        {"objective.preserve": "blank", "adapter.text_encoder": True},
        "adapter.text_encoder",
        {"adapter.text_encoder": False},
    ),
    ({"memory.checkpoint_share": 0.5}, "train.gradient_checkpointing", {"train.gradient_checkpointing": True}),
    ({"memory.offload_activations": True}, "train.gradient_checkpointing", {"memory.offload_activations": False}),
    (
        {"memory.lora_precision": "base", "adapter.kind": "oft"},
        "memory.lora_precision",
        {"memory.lora_precision": "fp32"},
    ),
    (
        {"memory.lora_precision": "base", "adapter.init": "pissa"},
        "memory.lora_precision",
        {"adapter.init": "default"},
    ),
]


def config(values: dict[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(("values", "named", "fix"), CASES)
def test_a_combination_is_refused_in_one_sentence_and_its_fix_mends_it(
    values: dict[str, Any], named: str, fix: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        config(values)
    [sentence] = str(caught.value.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()
    assert named in sentence
    assert len(sentence) < 200
    assert sentence.split()[0] in {
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name in getattr(field.annotation, "model_fields", {})
    }, "the wizard finds the page of a sentence by the setting that it begins with"
    config(values | fix)


def test_every_row_of_the_table_is_told_by_some_case() -> None:
    told = set()
    for values, _, _ in CASES:
        with pytest.raises(ValidationError) as caught:
            config(values)
        told.add(str(caught.value))
    own = [row for row in combinations._ROWS if not row.sentence.startswith(("run.", "dataset.", "captions.", "{}:"))]
    for row in own:
        tail = row.sentence.split("{}")[-1]
        assert any(tail in text for text in told) or "full rate" in tail, row.sentence


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_schedule_free_optimizer_may_have_a_warm_up(name: str) -> None:
    rate = 1.0 if name in ONE_RATE else 1e-3
    config({"optimizer.name": name, "optimizer.learning_rate": rate, "schedule.warmup_steps": 10})


def identity(prediction: Any) -> BaseIdentity:
    return BaseIdentity("sd15", "a model", "", prediction, 512, 0, "fp16")


SD = families()["sd15"].SPEC
FLOW = dataclasses.replace(SD, label="A flow model", objective="flow", trainable_text_encoders=())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"objective.min_snr_gamma": 5.0}, "objective.min_snr_gamma"),
        ({"objective.zero_terminal_snr": True}, "objective.zero_terminal_snr"),
        ({"objective.multires_iterations": 6}, "objective.multires_iterations"),
        ({"base.prediction": "v_prediction"}, "base.prediction"),
        ({"adapter.text_encoder": True}, "adapter.text_encoder"),
    ],
)
def test_what_a_flow_model_has_no_use_for_is_told_with_its_name(values: dict[str, Any], named: str) -> None:
    [problem] = base_contradictions(config(values), FLOW, identity("velocity"))
    assert problem.startswith(named)
    assert FLOW.label in problem


def test_what_other_models_have_no_use_for_is_told_too() -> None:
    found = base_contradictions(config({"objective.timestep_sampling": "sigmoid"}), SD, identity("epsilon"))
    assert len(found) == 1
    assert "timestep_sampling" in found[0]
    assert "set it to auto" in found[0]
    wanted = config({"objective.zero_terminal_snr": True})
    assert "epsilon" in base_contradictions(wanted, SD, identity("epsilon"))[0]
    assert not base_contradictions(wanted, SD, identity("v_prediction"))


@pytest.mark.parametrize(("spec", "prediction"), [(SD, "epsilon"), (FLOW, "velocity")])
def test_the_defaults_suit_every_base_model(spec: Any, prediction: str) -> None:
    assert not base_contradictions(RunConfig(), spec, identity(prediction))


class Reading:
    """Objective settings that remember what was asked of them."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(ObjectiveSettings(), name)


def test_only_settings_that_an_objective_never_reads_are_refused_for_it() -> None:
    flow, ddpm = Reading(), Reading()
    latents, one = torch.zeros(1, 4, 8, 8), torch.ones(1)
    for objective in (
        FlowObjective(FLOW, {}, "velocity", flow, 1),  # type: ignore[arg-type]
        DdpmObjective({}, "epsilon", ddpm, 1, torch.device("cpu")),  # type: ignore[arg-type]
    ):
        batch = objective.prepare(latents, one, 0, 0)
        objective.loss(torch.zeros_like(latents), batch)
    assert "min_timestep" in flow.read & ddpm.read
    assert not flow.read & set(combinations._ONLY["ddpm"])
    assert not ddpm.read & set(combinations._ONLY["flow"])


def test_a_run_ends_before_the_base_is_loaded_where_settings_do_not_suit_it(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, objective={"timestep_sampling": "sigmoid"})
    with pytest.raises(ConfigError, match=r"objective\.timestep_sampling has no meaning"):
        find_base(config, lambda event: None)
