"""Batches of pictures, cropped to their training sizes and decoded in threads ahead of the encoder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import Sample, fit_mask, fit_picture
from lorasmith.engine.dataset.cache_size import pictures_at_once
from lorasmith.engine.dataset.images import Picture, read_mask, read_picture
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.out_of_memory import is_out_of_memory
from lorasmith.engine.storage import sha256_file


@dataclass
class Decoded:
    """A sample's pixels (H, W, 3) and mask (H, W) at its training size, both uint8."""

    pixels: torch.Tensor
    mask: torch.Tensor | None


def decoded_batches(
    jobs: Sequence[Sample], settings: DatasetSettings, most: int
) -> Generator[tuple[list[Sample], list[Decoded]]]:
    """Yield batches of one bucket, of at most `most`, decoding the next batches meanwhile."""
    workers = min(8, os.cpu_count() or 1, most)
    batches = deque(_batches(jobs, most))
    running: deque[tuple[list[Sample], list[Future[Decoded]]]] = deque()
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


def _batches(jobs: Sequence[Sample], most: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in jobs:
        size = min(most, pictures_at_once(sample.bucket.width * sample.bucket.height))
        if batch and (batch[0].bucket != sample.bucket or len(batch) >= size):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _decode(sample: Sample, settings: DatasetSettings) -> Decoded:
    try:
        picture = read_picture(sample.item.path, settings.alpha_background)
    except DatasetError as error:
        # It was read before, so that not the picture is at fault.
        if error.__cause__ is not None and is_out_of_memory(error.__cause__):
            raise error.__cause__ from None
        raise
    if picture.sha256 != sample.item.sha256:
        raise _changed(sample.item.relative)
    image: Image.Image = fit_picture(picture.image, sample.bucket, sample.offset)
    if sample.flipped:
        image = ImageOps.mirror(image)
    mask = _mask_of(sample, picture, settings)
    fitted = None if mask is None else fit_mask(mask, picture.image.size, sample)
    return Decoded(_bytes(image), None if fitted is None else _bytes(fitted))


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


def mask_source(sample: Sample, settings: DatasetSettings) -> str:
    """Return where a sample's mask comes from: its file's hash, "alpha" for its transparency, "" where it has none."""
    if settings.masks != "off" and sample.item.mask_path is not None:
        return sample.item.mask_sha256
    return "alpha" if settings.masks == "alpha" and sample.item.transparent else ""
