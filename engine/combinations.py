"""Which settings cannot hold together: a table, each row one sentence and one fix. Torch-free.

A row is for what surely goes wrong or has no effect at all; what is only unwise is the preset's and the advisor's. A
setting without effect counts only where somebody must have meant something by it, not where a preset may have set it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasmith.engine.adapter_combinations import adapter_contradictions

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import BaseIdentity, FamilySpec

ONE_RATE = ("prodigy", "prodigy_schedulefree", "dadaptation")
"""Optimizers that find one learning rate for all weights, as a distance from where they began."""
SCHEDULE_FREE = ("adamw_schedulefree", "prodigy_schedulefree")
"""Optimizers that average the weights instead of lowering the learning rate."""
FUSABLE = ("adamw", "adamw8bit", "adafactor", "lion")
"""Optimizers whose step over one weight needs nothing of the others."""
WITH_UP = ("lora", "locon", "dora")
"""Adapter kinds that are a product of a down and an up matrix."""
_WEIGHTINGS = ("min_snr_gamma", "debiased", "p2_gamma")

_ONLY: dict[str, tuple[str, ...]] = {
    "ddpm": (*_WEIGHTINGS, "zero_terminal_snr", "noise_offset", "multires_iterations"),
    "flow": ("timestep_sampling", "shift"),
}
"""The objective settings that make base models of the other kind fail or that they do not read; what only refines one
of them, such as `logit_mean`, is not in the list."""


class Row(NamedTuple):
    """A combination that cannot hold: when it is there, and the sentence, in which `{}` is what `found` returned."""

    found: Callable[[Any], Any]
    sentence: str


def contradictions(config: RunConfig) -> list[str]:
    """Return one sentence, with its fix, for each combination of settings that cannot hold."""
    found = [row.sentence.format(words) for row in _ROWS if (words := row.found(config))]
    return found + adapter_contradictions(config.adapter)


def base_contradictions(config: RunConfig, spec: FamilySpec, identity: BaseIdentity) -> list[str]:
    """Return one sentence, with its fix, for each setting that cannot hold with this base model."""
    problems = [sentence for _, _, sentence in without_meaning(config, spec)]
    if config.adapter.targets not in spec.targets:
        problems.append(
            f"adapter.targets = {config.adapter.targets}: {spec.label} has no such set of layers; "
            f"it has {', '.join(spec.targets)}"
        )
    if spec.objective == "flow" and config.base.prediction != "auto":
        problems.append(f"base.prediction must be auto: {spec.label} is a flow model and predicts neither")
    if config.objective.zero_terminal_snr and config.base.prediction == "auto" and identity.prediction == "epsilon":
        problems.append(
            "objective.zero_terminal_snr needs a base model that predicts velocity, and this one predicts noise "
            "(epsilon): set it to false; objective.noise_offset = 0.05 is for dark and bright pictures"
        )
    if config.adapter.text_encoder and not spec.trainable_text_encoders:
        problems.append(f"adapter.text_encoder must be false: nobody trains the text encoder of {spec.label}")
    return problems


def without_meaning(config: RunConfig, spec: FamilySpec) -> list[tuple[str, Any, str]]:
    """Return (key, value that leaves it off, sentence) of each objective setting that is for the other kind of base."""
    found: list[tuple[str, Any, str]] = []
    objective, other = config.objective, "flow" if spec.objective == "ddpm" else "ddpm"
    for name in _ONLY[other]:
        usual = type(objective).model_fields[name].default
        if getattr(objective, name) != usual:
            words = f"objective.{name} has no meaning for {spec.label}, {_KINDS[spec.objective]}"
            found.append((f"objective.{name}", usual, f"{words}: set it to {_word(usual)}"))
    return found


_KINDS = {"ddpm": "which removes noise in steps (DDPM)", "flow": "a flow model"}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _one_rate(config: RunConfig) -> str:
    return config.optimizer.name if config.optimizer.name in ONE_RATE else ""


def _schedule_free(config: RunConfig) -> str:
    return config.optimizer.name if config.optimizer.name in SCHEDULE_FREE else ""


def _without_up(config: RunConfig) -> str:
    return "" if config.adapter.kind in WITH_UP else config.adapter.kind


def _other_kind(config: RunConfig, *kinds: str) -> str:
    return "" if config.adapter.kind in kinds else config.adapter.kind


def _both_weightings(config: RunConfig) -> str:
    names = [name for name in _WEIGHTINGS if getattr(config.objective, name)]
    return " and ".join(f"objective.{name}" for name in names) if len(names) > 1 else ""


def _wrong_dataset_weights(config: RunConfig) -> str:
    weights, folders = len(config.dataset.weights), 1 + len(config.dataset.more_folders)
    return f"{weights} numbers for {folders} datasets" if weights not in (0, folders) else ""


def _late_start(config: RunConfig) -> str:
    start, steps = config.schedule.start_step, config.train.steps
    return f"schedule.start_step ({start}) must be smaller than train.steps ({steps})" if start >= steps else ""


def _long_warmup(config: RunConfig) -> str:
    start, warmup, steps = config.schedule.start_step, config.schedule.warmup_steps, config.train.steps
    if start >= steps or warmup < steps - start:
        return ""
    if not start:
        return "schedule.warmup_steps must be smaller than train.steps"
    return f"schedule.warmup_steps ({warmup}) must be smaller than the {steps - start} steps after schedule.start_step"


def _unpacked_loftq(config: RunConfig) -> bool:
    return config.adapter.init == "loftq" and config.memory.quantize == "none"


def _matmul_without_8_bits(config: RunConfig) -> str:
    if not config.memory.quantized_matmul:
        return ""
    formats = (config.memory.quantize, config.memory.quantize_text_encoders)
    return "" if set(formats) & {"fp8", "int8"} else config.memory.quantize


def _is_file_name(name: str) -> bool:
    return name.strip() not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")


_ROWS: tuple[Row, ...] = (
    # Optimizers that find their own rate
    Row(
        lambda c: c.optimizer.learning_rate != 1.0 and _one_rate(c),
        "optimizer.learning_rate must be 1.0 with optimizer.name = {}, which finds the rate itself",
    ),
    Row(
        lambda c: c.optimizer.lora_plus_ratio != 1.0 and _one_rate(c),
        "optimizer.lora_plus_ratio must be 1.0 with {}, which needs one rate for all weights",
    ),
    Row(
        lambda c: c.optimizer.text_encoder_lora_plus_ratio not in (0.0, 1.0) and _one_rate(c),
        "optimizer.text_encoder_lora_plus_ratio must be 0 with {}, which needs one rate for all weights",
    ),
    Row(
        lambda c: c.adapter.block_learning_rates and _one_rate(c),
        "adapter.block_learning_rates must be empty with {}, which needs one rate for all weights",
    ),
    # Schedule-free optimizers
    Row(
        lambda c: c.schedule.name != "constant" and _schedule_free(c),
        "schedule.name must be constant with {}, which averages instead of lowering the rate; a warm-up may stay",
    ),
    Row(
        lambda c: c.train.ema_decay and _schedule_free(c),
        "train.ema_decay must be 0 with {}, which averages the weights itself",
    ),
    # Fused backward
    Row(
        lambda c: c.optimizer.fused_backward and c.optimizer.name not in FUSABLE and c.optimizer.name,
        "optimizer.fused_backward works with adamw, adamw8bit, adafactor and lion, not with {}: switch it off",
    ),
    Row(
        lambda c: c.optimizer.fused_backward and c.train.gradient_accumulation > 1,
        "optimizer.fused_backward needs train.gradient_accumulation = 1: added-up gradients cannot be freed early",
    ),
    Row(
        lambda c: c.optimizer.fused_backward and c.optimizer.max_grad_norm,
        "optimizer.fused_backward needs optimizer.max_grad_norm = 0: no step sees all gradients at once",
    ),
    Row(
        lambda c: c.optimizer.fused_backward and c.train.precision == "fp16",
        "optimizer.fused_backward cannot be used with train.precision = fp16: choose bf16 or fp32",
    ),
    # What the adapter's kind does not read
    Row(
        lambda c: c.optimizer.lora_plus_ratio != 1.0 and _without_up(c),
        "optimizer.lora_plus_ratio must be 1.0 with adapter.kind = {}, which has no up matrices",
    ),
    Row(
        lambda c: (c.adapter.lokr_factor or c.adapter.lokr_full) and _other_kind(c, "lokr"),
        "adapter.lokr_factor and adapter.lokr_full are read by adapter.kind = lokr alone: set them to 0 and false",
    ),
    Row(
        lambda c: c.adapter.block_size != 32 and _other_kind(c, "oft", "boft"),
        "adapter.block_size is read by oft and boft alone, not by adapter.kind = {}: set it to 32",
    ),
    # What the base is kept in
    Row(
        _unpacked_loftq,
        "adapter.init = loftq makes good what a quantized base model lost, and this one is not quantized: set "
        "memory.quantize, or adapter.init to default or pissa",
    ),
    Row(
        _matmul_without_8_bits,
        "memory.quantized_matmul has no effect with memory.quantize = {}: set it to false, or memory.quantize to int8 "
        "or fp8",
    ),
    # What is learnt
    Row(
        lambda c: c.objective.min_timestep >= c.objective.max_timestep,
        "objective.min_timestep must be smaller than objective.max_timestep, or no noise level is trained",
    ),
    Row(
        _both_weightings,
        "{} both weigh the noise levels: keep one, and set the other to 0 or false",
    ),
    Row(
        lambda c: c.objective.zero_terminal_snr and c.base.prediction == "epsilon",
        "objective.zero_terminal_snr cannot be used with base.prediction = epsilon, which learns nothing from pure "
        "noise: set it to false, or use a v-prediction model",
    ),
    Row(
        lambda c: c.objective.noise_offset and c.objective.multires_iterations,
        "objective.noise_offset and objective.multires_iterations teach the same, dark and bright pictures: set one "
        "to 0",
    ),
    Row(
        lambda c: c.dataset.regularization_folder and not c.objective.prior_weight,
        "objective.prior_weight = 0 leaves dataset.regularization_folder without effect: raise it, or empty the folder",
    ),
    # Preservation
    Row(
        lambda c: c.objective.preserve == "class" and not c.objective.preserve_class.strip(),
        "objective.preserve = class needs objective.preserve_class, what the trigger is one of, such as woman",
    ),
    Row(
        lambda c: c.objective.preserve == "class" and not c.captions.trigger.strip(),
        "objective.preserve = class needs captions.trigger, the word that the class takes the place of",
    ),
    Row(
        lambda c: c.objective.preserve_class.strip() and c.objective.preserve != "class",
        "objective.preserve_class is read with objective.preserve = class alone: set that, or empty it",
    ),
    Row(
        lambda c: c.objective.preserve != "off" and c.adapter.text_encoder,
        "objective.preserve cannot be used with adapter.text_encoder: what is kept would move with the encoder",
    ),
    # Memory
    Row(
        lambda c: c.memory.checkpoint_share < 1.0 and not c.train.gradient_checkpointing,
        "memory.checkpoint_share is read with train.gradient_checkpointing alone: switch that on, or set it to 1",
    ),
    Row(
        lambda c: c.memory.offload_activations and not c.train.gradient_checkpointing,
        "memory.offload_activations needs train.gradient_checkpointing, whose inputs it moves: switch that on, or this "
        "off",
    ),
    Row(
        lambda c: c.memory.lora_precision == "base" and _other_kind(c, "lora", "locon", "dora", "loha", "lokr"),
        "memory.lora_precision must be fp32 with adapter.kind = {}, which loses its rotations in 16 bits",
    ),
    Row(
        lambda c: c.memory.lora_precision == "base" and c.adapter.init in ("pissa", "olora") and c.adapter.init,
        "memory.lora_precision must be fp32 with adapter.init = {}, whose small first steps are lost in 16 bits",
    ),
    # The run itself
    Row(
        lambda c: not _is_file_name(c.run.name),
        "run.name must be usable as a file name: no slashes or control characters, not blank, no . or ..",
    ),
    Row(_wrong_dataset_weights, "dataset.weights has {}; give one for each, dataset.folder first"),
    Row(_late_start, "{}: the schedule never begins"),
    Row(_long_warmup, "{}, or the full rate is never reached"),
    Row(
        lambda c: c.captions.trigger and not c.captions.trigger.strip(),
        "captions.trigger is blank; give a word such as zqx, or remove the setting",
    ),
    Row(
        lambda c: "," in c.captions.trigger,
        "captions.trigger must not contain a comma, since commas separate tags",
    ),
)
