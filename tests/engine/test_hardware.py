"""The hardware readings, exercised through the real pynvml on a fake NVIDIA library compiled here."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from lorasmith.engine import hardware, nvml
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.events import HardwareSampled
from lorasmith.engine.hardware import Sampler, TorchBuild, gauges, read_memory, resolve_device, snapshot, torch_build
from lorasmith.engine.nvml import GpuReader
from tests.fake_nvml import GIB, FakeState, build_library, compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler to build the fake NVIDIA library")
CLOCK = r"\d\d:\d\d"
SECOND_UUID = "GPU-bbbb2222-0000-0000-0000-000000000000"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    # Also masks a real driver of the machine that runs the tests.
    def not_found() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", not_found)
    monkeypatch.setattr(hardware, "_gpus", GpuReader())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def use_library(path: Path, state: FakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_STATE", str(state.path))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(path)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(hardware, "_gpus", GpuReader())
    # First set, so that what resolve_device writes is undone after the test.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def gpu(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeState:
    state = FakeState(tmp_path / "nvml-state")
    state.add_gpu()
    use_library(library, state, monkeypatch)
    return state


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_build", lambda: TorchBuild("2.13.0", "12.8"))


@needs_compiler
def test_a_gpu_tells_all_its_facts(gpu: FakeState) -> None:
    gpu.change(**{"0.reserved": GIB, "0.processes": f"{os.getpid()}:{2 * GIB},7:?"})
    found = snapshot()
    assert found.note == ""
    assert found.cuda_driver == (13, 0)
    [card] = found.gpus
    assert (card.name, card.index, card.driver) == ("NVIDIA H200", 0, "580.95.05")
    assert card.uuid.startswith("GPU-aaaa1111")
    assert (card.total_gib, card.free_gib, card.used_gib) == (140.0, 129.0, 11.0)
    assert card.compute_capability == (9, 0)
    assert (card.utilization_percent, card.temperature_c, card.power_w) == (37.0, 54.0, 312.5)
    assert [(process.pid, process.used_gib) for process in card.processes] == [(os.getpid(), 2.0), (7, None)]


@needs_compiler
def test_process_names_are_told_only_where_process_numbers_are_the_machines_own(
    gpu: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.change(**{"0.processes": f"{os.getpid()}:1"})
    here = Path("/proc/self/ns/pid").stat().st_ino
    monkeypatch.setattr(nvml, "INITIAL_PID_NAMESPACE", here)
    assert snapshot().gpus[0].processes[0].name == psutil.Process().name()
    monkeypatch.setattr(nvml, "INITIAL_PID_NAMESPACE", here + 1)
    assert snapshot().gpus[0].processes[0].name is None


@needs_compiler
@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetPowerUsage", ("power_w",)),
        ("nvmlDeviceGetUtilizationRates", ("utilization_percent",)),
        ("nvmlDeviceGetTemperatureV", ("temperature_c",)),
        ("nvmlDeviceGetMemoryInfo_v2", ("total_gib", "free_gib", "used_gib")),
        ("nvmlDeviceGetCudaComputeCapability", ("compute_capability",)),
        ("nvmlSystemGetDriverVersion", ("driver",)),
    ],
)
def test_a_value_that_the_driver_refuses_is_none_and_the_others_stay(
    gpu: FakeState, function: str, fields: tuple[str, ...]
) -> None:
    gpu.fail(function, pynvml.NVML_ERROR_NO_PERMISSION)
    found = snapshot()
    [card] = found.gpus
    missing = {name for name in vars(card) if getattr(card, name) is None} | {"used_gib"} & set(fields)
    assert missing == set(fields)
    assert card.used_gib is None or card.used_gib == 10.0
    assert found.note == ""


@needs_compiler
def test_an_old_driver_without_the_newer_functions_is_read_through_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = FakeState(tmp_path / "state")
    state.add_gpu()
    use_library(build_library(tmp_path / "old", old_driver=True), state, monkeypatch)
    [card] = snapshot().gpus
    assert (card.total_gib, card.free_gib, card.temperature_c) == (140.0, 130.0, 54.0)
    assert card.processes == ()


@needs_compiler
@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "updated while in use; restart the machine"),
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_NO_PERMISSION, "ask the administrator"),
        ("nvmlDeviceGetCount_v2", 999, "NVML error 999"),
    ],
)
def test_a_driver_that_refuses_is_a_sentence(gpu: FakeState, function: str, code: int, words: str) -> None:
    gpu.fail(function, code)
    found = snapshot()
    assert found.gpus == ()
    assert words in found.note


@needs_compiler
def test_a_driver_that_starts_later_is_found(gpu: FakeState) -> None:
    gpu.fail("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    assert snapshot().gpus == ()
    gpu.fail("nvmlInitWithFlags", 0)
    assert len(snapshot().gpus) == 1


@needs_compiler
def test_a_driver_without_a_gpu_is_a_sentence(gpu: FakeState) -> None:
    gpu.change(count=0)
    assert snapshot().note == "There is a driver, but no NVIDIA GPU."


@pytest.mark.usefixtures("no_driver")
def test_a_machine_without_a_driver_still_tells_memory_disk_and_processor(tmp_path: Path) -> None:
    found = snapshot([tmp_path / "not" / "there yet"])
    assert found.gpus == ()
    assert "No NVIDIA driver" in found.note
    assert 0 < found.memory.available_gib <= found.memory.total_gib
    assert found.disks[0].free_gib is not None
    assert found.disks[0].free_gib > 0
    assert found.cores >= 1
    assert found.cpu


@needs_compiler
def test_a_gpu_that_is_lost_mid_run_keeps_its_time_and_the_other_gpu_stays(gpu: FakeState) -> None:
    gpu.add_gpu(uuid=SECOND_UUID, name="NVIDIA A2")
    reader = GpuReader()
    assert len(reader.read().gpus) == 2
    gpu.fail("nvmlDeviceGetMemoryInfo_v2.0", pynvml.NVML_ERROR_GPU_IS_LOST)
    lost = reader.read()
    assert [card.uuid for card in lost.gpus] == [SECOND_UUID]
    assert re.fullmatch(rf"GPU 0 \(NVIDIA H200\) was lost at {CLOCK}\. The GPU fell off the bus.*", lost.note)
    reader._lost_since[0] = 0.0
    first = time.strftime("%H:%M", time.localtime(0))
    assert f"lost at {first}" in reader.read().note
    gpu.fail("nvmlDeviceGetMemoryInfo_v2.0", 0)
    assert (len(reader.read().gpus), reader.read().note) == (2, "")


@needs_compiler
def test_readings_that_stop_mid_run_are_said_to_be_lost(gpu: FakeState) -> None:
    reader = GpuReader()
    assert reader.read().note == ""
    gpu.fail("nvmlDeviceGetCount_v2", 999)
    assert re.match(rf"The GPU readings were lost at {CLOCK}\. .*999", reader.read().note)


@needs_compiler
def test_a_library_that_forgot_its_start_is_started_again(gpu: FakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    real = pynvml.nvmlInit
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: starts.append(time.time()) or real())
    reader = GpuReader()
    reader.read()
    gpu.fail("nvmlDeviceGetCount_v2", pynvml.NVML_ERROR_UNINITIALIZED)
    reader.read()
    gpu.fail("nvmlDeviceGetCount_v2", 0)
    assert len(reader.read().gpus) == 1
    assert len(starts) == 2


@needs_compiler
def test_a_hanging_driver_delays_a_caller_once_and_is_read_again_when_it_answers(gpu: FakeState) -> None:
    reader = GpuReader()
    gpu.delay("nvmlDeviceGetCount_v2", 0.6)
    begin = time.monotonic()
    assert re.match(rf"The GPU readings were lost at {CLOCK}: the driver hangs", reader.read(0.1).note)
    again = time.monotonic()
    assert again - begin >= 0.1
    assert reader.read(0.1).gpus == ()
    assert time.monotonic() - again < 0.08
    gpu.delay("nvmlDeviceGetCount_v2", 0)
    deadline = time.monotonic() + 5
    while not reader.read(0.05).gpus and time.monotonic() < deadline:
        time.sleep(0.02)
    assert reader.read().note == ""


@needs_compiler
def test_gauges_go_on_while_the_driver_hangs(gpu: FakeState) -> None:
    gpu.delay("nvmlDeviceGetUtilizationRates", 1.5)
    samples: list[HardwareSampled] = []
    enough = threading.Event()

    def take(sample: HardwareSampled) -> None:
        samples.append(sample)
        if len(samples) >= 5:
            enough.set()

    sampler = Sampler(take, seconds=0.05, reader=GpuReader())
    sampler.start()
    assert enough.wait(1.4)
    sampler.stop()
    gpu.delay("nvmlDeviceGetUtilizationRates", 0)
    assert {sample.vram_used_gib for sample in samples} == {None}
    assert all("the driver hangs" in sample.note for sample in samples)
    assert samples[0].process_ram_gib > 0
    count = len(samples)
    time.sleep(0.15)
    assert len(samples) == count


@needs_compiler
def test_gauges_are_those_of_the_gpu_in_use(gpu: FakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.add_gpu(uuid=SECOND_UUID, used=99 * GIB)
    reading = GpuReader().read()
    assert gauges(reading).vram_used_gib == 10.0
    assert gauges(reading, SECOND_UUID).vram_used_gib == 99.0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SECOND_UUID)
    assert gauges(reading, "auto").vram_used_gib == 99.0
    on_cpu = gauges(reading, "cpu")
    assert (on_cpu.vram_used_gib, on_cpu.note) == (None, "")


@needs_compiler
def test_the_library_is_found_by_name_and_nothing_here_imports_torch(library: Path, tmp_path: Path) -> None:
    state = FakeState(tmp_path / "state")
    state.add_gpu()
    code = (
        "import json, sys; from lorasmith.engine.hardware import snapshot; s = snapshot();"
        "print(json.dumps([g.name for g in s.gpus])); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_STATE": str(state.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["NVIDIA H200"]


@needs_compiler
@pytest.mark.usefixtures("cuda_build")
def test_auto_takes_the_gpu_with_the_most_free_memory(gpu: FakeState) -> None:
    gpu.add_gpu(uuid=SECOND_UUID, used=GIB)
    assert resolve_device("auto") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == SECOND_UUID


@needs_compiler
@pytest.mark.usefixtures("cuda_build", "gpu")
@pytest.mark.parametrize(
    "setting", ["GPU-aaaa1111-0000-0000-0000-000000000000", "gpu-AAAA1111-0000-0000-0000-000000000000"]
)
def test_a_gpu_is_chosen_by_its_uuid(setting: str) -> None:
    assert resolve_device(setting) == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa1111-0000-0000-0000-000000000000"


@needs_compiler
@pytest.mark.usefixtures("cuda_build", "gpu")
@pytest.mark.parametrize("setting", ["GPU-zzz", "GPU-aaaa1111", "cuda:9"])
def test_an_unknown_gpu_is_refused_with_those_that_exist(setting: str) -> None:
    with pytest.raises(HardwareError, match=rf"{setting}, which is no GPU.*GPU-aaaa1111\S* \(NVIDIA H200\)"):
        resolve_device(setting)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@needs_compiler
@pytest.mark.usefixtures("cuda_build", "gpu")
def test_the_users_own_cuda_visible_devices_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert (resolve_device("auto"), os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(HardwareError, match="hides every GPU"):
        resolve_device("cuda")


@needs_compiler
@pytest.mark.usefixtures("cuda_build", "gpu")
def test_another_gpu_cannot_be_chosen_once_torch_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", in_use)  # type: ignore[arg-type]
    with pytest.raises(HardwareError, match="Start lorasmith again"):
        resolve_device("auto")


@pytest.mark.usefixtures("no_driver", "cuda_build")
def test_without_a_gpu_auto_is_the_cpu_and_a_named_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(HardwareError, match="No NVIDIA driver was found"):
        resolve_device("GPU-aaaa")


@needs_compiler
@pytest.mark.usefixtures("gpu")
def test_a_torch_without_cuda_trains_on_the_cpu_and_says_why_it_cannot_do_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_build", lambda: TorchBuild("2.13.0+cpu", None))
    assert resolve_device("auto") == "cpu"
    with pytest.raises(HardwareError, match=r"torch 2\.13\.0\+cpu cannot use a GPU"):
        resolve_device("cuda")


def test_the_torch_build_is_read_without_importing_it() -> None:
    code = (
        "import sys; from lorasmith.engine.hardware import torch_build; b = torch_build();"
        "assert 'torch' not in sys.modules; import torch;"
        "assert (b.version, b.cuda) == (torch.__version__, torch.version.cuda), b"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch_build() is not None


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/a/b\n", {"a/memory.max": 2 * GIB, "a/memory.current": GIB, "a/memory.stat": GIB // 2}),
        ("0::/\n", {"memory.max": 2 * GIB, "memory.current": GIB, "memory.stat": GIB // 2}),
    ],
)
def test_memory_is_that_of_the_tightest_control_group(tmp_path: Path, membership: str, files: dict[str, int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "a" / "b" / "memory.current").write_text("1\n")
    for name, value in files.items():
        prefix = "inactive_file " if name.endswith("stat") else ""
        (tmp_path / name).write_text(f"{prefix}{value}\n")
    own = tmp_path / "cgroup"
    own.write_text(membership)
    memory = read_memory(tmp_path, own)
    assert (memory.total_gib, memory.limited) == (2.0, True)
    assert memory.available_gib == min(1.5, psutil.virtual_memory().available / GIB)


def test_memory_of_version_1_control_groups_is_understood(tmp_path: Path) -> None:
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text(str(GIB))
    (tmp_path / "memory" / "job" / "memory.usage_in_bytes").write_text(str(GIB // 4))
    (tmp_path / "memory" / "job" / "memory.stat").write_text("cache 5\ntotal_inactive_file 0\n")
    own = tmp_path / "cgroup"
    own.write_text("5:cpu:/x\n4:memory:/job\n")
    assert read_memory(tmp_path, own).total_gib == 1.0


def test_without_control_groups_memory_is_the_machines(tmp_path: Path) -> None:
    memory = read_memory(tmp_path, tmp_path / "none")
    assert (memory.total_gib, memory.limited) == (psutil.virtual_memory().total / GIB, False)


def test_the_card_that_is_planned_for_is_the_one_that_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(index: int, free: float) -> nvml.Gpu:
        return nvml.Gpu(f"GPU-{index}", index, "A card", 24.0, free, (8, 9), "580", None, None, None, ())

    full, free = card(0, 4.0), card(1, 20.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpu_for((full, free), "auto") == free
    assert hardware.gpu_for((full, free), "gpu-0") == full
    assert hardware.gpu_for((full, free), "cpu") is None
    assert hardware.gpu_for((), "auto") is None
    # A slice, or a card of another machine: not the freest one instead.
    assert hardware.gpu_for((full, free), "MIG-1") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hardware.gpu_for((full, free), "auto") == full
    assert hardware.gpu_for((full, free), "cuda") == full
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpu_for((full, free), "auto") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert hardware.gpu_for((full, free), "auto") is None
