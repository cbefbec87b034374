"""A learner over invented latents and captions: what the step benchmarks share. No pictures are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, plan_buckets
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.loader import Loader
from lorasmith.engine.families import Family, identify_base
from lorasmith.engine.learner import Learner, build_learner
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_setup import Material
from lorasmith.engine.sources import locate_base

NUM_PICTURES = 32


def load_family(base: str, device: torch.device, dtype: torch.dtype) -> Family:
    """Load a base model by what a user would write."""
    files = locate_base(base)
    module, identity = identify_base(files)
    return module.load(files, identity, device, dtype)


def settings(base: str, resolution: int, batch_size: int, adapter: dict[str, Any], **train: Any) -> RunConfig:
    """Return a configuration without checkpoints and previews."""
    return resolve_config(
        [
            Layer(
                "benchmark",
                {
                    "base": {"model": base},
                    "dataset": {"resolution": resolution},
                    "captions": {"trigger": "zqx"},
                    "adapter": adapter,
                    "optimizer": {"learning_rate": 1e-4},
                    "train": {"batch_size": batch_size, **train},
                    "checkpoints": {"every": 0},
                    "previews": {"every": 0},
                },
            )
        ]
    ).config


def build(family: Family, config: RunConfig) -> tuple[Learner, Material]:
    """Return a learner of `config` over random latents, and the material that the trainer keeps beside it."""
    side = config.dataset.resolution
    items = tuple(
        ImageItem(
            path=Path(f"{index}.png"),
            relative=f"{index}.png",
            sha256=str(index),
            width=side,
            height=side,
            captions=(f"a picture, number {index}",),
        )
        for index in range(NUM_PICTURES)
    )
    plan: BucketPlan = plan_buckets(items, config.dataset, family.spec.pixel_multiple)
    with torch.no_grad():
        blank = torch.zeros((1, 3, side, side), device=family.device, dtype=family.dtype)
        shape = tuple(family.encode_images(blank).shape[1:])
    generator = torch.Generator().manual_seed(0)
    latents = {sample.index: torch.randn(shape, generator=generator) for sample in plan.samples}
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    loader = Loader(plan, latents, config)
    prompts = sorted(loader.epochs.all_captions(config.train.steps) or ())
    with torch.no_grad():
        encoded = dict(zip(prompts, family.encode_prompts(prompts), strict=True))
    family.release_encoders()
    dataset = Dataset(Path("."), items, (), len(items))
    return build_learner(family, adapter, loader, encoded, config), Material(dataset, plan, prompts[:1])
