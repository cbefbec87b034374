"""The cache of latents and prompts: computed once, never stale, never torn."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset import cache as cache_module
from lorasmith.engine.dataset import cache_size, decode_ahead
from lorasmith.engine.dataset.buckets import Sample, plan_buckets
from lorasmith.engine.dataset.cache import (
    EncodedPictures,
    LatentCache,
    TextCache,
    cache_latents,
    cache_prompts,
    latent_key,
    prompt_key,
)
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.errors import DatasetError, TrainingError
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.storage import cache_folder


class FakeFamily:
    """Encodes a picture to its 8×8 block means and a prompt to its letters, and remembers what it was given."""

    def __init__(self, name: str = "fake", dtype: torch.dtype = torch.float32) -> None:
        self.spec = SimpleNamespace(name=name, token_limit=77)
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.batches: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.factor = 1.0
        self.tile_side = 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == self.dtype
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        self.batches.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels.float(), 8).to(self.dtype) * self.factor

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        self.prompts += prompts
        codes = torch.tensor([[ord(letter) for letter in prompt.ljust(99)] for prompt in prompts])
        return [{"letters": row, "half": row[::2].float()} for row in codes]

    @property
    def encoded(self) -> int:
        return sum(batch[0] for batch in self.batches)


def as_family(fake: FakeFamily) -> Family:
    return cast(Family, fake)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        size = (64, 64) if number < 4 else (128, 32)
        left, right = Image.new("RGB", size, (40 * number, 0, 0)), Image.new("RGB", size, (0, 200, 40 * number))
        left.paste(right.crop((0, 0, size[0] // 2, size[1])), (0, 0))
        left.save(folder / f"{number}.png")
    Image.new("RGBA", (64, 64), (0, 0, 255, 0)).save(folder / "clear.png")
    return folder


def add_mask(folder: Path, name: str, left: int = 255, right: int = 0) -> None:
    """Write the mask of `folder`/`name`.png: two halves of a gray value each."""
    with Image.open(folder / f"{name}.png") as picture:
        size = picture.size
    mask = Image.new("L", size, right)
    mask.paste(left, (0, 0, size[0] // 2, size[1]))
    mask.save(folder / f"{name}-masklabel.png")


def options(folder: Path, **values: Any) -> DatasetSettings:
    return DatasetSettings.model_validate({"folder": str(folder), "resolution": 64, "bucket_step": 32, **values})


def samples_of(settings: DatasetSettings) -> tuple[Sample, ...]:
    return plan_buckets(scan_dataset(settings).items, settings).samples


def encode(
    settings: DatasetSettings, fake: FakeFamily, store: LatentCache, fingerprint: str = "vae"
) -> EncodedPictures:
    return cache_latents(samples_of(settings), as_family(fake), fingerprint, settings, cache=store)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LORASMITH_CACHE")
    assert cache_folder().name == "lorasmith"


def test_latents_are_those_of_the_picture_and_its_mirrored_twin(folder: Path, tmp_path: Path) -> None:
    settings = options(folder, flip=True)
    latents = encode(settings, FakeFamily(), LatentCache(tmp_path / "cache")).latents
    for sample in samples_of(settings):
        latent = latents[sample.index]
        assert latent.shape == (3, sample.bucket.height // 8, sample.bucket.width // 8)
        if sample.flipped:
            torch.testing.assert_close(latent, latents[sample.index - 1].flip(-1))
    first = latents[0]
    assert first[1, 0, 0].item() == pytest.approx(200 / 127.5 - 1)
    assert first[1, 0, -1].item() == pytest.approx(-1)


def test_a_second_run_encodes_nothing_and_gives_the_same(folder: Path, tmp_path: Path) -> None:
    settings, store = options(folder), LatentCache(tmp_path / "cache")
    fake, again = FakeFamily(), FakeFamily()
    first, second = encode(settings, fake, store).latents, encode(settings, again, store).latents
    assert fake.encoded == 7
    assert again.encoded == 0
    assert first.keys() == second.keys()
    assert all(torch.equal(first[index], second[index]) for index in first)


def test_batches_hold_one_bucket_and_stay_small_for_large_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_size, "ENCODED_PIXELS", 2 * 64 * 64)
    fake = FakeFamily()
    encode(options(folder), fake, LatentCache(tmp_path))
    assert sorted(fake.batches) == [(1, 3, 64, 64), (2, 3, 32, 128), (2, 3, 64, 64), (2, 3, 64, 64)]


CHANGES: dict[str, tuple[Callable[[FakeFamily], FakeFamily], dict[str, Any], str, int]] = {
    "family": (lambda _: FakeFamily("other"), {}, "vae", 7),
    "dtype": (lambda _: FakeFamily(dtype=torch.bfloat16), {}, "vae", 7),
    "encoder": (lambda fake: fake, {}, "another vae", 7),
    "resolution": (lambda fake: fake, {"resolution": 128}, "vae", 7),
    "crop of the wide ones": (lambda fake: fake, {"buckets": False}, "vae", 2),
    "flip adds twins": (lambda fake: fake, {"flip": True}, "vae", 7),
    "random crops of the wide ones": (
        lambda fake: fake,
        {"buckets": False, "crop": "random"},
        "vae",
        2 * 8,
    ),
    "random crops where nothing sticks out": (lambda fake: fake, {"crop": "random"}, "vae", 0),
    "another resolution beside the first": (lambda fake: fake, {"more_resolutions": [128]}, "vae", 0),
    "a smaller resolution beside the first": (lambda fake: fake, {"more_resolutions": [64]}, "vae", 0),
    "background of the transparent one": (lambda fake: fake, {"alpha_background": "black"}, "vae", 1),
    "checkerboard behind the transparent one": (lambda fake: fake, {"alpha_background": "checker"}, "vae", 1),
    "transparency as a mask": (lambda fake: fake, {"masks": "alpha"}, "vae", 1),
    "no masks where there are none": (lambda fake: fake, {"masks": "off"}, "vae", 0),
    "repeats": (lambda fake: fake, {"repeats": 3}, "vae", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_part_of_the_key_recomputes_exactly_what_it_affects(folder: Path, tmp_path: Path, change: str) -> None:
    store = LatentCache(tmp_path / "cache")
    encode(options(folder), FakeFamily(), store)
    make, values, fingerprint, expected = CHANGES[change]
    fake = make(FakeFamily())
    encode(options(folder, **values), fake, store, fingerprint)
    assert fake.encoded == expected


def test_a_changed_picture_alone_is_recomputed_and_a_renamed_one_is_not(folder: Path, tmp_path: Path) -> None:
    store = LatentCache(tmp_path / "cache")
    encode(options(folder), FakeFamily(), store)
    Image.new("RGB", (64, 64), "pink").save(folder / "2.png")
    (folder / "3.png").rename(folder / "renamed.png")
    fake = FakeFamily()
    encode(options(folder), fake, store)
    assert fake.encoded == 1


def test_a_mask_that_is_added_changed_or_removed_recomputes_its_picture_alone(folder: Path, tmp_path: Path) -> None:
    store = LatentCache(tmp_path / "cache")
    encode(options(folder), FakeFamily(), store)

    def count(**values: Any) -> int:
        fake = FakeFamily()
        encode(options(folder, **values), fake, store)
        return fake.encoded

    add_mask(folder, "1")
    assert count() == 1
    assert count() == 0
    add_mask(folder, "1", left=0, right=255)
    assert count() == 1
    assert count(masks="off") == 0  # as before there was a mask
    (folder / "1-masklabel.png").unlink()
    assert count() == 0


def test_a_new_way_of_decoding_recomputes_everything(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LatentCache(tmp_path / "cache")
    encode(options(folder), FakeFamily(), store)
    monkeypatch.setattr(cache_module, "DECODE_VERSION", "next")
    fake = FakeFamily()
    encode(options(folder), fake, store)
    assert fake.encoded == 7


def test_the_same_picture_twice_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    fake = FakeFamily()
    latents = encode(options(folder), fake, LatentCache(tmp_path / "cache"))
    assert fake.encoded == 7
    assert len(latents) == 8


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeros(data: bytes) -> bytes:
    return data[:-64] + bytes(64)


def foreign(_: bytes) -> bytes:
    return b"something else"


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [torn, zeros, foreign, empty])
def test_a_damaged_entry_is_computed_again(folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    settings, store = options(folder), LatentCache(tmp_path / "cache")
    first = encode(settings, FakeFamily(), store).latents
    path = store.path(latent_key(samples_of(settings)[0], as_family(FakeFamily()), "vae", settings))
    path.write_bytes(damage(path.read_bytes()))
    fake = FakeFamily()
    second = encode(settings, fake, store).latents
    assert fake.encoded == 1
    assert torch.equal(first[0], second[0])
    assert encode(settings, again := FakeFamily(), store).latents.keys() == second.keys()
    assert again.encoded == 0


def test_an_entry_under_another_entrys_name_is_computed_again(folder: Path, tmp_path: Path) -> None:
    settings, store = options(folder), LatentCache(tmp_path / "cache")
    encode(settings, FakeFamily(), store)
    one, two = (store.path(latent_key(s, as_family(FakeFamily()), "vae", settings)) for s in samples_of(settings)[:2])
    one.write_bytes(two.read_bytes())
    fake = FakeFamily()
    encode(settings, fake, store)
    assert fake.encoded == 1


def test_a_damaged_entry_with_a_mask_is_computed_again_with_its_mask(folder: Path, tmp_path: Path) -> None:
    add_mask(folder, "0")
    settings, store = options(folder), LatentCache(tmp_path / "cache")
    first = encode(settings, FakeFamily(), store)
    path = store.path(latent_key(samples_of(settings)[0], as_family(FakeFamily()), "vae", settings))
    path.write_bytes(zeros(path.read_bytes()))
    fake = FakeFamily()
    second = encode(settings, fake, store)
    assert fake.encoded == 1
    assert torch.equal(first.masks[0], second.masks[0])


def test_nothing_but_whole_entries_stays_in_the_cache_folder(folder: Path, tmp_path: Path) -> None:
    encode(options(folder), FakeFamily(), LatentCache(tmp_path / "cache"))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all(path.suffix == ".safetensors" for path in files)


def test_a_cache_that_cannot_be_written_costs_time_only(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    latents = encode(options(folder), FakeFamily(), LatentCache(tmp_path / "cache"))
    assert len(latents) == 7
    assert len(caplog.records) == 1
    assert "Cannot write the cache" in caplog.text


def test_progress_counts_hits_and_encodings_up_to_the_total(folder: Path, tmp_path: Path) -> None:
    settings, store, seen = options(folder), LatentCache(tmp_path / "cache"), list[tuple[int, int]]()
    samples = samples_of(settings)
    family = as_family(FakeFamily())
    cache_latents(samples[:3], family, "vae", settings, cache=store)
    cache_latents(samples, family, "vae", settings, lambda *counts: seen.append(counts), cache=store)
    assert seen[0] == (3, 7)
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)


def test_stopping_keeps_what_is_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_size, "ENCODED_PIXELS", 64 * 64)
    settings, store, fake = options(folder), LatentCache(tmp_path / "cache"), FakeFamily()
    samples = samples_of(settings)
    part = cache_latents(
        samples, as_family(fake), "vae", settings, should_stop=lambda: len(fake.batches) == 3, cache=store
    )
    assert len(part) == 3
    rest = FakeFamily()
    assert len(cache_latents(samples, as_family(rest), "vae", settings, cache=store)) == 7
    assert rest.encoded == 4


def test_a_cache_that_is_not_to_be_written_is_read_and_left_alone(folder: Path, tmp_path: Path) -> None:
    settings, fake = options(folder), FakeFamily()
    cache_latents(
        samples_of(settings)[:3], as_family(FakeFamily()), "vae", settings, cache=LatentCache(tmp_path / "cache")
    )
    before = sorted((tmp_path / "cache").rglob("*"))
    pictures = encode(settings, fake, LatentCache(tmp_path / "cache", writes=False))
    assert (len(pictures), fake.encoded) == (7, 4)
    assert sorted((tmp_path / "cache").rglob("*")) == before


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_cut_and_mirrored_like_their_pictures_and_averaged_to_latents(
    folder: Path, tmp_path: Path, flip: bool
) -> None:
    add_mask(folder, "0")
    add_mask(folder, "4")
    settings = options(folder, flip=flip, buckets=False, crop="random")
    pictures = encode(settings, FakeFamily(), LatentCache(tmp_path / "cache"))
    again = encode(settings, FakeFamily(), LatentCache(tmp_path / "cache"))
    samples = samples_of(settings)
    masked = [sample for sample in samples if sample.item.relative in ("0.png", "4.png")]
    assert pictures.masks.keys() == again.masks.keys() == {sample.index for sample in masked}
    for sample in masked:
        mask = pictures.masks[sample.index]
        assert torch.equal(mask, again.masks[sample.index])
        assert (mask.dtype, mask.shape) == (torch.uint8, (1, 8, 8))
        # The left half of these pictures is green, the right half is not; the mask is white over the left half.
        green = (pictures.latents[sample.index][1] + 1) / (200 / 127.5)
        assert (mask[0].float() / 255 - green).abs().max() < 0.12


def test_a_mask_of_another_size_covers_its_picture(folder: Path, tmp_path: Path) -> None:
    add_mask(folder, "0")
    store = LatentCache(tmp_path / "cache")
    first = encode(options(folder), FakeFamily(), store).masks[0]
    with Image.open(folder / "0-masklabel.png") as mask:
        mask.resize((192, 192), Image.Resampling.NEAREST).save(folder / "0-masklabel.png")
    assert torch.equal(encode(options(folder), FakeFamily(), store).masks[0], first)


def test_transparency_is_the_mask_where_that_is_wanted_and_no_file_is(folder: Path, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 255, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    picture.save(folder / "clear.png")
    settings = options(folder, masks="alpha")
    index = next(sample.index for sample in samples_of(settings) if sample.item.relative == "clear.png")
    store = LatentCache(tmp_path / "cache")
    masks = encode(settings, FakeFamily(), store).masks
    assert list(masks) == [index]
    assert masks[index][0, 0].tolist() == [0] * 4 + [255] * 4
    assert encode(options(folder), FakeFamily(), store).masks == {}
    add_mask(folder, "clear")
    assert encode(settings, FakeFamily(), store).masks[index][0, 0].tolist() == [255] * 4 + [0] * 4


def test_a_mask_that_changed_since_the_scan_is_an_error(folder: Path, tmp_path: Path) -> None:
    add_mask(folder, "2")
    settings = options(folder)
    samples = samples_of(settings)
    add_mask(folder, "2", left=7)
    with pytest.raises(DatasetError, match=r"mask of 2\.png changed"):
        cache_latents(samples, as_family(FakeFamily()), "vae", settings, cache=LatentCache(tmp_path / "cache"))


def test_a_picture_that_changed_since_the_scan_is_an_error(folder: Path, tmp_path: Path) -> None:
    settings = options(folder)
    samples = samples_of(settings)
    Image.new("RGB", (64, 64), "pink").save(folder / "2.png")
    with pytest.raises(DatasetError, match=r"2\.png changed"):
        cache_latents(samples, as_family(FakeFamily()), "vae", settings, cache=LatentCache(tmp_path / "cache"))


def test_latents_that_are_not_finite_are_an_error_and_never_kept(folder: Path, tmp_path: Path) -> None:
    fake = FakeFamily()
    fake.factor = float("nan")
    with pytest.raises(TrainingError, match="finite"):
        encode(options(folder), fake, LatentCache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_dataset_folder_is_not_changed(folder: Path, tmp_path: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir()))
    encode(options(folder), FakeFamily(), LatentCache(tmp_path / "cache"))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())) == before


def test_prompts_are_encoded_once_each_and_come_back_the_same(tmp_path: Path) -> None:
    store, fake, again, seen = TextCache(tmp_path), FakeFamily(), FakeFamily(), list[tuple[int, int]]()
    prompts = ["zqx, a dog", "", "zqx, a dog", "ünï 日本", os.fsdecode(b"bad \xff byte")]
    first = cache_prompts(prompts, as_family(fake), "clip", lambda *counts: seen.append(counts), cache=store)
    second = cache_prompts(prompts, as_family(again), "clip", cache=store)
    assert sorted(fake.prompts) == sorted(set(prompts))
    assert again.prompts == []
    assert seen == [(0, 4), (4, 4)]
    assert first.keys() == second.keys() == set(prompts)
    for prompt in prompts:
        assert first[prompt].keys() == second[prompt].keys() == {"letters", "half"}
        assert all(torch.equal(first[prompt][name], second[prompt][name]) for name in first[prompt])
    assert first[""]["letters"].untyped_storage().nbytes() == 99 * 8


def test_a_changed_prompt_or_encoder_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TextCache(tmp_path)
    cache_prompts(["a", "b"], as_family(FakeFamily()), "clip", cache=store)

    def encoded(prompts: list[str], fake: FakeFamily, fingerprint: str = "clip") -> list[str]:
        cache_prompts(prompts, as_family(fake), fingerprint, cache=store)
        return fake.prompts

    assert encoded(["a", "c"], FakeFamily()) == ["c"]
    assert encoded(["a", "b"], FakeFamily(), "other clip") == ["a", "b"]
    assert encoded(["a", "b"], FakeFamily("other")) == ["a", "b"]
    assert encoded(["a", "b"], FakeFamily(dtype=torch.bfloat16)) == ["a", "b"]
    monkeypatch.setattr(cache_module, "TEXT_VERSION", "next")
    assert encoded(["a", "b"], FakeFamily()) == ["a", "b"]


def test_a_torn_prompt_entry_is_encoded_again(tmp_path: Path) -> None:
    store, fake = TextCache(tmp_path), FakeFamily()
    cache_prompts(["a", "b"], as_family(FakeFamily()), "clip", cache=store)
    path = store.path(prompt_key("a", as_family(fake), "clip"))
    path.write_bytes(torn(path.read_bytes()))
    cache_prompts(["a", "b"], as_family(fake), "clip", cache=store)
    assert fake.prompts == ["a"]


def test_encoding_prompts_can_be_stopped(tmp_path: Path) -> None:
    fake = FakeFamily()
    prompts = [str(number) for number in range(40)]
    part = cache_prompts(
        prompts, as_family(fake), "clip", should_stop=lambda: len(fake.prompts) > 0, cache=TextCache(tmp_path)
    )
    assert 0 < len(part) == len(fake.prompts) < 40


def test_pictures_are_decoded_while_others_are_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_size, "ENCODED_PIXELS", 64 * 64)
    decode, decoded = decode_ahead._decode, threading.Semaphore(0)

    def count(sample: Sample, settings: DatasetSettings) -> Any:
        result = decode(sample, settings)
        decoded.release()
        return result

    class WaitingFamily(FakeFamily):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            if not self.batches:  # the first picture only comes back once a second one was decoded beside it
                assert all(decoded.acquire(timeout=20) for _ in range(2))
            return super().encode_images(pixels)

    monkeypatch.setattr(decode_ahead, "_decode", count)
    assert len(encode(options(folder), WaitingFamily(), LatentCache(tmp_path / "cache"))) == 7
