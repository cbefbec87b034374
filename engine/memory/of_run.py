"""The memory forecast of a run as planned: its settings, the headers of its base model, and its pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.memory.calibration import UNKNOWN, Calibration
from lorasmith.engine.memory.constants import find_memory
from lorasmith.engine.memory.forecast import Forecast, Subject, can_forecast, forecast
from lorasmith.engine.memory.simulated import cached_model_memory, cached_step_memory, model_key, step_key
from lorasmith.engine.memory.sizes import denoiser_tensors

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import FamilySpec
    from lorasmith.engine.sources import BaseFiles

USUAL_PICTURES = 20
"""Pictures of a dataset that is not known yet."""
WORTH_COUNTING = 100_000_000
"""A denoiser with fewer weights fits everywhere."""
_MEASURE = "`lorasmith plan --measure RUN.toml` tries each stage once and measures it"


@dataclass(frozen=True)
class Stored:
    """The denoiser as its files hold it: how many numbers, and the format of most of them, such as `BF16`."""

    numbers: int
    dtype: str


@dataclass(frozen=True)
class Known:
    """What is known of a run: None where it is not yet.

    `pixels` are those of the largest bucket, `num_parameters` the adapter's, `keeps_text` whether there are too many
    prompts to encode them beforehand. `stored` saves reading the headers again.
    """

    spec: FamilySpec | None
    files: BaseFiles | None
    pixels: int
    num_parameters: int | None = None
    number_of_pictures: int = USUAL_PICTURES
    keeps_text: bool | None = None
    calibration: Calibration = UNKNOWN
    stored: Stored | None = None


def stored_weights(files: BaseFiles) -> Stored:
    """Return what the headers of the denoiser's files tell."""
    counts: dict[str, int] = {}
    for info in denoiser_tensors(files).values():
        counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
    return Stored(sum(counts.values()), max(counts, key=lambda dtype: counts[dtype], default=""))


def forecast_run(config: RunConfig, known: Known) -> tuple[Forecast | None, str]:
    """Return the forecast of a run and what it rests on; None and the reason where there is none."""
    subject, reason = subject_of(config, known)
    if subject is None:
        return None, reason
    found = forecast(subject)
    return found, found.basis


def subject_of(config: RunConfig, known: Known) -> tuple[Subject | None, str]:
    """Return what is to be forecast, or None and the reason why nothing can be."""
    if known.spec is None or known.files is None:
        return None, "forecast once the base model is on this machine"
    stored = known.stored or stored_weights(known.files)
    model = find_memory(known.spec.name, stored.numbers)
    if model is None and stored.numbers >= WORTH_COUNTING:
        model = cached_model_memory(known.spec.name, model_key(known.spec.name, known.files))
    if model is None:
        return None, f"not forecast: this base model is of another size than those that were counted; {_MEASURE}"
    subject = Subject(
        config=config,
        spec=known.spec,
        model=model,
        megapixels=known.pixels / 1e6,
        num_parameters=known.num_parameters,
        number_of_pictures=known.number_of_pictures,
        calibration=known.calibration.memory,
        runs=known.calibration.runs,
        keeps_text=known.keeps_text,
        training_adapter_bytes=_training_adapter_bytes(config),
        mapped=_is_mapped(config, stored),
    )
    reason = can_forecast(subject)
    if reason:
        # Somebody may have had it counted on this machine.
        subject = replace(subject, step=cached_step_memory(step_key(known.spec.name, known.files, config)))
        reason = can_forecast(subject)
    return (None, f"not forecast: {reason} {_MEASURE[0].upper()}{_MEASURE[1:]}.") if reason else (subject, "")


def lacks_only_counting(config: RunConfig, known: Known) -> bool:
    """Tell whether there would be a forecast if this model, or a step with this adapter, were counted."""
    if known.spec is None or known.files is None or config.adapter.text_encoder:
        return False
    stored = known.stored or stored_weights(known.files)
    return stored.numbers >= WORTH_COUNTING and subject_of(config, known)[0] is None


def _is_mapped(config: RunConfig, stored: Stored) -> bool:
    """Tell whether most weights have the format that is computed in; `auto` is bf16 on the cards of today."""
    return stored.dtype == {"fp32": "F32", "fp16": "F16"}.get(config.train.precision, "BF16")


def _training_adapter_bytes(config: RunConfig) -> int:
    """Return the bytes of the training adapter where it is a file here: its weights are kept on the card in 16 bits."""
    path = Path(config.base.training_adapter.strip() or ".").expanduser()
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
