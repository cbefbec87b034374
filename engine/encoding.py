"""Encoding every picture and prompt of a run once, before its first step: how large that is, and how far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, Sample
from lorasmith.engine.dataset.cache import (
    EncodedPictures,
    LatentCache,
    TextCache,
    cache_latents,
    cache_prompts,
    latent_key,
    prompt_key,
)
from lorasmith.engine.dataset.cache_size import latent_bytes, max_prompts, numbers_of_prompt, prompt_bytes
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.events import Event, Logged, Progress, Stage
from lorasmith.engine.families import Conditioning, Family, present_text_parts
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.sources import BaseFiles
from lorasmith.engine.storage import cache_folder, free_bytes, readable_size

SECONDS_BETWEEN_EVENTS = 1.0
_NAMED = 5
_DISK_SLACK = 1.1
"""Files take whole blocks of the disk."""

Emit = Callable[[Event], None]
ShouldStop = Callable[[], bool]


@dataclass
class Encoded:
    """What training reads instead of encoders; no `conditionings` where prompts are encoded as they come."""

    pictures: EncodedPictures
    conditionings: dict[str, Conditioning] | None


@dataclass
class Encoder:
    """Encodes the pictures of `plan` and the prompts of a run with a loaded base model."""

    config: RunConfig
    files: BaseFiles
    family: Family
    plan: BucketPlan
    emit: Emit
    should_stop: ShouldStop
    rungs: Rungs = field(default_factory=Rungs)
    held_out: tuple[Sample, ...] = ()
    """Further pictures, which are not trained; their indices follow those of the plan."""
    reserved_bytes: int = 0
    """What the run itself will write to the disk of the cache."""

    def encode(self, extra_prompts: Sequence[str]) -> Encoded | None:
        """Return everything encoded, or None where the user stopped it: what is done then is in the cache.

        `extra_prompts` are those of previews. The sizes are told beforehand; where the disk has no room for what is
        new, nothing is written.
        """
        prompts = self._prompts(extra_prompts)
        writes = self._tell_size(prompts or [])
        latents, texts = LatentCache(writes=writes), TextCache(writes=writes)
        pictures = self._encode_pictures(latents)
        self._tell_unwritten(latents.problem)
        if self.should_stop():
            return None
        self._tell_masked_out(pictures)
        if prompts is None:
            return Encoded(pictures, None)
        conditionings = self._encode_prompts(prompts, texts)
        self._tell_unwritten(texts.problem)
        return None if self.should_stop() else Encoded(pictures, conditionings)

    @property
    def _samples(self) -> tuple[Sample, ...]:
        return (*self.plan.samples, *self.held_out)

    def _tell_unwritten(self, problem: str) -> None:
        if problem:
            message = f"The cache cannot be written ({problem}). Training goes on; the next start encodes this again."
            self.emit(Logged(severity="warning", message=message))

    def _prompts(self, extra: Sequence[str]) -> list[str] | None:
        """Return every prompt of the run; None where they are encoded as they come: trained, or too many."""
        config = self.config
        if config.adapter.text_encoder:
            return None
        limit = max_prompts(numbers_of_prompt(self.family.spec, self.family.identity), self._number_bytes)
        found = Epochs(self.plan, config).all_captions(config.train.steps * config.train.gradient_accumulation, limit)
        if found is not None:
            return sorted(found | set(extra))
        message = (
            f"The run has over {limit:,} different prompts, too many to keep in memory. The text encoder stays in "
            "memory instead and encodes them as they come, which takes more GPU memory and time. To avoid that, train "
            "fewer steps, or switch captions.shuffle, captions.tag_dropout and captions.wildcards off."
        )
        self.emit(Logged(severity="warning", message=message))
        return None

    @property
    def _number_bytes(self) -> int:
        return torch.empty((), dtype=self.family.dtype).element_size()

    def _tell_size(self, prompts: Sequence[str]) -> bool:
        """Say how much is new and what it takes; return whether the disk has room for it."""
        spec, latents, texts = self.family.spec, LatentCache(), TextCache()
        vae, text = self.files.fingerprint("vae"), self._text_fingerprint()
        settings, samples = self.config.dataset, self._samples
        new = [s for s in samples if not latents.has(latent_key(s, self.family, vae, settings))]
        unread = sum(not texts.has(prompt_key(prompt, self.family, text)) for prompt in prompts)
        needed = latent_bytes(new, spec, self._number_bytes)
        needed += unread * prompt_bytes(numbers_of_prompt(spec, self.family.identity), self._number_bytes)
        folder = cache_folder()
        free = free_bytes(folder)
        known = len(samples) - len(new) + len(prompts) - unread
        message = f"To encode: {_count(len(new), 'picture')} and {_count(unread, 'caption')}"
        message += f", about {readable_size(needed)} in {folder}" if needed else ""
        self.emit(Logged(severity="info", message=message + (f"; {known} are there already." if known else ".")))
        if not needed or needed * _DISK_SLACK + self.reserved_bytes <= free:
            return True
        reserved = readable_size(self.reserved_bytes)
        beside = f", of which the run itself may need {reserved}" if self.reserved_bytes else ""
        message = (
            f"The cache is not written: it needs about {readable_size(needed)}, but only {readable_size(free)} are "
            f"free in {folder}{beside}. Training goes on, and the next start encodes all of it again. "
            "Free some space, or let LORASMITH_CACHE name a folder on another disk."
        )
        self.emit(Logged(severity="warning", message=message))
        return False

    def _text_fingerprint(self) -> str:
        return self.files.fingerprint(*present_text_parts(self.family.spec, self.family.identity))

    def _encode_pictures(self, cache: LatentCache) -> EncodedPictures:
        report = report_progress(self.emit, "cache")
        return cache_latents(
            self._samples,
            self.family,
            self.files.fingerprint("vae"),
            self.config.dataset,
            lambda done, total: report("Encoding pictures", done, total),
            self.should_stop,
            cache,
            self.rungs,
        )

    def _encode_prompts(self, prompts: Sequence[str], cache: TextCache) -> dict[str, Conditioning]:
        report = report_progress(self.emit, "cache")
        return cache_prompts(
            prompts,
            self.family,
            self._text_fingerprint(),
            lambda done, total: report("Encoding captions", done, total),
            self.should_stop,
            cache,
            self.rungs,
        )

    def _tell_masked_out(self, pictures: EncodedPictures) -> None:
        """Name the pictures of which a mask leaves out everything, or everything of a part that is used."""
        samples = self._samples
        black = {samples[index].item.relative for index, mask in pictures.masks.items() if not mask.any()}
        if not black:
            return
        weight = self.config.objective.unmasked_weight
        effect = "nothing is learnt from those" if weight == 0 else f"those count {weight:g} times only"
        names = ", ".join(sorted(black)[:_NAMED]) + (f" and {len(black) - _NAMED} more" if len(black) > _NAMED else "")
        message = f"Masks leave out all of what is used of {_count(len(black), 'picture')} ({names}): {effect}."
        self.emit(Logged(severity="warning", message=message))


def report_progress(emit: Emit, stage: Stage) -> Callable[[str, int, int], None]:
    """Return a callback `(label, done, total)` that emits Progress events with the time that is left.

    For each label at most some two hundred, or one a second where that is more. The time that is left follows from the
    pace since the label's first call, so that what was in the cache already does not count.
    """
    begun: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def on_progress(label: str, done: int, total: int) -> None:
        now = time.monotonic()
        since, before = begun.setdefault(label, (now, done))
        due = done % max(1, total // 200) == 0 or now - told.get(label, now) >= SECONDS_BETWEEN_EVENTS
        if not due and done != total:
            return
        told[label] = now
        pace = (now - since) / (done - before) if done > before else None
        left = None if pace is None else pace * (total - done)
        emit(Progress(stage=stage, label=label, done=done, total=total, seconds_left=left))

    return on_progress


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
