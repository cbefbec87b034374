"""The whole run as typed, bounded, documented settings: the one place where a setting is declared.

A field's type, bounds, default and `description` are what the wizard's form, `--set key=value`, the commented TOML
file and the error messages are made of. Strict: "False" is not a boolean and 3.0 is not a whole number.
Values come in layers (defaults < preset < tier < goal < run file < --set or form); `engine.run_file` reads, merges and
writes them and knows every value's origin.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from lorasmith.engine.combinations import contradictions as contradictions
from lorasmith.engine.config_adapter import AdapterSettings as AdapterSettings
from lorasmith.engine.config_data import BaseSettings as BaseSettings
from lorasmith.engine.config_data import CaptionSettings as CaptionSettings
from lorasmith.engine.config_data import DatasetSettings as DatasetSettings
from lorasmith.engine.config_data import Probability as Probability
from lorasmith.engine.config_data import RunSettings as RunSettings
from lorasmith.engine.config_data import Section as Section
from lorasmith.engine.config_memory import MemorySettings as MemorySettings
from lorasmith.engine.config_training import ObjectiveSettings as ObjectiveSettings
from lorasmith.engine.config_training import OptimizerSettings as OptimizerSettings
from lorasmith.engine.config_training import ScheduleSettings as ScheduleSettings
from lorasmith.engine.config_training import TrainSettings as TrainSettings
from lorasmith.engine.config_training import ValidationSettings as ValidationSettings

CONFIG_VERSION: Final = 1


class CheckpointSettings(Section):
    """Saves from which a run resumes exactly."""

    every: Annotated[int, Field(ge=0, le=1_000_000)] = 250
    """Steps between checkpoints; 0: only at the end or on request."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many of the newest checkpoints stay."""


class PreviewSettings(Section):
    """Pictures drawn during training."""

    every: Annotated[int, Field(ge=0, le=1_000_000)] = 250
    """Steps between previews; 0: none. Always after a checkpoint was saved."""
    prompts: list[Annotated[str, Field(max_length=2000)]] = []
    """What to draw; `[trigger]` stands for the trigger word. Empty: the trigger with the first caption, and that
    caption without it."""
    negative_prompt: str = ""
    """What not to draw."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=64)] = [1]
    """Each prompt is drawn once for each seed; the same seeds each time make pictures comparable."""
    steps: Annotated[int, Field(ge=0, le=200)] = 0
    """Denoising steps of each picture; 0: as the base model is made for."""
    guidance: Annotated[float, Field(ge=0.0, le=30.0)] = 0.0
    """How strictly the prompt is followed (classifier-free guidance, or the base's own); 1: off, 0: as the base model
    is made for."""
    side: Annotated[int, Field(ge=0, le=2048, multiple_of=8)] = 0
    """Side of the square pictures in pixels; 0: the training resolution."""


class ExportSettings(Section):
    """The shareable file."""

    layouts: Annotated[list[Literal["auto", "kohya", "diffusers", "comfyui"]], Field(min_length=1)] = ["auto"]
    """Key layouts of the file, one file each; `auto`: the one that most programs load for this base model."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the file."""


class RunConfig(Section):
    """One training run."""

    version: Literal[1] = CONFIG_VERSION
    """Version of this file's format."""
    run: RunSettings = RunSettings()
    base: BaseSettings = BaseSettings()
    dataset: DatasetSettings = DatasetSettings()
    captions: CaptionSettings = CaptionSettings()
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    memory: MemorySettings = MemorySettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    previews: PreviewSettings = PreviewSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self
