"""What the doctor says about the card: through the real NVML client on a fake library, and with a torch that has,
or lacks, what the card needs."""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from lorasmith.engine import hardware
from lorasmith.engine.doctor import (
    computing,
    fast_products,
    graphics,
    quantized,
    torch_builds,
    trials,
    unusable_choices,
)
from lorasmith.engine.doctor.check import Check
from lorasmith.engine.doctor.choices import DISABLED_BY
from lorasmith.engine.doctor.torch_builds import TORCH_PIN, has_code_for, how_to_mend, suitable_build
from lorasmith.engine.hardware import HardwareSnapshot, Memory, TorchBuild, snapshot
from lorasmith.engine.nvml import Gpu, GpuProcess, GpuReader
from tests.fake_nvml import GIB, FakeState, build_library, compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler to build the fake NVIDIA library")
CARD = Gpu("GPU-1", 0, "NVIDIA H200", 140.0, 139.5, (9, 0), "580.95", 0.0, 30.0, 80.0, ())
WITH_GPU = HardwareSnapshot((CARD,), "", (13, 0), Memory(64.0, 60.0), (), "CPU", 8)
WITHOUT_GPU = replace(WITH_GPU, gpus=(), note="No NVIDIA driver was found.", cuda_driver=None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def card(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeState:
    state = FakeState(tmp_path / "nvml-state")
    state.add_gpu(used=GIB // 2)
    monkeypatch.setenv("FAKE_NVML_STATE", str(state.path))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(hardware, "_gpus", GpuReader())
    return state


def built_for(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    monkeypatch.setattr(graphics, "torch_build", lambda: TorchBuild("2.13.0", cuda))


# Without torch


def test_without_a_gpu_the_driver_checks_are_skipped_and_the_reason_is_told() -> None:
    check = graphics.check_gpu(WITHOUT_GPU)
    assert (check.status, check.detail, check.blocking) == ("warn", "No NVIDIA driver was found.", False)
    assert "on the CPU" in check.meaning
    assert graphics.check_driver(WITHOUT_GPU).status == graphics.check_vram(WITHOUT_GPU).status == "skip"


def test_gpus_are_listed_with_free_memory_and_uuid() -> None:
    check = graphics.check_gpu(WITH_GPU)
    assert (check.status, check.detail) == ("pass", "NVIDIA H200, 139.5 of 140.0 GiB free (GPU-1)")
    lost = graphics.check_gpu(replace(WITH_GPU, note="GPU 1 cannot be read."))
    assert (lost.status, "GPU 1 cannot be read." in lost.detail, lost.fix) == ("warn", True, "sudo reboot")


@needs_compiler
def test_a_driver_that_runs_torchs_cuda_passes(card: FakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    built_for(monkeypatch, "13.0")
    check = graphics.check_driver(snapshot())
    assert (check.status, check.detail) == ("pass", "driver 580.95.05 runs up to CUDA 13.0, torch needs 13.0")
    # Within one major version older drivers run newer toolkits.
    card.change(driver="550.54", cuda=12040)
    built_for(monkeypatch, "12.6")
    assert graphics.check_driver(snapshot()).status == "pass"


@needs_compiler
def test_a_driver_older_than_torchs_cuda_fails_and_the_build_that_it_runs_is_named(
    card: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.change(driver="550.54.14", cuda=12040)
    built_for(monkeypatch, "13.0")
    check = graphics.check_driver(snapshot())
    assert (check.status, check.blocking) == ("fail", True)
    assert "torch is built for CUDA 13.0 and needs driver 580 or newer" in check.detail
    assert "driver 550.54.14 runs up to CUDA 12.4" in check.detail
    assert "would end" in check.meaning
    assert check.fix.endswith(
        f"-m pip install 'torch=={TORCH_PIN}+cu126' --index-url https://download.pytorch.org/whl/cu126"
    )


@needs_compiler
def test_a_new_card_with_an_old_driver_needs_the_driver_first(card: FakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    card.change(driver="570.10", cuda=12080, **{"0.capability": 120})
    built_for(monkeypatch, "13.0")
    fix = graphics.check_driver(snapshot()).fix
    assert fix.startswith("Update the NVIDIA driver to 580 or newer, then: ")
    assert fix.endswith("/cu130")


def test_a_torch_without_cuda_beside_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for(monkeypatch, None)
    check = graphics.check_driver(WITH_GPU)
    assert (check.status, check.detail) == ("fail", "There is a GPU, but torch 2.13.0 cannot use it.")
    assert f"'torch=={TORCH_PIN}+cu130'" in check.fix


@needs_compiler
def test_who_holds_the_cards_memory_is_named(card: FakeState) -> None:
    assert graphics.check_vram(snapshot()).status == "pass"
    card.change(
        **{"0.used": 21 * GIB, "0.processes": f"{os.getpid()}:{19 * GIB}", "0.drawing": f"{os.getppid()}:{GIB}"}
    )
    check = graphics.check_vram(snapshot())
    assert (check.status, check.blocking) == ("warn", False)
    assert check.detail.startswith("NVIDIA H200: 119.0 of 140.0 GiB free, 21.0 held by ")
    assert f"({os.getpid()}) 19.0 GiB" in check.detail
    assert f"({os.getppid()}) 1.0 GiB" in check.detail, "a desktop draws and does not compute"
    assert check.meaning.startswith("21.0 GiB less for training")
    named = snapshot().gpus[0].processes[0].name
    # In a container the numbers are the machine's, and whose they are is not known.
    assert check.fix.startswith(f"kill {os.getpid()} ") if named else check.fix == "nvidia-smi"


def test_the_screen_and_what_is_not_ones_own_are_never_to_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(uids=lambda: SimpleNamespace(real=os.getuid()))
    monkeypatch.setattr(graphics, "psutil", SimpleNamespace(Process=lambda pid: own, Error=OSError))
    held = replace(CARD, free_gib=130.0, processes=(GpuProcess(7, 4.0, "gnome-shell"), GpuProcess(8, 5.0, "python3")))
    check = graphics.check_vram(replace(WITH_GPU, gpus=(held,)))
    assert check.fix == "kill 8   # python3: if it is yours and no longer needed"
    alone = replace(held, processes=held.processes[:1])
    assert graphics.check_vram(replace(WITH_GPU, gpus=(alone,))).fix == "nvidia-smi"
    first = replace(held, processes=(GpuProcess(1, 9.0, "init"),))
    assert graphics.check_vram(replace(WITH_GPU, gpus=(first,))).fix == "nvidia-smi"
    own.uids = lambda: SimpleNamespace(real=os.getuid() + 1)
    assert graphics.check_vram(replace(WITH_GPU, gpus=(held,))).fix == "nvidia-smi"


def test_the_build_for_each_card_and_driver() -> None:
    names = {
        ((12, 0), (13, 0)): "cu130",
        ((12, 1), (13, 2)): "cu130",
        ((8, 9), (13, 0)): "cu130",
        ((8, 9), (12, 4)): "cu126",
        ((7, 0), (13, 0)): "cu126",
        ((6, 1), (12, 2)): "cu126",
        ((7, 5), None): "cu130",
        (None, (12, 8)): "cu126",
    }
    for (capability, driver), name in names.items():
        build = suitable_build(capability, driver)
        assert build is not None, (capability, driver)
        assert build.name == name, (capability, driver)
    assert suitable_build((12, 0), (12, 8)) is None
    assert suitable_build((3, 5), (13, 0)) is None
    assert "train.device=cpu" in how_to_mend((3, 5), (13, 0))
    assert {build.minimum_driver for build in torch_builds.BUILDS} == {580, 525}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_90a", "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_120a"], (12, 1), False),
        (["sm_120"], (12, 1), True),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_90"], (8, 0), False),
        (["sm_75", "sm_80"], (7, 0), False),
        (["gfx90a", ""], (9, 0), False),
    ],
)
def test_code_runs_on_its_own_major_version_and_ptx_on_all_later_ones(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert has_code_for(architectures, *capability) is runs


# With a fake torch


class FakeCuda:
    """What torch.cuda says of a card."""

    def __init__(
        self, capability: tuple[int, int], architectures: tuple[str, ...] = (), available: bool = True
    ) -> None:
        self.is_available = lambda: available
        self.get_device_capability = lambda: capability
        self.get_arch_list = lambda: list(architectures)
        self.get_device_name = lambda: "NVIDIA GeForce RTX"


class _Matrix:
    def __init__(self, value: float) -> None:
        self.value = value

    def __matmul__(self, other: _Matrix) -> _Matrix:
        return _Matrix(64 * self.value * other.value)

    def __getitem__(self, place: object) -> _Matrix:
        return self

    def item(self) -> float:
        return self.value


def fake_torch(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, version: str = "2.13.0+cu130", **more: Any) -> None:
    facts = {"full": lambda shape, value, **_: _Matrix(value), "float32": None, "bfloat16": None, "float16": None}
    build = None if "cpu" in version else f"{version[-3:-1]}.{version[-1]}"
    torch = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=build), cuda=cuda, **(facts | more))
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: torch if name == "torch" else real(name, *rest))
    monkeypatch.setattr(computing, "snapshot", lambda: WITH_GPU)


def test_a_torch_without_code_for_this_gpu_blocks_and_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((12, 0), ("sm_50", "sm_80", "sm_86", "sm_90")), "2.13.0+cu126")
    check = trials.try_here("cuda")
    assert (check.status, check.blocking) == ("fail", True)
    assert check.detail == (
        "torch for CUDA 12.6 has no code for the NVIDIA GeForce RTX (sm_120); it has sm_50, sm_80, sm_86, sm_90."
    )
    assert "no kernel image is available" in check.meaning
    assert check.fix.endswith(f"'torch=={TORCH_PIN}+cu130' --index-url https://download.pytorch.org/whl/cu130")


def test_an_old_card_needs_the_build_for_old_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((6, 1), ("sm_75", "sm_80", "sm_120", "compute_120")))
    assert "+cu126'" in trials.try_here("cuda").fix


def test_a_card_that_multiplies_rightly_passes_and_one_that_does_not_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((9, 0), ("sm_90",)))
    assert trials.try_here("cuda").detail == "CUDA 13.0 on NVIDIA GeForce RTX (sm_90)"
    fake_torch(monkeypatch, FakeCuda((9, 0), ("sm_90",)), full=lambda shape, value, **_: _Matrix(1.0))
    check = trials.try_here("cuda")
    assert (check.blocking, "multiplies wrongly" in check.detail) == (True, True)


def test_a_gpu_that_torch_does_not_see_blocks_unless_the_driver_is_what_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_torch(monkeypatch, FakeCuda((9, 0), available=False))
    check = trials.try_here("cuda")
    assert (check.blocking, "CUDA_VISIBLE_DEVICES" in check.fix) == (True, True)
    monkeypatch.setattr(computing, "snapshot", lambda: replace(WITH_GPU, cuda_driver=(12, 4)))
    assert trials.try_here("cuda").status == "skip", "the driver's own check says it"
    monkeypatch.setattr(computing, "snapshot", lambda: WITHOUT_GPU)
    assert trials.try_here("cuda").status == "skip"


def test_another_torch_than_the_pinned_one_is_a_warning_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((9, 0)), "2.9.1+cu128")
    check = trials.try_here("torch")
    assert (check.status, check.fix.endswith(f"'torch=={TORCH_PIN}'")) == ("warn", True)


def test_bf16_that_is_wrong_leaves_fp16_and_slow_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((7, 5)))
    slow = trials.try_here("bf16")
    assert (slow.status, slow.disables, slow.fix) == ("warn", (), "--set train.precision=fp16")
    fake_torch(monkeypatch, FakeCuda((9, 0)), full=lambda shape, value, **_: _Matrix(1.0))
    wrong = trials.try_here("bf16")
    assert (wrong.status, wrong.blocking, wrong.disables) == ("fail", False, (("train.precision", "bf16"),))


@pytest.mark.parametrize(("name", "capability"), [("fp8 product", (8, 6)), ("int8 product", (7, 0))])
def test_a_card_without_a_kernel_loses_that_product_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    fake_torch(monkeypatch, FakeCuda(capability))
    check = trials.try_here(name)
    kind = name.partition(" ")[0]
    assert (check.status, check.blocking, check.disables) == ("skip", False, ())
    assert f"compute capability {capability[0]}.{capability[1]}" in check.detail
    assert f"cannot be chosen with {kind}" in check.meaning
    assert list(unusable_choices([check], {"memory.quantize": kind})) == [("memory.quantized_matmul", True)]


class _Refuses:
    uint8 = None

    def empty(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")


def test_pinned_memory_that_is_refused_is_told_with_what_becomes_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, FakeCuda((9, 0)), uint8=None, empty=_Refuses().empty)
    check = trials.try_here("pinned memory")
    assert (check.status, check.blocking, check.disables) == ("warn", False, ())
    assert check.detail == "64 MiB were refused: CUDA error: out of memory"
    assert "memory.swapped_blocks" in check.meaning
    assert check.fix.startswith("ulimit -l unlimited")


# With the real torch


def test_every_optimizer_of_bitsandbytes_hangs_on_its_check_and_no_other() -> None:
    from lorasmith.engine import optimizers

    ours = {name for name, build in optimizers._BUILDERS.items() if "_bitsandbytes" in str(build)}
    assert {value for _, value in DISABLED_BY["bitsandbytes"]} == ours


def break_import(monkeypatch: pytest.MonkeyPatch, package: str, error: BaseException) -> None:
    real = importlib.import_module

    def broken(name: str, package_of: str | None = None) -> ModuleType:
        if name == package:
            raise error
        return real(name, package_of)

    monkeypatch.setattr(importlib, "import_module", broken)


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: cannot open"), RuntimeError("CUDA Setup failed\nmore"), SystemExit(2)]
)
def test_a_broken_bitsandbytes_takes_its_optimizers_and_nf4(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    break_import(monkeypatch, "bitsandbytes", error)
    checks = [trials.try_here(name) for name in ("bitsandbytes", "nf4", "int8", "fp8")]
    assert [check.status for check in checks] == ["fail", "fail", "pass", "pass"]
    assert all(type(error).__name__ in check.detail and "\n" not in check.detail for check in checks[:2])
    lost = unusable_choices(checks)
    assert set(lost) == {*DISABLED_BY["bitsandbytes"], *DISABLED_BY["nf4"]}
    assert all("pip install" in reason for reason in lost.values())


def test_an_8_bit_step_that_moves_weights_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def nothing(self: Any) -> None:
        self.state[self.param_groups[0]["params"][0]] = {"state1": SimpleNamespace(dtype=None)}

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", nothing)
    check = trials.try_here("bitsandbytes")
    assert (check.status, "moved the weights by 0.0000" in check.detail) == ("fail", True)
    assert ("optimizer.name", "adamw8bit") in check.disables


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8", "int8 product", "fp8 product"])
def test_a_packed_layer_that_computes_wrongly_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from lorasmith.engine.quantization import frozen_linear

    right = frozen_linear.FrozenLinear.forward
    monkeypatch.setattr(frozen_linear.FrozenLinear, "forward", lambda self, x: right(self, x) * 1.5)
    check = trials.try_here(name)
    assert (check.status, check.optional) == ("fail", True)
    assert f"A layer in {name.partition(' ')[0]} is " in check.detail
    assert "pip install" in check.fix
    assert check.disables or check.disables_together


def test_a_layer_that_was_not_packed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.engine import quantization

    monkeypatch.setattr(quantization, "pack_module", lambda *_, **__: 0)
    assert quantized.check_int8().detail == "The layer was not packed."


def test_each_attention_kernel_is_tried_and_masks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "device_of", lambda torch: "cpu")
    check = trials.try_here("attention")
    assert (check.status, check.detail.startswith("flash, math on the CPU; with masks ")) == ("pass", True)


@pytest.mark.parametrize(
    ("working", "status", "words"),
    [
        ({"flash": False, "math": True}, "warn", "Base models whose attention has masks take several times"),
        ({"math": False}, "warn", "Attention takes several times"),
        ({}, "fail", "No base model can be trained."),
        ({"flash": False, "memory-efficient": True, "math": True}, "pass", ""),
    ],
)
def test_attention_kernels_that_do_not_work_are_told_with_what_they_cost(
    monkeypatch: pytest.MonkeyPatch, working: dict[str, bool], status: str, words: str
) -> None:
    """`working` says of each kernel that works whether it takes masks; `math` takes them always."""
    import torch

    kernels = torch.nn.attention.SDPBackend
    names = {kernels.FLASH_ATTENTION: "flash", kernels.EFFICIENT_ATTENTION: "memory-efficient", kernels.MATH: "math"}

    def attends(torch: Any, backend: Any, device: str, dtype: Any, *, masked: bool) -> bool:
        name = names.get(backend, "")
        return name in working and (working[name] or not masked or name == "math")

    monkeypatch.setattr(computing, "device_of", lambda torch: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(computing, "_attends", attends)
    check = trials.try_here("attention")
    assert (check.status, check.blocking) == (status, status == "fail")
    assert check.meaning.startswith(words)


def test_products_in_8_bits_count_as_fast_only_where_they_were_clearly_faster_and_right() -> None:
    checks = [
        Check("int8 product", "pass", "works", speedup=1.6),
        Check("fp8 product", "fail", "wrong", speedup=1.9),
        Check("bf16", "pass", "works"),
    ]
    assert fast_products(checks) == {"int8"}
    assert fast_products([replace(checks[0], speedup=1.02)]) == frozenset()
    assert fast_products([Check.from_json(checks[0].to_json() | {"blocking": 0})]) == {"int8"}
