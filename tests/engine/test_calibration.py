"""What was measured on a card corrects later forecasts: kept per card, driver and family, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import step_calibration, trainer
from lorasmith.engine.config import RunConfig
from lorasmith.engine.fit.machine import room_of
from lorasmith.engine.hardware import HardwareSnapshot, Memory
from lorasmith.engine.memory import calibration
from lorasmith.engine.memory.calibration import UNKNOWN, Calibration, CardKey, read, record
from lorasmith.engine.memory.forecast import forecast
from lorasmith.engine.nvml import Gpu
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.step_calibration import StepCalibration, step_subject
from lorasmith.engine.training_parts import TrainingParts
from tests.engine.running import run_training, tiny_config
from tests.memory_sample import small_unet

KEY = CardKey("NVIDIA GeForce RTX 3060", "570.1", "sd15")
GPU = Gpu("GPU-1", 0, "NVIDIA GeForce RTX 3060", 12.0, 11.0, (8, 6), "570.1", None, None, None, ())


def test_nothing_was_measured_at_first_and_then_what_was_recorded() -> None:
    assert read(KEY) == UNKNOWN
    record(KEY, 10.0, 10.5, 1.0, 0.8)
    assert read(KEY) == Calibration(1.05, 0.8, 1)
    for other in (dataclasses.replace(KEY, driver="580.2"), dataclasses.replace(KEY, family="sdxl")):
        assert read(other) == UNKNOWN


def test_one_odd_run_changes_little_and_an_impossible_one_nothing() -> None:
    for measured in (10.3, 10.4, 10.5, 14.0):
        record(KEY, 10.0, measured, 1.0, 1.0)
    assert read(KEY).memory == pytest.approx(1.045)
    record(KEY, 10.0, 80.0, 1.0, 1000.0)
    record(KEY, 0.0, 10.0, 0.0, 1.0)
    record(KEY, 10.0, float("nan"), 1.0, float("inf"))
    assert read(KEY) == Calibration(1.045, 1.0, 4)


def test_only_the_newest_runs_count() -> None:
    for _ in range(8):
        record(KEY, 10.0, 12.0, 1.0, 1.0)
    for _ in range(8):
        record(KEY, 10.0, 10.2, 1.0, 1.0)
    assert read(KEY) == Calibration(1.02, 1.0, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"version": 9, "cards": {}}', b'{"version": 1, "cards": [1]}', b"\xff\xfe",
     b'{"version": 1, "cards": {"NVIDIA GeForce RTX 3060 | 570.1 | sd15": {"memory": ["x", null, 99]}}}'],
)  # fmt: skip
def test_a_damaged_file_means_nothing_was_measured(content: bytes) -> None:
    path = calibration.calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert read(KEY) == UNKNOWN
    record(KEY, 10.0, 10.5, 1.0, 1.0)
    assert read(KEY).memory == 1.05


def test_a_folder_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "file"))
    record(KEY, 10.0, 10.5, 1.0, 1.0)
    assert read(KEY) == UNKNOWN


def test_runs_that_end_together_lose_nothing() -> None:
    threads = [threading.Thread(target=record, args=(KEY, 10.0, 10.5, 1.0, 1.0)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(KEY).runs == 6
    assert not [path for path in calibration.calibration_file().parent.iterdir() if path.suffix == ".tmp"]
    assert json.loads(calibration.calibration_file().read_text())["version"] == 1


def test_a_room_knows_what_was_measured_on_its_card() -> None:
    record(KEY, 10.0, 10.5, 1.0, 0.8)
    here = HardwareSnapshot((GPU,), "", None, Memory(32.0, 30.0), (), "a processor", 8)
    room = room_of(here, GPU, "sd15")
    assert room is not None
    assert (room.memory_calibration, room.seconds_calibration) == (1.05, 0.8)


class FakeMeter:
    """A card that is always as full as told."""

    def __init__(self, gib: float, gpu: Gpu | None = GPU) -> None:
        self.gib, self.starts, self._gpu = gib, 0, gpu

    def start(self) -> None:
        self.starts += 1

    def peak_gib(self) -> float:
        return self.gib

    def gpu(self) -> Gpu | None:
        return self._gpu


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory of the tiny base model be known."""
    monkeypatch.setattr(step_calibration, "find_memory", lambda *_: small_unet())


def train(monkeypatch: pytest.MonkeyPatch, config: RunConfig, meter: FakeMeter) -> list[StepCalibration]:
    """Train with a faked card and return what watched the steps."""
    made: list[StepCalibration] = []

    def watched(parts: TrainingParts) -> StepCalibration:
        made.append(StepCalibration(parts, meter))
        return made[0]

    monkeypatch.setattr(trainer, "StepCalibration", watched)
    run_training(config)
    return made


@pytest.fixture
def config(tmp_path: Path, tiny_sd15: Path) -> RunConfig:
    return tiny_config(tiny_sd15, tmp_path, train={"steps": 12, "log_every": 3}, dataset={"more_resolutions": [128]})


@pytest.mark.usefixtures("counted")
def test_the_first_steps_of_a_run_are_compared_with_their_forecast(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig
) -> None:
    meter = FakeMeter(8.0)
    (watched,) = train(monkeypatch, config, meter)
    learner = watched._parts.learner
    assert meter.starts == 1
    found = read(KEY)
    # Of the two sizes the larger one counts.
    buckets = {sample.bucket for sample in watched._parts.material.plan.samples}
    sizes = sorted(bucket.width * bucket.height for bucket in buckets)
    assert sizes[0] < sizes[-1]
    subject = step_subject(learner, sizes[-1])
    assert subject is not None
    assert subject.config.train.precision == "fp32"
    assert subject.num_parameters == learner.adapter.num_parameters()
    assert found.memory == pytest.approx(8.0 / forecast(subject).step.without_slack, rel=1e-3)
    assert found.runs == 1


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("reason", ["saved between", "memory ran out", "meter fails"])
def test_steps_that_tell_nothing_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, reason: str
) -> None:
    meter = FakeMeter(8.0)
    if reason == "saved between":
        config = config.model_copy(update={"checkpoints": config.checkpoints.model_copy(update={"every": 2})})
    if reason == "memory ran out":
        monkeypatch.setattr(Rungs, "taken", lambda _, phase: ("checkpointing",) if phase == "step" else ())
    if reason == "meter fails":

        def fail() -> float:
            raise RuntimeError("the driver is gone")

        monkeypatch.setattr(meter, "peak_gib", fail)
    (watched,) = train(monkeypatch, config, meter)
    assert watched._parts.step == 12
    assert read(KEY) == UNKNOWN


def test_without_a_card_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(step_calibration, "record", lambda *values: recorded.append(values))
    run_training(config)
    assert not recorded
