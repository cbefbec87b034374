"""A step of a model or an adapter that no preset has, simulated once on this machine and kept."""

from __future__ import annotations

import sys

import torch

from lorasmith.engine.compute import DTYPES
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import BaseIdentity, FamilyModule, identify_base
from lorasmith.engine.families._loading import skeletons
from lorasmith.engine.memory.constants import StepMemory, find_memory
from lorasmith.engine.memory.of_run import Known, stored_weights, subject_of
from lorasmith.engine.memory.simulated import (
    cached_model_memory,
    cached_step_memory,
    model_key,
    step_key,
    store_model_memory,
    store_step_memory,
)
from lorasmith.engine.simulation.derive import derive_loaded
from lorasmith.engine.simulation.measured_steps import StepCounter
from lorasmith.engine.simulation.step import PROMPT_TOKENS
from lorasmith.engine.sources import BaseFiles, locate_configured


def simulated_step_memory(
    module: FamilyModule, files: BaseFiles, identity: BaseIdentity, settings: RunConfig
) -> StepMemory:
    """Return the memory of a step with these settings, from the cache or counted now, which takes up to some minutes.

    The weights are not read. Raises ConfigError where the text encoder is trained, whose steps are not simulated.
    """
    if settings.adapter.text_encoder:
        raise ConfigError(
            "A step that trains the text encoder cannot be simulated.",
            why="Its prompts are encoded in each step, which takes the weights.",
            fix="Set adapter.text_encoder to false, or measure with `lorasmith plan --measure`.",
        )
    key = step_key(module.SPEC.name, files, settings)
    found = cached_step_memory(key)
    if found is None:
        # What auto becomes on a card: 16 bits, which both take the same memory.
        dtype = DTYPES.get(settings.train.precision, torch.bfloat16)
        with skeletons():
            family = module.load(files, identity, torch.device("meta"), dtype)
        counter = StepCounter(family, min(PROMPT_TOKENS, module.SPEC.token_limit), settings)
        found = counter.step_memory(settings.adapter.targets)
        store_step_memory(key, found)
    return found


def count_model(module: FamilyModule, files: BaseFiles, identity: BaseIdentity, settings: RunConfig) -> None:
    """Count what is not known of a run's memory: its model where no preset has it, and its step; both are kept."""
    if find_memory(identity.family, stored_weights(files).numbers) is None:
        key = model_key(identity.family, files)
        if cached_model_memory(identity.family, key) is None:
            with skeletons():
                family = module.load(files, identity, torch.device("meta"), torch.bfloat16)
            named = {"label": identity.label, "hub": ""}
            store_model_memory(key, {**named, **derive_loaded(family, (settings.adapter.targets,))})
    known = Known(module.SPEC, files, settings.dataset.resolution**2)
    if subject_of(settings, known)[0] is None:
        simulated_step_memory(module, files, identity, settings)


def main() -> None:
    """Count the memory of the run whose settings come in as JSON, for a process that must not be held up by it."""
    config = RunConfig.model_validate_json(sys.stdin.read())
    files = locate_configured(config.base)
    module, identity = identify_base(files, config.base.family)
    count_model(module, files, identity, config)


if __name__ == "__main__":
    main()
