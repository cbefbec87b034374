"""What a run will do before it does it: steps, epochs, buckets, disk and memory. Torch-free.

Everything is derived from the settings, the scanned pictures and the headers of the base model. What cannot be known
from those is None and said in words; a figure that is only an estimate is called one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine import storage
from lorasmith.engine.dataset.buckets import BucketPlan, plan_buckets
from lorasmith.engine.families import families

if TYPE_CHECKING:
    from lorasmith.engine.config import AdapterSettings, RunConfig
    from lorasmith.engine.dataset.scan import Dataset
    from lorasmith.engine.families import BaseIdentity, FamilySpec
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.sources import BaseFiles, TensorInfo

GIB = 1 << 30
_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_DENOISER_PARTS = ("unet", "transformer")
_SINGLE_FILE_PREFIX = "model.diffusion_model."
_MANY_VIEWS = 400
# Estimate of the training peak: see `_memory`.
_CONTEXT_GIB, _SLACK, _SLACK_GIB = 0.5, 1.05, 0.6
_MLP_FACTOR = 1.35


@dataclass(frozen=True)
class BucketRow:
    """One training size: `pictures` of it, seen `uses` times an epoch in `batches` batches."""

    size: str
    pictures: int
    uses: int
    batches: int


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
    adapter_parameters: int | None
    adapter_modules: int | None
    checkpoint_bytes: int | None
    num_checkpoints: int
    export_bytes: int | None
    num_previews: int
    disk_needed_bytes: int | None
    disk_free_bytes: int
    output_folder: str
    weights_bytes: dict[str, int]
    memory_gib: float | None
    memory_note: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (label, words) for the screen and the command line."""
        rows = [("base model", self.base), ("steps", self._steps_words())]
        if self.pictures is not None:
            rows.append(("pictures", self._pictures_words()))
            rows.append(("buckets", ", ".join(f"{row.size}: {row.pictures}" for row in self.buckets)))
        rows.append(("LoRA", self._adapter_words()))
        rows.append(("disk", self._disk_words()))
        if self.weights_bytes:
            parts = ", ".join(f"{part} {storage.readable_size(size)}" for part, size in self.weights_bytes.items())
            rows.append(("weights on disk", parts))
        peak = "" if self.memory_gib is None else f"estimated peak {self.memory_gib:.1f} GiB; "
        rows.append(("GPU memory", peak + self.memory_note))
        return rows + [("warning", warning) for warning in self.warnings]

    def _steps_words(self) -> str:
        words = f"{self.steps} of {self.batch_size} picture{'s' if self.batch_size > 1 else ''}"
        if self.gradient_accumulation > 1:
            words += f" × {self.gradient_accumulation}"
        return words if self.epochs is None else f"{words} = {self.epochs:.1f} epochs of {self.steps_per_epoch:g} steps"

    def _pictures_words(self) -> str:
        words = f"{self.pictures}, each seen about {self.views_per_picture:.0f} times"
        if self.regularization:
            words += f"; {self.regularization} for regularization"
        return words + (f"; {self.refused} files refused" if self.refused else "")

    def _adapter_words(self) -> str:
        if self.adapter_parameters is None or self.export_bytes is None:
            return "its size is known once the base model is on this machine"
        millions = self.adapter_parameters / 1e6
        size = storage.readable_size(self.export_bytes)
        return f"{millions:.2f} M numbers in {self.adapter_modules} layers; files to share: {size}"

    def _disk_words(self) -> str:
        free = f"{storage.readable_size(self.disk_free_bytes)} free in {self.output_folder}"
        if self.disk_needed_bytes is None:
            return free
        return (
            f"up to {storage.readable_size(self.disk_needed_bytes)} for {self.num_checkpoints} checkpoints, "
            f"{self.num_previews} previews and the LoRA; {free}"
        )


def build_plan(
    resolved: ResolvedConfig,
    identity: BaseIdentity | None = None,
    dataset: Dataset | None = None,
    files: BaseFiles | None = None,
) -> Plan:
    """Return the plan of a run from whatever is known so far; reads headers, writes nothing."""
    config = resolved.config
    spec = families()[identity.family].SPEC if identity is not None else None
    buckets = plan_buckets(dataset.items, config.dataset, spec.pixel_multiple if spec else 8) if dataset else None
    shapes = _adapted_layers(config.adapter, spec, files) if spec is not None and files is not None else None
    parameters = None if shapes is None else _num_parameters(shapes, config.adapter)
    output = Path(config.run.output_folder).expanduser()
    num_previews = _num_previews(config)
    num_layouts = len(set(config.export.layouts))
    memory_gib, memory_note = _memory(config, spec, files, parameters, buckets)
    plan = Plan(
        name=config.run.name,
        base=identity.label if identity is not None else (config.base.model or "not chosen"),
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        **_epochs(config, dataset, buckets),
        buckets=_bucket_rows(buckets, config.train.batch_size) if buckets else (),
        adapter_parameters=parameters,
        adapter_modules=None if shapes is None else len(shapes),
        checkpoint_bytes=None if parameters is None else storage.checkpoint_bytes(parameters, config.optimizer.name),
        num_checkpoints=_num_checkpoints(config),
        export_bytes=None if shapes is None else _export_bytes(config, shapes, parameters or 0),
        num_previews=num_previews,
        disk_needed_bytes=None
        if parameters is None
        else storage.planned_bytes(
            parameters,
            optimizer=config.optimizer.name,
            keep=_num_checkpoints(config),
            num_layouts=num_layouts,
            export_precision=config.export.precision,
            num_previews=num_previews,
        ),
        disk_free_bytes=storage.free_bytes(output),
        output_folder=str(output),
        weights_bytes=_weights_bytes(files) if files is not None else {},
        memory_gib=memory_gib,
        memory_note=memory_note,
        warnings=(),
    )
    return dataclasses.replace(plan, warnings=tuple(_warnings(config, plan)))


def _epochs(config: RunConfig, dataset: Dataset | None, buckets: BucketPlan | None) -> dict[str, Any]:
    names = ("pictures", "regularization", "refused", "uses_per_epoch", "batches_per_epoch")
    if dataset is None or buckets is None:
        return dict.fromkeys((*names, "steps_per_epoch", "epochs", "views_per_picture"))
    batches = buckets.batches_per_epoch(config.train.batch_size)
    regularization = sum(item.regularization for item in dataset.items)
    pictures = len(dataset.items) - regularization
    uses = sum(sample.item.repeats for sample in buckets.samples)
    own_uses = sum(sample.item.repeats for sample in buckets.samples if not sample.item.regularization)
    steps_per_epoch = batches / config.train.gradient_accumulation
    epochs = config.train.steps / steps_per_epoch if batches else 0.0
    counts = (pictures, regularization, len(dataset.refused), uses, batches)
    return dict(zip(names, counts, strict=True)) | {
        "steps_per_epoch": steps_per_epoch,
        "epochs": epochs,
        "views_per_picture": epochs * own_uses / pictures if pictures else 0.0,
    }


def _bucket_rows(buckets: BucketPlan, batch_size: int) -> tuple[BucketRow, ...]:
    uses: dict[str, int] = {}
    for sample in buckets.samples:
        uses[str(sample.bucket)] = uses.get(str(sample.bucket), 0) + sample.item.repeats
    return tuple(
        BucketRow(size, count, uses[size], math.ceil(uses[size] / batch_size))
        for size, count in buckets.counts().items()
    )


def _adapted_layers(
    settings: AdapterSettings, spec: FamilySpec, files: BaseFiles
) -> dict[tuple[str, str], tuple[int, ...]] | None:
    """Return the weight shapes of the layers to adapt by (component, path), or None where headers do not tell.

    A single file in the original layout names convolutions and text encoders in ways that only loading translates.
    """
    single = files.kind == "single_file"
    if single and (settings.kind == "locon" or settings.text_encoder):
        return None
    suffixes = (*spec.targets[settings.targets], *(spec.conv_targets if settings.kind == "locon" else ()))
    found = {("denoiser", path): shape for path, shape in _matching(denoiser_tensors(files), suffixes).items()}
    if settings.text_encoder:
        for part in [part for part in files.config("") if part.startswith("text_encoder")]:
            encoder = _matching(files.tensors(part), spec.text_encoder_targets)
            found |= {(part, path): shape for path, shape in encoder.items()}
    return found or None


def denoiser_tensors(files: BaseFiles) -> dict[str, TensorInfo]:
    """Return the header of the denoiser by tensor name; {} where it is not found."""
    if files.kind == "single_file":
        tensors = files.tensors("")
        own = {n.removeprefix(_SINGLE_FILE_PREFIX): t for n, t in tensors.items() if n.startswith(_SINGLE_FILE_PREFIX)}
        return own or tensors
    return next((tensors for part in _DENOISER_PARTS if (tensors := files.tensors(part))), {})


def _matching(tensors: Mapping[str, TensorInfo], suffixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    layers = {name.removesuffix(".weight"): info.shape for name, info in tensors.items() if name.endswith(".weight")}
    return {
        path: shape
        for path, shape in layers.items()
        if len(shape) in (2, 4) and any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes)
    }


def _num_parameters(shapes: Mapping[Any, tuple[int, ...]], settings: AdapterSettings) -> int:
    # A convolution (4-D) has its own rank; see engine.adapters.
    return sum(
        (settings.conv_rank if len(shape) == 4 else settings.rank) * (shape[0] + math.prod(shape[1:]))
        for shape in shapes.values()
    )


def _export_bytes(config: RunConfig, shapes: Mapping[Any, tuple[int, ...]], parameters: int) -> int:
    # The header takes about 110 bytes a key, and the alphas 4 bytes each.
    keys = 3 * len(shapes)
    one = parameters * storage.EXPORT_BYTES[config.export.precision] + keys * 115 + 4000
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


def _weights_bytes(files: BaseFiles) -> dict[str, int]:
    parts = [""] if files.kind == "single_file" else [part for part in files.config("") if not part.startswith("_")]
    sizes = {part or files.path.name: _total_bytes(files.tensors(part)) for part in parts}
    return {part: size for part, size in sizes.items() if size}


def _total_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) * _DTYPE_BYTES.get(info.dtype, 1) for info in tensors.values())


def _memory(
    config: RunConfig,
    spec: FamilySpec | None,
    files: BaseFiles | None,
    parameters: int | None,
    buckets: BucketPlan | None,
) -> tuple[float | None, str]:
    """Return the estimated peak of a training step in GiB, or None, and what it rests on.

    context + 16-bit weights + LoRA (weights, gradients, optimizer) + activations per pixel × batch, then 5 % + 0.6 GiB:
    on 11 published points that margin covered 10. The constant holds for one architecture, size and adapter kind.
    """
    unknown = "not forecast for these settings; watch the gauge in the first steps, which shows the measured use"
    if spec is None or files is None:
        return None, "forecast once the base model is on this machine"
    weights = sum(math.prod(info.shape) for info in denoiser_tensors(files).values())
    measured = spec.activation_mib_per_megapixel
    if measured is None or parameters is None or abs(weights / spec.denoiser_parameters - 1) > 0.03:
        return None, unknown
    if config.adapter.kind == "locon" or config.adapter.text_encoder or config.train.precision == "fp32":
        return None, unknown
    pixels = max((s.bucket.width * s.bucket.height for s in buckets.samples), default=0) if buckets else 0
    pixels = pixels or config.dataset.resolution**2
    activations = measured[config.train.gradient_checkpointing] / 1024 * pixels / 1e6 * config.train.batch_size
    if config.adapter.targets == "attention-mlp":
        activations *= _MLP_FACTOR
    lora = parameters * (8 + storage.OPTIMIZER_BYTES[config.optimizer.name]) / GIB
    peak = (_CONTEXT_GIB + weights * 2 / GIB + lora + activations) * _SLACK + _SLACK_GIB
    return round(peak, 1), (
        "an estimate from published measurements for 16-bit training with encoders released; "
        "encoding the pictures and drawing previews can take more for a moment"
    )


def _warnings(config: RunConfig, plan: Plan) -> list[str]:
    found = []
    if plan.disk_needed_bytes is not None and plan.disk_needed_bytes > plan.disk_free_bytes:
        found.append("The disk has less free space than the run can need; free some or lower checkpoints.keep.")
    if plan.epochs is not None and 0 < plan.epochs < 1:
        found.append(f"{plan.steps} steps are less than one epoch: not every picture is seen.")
    if plan.views_per_picture is not None and plan.views_per_picture > _MANY_VIEWS:
        found.append(f"Each picture is seen about {plan.views_per_picture:.0f} times: expect the LoRA to overfit.")
    thin = [row for row in plan.buckets if row.uses % plan.batch_size and row.uses < plan.batch_size]
    if thin:
        sizes = ", ".join(row.size for row in thin)
        found.append(f"Batches of {sizes} are smaller than train.batch_size, since too few pictures have that shape.")
    return found
