"""Pictures drawn during training, always after a save and never able to end the run.

Each picture carries the line that A1111, Forge and Civitai read from a PNG (`parameters`), so that it can be drawn
again elsewhere. The same seeds each time make pictures of different steps comparable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.events import Event, Logged, PreviewReady
from lorasmith.engine.lora_metadata import safe_label
from lorasmith.engine.out_of_memory import FREE_CACHE, Limit, Rung, Rungs
from lorasmith.engine.preview_sheet import one_line, png_bytes
from lorasmith.engine.storage import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from lorasmith.engine.adapters import Adapter
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import Conditioning, Family

FLAT_DEVIATION = 2 / 255
"""A picture whose values (0 to 1) deviate less than this is a single color: NaN or a collapsed model."""
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "UniPCMultistepScheduler": "UniPC",
}

Emit = Callable[[Event], None]


class _DrawingStoppedError(Exception):
    pass


@dataclass(frozen=True)
class PreviewPicture:
    """One picture to draw: number and text of its prompt, number and value of its seed."""

    prompt_index: int
    prompt: str
    seed: int

    def file_name(self, step: int) -> str:
        """Return the file name, e.g. `step-00000100_p0_s1.png`, where 1 is the seed."""
        return f"step-{step:08d}_p{self.prompt_index}_s{self.seed}.png"


def preview_prompts(config: RunConfig, first_caption: str) -> list[str]:
    """Return the prompts to draw, `[trigger]` replaced; without any, the trigger with `first_caption`, then without.

    `first_caption` is a picture's own text, with or without the trigger.
    """
    from lorasmith.engine.dataset.captions import compose

    trigger = config.captions.trigger.strip()
    if config.previews.prompts:
        return [prompt.replace("[trigger]", trigger).strip() for prompt in config.previews.prompts]
    plain = compose(first_caption, trigger, regularization=True)
    return list(dict.fromkeys([compose(plain, trigger), plain] if plain else [compose(None, trigger)]))


def draw_previews(
    family: Family,
    adapter: Adapter,
    config: RunConfig,
    conditionings: Mapping[str, Conditioning],
    folder: Path,
    step: int,
    emit: Emit,
    should_stop: Callable[[], bool],
    rungs: Rungs | None = None,
) -> None:
    """Draw each prompt with each seed into `folder` and emit PreviewReady for every picture.

    `conditionings` holds the prompts of `preview_prompts` in their order, and the negative prompt under
    `config.previews.negative_prompt`. Any failure becomes a warning in the log; a memory error only after smaller
    batches, tiles and the processor were tried. `should_stop` is asked after each denoising step. Only
    KeyboardInterrupt leaves this function.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _undisturbed(family, adapter):
            _draw_all(family, config, conditionings, folder, step, emit, should_stop, rungs or Rungs(emit))
    except _DrawingStoppedError:
        emit(Logged(severity="info", message=f"Previews of step {step} were left unfinished."))
    except Exception as error:
        emit(Logged(severity="warning", message=f"Previews of step {step} failed, training goes on: {_words(error)}"))


def preview_parameters(config: RunConfig, family: Family, prompt: str, seed: int, side: int) -> str:
    """Return the lines that A1111 writes into a PNG: prompt with the LoRA, negative prompt, settings."""
    steps, guidance = drawing(config, family)
    sampler = str(family.noise_schedule.get("_class_name", ""))
    settings = {
        "Steps": steps,
        "Sampler": _SAMPLERS.get(sampler, sampler or "unknown"),
        "CFG scale": f"{guidance:g}",
        "Seed": seed,
        "Size": f"{side}x{side}",
        "Model": safe_label(config.base.model),
    }
    lines = [f"{one_line(prompt)} <lora:{safe_label(config.run.name)}:1>"]
    if config.previews.negative_prompt:
        lines.append(f"Negative prompt: {one_line(config.previews.negative_prompt)}")
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])


def drawing(config: RunConfig, family: Family) -> tuple[int, float]:
    """Return the denoising steps and the guidance of previews: the run's, or else what the base model is made for."""
    from lorasmith.engine.families import usual_drawing

    steps, guidance = usual_drawing(family)
    return config.previews.steps or steps, config.previews.guidance or guidance


def _draw_all(
    family: Family,
    config: RunConfig,
    conditionings: Mapping[str, Conditioning],
    folder: Path,
    step: int,
    emit: Emit,
    should_stop: Callable[[], bool],
    rungs: Rungs,
) -> None:
    from lorasmith.engine.dataset.cache_size import PREVIEWS_AT_ONCE, pictures_at_once
    from lorasmith.engine.families import DrawSettings, PictureRequest

    side = config.previews.side or config.dataset.resolution
    settings = DrawSettings(*drawing(config, family), side, side)
    negative = conditionings[config.previews.negative_prompt]
    waiting = planned_pictures(config, list(conditionings))
    limit = Limit(min(PREVIEWS_AT_ONCE, pictures_at_once(side * side)))
    ladder = [
        FREE_CACHE,
        *[limit.rung(most, "previews are drawn") for most in (2, 1)],
        Rung("tiles", "large previews are decoded in overlapping tiles", lambda: family.save_memory("tiles")),
        Rung("cpu", "previews are drawn on the processor, slowly", lambda: family.save_memory("draw on cpu")),
    ]
    rungs.retake("preview", ladder)

    def on_step(_: int) -> None:
        if should_stop():
            raise _DrawingStoppedError

    def draw_waiting() -> None:
        while waiting:
            on_step(0)
            chunk = waiting[: limit.most]
            requests = [PictureRequest(conditionings[item.prompt], negative, item.seed) for item in chunk]
            drawn = family.draw(requests, settings, on_step)
            for item, picture in zip(chunk, drawn, strict=True):
                _keep(family, config, picture, item, folder / item.file_name(step), step, emit)
            del waiting[: len(chunk)]

    fix = f"Lower previews.side (now {side}), or set previews.every to 0 to train without previews."
    rungs.attempt("preview", draw_waiting, ladder, fix=fix)


def planned_pictures(config: RunConfig, conditioned: Sequence[str]) -> list[PreviewPicture]:
    """Return every prompt with every seed in drawing order.

    Without prompts in the settings these are the `conditioned` ones but the negative prompt.
    """
    negative = config.previews.negative_prompt
    prompts = preview_prompts(config, "") if config.previews.prompts else [p for p in conditioned if p != negative]
    seeds = list(dict.fromkeys(config.previews.seeds))
    return [PreviewPicture(index, prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds]


def _keep(
    family: Family, config: RunConfig, picture: Image.Image, item: PreviewPicture, path: Path, step: int, emit: Emit
) -> None:
    line = preview_parameters(config, family, item.prompt, item.seed, picture.width)
    atomic_write(path, png_bytes(picture, {"parameters": line}))
    emit(PreviewReady(step=step, prompt=item.prompt, seed=item.seed, path=str(path), line=one_line(line)))
    if is_flat(picture):
        emit(Logged(severity="warning", message=f"Preview {path.name} is a single color: training may have diverged."))


def is_flat(picture: Image.Image) -> bool:
    """Tell whether a picture is (nearly) a single color."""
    import numpy as np

    values = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    # Of each channel: a single color has three different values.
    return float(values.reshape(-1, 3).std(axis=0).max()) < FLAT_DEVIATION


@contextlib.contextmanager
def _undisturbed(family: Family, adapter: Adapter) -> Iterator[None]:
    """Draw without dropout, gradients or a trace in the random state, and put everything back."""
    import torch

    devices = [family.device] if family.device.type != "cpu" else []
    modes = [dropout.training for dropout in adapter.dropouts]
    adapter.train(False)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for dropout, mode in zip(adapter.dropouts, modes, strict=True):
            dropout.train(mode)


def _words(error: Exception) -> str:
    if isinstance(error, LorasmithError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
