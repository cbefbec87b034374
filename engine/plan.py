"""What a run will do before it does it: steps, epochs, buckets, disk and memory. Torch-free.

Everything is derived from the settings, the scanned pictures and the headers of the base model. What cannot be known
from those is None and said in words; a figure that is only an estimate is called one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine import memory, storage
from lorasmith.engine.adapter_combinations import OF_WEIGHTS
from lorasmith.engine.combinations import base_contradictions
from lorasmith.engine.compatibility import chosen_layouts, compatibility_problems, loads_in
from lorasmith.engine.config_adapter import effective_scale
from lorasmith.engine.dataset.buckets import MAX_ENLARGEMENT, BucketPlan, BucketRow, plan_buckets
from lorasmith.engine.dataset.cache_size import forecast_cache, max_prompts, numbers_of_prompt
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.disk_plan import plan_disk
from lorasmith.engine.families import families
from lorasmith.engine.foot_guns import tell_foot_guns
from lorasmith.engine.holdout import split
from lorasmith.engine.memory.blocks import block_problems
from lorasmith.engine.memory.calibration import UNKNOWN, Calibration
from lorasmith.engine.memory.forecast import Forecast
from lorasmith.engine.memory.of_run import USUAL_PICTURES, Known, forecast_run
from lorasmith.engine.memory.words import memory_rows

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.engine.families import BaseIdentity
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.sources import BaseFiles

_MANY_VIEWS = 400
_COUNTED_PROMPTS = 20_000


@dataclass(frozen=True)
class Plan:
    """What a run will do; None where it cannot be known yet. Sizes in bytes, or GiB where the name says so."""

    name: str
    base: str
    steps: int
    batch_size: int
    gradient_accumulation: int
    pictures: int | None
    regularization: int | None
    refused: int | None
    uses_per_epoch: int | None
    batches_per_epoch: int | None
    steps_per_epoch: float | None
    epochs: float | None
    views_per_picture: float | None
    buckets: tuple[BucketRow, ...]
    enlarged: int
    """Pictures that are enlarged more than 1.5 times."""
    left_out_resolutions: int
    """Pictures times resolutions that are left out because they would enlarge too much."""
    num_latents: int | None
    num_prompts: int | None
    """Different prompts of the whole run; None also where there are too many to encode them ahead."""
    cache_bytes: int | None
    cache_free_bytes: int
    adapter_parameters: int | None
    adapter_modules: int | None
    checkpoint_bytes: int | None
    num_checkpoints: int
    export_bytes: int | None
    effective_scale: float
    """What the trained product is multiplied by."""
    loads_in: dict[str, tuple[str, ...]]
    """The programs that load the LoRA, by the layout of the file; empty while the base model is not known."""
    num_previews: int
    disk_needed_bytes: int | None
    disk_free_bytes: int
    output_folder: str
    weights_bytes: dict[str, int]
    forecast: Forecast | None
    """What the run takes of the card, main memory and disk."""
    memory_gib: float | None
    """The most of the card's memory."""
    memory_note: str
    """What the forecast rests on, or why there is none."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["buckets"] = [dataclasses.asdict(row) for row in self.buckets]
        values["forecast"] = None if self.forecast is None else self.forecast.to_json()
        return values

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (label, words) for the screen and the command line."""
        rows = [("base model", self.base), ("steps", self._steps_words())]
        if self.pictures is not None:
            rows.append(("pictures", self._pictures_words()))
            rows.append(("buckets", self._buckets_words()))
            rows.append(("cache", self._cache_words()))
        rows.append(("LoRA", self._adapter_words()))
        rows += [(f"{layout} file", self._programs_words(layout)) for layout in self.loads_in]
        rows.append(("disk", self._disk_words()))
        if self.weights_bytes:
            parts = ", ".join(f"{part} {storage.readable_size(size)}" for part, size in self.weights_bytes.items())
            rows.append(("weights on disk", parts))
        rows += memory_rows(self.forecast, self.memory_note)
        return rows + [("warning", warning) for warning in self.warnings]

    def _steps_words(self) -> str:
        each = f"{self.batch_size} picture{'s' if self.batch_size > 1 else ''}"
        each += f" × {self.gradient_accumulation}" if self.gradient_accumulation > 1 else ""
        words = f"{self.steps}, each of {each}"
        if self.epochs is None:
            return words
        return f"{words}: {round(self.epochs, 1):g} epochs of {self.steps_per_epoch:g} steps"

    def _pictures_words(self) -> str:
        words = f"{self.pictures}, each seen about {self.views_per_picture:.0f} times"
        if self.regularization:
            words += f"; {self.regularization} for regularization"
        return words + (f"; {self.refused} file{'s' if self.refused > 1 else ''} refused" if self.refused else "")

    def _buckets_words(self) -> str:
        words = ", ".join(f"{row.size}: {row.pictures}" for row in self.buckets)
        if not self.left_out_resolutions:
            return words
        return f"{words}; {self.left_out_resolutions} left out of a resolution that would enlarge them too much"

    def _cache_words(self) -> str:
        texts = "captions encoded as they come" if self.num_prompts is None else f"{self.num_prompts} captions"
        words = f"{self.num_latents} encoded pictures, {texts}"
        if self.cache_bytes is None:
            return words
        free = storage.readable_size(self.cache_free_bytes)
        return f"about {storage.readable_size(self.cache_bytes)} for {words}; {free} free"

    def _adapter_words(self) -> str:
        if self.adapter_parameters is None or self.export_bytes is None:
            return "its size is known once the base model is on this machine"
        size = storage.readable_size(self.export_bytes)
        words = f"{self.adapter_parameters:,} parameters in {self.adapter_modules} layers"
        return f"{words}, scale {self.effective_scale:.3g}; to share: {size}"

    def _programs_words(self, layout: str) -> str:
        programs = self.loads_in[layout]
        return f"loads in {', '.join(programs)}" if programs else "loads in no program that lorasmith knows"

    def _disk_words(self) -> str:
        free = f"{storage.readable_size(self.disk_free_bytes)} free in {self.output_folder}"
        if self.disk_needed_bytes is None:
            return free
        return (
            f"up to {storage.readable_size(self.disk_needed_bytes)} for {self.num_checkpoints} "
            f"checkpoint{'' if self.num_checkpoints == 1 else 's'}, "
            f"{self.num_previews} previews and the LoRA; {free}"
        )


def build_plan(
    resolved: ResolvedConfig,
    identity: BaseIdentity | None = None,
    dataset: Dataset | None = None,
    files: BaseFiles | None = None,
    calibration: Calibration = UNKNOWN,
) -> Plan:
    """Return the plan of a run from whatever is known so far; reads headers, writes nothing.

    `calibration` is what was measured on the card that the run will have.
    """
    config = resolved.config
    spec = families()[identity.family].SPEC if identity is not None else None
    multiple = spec.pixel_multiple if spec else 8
    dataset = split(dataset, config)[0] if dataset else None
    buckets = plan_buckets(dataset.items, config.dataset, multiple, config.run.seed) if dataset else None
    shapes = memory.adapted_layers(config.adapter, spec, files) if spec is not None and files is not None else None
    parameters = None if shapes is None else memory.num_parameters(shapes, config.adapter)
    largest = max((s.bucket.width * s.bucket.height for s in buckets.samples), default=0) if buckets else 0
    sizes = _cache_sizes(config, buckets, identity)
    samples = len(buckets.samples) if buckets is not None else 0
    pixels, keeps_text = largest or config.dataset.resolution**2, sizes["num_prompts"] is None if samples else None
    known = Known(spec, files, pixels, parameters, samples or USUAL_PICTURES, keeps_text, calibration)
    forecast, memory_note = forecast_run(config, known)
    plan = Plan(
        name=config.run.name,
        base=identity.label if identity is not None else (config.base.model or "not chosen"),
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        **_epochs(config, dataset, buckets),
        buckets=buckets.rows(config.train.batch_size) if buckets else (),
        enlarged=len(buckets.enlarged()) if buckets else 0,
        left_out_resolutions=len(buckets.left_out) if buckets else 0,
        **sizes,
        cache_free_bytes=storage.free_bytes(storage.cache_folder()),
        **_adapter_sizes(config, shapes, parameters),
        effective_scale=effective_scale(config.adapter),
        loads_in={name: loads_in(spec, config.adapter, name) for name in chosen_layouts(config.export, spec)}
        if spec
        else {},
        num_checkpoints=_num_checkpoints(config),
        num_previews=_num_previews(config),
        disk_free_bytes=storage.free_bytes(output := Path(config.run.output_folder).expanduser()),
        output_folder=str(output),
        weights_bytes=memory.weights_bytes(files) if files is not None else {},
        forecast=forecast,
        memory_gib=None if forecast is None else round(forecast.peak.total, 2),
        memory_note=memory_note,
        warnings=(),
    )
    if spec is None:
        return dataclasses.replace(plan, warnings=tuple(_warnings(config, plan, known_views=False)))
    unsuited = base_contradictions(config, spec, identity) if identity is not None else []
    unsuited += block_problems(config.memory, identity) if identity is not None else []
    unsuited += memory.unfound_patterns(config.adapter, spec, files) if files is not None else []
    layouts = compatibility_problems(config, spec, identity)
    guns = tell_foot_guns(config, spec, identity, dataset)
    said = _warnings(config, plan, known_views="steps-many" in {gun.key for gun in guns})
    return dataclasses.replace(plan, warnings=(*unsuited, *layouts, *said, *(gun.words for gun in guns)))


def _adapter_sizes(
    config: RunConfig, shapes: memory.AdaptedLayers | None, parameters: int | None
) -> dict[str, int | None]:
    if shapes is None or parameters is None:
        names = ("adapter_parameters", "adapter_modules", "checkpoint_bytes", "export_bytes", "disk_needed_bytes")
        return dict.fromkeys(names)
    averaged, starts = config.train.ema_decay > 0, config.adapter.init in OF_WEIGHTS
    checkpoint = storage.checkpoint_bytes(parameters, config.optimizer.name, averaged=averaged, starts=starts)
    return {
        "adapter_parameters": parameters,
        "adapter_modules": len(shapes),
        "checkpoint_bytes": checkpoint,
        "export_bytes": _export_bytes(config, len(shapes), parameters),
        "disk_needed_bytes": plan_disk(config, parameters).total,
    }


def _epochs(config: RunConfig, dataset: Dataset | None, buckets: BucketPlan | None) -> dict[str, Any]:
    names = ("pictures", "regularization", "refused", "uses_per_epoch", "batches_per_epoch")
    if dataset is None or buckets is None:
        return dict.fromkeys((*names, "steps_per_epoch", "epochs", "views_per_picture"))
    batches = buckets.batches_per_epoch(config.train.batch_size)
    regularization = sum(item.regularization for item in dataset.items)
    pictures = len(dataset.items) - regularization
    uses = sum(row.uses for row in buckets.rows(config.train.batch_size))
    own_uses = sum(view.repeats for view in buckets.views if not view.samples[0].item.regularization)
    steps_per_epoch = batches / config.train.gradient_accumulation
    epochs = config.train.steps / steps_per_epoch if batches else 0.0
    counts = (pictures, regularization, len(dataset.refused), uses, batches)
    return dict(zip(names, counts, strict=True)) | {
        "steps_per_epoch": steps_per_epoch,
        "epochs": epochs,
        "views_per_picture": epochs * own_uses / pictures if pictures else 0.0,
    }


def _cache_sizes(config: RunConfig, buckets: BucketPlan | None, identity: BaseIdentity | None) -> dict[str, int | None]:
    """Count what is encoded ahead, and its bytes on disk once the base model is known."""
    if buckets is None or not buckets.samples:
        return dict.fromkeys(("num_latents", "num_prompts", "cache_bytes"))
    spec = families()[identity.family].SPEC if identity is not None else None
    # As `compute.choose_compute` decides, but without asking the machine: auto is taken as 16 bits.
    number_bytes = 4 if config.train.precision == "fp32" or config.train.device == "cpu" else 2
    numbers = numbers_of_prompt(spec, identity) if spec is not None else 0
    prompts = None
    if not config.adapter.text_encoder:
        limit = max_prompts(numbers, number_bytes) if spec is not None else _COUNTED_PROMPTS
        num_micro = config.train.steps * config.train.gradient_accumulation
        prompts = Epochs(buckets, config).all_captions(num_micro, limit)
    size = None
    if spec is not None:
        size = forecast_cache(buckets, spec, len(prompts or ()), number_bytes=number_bytes, prompt_numbers=numbers)
    num_prompts = None if prompts is None else len(prompts)
    return {"num_latents": len(buckets.samples), "num_prompts": num_prompts, "cache_bytes": size}


def _export_bytes(config: RunConfig, modules: int, parameters: int) -> int:
    # Three keys a module take about 115 bytes each in the header, the metadata some 4 kB.
    numbers = parameters * (1 + (config.adapter.init in OF_WEIGHTS))
    one = numbers * storage.EXPORT_BYTES[config.export.precision] + modules * 3 * 115 + 4000
    return one * len(set(config.export.layouts))


def _num_checkpoints(config: RunConfig) -> int:
    every, steps = config.checkpoints.every, config.train.steps
    return min(config.checkpoints.keep, math.ceil(steps / every) if every else 1)


def _num_previews(config: RunConfig) -> int:
    previews = config.previews
    if previews.every == 0:
        return 0
    prompts = len(previews.prompts) or 2
    return (config.train.steps // previews.every) * prompts * len(set(previews.seeds))


def _warnings(config: RunConfig, plan: Plan, *, known_views: bool) -> list[str]:
    found = []
    if plan.disk_needed_bytes is not None and plan.disk_needed_bytes > plan.disk_free_bytes:
        found.append("The disk has less free space than the run can need; free some or lower checkpoints.keep.")
    if plan.cache_bytes is not None and plan.cache_bytes > plan.cache_free_bytes:
        found.append("The disk of the cache is too small for it: every start encodes all pictures and captions again.")
    if plan.epochs is not None and 0 < plan.epochs < 1:
        found.append(f"{plan.steps} steps are less than one epoch: not every picture is seen.")
    if not known_views and plan.views_per_picture is not None and plan.views_per_picture > _MANY_VIEWS:
        found.append(f"Each picture is seen about {plan.views_per_picture:.0f} times: expect the LoRA to overfit.")
    if plan.enlarged:
        were = "picture is" if plan.enlarged == 1 else "pictures are"
        found.append(
            f"{plan.enlarged} {were} enlarged more than {MAX_ENLARGEMENT:g} times, which teaches their blur: "
            "use larger ones, or lower dataset.resolution."
        )
    thin = [row for row in plan.buckets if row.uses % plan.batch_size and row.uses < plan.batch_size]
    if thin:
        sizes = ", ".join(row.size for row in thin)
        found.append(f"Batches of {sizes} are smaller than train.batch_size, since too few pictures have that shape.")
    return found
