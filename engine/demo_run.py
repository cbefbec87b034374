"""The rehearsal without a screen: train the demo LoRA, then measure whether its trigger works.

The measurement loads the written LoRA file into a fresh diffusers pipeline, as a user of the file would, draws the same
prompts from the same seeds with and without the trigger, and lets the pixel rule of `presets.demo.judge` decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import TrainingError
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.presets import demo

if TYPE_CHECKING:
    from PIL import Image

    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.run_folder import RunFolder

NUM_SEEDS = 32
WITH_GOAL, WITHOUT_GOAL = 0.80, 0.10
_STEPS, _GUIDANCE, _BATCH = 16, 3.0, 16
_SEEDS_FROM = 70_000
"""Far from the seeds of training and previews."""


@dataclass(frozen=True)
class TriggerRates:
    """Shares of pictures that show the concept, with and without the trigger, over `seeds` seeds each."""

    with_trigger: float
    without_trigger: float
    seeds: int
    sheet: Path

    @property
    def passed(self) -> bool:
        """Whether the trigger calls the concept, and nothing else does."""
        return self.with_trigger >= WITH_GOAL and self.without_trigger <= WITHOUT_GOAL

    def lines(self) -> list[str]:
        """Return the result as plain lines."""
        drawn = f"of {self.seeds} pictures (goal: at"
        return [
            f"concept shown with the trigger:    {self.with_trigger:6.1%} {drawn} least {WITH_GOAL:.0%})",
            f"concept shown without the trigger: {self.without_trigger:6.1%} {drawn} most {WITHOUT_GOAL:.0%})",
        ]


def resolve_demo(*layers: Layer) -> ResolvedConfig:
    """Return the demo's configuration with `layers` on top."""
    return resolve_config([Layer("demo preset", demo.settings()), *layers])


def is_demo(model: str, pictures: str) -> bool:
    """Whether a run of this base model and this dataset folder is the rehearsal, whose trigger can be measured."""
    return model == "demo" and bool(pictures) and Path(pictures) == demo.PICTURES


def report_trigger(run: RunFolder, config: RunConfig, say: Callable[[str], None]) -> int:
    """Say how often the concept shows with and without the trigger; return the exit code.

    A missed goal is a failed training. `run` must be finished: its first LoRA file is measured.
    """
    lora = next(iter(sorted(run.export.glob("*.safetensors"))))
    say("Measuring whether the trigger works")
    rates = measure_trigger(
        lora,
        run.previews / "trigger-sheet.png",
        config.captions.trigger,
        on_progress=lambda done, total: say(f"  {done} of {total} pictures"),
    )
    for line in rates.lines():
        say(line)
    say(f"Trigger sheet: {rates.sheet}")
    return 0 if rates.passed else TrainingError.exit_code


def measure_trigger(
    lora: Path,
    sheet: Path,
    trigger: str,
    num_seeds: int = NUM_SEEDS,
    on_progress: Callable[[int, int], None] | None = None,
) -> TriggerRates:
    """Draw `num_seeds` scenes with and without the trigger from the LoRA file and count the concept in both.

    Writes all pictures, with-trigger rows above without-trigger rows, to `sheet`.
    """
    from lorasmith.presets.demo.judge import has_concept
    from lorasmith.presets.demo.scenes import COLORS, CONCEPT_BACKGROUNDS, CONCEPT_SHAPES, Scene

    scenes = [
        Scene(
            CONCEPT_SHAPES[i % len(CONCEPT_SHAPES)],
            list(COLORS)[i % len(COLORS)],
            CONCEPT_BACKGROUNDS[i % len(CONCEPT_BACKGROUNDS)],
        )
        for i in range(num_seeds)
    ]
    captions = [scene.caption() for scene in scenes]
    pipeline = _load_pipeline(lora)
    pictures: list[Image.Image] = []
    prompts = [f"{trigger}, {caption}" for caption in captions] + captions
    for start in range(0, len(prompts), _BATCH):
        seeds = [_SEEDS_FROM + index % num_seeds for index in range(start, min(start + _BATCH, len(prompts)))]
        pictures += _draw(pipeline, prompts[start : start + _BATCH], seeds)
        if on_progress is not None:
            on_progress(len(pictures), len(prompts))
    shown = [has_concept(picture) for picture in pictures]
    _write_sheet(pictures, sheet)
    return TriggerRates(sum(shown[:num_seeds]) / num_seeds, sum(shown[num_seeds:]) / num_seeds, num_seeds, sheet)


def _load_pipeline(lora: Path) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(demo.BASE, torch_dtype=torch.float32, local_files_only=True)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.inference_mode():
        pictures = pipeline(prompts, generator=generators, num_inference_steps=_STEPS, guidance_scale=_GUIDANCE).images
    return list(pictures)


def _write_sheet(pictures: list[Image.Image], path: Path) -> None:
    from PIL import Image

    side, columns = pictures[0].width, _BATCH
    sheet = Image.new("RGB", (side * columns, side * -(-len(pictures) // columns)))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * side, index // columns * side))
    sheet.save(path)
