"""Encoding every picture and prompt once, and keeping the results on disk for later runs.

An entry's name is the hash of everything that its content depends on: the picture's bytes, how it is decoded and
cropped, the encoder and its number format (and for prompts the text). Whatever changes one of these changes the name,
so an entry is never stale. A torn or foreign file under an entry's name is computed again.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import Sample
from lorasmith.engine.dataset.cache_size import prompts_at_once
from lorasmith.engine.dataset.decode_ahead import Decoded, decoded_batches, mask_source
from lorasmith.engine.dataset.images import DECODE_VERSION
from lorasmith.engine.dataset.tensor_cache import TensorCache, key_digest, own_copy
from lorasmith.engine.errors import TrainingError
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.out_of_memory import FREE_CACHE, Limit, Rung, Rungs

TEXT_VERSION = "1"
"""Part of every prompt's key: to be raised whenever the same prompt is encoded in another way than before."""
_MAX_BATCH = 16

Progress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


class LatentCache(TensorCache):
    """Latents of pictures on disk, each with the mask of the picture where it has one."""

    def __init__(self, folder: Path | None = None, *, writes: bool = True) -> None:
        super().__init__("latents", folder, writes=writes)


class TextCache(TensorCache):
    """Embeddings of prompts on disk."""

    def __init__(self, folder: Path | None = None, *, writes: bool = True) -> None:
        super().__init__("prompts", folder, writes=writes)


@dataclass
class EncodedPictures:
    """By sample index, on the CPU: latents (C, h, w) as the encoder gave them, and masks (1, h, w) uint8, 255: learn.

    Pictures without a mask have none here.
    """

    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return how many samples have latents."""
        return len(self.latents)

    def add(self, index: int, entry: Mapping[str, torch.Tensor]) -> None:
        """Take over an entry of the cache."""
        self.latents[index] = entry["latents"]
        if "mask" in entry:
            self.masks[index] = entry["mask"]


def latent_key(sample: Sample, family: Family, fingerprint: str, settings: DatasetSettings) -> dict[str, str]:
    """Return everything that the latents of `sample` depend on; the background counts for transparent pictures only."""
    return {
        "picture": sample.item.sha256,
        "decode": DECODE_VERSION,
        "background": settings.alpha_background if sample.item.transparent else "",
        "bucket": str(sample.bucket),
        "crop": str(sample.offset),
        "flipped": str(sample.flipped),
        "mask": mask_source(sample, settings),
        "family": family.spec.name,
        "encoder": fingerprint,
        "dtype": str(family.dtype),
        **_tiles(sample, family),
    }


def _tiles(sample: Sample, family: Family) -> dict[str, str]:
    """Return what encoding in tiles adds to the key of `sample`: nothing where the picture is one tile."""
    larger = max(sample.bucket.width, sample.bucket.height) > family.tile_side
    return {"tiles": str(family.tile_side)} if family.tile_side and larger else {}


def prompt_key(prompt: str, family: Family, fingerprint: str) -> dict[str, str]:
    """Return everything that the embeddings of `prompt` depend on."""
    return {
        "prompt": prompt,
        "version": TEXT_VERSION,
        "family": family.spec.name,
        "encoder": fingerprint,
        "dtype": str(family.dtype),
    }


def cache_latents(
    samples: Sequence[Sample],
    family: Family,
    fingerprint: str,
    settings: DatasetSettings,
    on_progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    cache: LatentCache | None = None,
    rungs: Rungs | None = None,
) -> EncodedPictures:
    """Return the latents and masks of each sample.

    What the disk lacks is decoded in threads ahead of the encoder, which works on batches of one bucket; where memory
    runs out, on smaller ones, and at last in tiles. `on_progress(done, total)` counts samples. When `should_stop` turns
    true, what is done so far is returned; it is on disk as well. Raises DatasetError where a picture changed since the
    scan or cannot be read any more, TrainingError where latents are not finite, HardwareError where memory does not
    suffice for one picture. `fingerprint` is that of the image encoder's files.
    """
    rungs = rungs or Rungs()
    job = _LatentJob(samples, family, fingerprint, settings, cache or LatentCache(), on_progress, should_stop)
    limit = job.limit
    ladder = [
        FREE_CACHE,
        limit.rung(4, "pictures are encoded"),
        limit.rung(1, "picture is encoded"),
        Rung("apart", "the text encoder waits in main memory meanwhile", lambda: family.save_memory("apart")),
        Rung("tiles", "large pictures are encoded in overlapping tiles", lambda: family.save_memory("tiles")),
    ]
    rungs.retake("image encode", ladder)
    fix = f"Lower dataset.resolution (now {settings.resolution}), or close other programs that use this memory."
    return rungs.attempt("image encode", job.run, ladder, fix=fix)


@dataclass
class _LatentJob:
    """The latents of all samples; `run` may be called again after a failure, and does what is missing."""

    samples: Sequence[Sample]
    family: Family
    fingerprint: str
    settings: DatasetSettings
    store: LatentCache
    on_progress: Progress | None
    should_stop: ShouldStop | None

    def __post_init__(self) -> None:
        self.limit = Limit(_MAX_BATCH)
        self._done = EncodedPictures()
        self._digests: dict[int, str] = {}

    def run(self) -> EncodedPictures:
        keys = {s.index: latent_key(s, self.family, self.fingerprint, self.settings) for s in self.samples}
        missing = self._find_missing(keys)
        _report(self.on_progress, len(self._done), len(self.samples))
        jobs = sorted((group[0] for group in missing.values()), key=lambda sample: (sample.bucket, sample.index))
        with contextlib.closing(decoded_batches(jobs, self.settings, self.limit.most)) as batches:
            for batch, decoded in batches:
                if self.should_stop is not None and self.should_stop():
                    break
                for sample, entry in zip(batch, _encode(self.family, decoded, batch), strict=True):
                    key = keys[sample.index]
                    self.store.store(key, entry)
                    digest = key_digest(key)
                    for twin in missing[digest]:
                        self._take(twin, digest, entry)
                _report(self.on_progress, len(self._done), len(self.samples))
        return self._done

    def _find_missing(self, keys: Mapping[int, Mapping[str, str]]) -> dict[str, list[Sample]]:
        """Take what is on disk; return the others by their keys' digests: the same picture twice is encoded once."""
        missing: dict[str, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            digest = key_digest(keys[sample.index])
            if self._digests.get(sample.index) == digest:
                continue
            self._done.latents.pop(sample.index, None)
            entry = self.store.load(keys[sample.index])
            if entry is not None and "latents" in entry:
                self._take(sample, digest, entry)
            else:
                missing[digest].append(sample)
        return missing

    def _take(self, sample: Sample, digest: str, entry: Mapping[str, torch.Tensor]) -> None:
        self._done.add(sample.index, entry)
        self._digests[sample.index] = digest


def cache_prompts(
    prompts: Iterable[str],
    family: Family,
    fingerprint: str,
    on_progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    cache: TextCache | None = None,
    rungs: Rungs | None = None,
) -> dict[str, Conditioning]:
    """Return the conditioning of each prompt, on the CPU, from disk or encoded now; in smaller batches where need be.

    `on_progress(done, total)` counts different prompts. When `should_stop` turns true, what is done so far is returned.
    `fingerprint` is that of the text encoders' and tokenizers' files. Raises HardwareError where memory does not
    suffice for one prompt.
    """
    rungs, limit = rungs or Rungs(), Limit(prompts_at_once(family.spec.token_limit))
    ladder = [
        FREE_CACHE,
        limit.rung(4, "captions are encoded"),
        limit.rung(1, "caption is encoded"),
        Rung("apart", "the image encoder is out of memory meanwhile", lambda: family.save_memory("apart")),
    ]
    rungs.retake("text encode", ladder)
    store = cache or TextCache()
    wanted = sorted(set(prompts))
    done: dict[str, Conditioning] = {}
    for prompt in wanted:
        entry = store.load(prompt_key(prompt, family, fingerprint))
        if entry is not None:
            done[prompt] = entry
    _report(on_progress, len(done), len(wanted))

    def encode_missing() -> dict[str, Conditioning]:
        while missing := [prompt for prompt in wanted if prompt not in done][: limit.most]:
            if should_stop is not None and should_stop():
                break
            # no_grad and not inference_mode: inference tensors cannot take part in training later.
            with torch.no_grad():
                encoded = family.encode_prompts(missing)
            for prompt, conditioning in zip(missing, encoded, strict=True):
                done[prompt] = {name: own_copy(tensor) for name, tensor in conditioning.items()}
                store.store(prompt_key(prompt, family, fingerprint), done[prompt])
            _report(on_progress, len(done), len(wanted))
        return done

    fix = "Close other programs that use this memory, or set train.precision to bf16."
    return rungs.attempt("text encode", encode_missing, ladder, fix=fix)


def _encode(family: Family, decoded: Sequence[Decoded], batch: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
    # Channels stay last in memory, as decoded: on a CPU the encoder is a third faster so.
    pixels = torch.stack([each.pixels for each in decoded]).permute(0, 3, 1, 2)
    # Bytes travel to the device, a quarter of the floats.
    scaled = pixels.to(family.device).to(torch.float32).div_(127.5).sub_(1.0)
    with torch.no_grad():
        latents = family.encode_images(scaled.to(family.dtype)).cpu()
    entries = []
    for sample, each, latent in zip(batch, decoded, latents, strict=True):
        if not bool(torch.isfinite(latent).all()):
            raise TrainingError(
                f"The image encoder gave no finite values for {sample.item.relative}.",
                why=f"It ran in {str(family.dtype).removeprefix('torch.')}.",
                fix="Set train.precision to bf16 or fp32.",
            )
        mask = {} if each.mask is None else {"mask": _shrunk(each.mask, (latent.shape[-2], latent.shape[-1]))}
        entries.append({"latents": own_copy(latent), **mask})
    return entries


def _shrunk(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Average a mask (H, W) uint8 down to (1, h, w) uint8, as sd-scripts and OneTrainer do by area."""
    return torch.nn.functional.adaptive_avg_pool2d(mask.float()[None], size).round().to(torch.uint8)


def _report(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
