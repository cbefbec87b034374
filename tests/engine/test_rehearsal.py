"""A rehearsal goes through every stage of a run for real, measures it, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lorasmith.engine import rehearsal
from lorasmith.engine.card_meter import CardMeter
from lorasmith.engine.cli import app
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.holdout import HeldOut
from lorasmith.engine.memory.calibration import read
from lorasmith.engine.memory.measured import Rehearsal, RehearsalProgress, StageMeasure, estimate_total, time_words
from lorasmith.engine.rehearsal import RehearsalStoppedError, largest_material, rehearse
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.engine.run_setup import Material
from lorasmith.engine.storage import cache_folder
from tests.engine.running import tiny_config
from tests.memory_sample import small_unet

STAGES = ["load", "image encode", "text encode", "step", "save", "preview"]


def settings(base: Path, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    usual: dict[str, dict[str, Any]] = {
        "train": {"steps": 500, "batch_size": 2, "device": "cpu"},
        "previews": {"every": 100, "steps": 1, "side": 64, "seeds": [1, 2, 3]},
    }
    return tiny_config(base, folder, **(usual | sections))


def as_resolved(config: RunConfig) -> ResolvedConfig:
    return resolve_config([Layer("test", config.model_dump())])


def left_behind(folder: Path) -> list[str]:
    rehearsals = cache_folder() / "rehearsals"
    inside = sorted(path.name for path in rehearsals.iterdir()) if rehearsals.is_dir() else []
    return inside + [name for name in ("runs",) if (folder / name).exists()]


@pytest.fixture(scope="module")
def rehearsed(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rehearsal, list[Any], Path]]:
    folder = tmp_path_factory.mktemp("rehearsed")
    told: list[RehearsalProgress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(folder / "cache"))
        found = rehearse(as_resolved(settings(tiny_sd15, folder)), told.append)
        assert not left_behind(folder)
        assert not (folder / "cache" / "latents").exists()
        yield found, told, folder


def test_every_stage_is_done_once_and_told_before_and_after(
    rehearsed: tuple[Rehearsal, list[RehearsalProgress], Path],
) -> None:
    found, told, _ = rehearsed
    assert [each.stage for each in found.stages] == STAGES
    lines = [progress for progress in told if progress.measured is None]
    assert [progress.stage for progress in lines] == STAGES
    assert [progress.measured.stage for progress in told if progress.measured] == STAGES
    assert all(each.seconds > 0 for each in found.stages)
    assert found.peak.gib > 0
    assert found.size == "64x64"
    assert "RAM" in found.measured_by
    assert not found.calibrated
    assert 0 < found.seconds_per_step < 30


def test_the_whole_run_is_estimated_from_what_was_measured(
    rehearsed: tuple[Rehearsal, list[RehearsalProgress], Path],
) -> None:
    found, _, _ = rehearsed
    assert found.total_seconds > 500 * found.seconds_per_step
    assert found.total_seconds < 500 * found.seconds_per_step + 100 * sum(each.seconds for each in found.stages)
    rows = dict(found.rows())
    assert set(STAGES) < set(rows)
    assert "for the whole run" in rows["time"]
    assert "another size" in rows["forecast"]
    data = json.loads(json.dumps(found.to_json()))
    assert list(data["stages"]) == STAGES
    assert data["forecast"] is None


def test_of_all_pictures_those_that_take_most_are_tried(tiny_sd15: Path, tmp_path: Path) -> None:
    config = settings(tiny_sd15, tmp_path, dataset={"resolution": 128, "more_resolutions": [64]})
    dataset = scan_dataset(config.dataset)
    plan = plan_buckets(dataset.items, config.dataset, 8, 0)
    largest = largest_material(Material(dataset, plan, ["a", "b", "c", "d", "e"], HeldOut()), config)
    sizes = {sample.bucket for sample in largest.plan.samples}
    assert len(sizes) == 1
    pixels = {bucket.width * bucket.height for bucket in {sample.bucket for sample in plan.samples}}
    assert {bucket.width * bucket.height for bucket in sizes} == {max(pixels)}
    assert [sample.index for sample in largest.plan.samples] == list(range(len(largest.plan.samples)))
    assert largest.prompts == ["a", "b", "c", "d"]


def test_a_picture_that_is_alone_in_its_size_does_not_stand_for_a_batch(tiny_sd15: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_pictures

    tiny_pictures(tmp_path / "pictures", 4, sizes=((64, 64), (64, 64), (64, 64), (192, 64)), captions=["a"])
    config = settings(tiny_sd15, tmp_path, train={"batch_size": 3}, dataset={"bucket_step": 64})
    dataset = scan_dataset(config.dataset)
    plan = plan_buckets(dataset.items, config.dataset, 8, 0)
    largest = largest_material(Material(dataset, plan, [], HeldOut()), config)
    assert {str(sample.bucket) for sample in largest.plan.samples} == {"64x64"}


@pytest.mark.parametrize("stage", ["step", "load"])
def test_a_stage_without_memory_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tiny_sd15: Path, tmp_path: Path, stage: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if stage == "step":
        monkeypatch.setattr("lorasmith.engine.learner.Learner.run_step", full)
    else:
        monkeypatch.setattr("lorasmith.engine.families._model.LoadedModel.__init__", full)
    with pytest.raises(HardwareError) as raised:
        rehearse(as_resolved(settings(tiny_sd15, tmp_path)), lambda _: None)
    assert f"“{stage}”" in raised.value.what
    assert "plan --fit" in raised.value.fix
    assert ("gradient_checkpointing" if stage == "step" else "memory.apart") in raised.value.fix
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("how", ["stop", "ctrl-c"])
def test_a_rehearsal_can_be_ended_at_any_time(tiny_sd15: Path, tmp_path: Path, how: str) -> None:
    stopped: list[bool] = []

    def on_progress(progress: RehearsalProgress) -> None:
        if progress.stage == "image encode":
            if how == "ctrl-c":
                raise KeyboardInterrupt
            stopped.append(True)

    expected: type[BaseException] = KeyboardInterrupt if how == "ctrl-c" else RehearsalStoppedError
    with pytest.raises(expected):
        rehearse(as_resolved(settings(tiny_sd15, tmp_path)), on_progress, lambda: bool(stopped))
    assert not left_behind(tmp_path)


def test_on_a_card_what_was_measured_corrects_later_forecasts(
    monkeypatch: pytest.MonkeyPatch, tiny_sd15: Path, tmp_path: Path
) -> None:
    from tests.engine.test_calibration import GPU, KEY

    class FakeCard(CardMeter):
        def start(self) -> None:
            pass

        def peak_gib(self) -> float:
            return 7.0

        def wait(self) -> None:
            pass

        def gpu(self) -> Any:
            return GPU

    monkeypatch.setattr(rehearsal, "meter_of", FakeCard)
    monkeypatch.setattr("lorasmith.engine.memory.of_run.find_memory", lambda *_: small_unet())
    config = settings(tiny_sd15, tmp_path, previews={"every": 0})
    found = rehearse(as_resolved(config), lambda _: None)
    assert found.calibrated
    assert found.forecast is not None
    step = next(each for each in found.stages if each.stage == "step")
    assert (step.gib, step.forecast_gib) == (7.0, pytest.approx(found.forecast.step.without_slack))
    assert read(KEY).memory == pytest.approx(7.0 / step.forecast_gib, rel=1e-3)
    assert "preview" not in {each.stage for each in found.stages}
    assert "corrected" in dict(found.rows())["from now on"]


def test_the_command_shows_each_stage(tiny_sd15: Path, tmp_path: Path) -> None:
    config = settings(tiny_sd15, tmp_path, previews={"every": 0})
    run_file = tmp_path / "run.toml"
    run_file.write_text(_as_toml(config))
    result = CliRunner().invoke(app, ["plan", "--measure", str(run_file)])
    assert result.exit_code == 0, result.output
    for words in ("Training 2 steps", "for the whole run", "peak"):
        assert words in result.output


def _as_toml(config: RunConfig) -> str:
    import tomlkit

    return tomlkit.dumps(config.model_dump(exclude_defaults=True))


def test_times_are_told_as_people_say_them() -> None:
    assert [time_words(value) for value in (12.4, 89.0, 600.0, 4800.0, 7325.0)] == [
        "12 s", "89 s", "10 min", "80 min", "2 h 02 min",
    ]  # fmt: skip
    measure = StageMeasure("step", 6.12, 4.1, 6.0, "memory ran out")
    assert dataclasses.replace(measure).note == "memory ran out"


def test_a_run_is_the_sum_of_its_parts(tiny_sd15: Path, tmp_path: Path) -> None:
    config = settings(tiny_sd15, tmp_path, checkpoints={"every": 100})
    dataset = scan_dataset(config.dataset)
    plan = plan_buckets(dataset.items, config.dataset, 8, 0)
    seconds = {"picture": 1.0, "prompt": 2.0, "step": 3.0, "preview": 4.0, "save": 5.0}
    # 500 steps, previews of two prompts and three seeds at five times, five checkpoints and the last.
    expected = 10 + len(plan.samples) * 1 + len(plan.views) * 2 + 500 * 3 + 30 * 4 + 6 * 5
    assert estimate_total(config, plan, seconds, 10.0) == pytest.approx(expected)
