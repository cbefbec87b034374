"""The fit solver's question about a real run on this machine: the run as a subject, and the room that there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine import hardware
from lorasmith.engine.doctor import fast_products, remembered_checks, unusable_choices
from lorasmith.engine.errors import BaseModelError, HardwareError
from lorasmith.engine.families import families, identify_base
from lorasmith.engine.fit import Room
from lorasmith.engine.memory import ModelMemory, adapted_layers, model_memories, num_parameters, of_run
from lorasmith.engine.memory.calibration import card_key, read
from lorasmith.engine.memory.forecast import Subject
from lorasmith.engine.memory.of_run import USUAL_PICTURES, Known
from lorasmith.engine.sources import locate_here
from lorasmith.engine.step_time import card_speed

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import FamilySpec
    from lorasmith.engine.hardware import HardwareSnapshot
    from lorasmith.engine.nvml import Gpu


def subject_of(config: RunConfig, number_of_pictures: int = USUAL_PICTURES) -> Subject:
    """Return a run as what is forecast; its base model is recognized by its files, or else by its name on the Hub.

    Raises BaseModelError where it is not known, or its memory was not derived.
    """
    side = max([config.dataset.resolution, *config.dataset.more_resolutions])
    files = locate_here(config.base)
    if files is None:
        spec, model = _by_name(config.base.model.strip())
        return Subject(config, spec, model, side**2 / 1e6, number_of_pictures=number_of_pictures)
    module, identity = identify_base(files, config.base.family)
    layers = adapted_layers(config.adapter, module.SPEC, files)
    numbers = None if layers is None else num_parameters(layers, config.adapter)
    known = Known(module.SPEC, files, side**2, numbers, number_of_pictures)
    subject, reason = of_run.subject_of(config, known)
    if subject is None:
        raise BaseModelError(f"The memory of a run on {identity.label} is not known.", why=reason)
    return subject


def room_here(config: RunConfig, family: str) -> Room:
    """Return what is free here for a run of `family`; raises HardwareError without an NVIDIA card."""
    output = Path(config.run.output_folder).expanduser()
    here = hardware.snapshot([output])
    gpu = hardware.gpu_for(here.gpus, config.train.device)
    room = None if gpu is None else room_of(here, gpu, family)
    if room is None:
        raise HardwareError(
            "There is no card whose memory can be read.",
            why=here.note or f"train.device is {config.train.device}, or CUDA_VISIBLE_DEVICES hides the cards.",
            fix="`lorasmith plan --all` tells what fits on which card.",
        )
    return room


def room_of(
    here: HardwareSnapshot, gpu: Gpu, family: str, unusable: frozenset[tuple[str, Any]] | None = None
) -> Room | None:
    """Return what is free on a machine for a run of `family` on `gpu`, its first disk's space; None: not readable.

    `unusable` are choices that do not work here; None: as the doctor remembers them.
    """
    if gpu.free_gib is None:
        return None
    measured = read(card_key(gpu, family))
    disk = here.disks[0].free_gib if here.disks and here.disks[0].free_gib is not None else 0.0
    checks = remembered_checks(here)
    return Room(
        vram_gib=gpu.free_gib,
        ram_gib=here.memory.available_gib,
        disk_gib=disk,
        card=card_speed(gpu.name, gpu.compute_capability),
        memory_calibration=measured.memory,
        seconds_calibration=measured.seconds,
        unusable=frozenset(unusable_choices(checks)) if unusable is None else unusable,
        fast_products=fast_products(checks),
    )


def _by_name(name: str) -> tuple[FamilySpec, ModelMemory]:
    for module in families().values():
        models = model_memories(module.SPEC.name)
        for model in models:
            if model.hub == name or (name in module.SPEC.hub_ids and len(models) == 1):
                return module.SPEC, model
    raise BaseModelError(
        f"The memory of {name or 'no base model'} is not known.",
        why="It is not on this machine yet, and none of those whose memory was derived.",
        fix="Fetch the base model first, or try `lorasmith plan --all` for the usual ones.",
    )
