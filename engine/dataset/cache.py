"""Encoding every picture and prompt once, and keeping the results on disk for later runs.

An entry's name is the hash of everything that its content depends on: the picture's bytes, how it is decoded and
cropped, the encoder and its number format (and for prompts the text). Whatever changes one of these changes the name,
so an entry is never stale. A torn or foreign file under an entry's name is computed again.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import Sample, fit_mask, fit_picture
from lorasmith.engine.dataset.images import DECODE_VERSION, Picture, read_mask, read_picture
from lorasmith.engine.dataset.tensor_cache import TensorCache, key_digest, own_copy
from lorasmith.engine.errors import DatasetError, TrainingError
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.storage import sha256_file

TEXT_VERSION = "1"
"""Part of every prompt's key: to be raised whenever the same prompt is encoded in another way than before."""
_BATCH_PIXELS = 4 * 512 * 512
_MAX_BATCH = 16
_PROMPT_BATCH = 16

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
    }


def mask_source(sample: Sample, settings: DatasetSettings) -> str:
    """Return where a sample's mask comes from: its file's hash, "alpha" for its transparency, "" where it has none."""
    if settings.masks != "off" and sample.item.mask_path is not None:
        return sample.item.mask_sha256
    return "alpha" if settings.masks == "alpha" and sample.item.transparent else ""


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
) -> EncodedPictures:
    """Return the latents and masks of each sample.

    What the disk lacks is decoded in threads ahead of the encoder, which works on batches of one bucket.
    `on_progress(done, total)` counts samples. When `should_stop` turns true, what is done so far is returned; it is on
    disk as well. Raises DatasetError where a picture changed since the scan or cannot be read any more, TrainingError
    where latents are not finite. `fingerprint` is that of the image encoder's files.
    """
    store = cache or LatentCache()
    keys = {sample.index: latent_key(sample, family, fingerprint, settings) for sample in samples}
    done = EncodedPictures()
    missing: dict[str, list[Sample]] = defaultdict(list)  # equal keys (the same picture twice) are encoded once
    for sample in samples:
        entry = store.load(keys[sample.index])
        if entry is not None and "latents" in entry:
            done.add(sample.index, entry)
        else:
            missing[key_digest(keys[sample.index])].append(sample)
    _report(on_progress, len(done), len(samples))
    jobs = sorted((group[0] for group in missing.values()), key=lambda sample: (sample.bucket, sample.index))
    with contextlib.closing(_decoded_batches(jobs, settings)) as batches:
        for batch, decoded in batches:
            if should_stop is not None and should_stop():
                break
            for sample, entry in zip(batch, _encode(family, decoded, batch), strict=True):
                key = keys[sample.index]
                store.store(key, entry)
                for twin in missing[key_digest(key)]:
                    done.add(twin.index, entry)
            _report(on_progress, len(done), len(samples))
    return done


def cache_prompts(
    prompts: Iterable[str],
    family: Family,
    fingerprint: str,
    on_progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
    cache: TextCache | None = None,
) -> dict[str, Conditioning]:
    """Return the conditioning of each prompt, on the CPU, from disk or encoded now.

    `on_progress(done, total)` counts different prompts. When `should_stop` turns true, what is done so far is returned.
    `fingerprint` is that of the text encoders' and tokenizers' files.
    """
    store = cache or TextCache()
    wanted = sorted(set(prompts))
    done: dict[str, Conditioning] = {}
    for prompt in wanted:
        entry = store.load(prompt_key(prompt, family, fingerprint))
        if entry is not None:
            done[prompt] = entry
    _report(on_progress, len(done), len(wanted))
    missing = [prompt for prompt in wanted if prompt not in done]
    for start in range(0, len(missing), _PROMPT_BATCH):
        if should_stop is not None and should_stop():
            break
        batch = missing[start : start + _PROMPT_BATCH]
        # no_grad and not inference_mode: inference tensors cannot take part in training later.
        with torch.no_grad():
            encoded = family.encode_prompts(batch)
        for prompt, conditioning in zip(batch, encoded, strict=True):
            done[prompt] = {name: own_copy(tensor) for name, tensor in conditioning.items()}
            store.store(prompt_key(prompt, family, fingerprint), done[prompt])
        _report(on_progress, len(done), len(wanted))
    return done


@dataclass
class _Decoded:
    """A sample's pixels (H, W, 3) and mask (H, W) at its training size, both uint8."""

    pixels: torch.Tensor
    mask: torch.Tensor | None


def _decoded_batches(
    jobs: Sequence[Sample], settings: DatasetSettings
) -> Generator[tuple[list[Sample], list[_Decoded]]]:
    """Yield batches of one bucket, decoding the next batches meanwhile."""
    workers = min(8, os.cpu_count() or 1)
    batches = deque(_batches(jobs))
    running: deque[tuple[list[Sample], list[Future[_Decoded]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while batches or running:
            # Two batches or two pictures a worker ahead keep everyone busy; more would only fill the memory.
            while batches and (len(running) < 2 or sum(len(futures) for _, futures in running) < 2 * workers):
                batch = batches.popleft()
                running.append((batch, [pool.submit(_decode, sample, settings) for sample in batch]))
            batch, futures = running.popleft()
            yield batch, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(jobs: Sequence[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in jobs:
        size = max(1, min(_MAX_BATCH, _BATCH_PIXELS // (sample.bucket.width * sample.bucket.height)))
        if batch and (batch[0].bucket != sample.bucket or len(batch) >= size):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _decode(sample: Sample, settings: DatasetSettings) -> _Decoded:
    picture = read_picture(sample.item.path, settings.alpha_background)
    if picture.sha256 != sample.item.sha256:
        raise _changed(sample.item.relative)
    image: Image.Image = fit_picture(picture.image, sample.bucket, sample.offset)
    if sample.flipped:
        image = ImageOps.mirror(image)
    mask = _mask_of(sample, picture, settings)
    fitted = None if mask is None else fit_mask(mask, picture.image.size, sample)
    return _Decoded(_bytes(image), None if fitted is None else _bytes(fitted))


def _mask_of(sample: Sample, picture: Picture, settings: DatasetSettings) -> Image.Image | None:
    """Return the whole picture's mask, in the size that it has, or None."""
    source, path = mask_source(sample, settings), sample.item.mask_path
    if source in ("", "alpha") or path is None:
        return picture.alpha if source == "alpha" else None
    if sha256_file(path) != source:
        raise _changed(f"The mask of {sample.item.relative}")
    return read_mask(path)


def _bytes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def _changed(name: str) -> DatasetError:
    return DatasetError(
        f"{name} changed after it was scanned.",
        why="Its latents would be kept under the name of another picture.",
        fix="Start again when the dataset is no longer edited.",
    )


def _encode(family: Family, decoded: Sequence[_Decoded], batch: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
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
