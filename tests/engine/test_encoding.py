"""Encoding ahead: its size is told and true, a full disk costs time only, and an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.engine import encoding
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset import cache_size
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.cache_size import forecast_cache, numbers_of_prompt
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.encoding import Encoder, report_progress
from lorasmith.engine.events import Event, Logged, Progress, RunEnded
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.plan import build_plan
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.sources import locate_base
from lorasmith.engine.storage import cache_folder, readable_size
from tests.engine.running import RecordingHost, load_tiny, run_training, texts, tiny_config
from tests.tiny import tiny_pictures


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(kind: str) -> int:
    """Return the bytes of all files of one kind in the cache."""
    return sum(path.stat().st_size for path in (cache_folder() / kind).rglob("*") if path.is_file())


def encoder(config: RunConfig, family: Family, host: RecordingHost) -> Encoder:
    plan = plan_buckets(scan_dataset(config.dataset).items, config.dataset, 8, config.run.seed)
    return Encoder(config, locate_base(config.base.model), family, plan, host.emit, lambda: False)


def encode(config: RunConfig, family: Family) -> tuple[encoding.Encoded, RecordingHost]:
    host = RecordingHost()
    encoded = encoder(config, family, host).encode(["a preview"])
    assert encoded is not None
    return encoded, host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dataset",
    [
        {},
        {"flip": True, "resolution": 128, "more_resolutions": [64]},
        {"crop": "random", "buckets": False, "resolution": 64},
    ],
)
def test_the_forecast_is_what_is_written(
    dtype: torch.dtype, dataset: dict[str, Any], tiny_sd15: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_sd15, tmp_path, dataset=dataset, captions={"shuffle": True}, train={"steps": 12})
    Image.new("L", (64, 64), 200).save(tmp_path / "pictures" / "00-masklabel.png")
    (tmp_path / "pictures" / "copy.png").write_bytes((tmp_path / "pictures" / "00.png").read_bytes())
    (tmp_path / "pictures" / "copy.txt").write_text("a copy, with another caption")
    family = load_tiny(tiny_sd15, dtype)
    plan = encoder(config, family, RecordingHost()).plan
    encoded, _ = encode(config, family)
    assert encoded.conditionings is not None
    sizes = {
        "number_bytes": 4 if dtype == torch.float32 else 2,
        "prompt_numbers": numbers_of_prompt(family.spec, family.identity),
    }
    forecast = forecast_cache(plan, family.spec, len(encoded.conditionings), **sizes)
    assert forecast == pytest.approx(written("latents") + written("prompts"), rel=0.03)
    latents = forecast_cache(plan, family.spec, 0, **sizes)
    assert latents == pytest.approx(written("latents"), rel=0.04)


def test_the_plan_tells_the_size_that_is_then_said_and_written(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 20})
    family = load_tiny(tiny_sd15)
    resolved = resolve_config([Layer("test", config.model_dump())])
    plan = build_plan(resolved, family.identity, scan_dataset(config.dataset), locate_base(str(tiny_sd15)))
    assert (plan.num_latents, plan.num_prompts) == (5, 2)
    _, host = encode(config, family)
    assert plan.cache_bytes is not None
    preview = numbers_of_prompt(family.spec, family.identity) * 4 + cache_size.ENTRY_BYTES
    assert plan.cache_bytes + preview == pytest.approx(written("latents") + written("prompts"), rel=0.03)
    assert f"about {readable_size(plan.cache_bytes)}" in dict(plan.rows())["cache"]
    assert "5 encoded pictures, 2 captions" in dict(plan.rows())["cache"]
    expected = f"To encode: 5 pictures and 3 captions, about {readable_size(plan.cache_bytes + preview)} in"
    assert expected in texts(host.of(Logged))
    _, again = encode(config, family)
    assert "To encode: 0 pictures and 0 captions; 8 are there already." in texts(again.of(Logged))


def test_a_cache_disk_without_room_is_left_alone_and_training_goes_on(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(encoding, "free_bytes", lambda path: 1000)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path))
    warnings = texts([event for event in host.of(Logged) if event.severity == "warning"])
    assert "The cache is not written" in warnings
    assert "LORASMITH_CACHE" in warnings
    assert "1000 bytes are free" in warnings
    assert not list(cache.rglob("*.safetensors"))
    assert host.of(RunEnded)[0].outcome == "finished"


def test_what_is_there_already_needs_no_room(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run_training(config)
    monkeypatch.setattr(encoding, "free_bytes", lambda path: 0)
    _, host = run_training(config)
    assert "not written" not in texts(host.of(Logged))


class Counting:
    """A loaded base that counts what it is asked to encode."""

    def __init__(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures, self.prompts = 0, list[str]()
        images, prompts = family.encode_images, family.encode_prompts

        def encode_images(pixels: torch.Tensor) -> torch.Tensor:
            self.pictures += len(pixels)
            return images(pixels)

        def encode_prompts(texts: Sequence[str]) -> list[Conditioning]:
            self.prompts += texts
            return prompts(texts)

        monkeypatch.setattr(family, "encode_images", encode_images)
        monkeypatch.setattr(family, "encode_prompts", encode_prompts)


@pytest.mark.parametrize("stop_at", ["Encoding pictures", "Encoding captions"])
def test_an_interrupted_start_goes_on_where_it_was(
    stop_at: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pictures(tmp_path / "pictures", 40, captions=[f"picture {number}" for number in range(40)])
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 60})
    families = [load_tiny(tiny_sd15) for _ in range(2)]
    first, rest = (Counting(family, monkeypatch) for family in families)
    host = RecordingHost()
    interrupted = encoder(config, families[0], host)
    interrupted.should_stop = lambda: any(e.label == stop_at and e.done >= 16 for e in host.of(Progress))
    assert interrupted.encode([]) is None
    encoded = encoder(config, families[1], RecordingHost()).encode([])
    assert encoded is not None
    assert encoded.conditionings is not None
    assert first.pictures + rest.pictures == len(encoded.pictures) == 40
    assert sorted(first.prompts + rest.prompts) == sorted(encoded.conditionings)
    assert 0 < first.pictures < 40 or stop_at == "Encoding captions"
    assert 0 < len(first.prompts) < 40 or stop_at == "Encoding pictures"


def test_a_run_stopped_while_encoding_says_so_and_the_next_one_does_the_rest(tiny_sd15: Path, tmp_path: Path) -> None:
    tiny_pictures(tmp_path / "pictures", 40)
    config = tiny_config(tiny_sd15, tmp_path)
    host = RecordingHost()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.label == "Encoding pictures" and 0 < event.done < 40:
            host.waiting.append(Command.STOP)

    host.on_event = stop
    run, _ = run_training(config, host)
    assert host.of(RunEnded)[0].outcome == "stopped"
    _, again = run_training(config, run=run)
    first = next(event for event in again.of(Progress) if event.label == "Encoding pictures")
    assert 0 < first.done < 40
    assert again.of(RunEnded)[0].outcome == "finished"


def test_too_many_prompts_are_told_and_encoded_as_they_come(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    captions = {"shuffle": True, "keep_tokens": 0}
    config = tiny_config(tiny_sd15, tmp_path, captions=captions, train={"steps": 6, "log_every": 1})
    _, ahead = run_training(config)
    monkeypatch.setattr(cache_size, "MAX_PROMPT_BYTES", 3 * 5000)
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    _, host = run_training(config)
    assert "too many to keep in memory" in texts(host.of(Logged))
    assert not (cache / "prompts").exists() or not written("prompts")
    # The same text encoder, in batches of another size: the same but for rounding.
    assert host.losses() == pytest.approx(ahead.losses(), rel=1e-4)


def test_progress_tells_the_time_that_is_left_and_leaves_out_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(encoding.time, "monotonic", lambda: now[0])
    host = RecordingHost()
    report = report_progress(host.emit, "cache")
    for done in range(40, 101, 10):
        report("Encoding pictures", done, 100)
        now[0] += 2.0
    left = {event.done: event.seconds_left for event in host.of(Progress)}
    assert left == {40: None, 50: 10.0, 60: 8.0, 70: 6.0, 80: 4.0, 90: 2.0, 100: 0.0}


def test_progress_is_neither_a_flood_nor_silent_when_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(encoding.time, "monotonic", lambda: now[0])
    fast, slow = RecordingHost(), RecordingHost()
    report = report_progress(fast.emit, "cache")
    for done in range(10_001):
        report("a", done, 10_000)
    assert 200 <= len(fast.events) <= 202
    report = report_progress(slow.emit, "cache")
    for done in range(50):
        now[0] += 3.0
        report("a", done, 10_000)
    assert len(slow.events) == 50


@pytest.mark.parametrize(("weight", "effect"), [(0.0, "nothing is learnt"), (0.25, "count 0.25 times")])
def test_pictures_that_are_masked_out_are_named(weight: float, effect: str, tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, objective={"unmasked_weight": weight})
    for number, gray in enumerate((0, 255, 0)):
        Image.new("L", (64, 64), gray).save(tmp_path / "pictures" / f"{number:02}-masklabel.png")
    _, host = encode(config, load_tiny(tiny_sd15))
    (warning,) = [event.message for event in host.of(Logged) if event.severity == "warning"]
    assert "2 pictures (00.png, 02.png)" in warning
    assert effect in warning
