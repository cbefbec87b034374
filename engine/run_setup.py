"""What a run needs before its first step: the base model, the dataset, and what is encoded once.

Each function is one stage of `engine.trainer.train`; none of them knows the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.block_swap import swap_blocks
from lorasmith.engine.checkpoints import Checkpoint, remove_unfinished
from lorasmith.engine.combinations import base_contradictions
from lorasmith.engine.compatibility import compatibility_problems, require_compatible
from lorasmith.engine.compute import Compute, package_versions
from lorasmith.engine.config import CaptionSettings, MemorySettings, RunConfig
from lorasmith.engine.controls import Host, RunPaths
from lorasmith.engine.dataset.buckets import BucketPlan, plan_buckets
from lorasmith.engine.dataset.captions import full_prompt
from lorasmith.engine.dataset.items import Dataset
from lorasmith.engine.dataset.loader import Loader
from lorasmith.engine.dataset.scan import require_captions, scan_dataset
from lorasmith.engine.disk_plan import DiskPlan, existing_checkpoints, plan_disk, require_room
from lorasmith.engine.encoding import Encoder, report_progress
from lorasmith.engine.end_notice import missing_program
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.event_words import some_names
from lorasmith.engine.events import DatasetReady, Event, Logged, RunStarted, StageChanged
from lorasmith.engine.export import require_exportable
from lorasmith.engine.families import BaseIdentity, Conditioning, Family, FamilyModule, Placement, identify_base
from lorasmith.engine.foot_guns import tell_foot_guns
from lorasmith.engine.holdout import HeldOut, plan_held_out, require_pictures, split
from lorasmith.engine.learner import Learner, build_learner
from lorasmith.engine.lora_files import start_adapter
from lorasmith.engine.memory import unfound_patterns, weights_bytes
from lorasmith.engine.memory.blocks import block_problems
from lorasmith.engine.out_of_memory import FREE_CACHE, Rung, Rungs
from lorasmith.engine.previews import preview_prompts
from lorasmith.engine.resume import is_extended
from lorasmith.engine.sources import BaseFiles, hub_file, is_hub_id, locate_configured
from lorasmith.engine.storage import free_bytes, readable_size, require_writable
from lorasmith.engine.training_adapter import TrainingAdapter, attach_training_adapter, resolve_training_adapter

LEFTOVERS = (".*.tmp", ".proving-*.safetensors", ".write-test-*")
"""Names that files have while they are being written or tried; see `storage` and `export`."""


@dataclass(frozen=True)
class FoundBase:
    """A located and recognised base model, of which nothing but headers was read."""

    files: BaseFiles
    module: FamilyModule
    identity: BaseIdentity
    training_adapter: Path | None = None
    """The LoRA that is active while training only."""


@dataclass(frozen=True)
class Material:
    """The dataset as planned, and the captions of its pictures."""

    dataset: Dataset
    plan: BucketPlan
    prompts: list[str]
    """Preview prompts."""
    held_out: HeldOut = field(default_factory=HeldOut)
    """The pictures to validate on, which `dataset` and `plan` are without."""


def announce(
    run: RunPaths, config: RunConfig, host: Host, compute: Compute, checkpoint: Checkpoint | None, warnings: list[str]
) -> None:
    """Emit RunStarted and what was found about the checkpoints."""
    resumed_from = checkpoint.step if checkpoint else 0
    host.emit(
        RunStarted(
            run=run.path.name,
            total_steps=config.train.steps,
            resumed_from=resumed_from,
            config=config.model_dump(mode="json"),
            versions=package_versions(),
            device=compute.label,
        )
    )
    for warning in warnings:
        host.emit(Logged(severity="warning", message=warning))
    if program := missing_program(config.run.on_finish):
        host.emit(Logged(severity="warning", message=f"run.on_finish: there is no program {program} here."))
    if checkpoint:
        message = f"Resuming from the checkpoint of step {resumed_from}."
        if is_extended(checkpoint, config):
            message += f" The schedule is planned anew from here to step {config.train.steps}."
        host.emit(Logged(severity="info", message=message))


def find_base(config: RunConfig, emit: Callable[[Event], None]) -> FoundBase:
    """Locate and recognise the base model from its headers; a model on the Hub is downloaded.

    Raises ConfigError where settings have no meaning for it.
    """
    emit(StageChanged(stage="scan", label="Checking the base model and the dataset"))
    _tell_download(config, emit)
    files = locate_configured(config.base, report_progress(emit, "scan"))
    module, identity = identify_base(files, config.base.family)
    if config.base.prediction != "auto":
        identity = dataclasses.replace(identity, prediction=config.base.prediction)
    emit(Logged(severity="info", message=f"Base model: {identity.label} ({files.origin})."))
    problems = base_contradictions(config, module.SPEC, identity)
    problems += block_problems(config.memory, identity)
    if problems := problems + unfound_patterns(config.adapter, module.SPEC, files):
        raise ConfigError(
            f"The settings do not suit the base model, {identity.label}: {'; '.join(problems)}.",
            fix="Change these settings, or choose another base model.",
        )
    require_compatible(config, module.SPEC)
    for problem in compatibility_problems(config, module.SPEC, identity):
        emit(Logged(severity="warning", message=problem))
    training_adapter = resolve_training_adapter(config.base, identity, report_progress(emit, "scan"))
    return FoundBase(files, module, identity, training_adapter)


def _tell_download(config: RunConfig, emit: Callable[[Event], None]) -> None:
    """Say which parts are downloaded and how large they are, before they are."""
    model = config.base.model.strip()
    repo, file = (model, "") if is_hub_id(model) else hub_file(model) or ("", "")
    if not repo:
        return
    from lorasmith.engine.hub import describe_download, list_download

    if words := describe_download(list_download(repo, config.base.revision, file)):
        emit(Logged(severity="info", message=words))


def placement_of(settings: MemorySettings, *, apart: bool = False) -> Placement:
    """Return how a run keeps its base model's weights."""
    return Placement(
        apart=settings.apart or apart,
        quantize=settings.quantize,
        quantize_text_encoders=settings.quantize_text_encoders,
        quantized_matmul=settings.quantized_matmul,
        swapped_blocks=settings.swapped_blocks,
    )


def load_base(
    base: FoundBase,
    compute: Compute,
    emit: Callable[[Event], None],
    rungs: Rungs | None = None,
    settings: MemorySettings | None = None,
) -> Family:
    """Load the weights of the base model; raises HardwareError with the needed memory where it does not fit."""
    emit(StageChanged(stage="load", label=f"Loading the base model on {compute.label}"))
    rungs = rungs or Rungs(emit)
    needed = sum(weights_bytes(base.files).values())
    ladder = [FREE_CACHE, Rung("apart", "parts are loaded one after another, encoders once needed", lambda: True)]
    family = rungs.attempt(
        "load",
        lambda: base.module.load(
            base.files,
            base.identity,
            compute.device,
            compute.dtype,
            placement_of(settings or MemorySettings(), apart="apart" in rungs.taken("load")),
        ),
        ladder,
        fix=f"The weights are {readable_size(needed)} in their files. Close other programs that use this memory, set "
        "train.precision to bf16, or choose a smaller base model.",
    )
    if settings and settings.tile_pictures:
        family.save_memory("tiles")
    return family


def adapt(
    config: RunConfig, base: FoundBase, family: Family, checkpoint: Checkpoint | None, emit: Callable[[Event], None]
) -> tuple[Adapter, TrainingAdapter | None]:
    """Attach the adapter to train, with the weights to start from, and the training adapter where there is one.

    Raises ConfigError where a layout of the export cannot hold the adapter, and BaseModelError where a LoRA is for
    another base model.
    """
    training_adapter = attach_training_adapter(family, base.training_adapter) if base.training_adapter else None
    if training_adapter:
        message = f"{training_adapter.label} is active in {training_adapter.layers} layers, while training only."
        emit(Logged(severity="info", message=message))
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    if config.memory.lora_precision == "base":
        adapter.compute_as_base()
    require_exportable(family, adapter, config)
    if config.adapter.start_from and checkpoint is None:
        words = start_adapter(adapter, Path(config.adapter.start_from).expanduser(), family)
        emit(Logged(severity="info", message=words))
    return adapter, training_adapter


def read_dataset(config: RunConfig, pixel_multiple: int, emit: Callable[[Event], None]) -> Material:
    """Scan the pictures, sort out captions and plan the buckets; each refused file is named in the log.

    Bucket sides are multiples of `pixel_multiple` pixels, as the base model's family asks for.
    """
    on_progress = report_progress(emit, "scan")
    dataset = scan_dataset(config.dataset, lambda done, total: on_progress("Reading pictures", done, total))
    dataset = require_captions(dataset, config.dataset)
    for note in dataset.notes:
        emit(Logged(severity="warning", message=note))
    for refusal in dataset.refused:
        emit(Logged(severity="warning", message=f"Left out {refusal.relative}: {refusal.reason}"))
    dataset, held_out = split(dataset, config)
    require_pictures(held_out, config)
    if held_out:
        emit(Logged(severity="info", message=f"Held out for validation: {some_names([i.relative for i in held_out])}."))
    plan = plan_buckets(dataset.items, config.dataset, pixel_multiple, config.run.seed)
    emit(
        DatasetReady(
            images=len(dataset.items),
            refused=len(dataset.refused),
            regularization=sum(item.regularization for item in dataset.items),
            buckets=plan.counts(),
            steps_per_epoch=plan.steps_per_epoch(config.train.batch_size, config.train.gradient_accumulation),
        )
    )
    prompts = preview_prompts(config, first_caption(dataset, config.captions))
    return Material(
        dataset, plan, prompts, plan_held_out(held_out, config, pixel_multiple, first_index=len(plan.samples))
    )


def warn_of_foot_guns(config: RunConfig, base: FoundBase, dataset: Dataset, emit: Callable[[Event], None]) -> None:
    """Log the settings that are known to spoil a LoRA, each with its fix; the run goes on."""
    for gun in tell_foot_guns(config, base.module.SPEC, base.identity, dataset):
        emit(Logged(severity="warning" if gun.severity == "warning" else "info", message=gun.words))


def first_caption(dataset: Dataset, settings: CaptionSettings) -> str:
    """Return the prompt of the first picture that has a caption, without the trigger; regularization comes last.

    An empty text where no picture has one. Nothing is drawn or dropped in it.
    """
    items = sorted(dataset.items, key=lambda item: (item.regularization, item.relative))
    return next((full_prompt(item.caption, settings, regularization=True) for item in items if item.caption), "")


def build_training(
    config: RunConfig,
    files: BaseFiles,
    family: Family,
    material: Material,
    adapter: Adapter,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
    rungs: Rungs | None = None,
    reserved_bytes: int = 0,
) -> Learner | None:
    """Encode pictures and prompts once, let the encoders go, and return the learner; None where the user stopped it.

    The cache leaves `reserved_bytes` of its disk to the run.
    """
    emit(StageChanged(stage="cache", label="Encoding pictures and captions"))
    held = material.held_out
    encoder = Encoder(config, files, family, material.plan, emit, should_stop, rungs or Rungs(emit))
    encoder.held_out, encoder.reserved_bytes = held.samples, reserved_bytes
    encoded = encoder.encode([*material.prompts, config.previews.negative_prompt, *held.prompts])
    if encoded is None:
        return None
    settle_denoiser(family, config, keep_text=encoded.conditionings is None, rungs=rungs or Rungs(emit))
    loader = Loader(material.plan, encoded.pictures.latents, config, encoded.pictures.masks)
    learner = build_learner(family, adapter, loader, encoded.conditionings, config)
    if held.samples:
        learner.held_out = dataclasses.replace(held, latents=encoded.pictures.latents, masks=encoded.pictures.masks)
    return learner


def settle_denoiser(family: Family, config: RunConfig, *, keep_text: bool, rungs: Rungs) -> None:
    """Let the encoders go, and bring the denoiser to the device, but for the blocks that are swapped.

    Raises HardwareError where it has no room there.
    """

    def settle() -> None:
        family.release_encoders(keep_text=keep_text)
        if config.memory.swapped_blocks:
            swap_blocks(family, config.memory.swapped_blocks)

    fix = "Set memory.quantize to fp8 or nf4, raise memory.swapped_blocks, or choose a smaller base model."
    rungs.attempt("load", settle, [FREE_CACHE], fix=fix)


def remove_leftovers(run: RunPaths) -> None:
    """Remove files that a killed process left half-written; the run's lock says that nobody else is writing there."""
    for folder in (run.path, run.previews, run.export):
        for pattern in LEFTOVERS:
            for path in folder.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()
    with contextlib.suppress(OSError):
        # A run that was killed at its last pruning saves nothing more that would clean up.
        remove_unfinished(run.checkpoints)


def require_space(config: RunConfig, run: RunPaths, num_parameters: int, done_steps: int) -> DiskPlan:
    """Return what the run will still write; raises StorageError where its folder cannot take that, part by part."""
    for folder in (run.path, run.checkpoints, run.previews, run.export):
        require_writable(folder, 0)
    existing = existing_checkpoints(run.checkpoints)
    plan = plan_disk(config, num_parameters, done_steps=done_steps, existing=existing)
    require_room(run.path, plan)
    return plan


def tell_disk_plan(run: RunPaths, plan: DiskPlan, emit: Callable[[Event], None]) -> None:
    """Say what the run will write, part by part, and how much is free."""
    free = readable_size(free_bytes(run.path))
    message = f"On the disk, at most {readable_size(plan.total)} are needed: {plan.describe()}; {free} are free."
    emit(Logged(severity="info", message=message))


def preview_conditionings(learner: Learner, material: Material) -> dict[str, Conditioning]:
    """Return the conditioning of each preview prompt and, last, the negative prompt, by the present text encoder."""
    prompts = list(dict.fromkeys([*material.prompts, learner.config.previews.negative_prompt]))
    if learner.conditionings is not None:
        return {prompt: learner.conditionings[prompt] for prompt in prompts}
    with torch.no_grad():
        return dict(zip(prompts, learner.family.encode_prompts(prompts), strict=True))
