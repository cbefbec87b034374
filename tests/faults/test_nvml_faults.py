"""The GPU's management library fails, hangs or comes back in the middle of a run: gauges say so, training goes on."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from lorasmith.engine import hardware, session
from lorasmith.engine.commands import Command
from lorasmith.engine.events import HardwareSampled, StepsDone
from lorasmith.engine.hardware import GpuReader, Sampler
from lorasmith.engine.journal import replay
from lorasmith.engine.session import Session
from tests.fake_nvml import FakeState, build_library, compiler
from tests.faults.hosting import Host, hosting, steps, stop, wait_for

Record = Callable[[int, str, str], None]
CLOCK = r"\d\d:\d\d"
SAMPLE = 0.05

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler for the fake library")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeState:
    state = FakeState(tmp_path / "nvml-state")
    state.add_gpu()
    monkeypatch.setenv("FAKE_NVML_STATE", str(state.path))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(hardware, "_gpus", GpuReader())
    monkeypatch.setattr(session, "Sampler", functools.partial(Sampler, seconds=SAMPLE))
    # First set, so that what a run writes is undone after the test.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return state


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with hosting(tmp_path, monkeypatch, device="auto") as host:
        yield host


def train_until_stopped(run: Any, config: Any, host: Any) -> None:
    step = 0
    while Command.STOP not in host.next_commands():
        step += 1
        host.emit(steps(step))
        time.sleep(0.001)
    stop(host, step)


def healthy(sample: HardwareSampled) -> bool:
    return sample.vram_used_gib == 10.0 and sample.temperature_c == 54.0 and sample.note == ""


def lost(reason: str) -> Callable[[HardwareSampled], bool]:
    """Return whether a sample shows no GPU values, says since when, and why."""

    def holds(sample: HardwareSampled) -> bool:
        said = re.search(rf"lost at {CLOCK}.*{reason}", sample.note)
        return bool(said) and sample.vram_used_gib is None and sample.process_ram_gib > 0

    return holds


def last_step(hosted_session: Session) -> int:
    return wait_for(hosted_session, StepsDone).step


FAULTS: list[tuple[str, dict[str, object], str]] = [
    ("GPU is lost", {"error.nvmlDeviceGetHandleByIndex_v2": 15}, "fell off the bus"),
    ("GPU is lost, at another call", {"error.nvmlDeviceGetUUID": 15}, "fell off the bus"),
    ("unknown error 999", {"error.nvmlDeviceGetCount_v2": 999}, "NVML error 999"),
    ("unknown error 999 of one GPU", {"error.nvmlDeviceGetUUID.0": 999}, "NVML error 999"),
    ("driver updated while in use", {"error.nvmlDeviceGetCount_v2": 18}, "updated while in use"),
    ("library forgot its start", {"error.nvmlDeviceGetCount_v2": 1}, "NVML error 1"),
    ("no permission", {"error.nvmlDeviceGetCount_v2": 4}, "may not use"),
    ("a call that hangs", {"delay.nvmlDeviceGetUtilizationRates": 700}, "the driver hangs"),
    ("another call that hangs", {"delay.nvmlDeviceGetCount_v2": 700}, "the driver hangs"),
]


def test_each_fault_in_the_middle_of_a_run_is_said_and_its_end_seen(
    driver: FakeState, hosted: Host, record: Record
) -> None:
    running = hosted(train_until_stopped)
    wait_for(running, HardwareSampled, healthy)
    for _, fault, words in FAULTS:
        before = last_step(running)
        driver.change(**fault)
        wait_for(running, HardwareSampled, lost(words))
        wait_for(running, StepsDone, lambda event, before=before: event.step > before + 5)
        driver.change(**dict.fromkeys(fault, 0))
        wait_for(running, HardwareSampled, healthy)
    assert running.stop_and_join(20)
    done = [event.step for event in replay(running.run.journal) if isinstance(event, StepsDone)]
    assert done == list(range(1, len(done) + 1))
    record(10, "NVML faults in a running session", f"{len(FAULTS)} said and their ends seen, no step lost")


def test_a_value_that_fails_alone_leaves_the_others(driver: FakeState, hosted: Host) -> None:
    running = hosted(train_until_stopped)
    wait_for(running, HardwareSampled, healthy)
    driver.fail("nvmlDeviceGetPowerUsage", 999)
    driver.fail("nvmlDeviceGetMemoryInfo_v2", 999)
    sample = wait_for(running, HardwareSampled, lambda sample: sample.power_w is None and sample.vram_used_gib is None)
    assert (sample.temperature_c, sample.gpu_utilization_percent, sample.note) == (54.0, 37.0, "")


def test_while_a_call_hangs_no_second_thread_waits_and_the_run_still_ends_at_once(
    driver: FakeState, hosted: Host, record: Record
) -> None:
    running = hosted(train_until_stopped)
    wait_for(running, HardwareSampled, healthy)
    driver.delay("nvmlDeviceGetHandleByIndex_v2", 4)
    first = wait_for(running, HardwareSampled, lost("the driver hangs"))
    for _ in range(10):
        last = wait_for(running, HardwareSampled, lambda sample, than=first.time: sample.time > than)
        assert last.note == first.note
        assert sum(thread.name == "nvml" for thread in threading.enumerate()) == 1
        first = last
    began = time.monotonic()
    assert running.stop_and_join(20)
    assert time.monotonic() - began < 2
    driver.delay("nvmlDeviceGetHandleByIndex_v2", 0)
    record(10, "hanging NVML call", "one waiting thread, gauges go on, the run ends at once")


def test_without_the_library_a_run_has_no_gpu_gauges_and_says_why(
    hosted: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    monkeypatch.setattr(hardware, "_gpus", GpuReader())
    running = hosted(train_until_stopped)
    sample = wait_for(running, HardwareSampled)
    assert sample.vram_total_gib is None
    assert sample.note == "No NVIDIA driver was found (libnvidia-ml.so.1 is missing)."
    assert last_step(running) > 0


def test_gauges_that_cannot_be_read_at_all_come_back(hosted: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor left, for example: /proc cannot be opened for a while."""
    broken, read = threading.Event(), hardware.read_memory
    monkeypatch.setattr(session, "Sampler", functools.partial(Sampler, seconds=0.01))

    def read_memory() -> hardware.Memory:
        if broken.is_set():
            failed.set()
            raise OSError(24, "Too many open files")
        return read()

    failed = threading.Event()
    monkeypatch.setattr(hardware, "read_memory", read_memory)
    running = hosted(train_until_stopped)
    wait_for(running, HardwareSampled)
    broken.set()
    assert failed.wait(20)
    stopped_at = wait_for(running, HardwareSampled).time
    broken.clear()
    wait_for(running, HardwareSampled, lambda sample: sample.time > stopped_at)
    log = running.run.log.read_text()
    assert log.count("the gauges cannot be read") == 1


def test_a_real_training_learns_the_same_with_a_sick_driver(
    driver: FakeState, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.running import new_run, run_training, tiny_config

    monkeypatch.setenv("LORASMITH_RUNTIME", str(tmp_path / "runtime"))
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 6, "log_every": 1, "device": "auto"})
    _, undisturbed = run_training(config)
    driver.delay("nvmlDeviceGetCount_v2", 0.4)
    driver.fail("nvmlDeviceGetUUID", 15)
    sick = Session(new_run(config), config)
    sick.start()
    assert sick.join(120)
    losses = [loss for event in replay(sick.run.journal) if isinstance(event, StepsDone) for loss in event.losses]
    assert losses == undisturbed.losses()
    assert len(losses) == 6
    assert sick.outcome is not None
    assert sick.outcome.outcome == "finished"
