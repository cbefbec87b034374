"""Encoding every picture and prompt once, and keeping the results on disk for later runs.

An entry's name is the hash of everything that its content depends on: the picture's bytes, how it is decoded and
cropped, the encoder and its number format (and for prompts the text). Whatever changes one of these changes the name,
so an entry is never stale. A torn or foreign file under an entry's name is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import Sample, fit_picture
from lorasmith.engine.dataset.images import DECODE_VERSION, read_picture
from lorasmith.engine.errors import DatasetError, TrainingError
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.storage import cache_folder

TEXT_VERSION = "1"
"""Part of every prompt's key: to be raised whenever the same prompt is encoded in another way than before."""
_BATCH_PIXELS = 4 * 512 * 512
_MAX_BATCH = 16
_PROMPT_BATCH = 16
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]
Tensors = dict[str, torch.Tensor]


class TensorCache:
    """Named tensors on disk, one safetensors file for each key; keys are plain values by name."""

    def __init__(self, kind: str, folder: Path | None = None) -> None:
        """Keep entries of `kind` (a folder name) below `folder`, or below `cache_folder()`."""
        self._folder = (folder or cache_folder()) / kind
        self._write_failed = False

    def path(self, key: Mapping[str, str]) -> Path:
        """Return where the entry of `key` lies, whether it exists or not."""
        name = hashlib.sha256(_key_text(key).encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def load(self, key: Mapping[str, str]) -> Tensors | None:
        """Return the tensors of `key`; None where there are none, or the file is torn or holds something else."""
        try:
            with safe_open(self.path(key), framework="pt", device="cpu") as file:
                facts = file.metadata() or {}
                tensors = {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, RuntimeError):
            return None
        intact = facts.get("key") == _digest(key) and facts.get("crc32") == _checksum(tensors)
        return tensors if intact else None

    def store(self, key: Mapping[str, str], tensors: Tensors) -> None:
        """Write the entry in one step, so that other processes see all of it or nothing.

        A full or read-only disk costs the next run time, not this one its life: it is logged once.
        """
        path = self.path(key)
        data = save(tensors, {"key": _digest(key), "crc32": _checksum(tensors)})
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self._write_failed:
                _log.warning("Cannot write the cache in %s (%s); it is computed again next time.", self._folder, error)
            self._write_failed = True


class LatentCache(TensorCache):
    """Latents of pictures on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("latents", folder)


class TextCache(TensorCache):
    """Embeddings of prompts on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("prompts", folder)


def latent_key(sample: Sample, family: Family, fingerprint: str, settings: DatasetSettings) -> dict[str, str]:
    """Return everything that the latents of `sample` depend on; the background counts for transparent pictures only."""
    return {
        "picture": sample.item.sha256,
        "decode": DECODE_VERSION,
        "background": settings.alpha_background if sample.item.transparent else "",
        "bucket": str(sample.bucket),
        "flipped": str(sample.flipped),
        "family": family.spec.name,
        "encoder": fingerprint,
        "dtype": str(family.dtype),
    }


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
) -> dict[int, torch.Tensor]:
    """Return the latents (C, h, w) of each sample by its index, on the CPU in the dtype that the encoder gave.

    What the disk lacks is decoded in threads ahead of the encoder, which works on batches of one bucket.
    `on_progress(done, total)` counts samples. When `should_stop` turns true, what is done so far is returned; it is on
    disk as well. Raises DatasetError where a picture changed since the scan or cannot be read any more, TrainingError
    where latents are not finite. `fingerprint` is that of the image encoder's files.
    """
    store = cache or LatentCache()
    keys = {sample.index: latent_key(sample, family, fingerprint, settings) for sample in samples}
    latents: dict[int, torch.Tensor] = {}
    missing: dict[str, list[Sample]] = defaultdict(list)  # equal keys (the same picture twice) are encoded once
    for sample in samples:
        entry = store.load(keys[sample.index])
        if entry is not None and "latents" in entry:
            latents[sample.index] = entry["latents"]
        else:
            missing[_digest(keys[sample.index])].append(sample)
    _report(on_progress, len(latents), len(samples))
    jobs = sorted((group[0] for group in missing.values()), key=lambda sample: (sample.bucket, sample.index))
    with contextlib.closing(_decoded_batches(jobs, settings.alpha_background)) as batches:
        for batch, pixels in batches:
            if should_stop is not None and should_stop():
                break
            for sample, latent in zip(batch, _encode(family, pixels, batch), strict=True):
                key = keys[sample.index]
                store.store(key, {"latents": latent})
                latents.update((twin.index, latent) for twin in missing[_digest(key)])
            _report(on_progress, len(latents), len(samples))
    return latents


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
            done[prompt] = {name: _own(tensor) for name, tensor in conditioning.items()}
            store.store(prompt_key(prompt, family, fingerprint), done[prompt])
        _report(on_progress, len(done), len(wanted))
    return done


def _decoded_batches(jobs: Sequence[Sample], background: str) -> Generator[tuple[list[Sample], torch.Tensor]]:
    """Yield batches of one bucket with pixels (B, 3, H, W) uint8, decoding the next batches meanwhile."""
    workers = min(8, os.cpu_count() or 1)
    batches = deque(_batches(jobs))
    running: deque[tuple[list[Sample], list[Future[torch.Tensor]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while batches or running:
            # Two batches or two pictures a worker ahead keep everyone busy; more would only fill the memory.
            while batches and (len(running) < 2 or sum(len(futures) for _, futures in running) < 2 * workers):
                batch = batches.popleft()
                running.append((batch, [pool.submit(_pixels, sample, background) for sample in batch]))
            batch, futures = running.popleft()
            # Channels stay last in memory, as decoded: on a CPU the encoder is a third faster so.
            yield batch, torch.stack([future.result() for future in futures]).permute(0, 3, 1, 2)
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


def _pixels(sample: Sample, background: str) -> torch.Tensor:
    picture = read_picture(sample.item.path, background)
    if picture.sha256 != sample.item.sha256:
        raise DatasetError(
            f"{sample.item.relative} changed after it was scanned.",
            why="Its latents would be kept under the name of another picture.",
            fix="Start again when the dataset is no longer edited.",
        )
    image: Image.Image = fit_picture(picture.image, sample.bucket)
    if sample.flipped:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image))


def _encode(family: Family, pixels: torch.Tensor, batch: Sequence[Sample]) -> list[torch.Tensor]:
    # Bytes travel to the device, a quarter of the floats.
    scaled = pixels.to(family.device).to(torch.float32).div_(127.5).sub_(1.0)
    with torch.no_grad():
        latents = family.encode_images(scaled.to(family.dtype)).cpu()
    for sample, latent in zip(batch, latents, strict=True):
        if not bool(torch.isfinite(latent).all()):
            raise TrainingError(
                f"The image encoder gave no finite values for {sample.item.relative}.",
                why=f"It ran in {str(family.dtype).removeprefix('torch.')}.",
                fix="Set train.precision to bf16 or fp32.",
            )
    return [_own(latent) for latent in latents]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    # A view would keep its whole batch in memory, and a loaded tensor its file open.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _key_text(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True, ensure_ascii=True)


def _digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(_key_text(key).encode()).hexdigest()


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    # The files are not synced: after a power cut one may have its length and header, but zeros for data.
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def _report(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
