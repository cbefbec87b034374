"""What the doctor promises: real trials, one line of fix for each failure, and no crash whatever is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import locale
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorasmith.engine import doctor
from lorasmith.engine.doctor import Check, run_checks
from lorasmith.engine.hardware import HardwareSnapshot, Memory, TorchBuild
from lorasmith.engine.nvml import Gpu

ROOT = Path(__file__).parents[2]
NAMES = [
    "python",
    "packages",
    "torch",
    "gpu",
    "cuda",
    "bf16",
    "bitsandbytes",
    "memory",
    "output folder",
    "cache folder",
    "locale",
    "terminal",
    "hub",
]
CARD = Gpu("GPU-1", 0, "NVIDIA H200", 140.0, 130.0, (9, 0), "580.95", 0.0, 30.0, 80.0, ())
WITH_GPU = HardwareSnapshot((CARD,), "", (13, 0), Memory(64.0, 60.0), (), "CPU", 8)
WITHOUT_GPU = replace(WITH_GPU, gpus=(), note="No NVIDIA driver was found.", cuda_driver=None)


@pytest.fixture(autouse=True)
def _process_settings_restored() -> Iterator[None]:
    environment = dict(os.environ)
    yield
    logging.captureWarnings(False)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


def break_import(monkeypatch: pytest.MonkeyPatch, package: str, error: BaseException) -> None:
    real = importlib.import_module

    def broken(name: str, package_of: str | None = None) -> ModuleType:
        if name == package:
            raise error
        return real(name, package_of)

    monkeypatch.setattr(importlib, "import_module", broken)


def fake_torch(monkeypatch: pytest.MonkeyPatch, **cuda: Any) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(**cuda), full=lambda shape, value, device: _Matrix(value))
    monkeypatch.setattr(importlib, "import_module", lambda name: torch)
    monkeypatch.setattr(doctor, "torch_build", lambda: TorchBuild("2.13.0", "12.8"))


class _Matrix:
    def __init__(self, value: float) -> None:
        self.value = value

    def __matmul__(self, other: _Matrix) -> _Matrix:
        return _Matrix(64 * self.value * other.value)

    def __getitem__(self, place: object) -> _Matrix:
        return self

    def item(self) -> float:
        return self.value


def test_every_check_is_made_in_order_and_told_as_it_comes(tmp_path: Path) -> None:
    told: list[Check] = []
    checks = run_checks(tmp_path / "runs", on_check=told.append)
    assert [check.name for check in checks] == NAMES
    assert told == checks
    assert not (tmp_path / "runs").exists(), "a check leaves nothing behind"
    by_name = {check.name: check for check in checks}
    for name in ("python", "packages", "torch", "bf16", "bitsandbytes", "output folder", "cache folder"):
        assert by_name[name].status == "pass", by_name[name]
    assert by_name["hub"].status == "skip"
    for check in checks:
        assert check.detail
        assert "\n" not in check.fix
        assert check.fix or check.status in ("pass", "skip")


@pytest.mark.parametrize("package", ["torch", "bitsandbytes"])
@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: cannot open"), RuntimeError("CUDA Setup failed\nmore"), SystemExit(2)]
)
def test_a_broken_library_is_a_failed_check_with_a_fix_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, error: BaseException
) -> None:
    break_import(monkeypatch, package, error)
    by_name = {check.name: check for check in run_checks(tmp_path)}
    assert list(by_name) == NAMES
    broken = by_name[package]
    assert (broken.status, type(error).__name__ in broken.detail) == ("fail", True)
    assert "\n" not in broken.detail
    assert f"'{package}" in broken.fix
    assert by_name["bitsandbytes"].status == "fail"
    assert (by_name["bf16"].status == "fail") == (package == "torch")
    assert by_name["output folder"].status == "pass"


def test_without_bitsandbytes_the_fix_offers_the_optimizer_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "bitsandbytes", ImportError("x"))
    assert "Set optimizer.name to adamw" in run_checks()[NAMES.index("bitsandbytes")].fix


def test_an_8_bit_step_that_moves_weights_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(
        bitsandbytes.optim.AdamW8bit,
        "step",
        lambda self: self.state.__setitem__(self.param_groups[0]["params"][0], {"state1": SimpleNamespace(dtype=None)}),
    )
    check = doctor.check_bitsandbytes()
    assert (check.status, "moved the weights by 0.0000" in check.detail) == ("fail", True)


def test_the_torch_pin_is_the_one_of_the_constraints_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"torch=={doctor.TORCH_PIN}" in (ROOT / "constraints.txt").read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.MINIMUM_PYTHON))
    other = SimpleNamespace(__version__="2.9.1+cu128", version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setattr(importlib, "import_module", lambda name: other)
    check = doctor.check_torch()
    assert (check.status, check.fix.endswith(f"'torch=={doctor.TORCH_PIN}'")) == ("warn", True)


def test_missing_and_untested_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["pillow>=99", "no-such-thing>=1", "numpy>=2", "x; extra == 'dev'"]
    )
    check = doctor.check_packages()
    assert check.status == "fail"
    assert re.match(r"pillow \S+ is installed, >=99 is needed; no-such-thing is missing$", check.detail)
    assert check.fix.endswith("'pillow>=99' 'no-such-thing>=1'")


def test_without_a_gpu_the_driver_checks_are_skipped_and_the_reason_is_told() -> None:
    check = doctor.check_gpu(WITHOUT_GPU)
    assert (check.status, check.detail) == ("warn", "No NVIDIA driver was found.")
    assert doctor.check_cuda(WITHOUT_GPU).status == "skip"


def test_gpus_are_listed_with_free_memory_and_uuid() -> None:
    check = doctor.check_gpu(WITH_GPU)
    assert (check.status, check.detail) == ("pass", "NVIDIA H200, 130.0 of 140.0 GiB free (GPU-1)")
    lost = doctor.check_gpu(replace(WITH_GPU, note="GPU 1 cannot be read."))
    assert (lost.status, "GPU 1 cannot be read." in lost.detail) == ("warn", True)


def test_a_torch_without_cuda_beside_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_build", lambda: TorchBuild("2.13.0+cpu", None))
    check = doctor.check_cuda(WITH_GPU)
    assert (check.status, check.detail) == ("fail", "There is a GPU, but torch 2.13.0+cpu cannot use it.")


def test_a_driver_older_than_torchs_cuda_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_build", lambda: TorchBuild("2.13.0", "13.0"))
    check = doctor.check_cuda(replace(WITH_GPU, cuda_driver=(12, 4)))
    assert (check.status, check.fix) == ("fail", "Update the NVIDIA driver.")
    assert "driver 580.95 runs up to CUDA 12.4" in check.detail


@pytest.mark.parametrize(
    ("architectures", "capability", "status"),
    [
        (["sm_80", "sm_90"], (9, 0), "pass"),
        (["sm_80"], (8, 9), "pass"),
        (["sm_90a", "compute_90"], (12, 0), "pass"),
        (["sm_80", "sm_90"], (12, 0), "fail"),
        (["sm_90"], (8, 0), "fail"),
    ],
)
def test_a_torch_without_code_for_this_gpu_fails(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], capability: tuple[int, int], status: str
) -> None:
    fake_torch(
        monkeypatch,
        is_available=lambda: True,
        get_device_capability=lambda: capability,
        get_arch_list=lambda: architectures,
    )
    check = doctor.check_cuda(WITH_GPU)
    assert check.status == status
    assert status == "pass" or f"sm_{capability[0]}{capability[1]}" in check.detail


def test_a_gpu_that_torch_does_not_see_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, is_available=lambda: False)
    assert doctor.check_cuda(WITH_GPU).status == "fail"


@pytest.mark.parametrize(("available", "status"), [(30.0, "pass"), (4.0, "warn")])
def test_little_memory_is_a_warning(available: float, status: str) -> None:
    machine = replace(WITHOUT_GPU, memory=Memory(64.0, available, limited=True))
    check = doctor.check_memory(machine)
    assert check.status == status
    assert check.detail == f"{available:.1f} of 64.0 GiB available (limited by the container)"


@pytest.mark.parametrize(("free_gib", "status"), [(500, "pass"), (5, "warn"), (0.5, "fail")])
def test_little_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * (1 << 30)))
    check = doctor.check_disk("output folder", tmp_path / "new", "run.output_folder")
    assert (check.status, str(tmp_path) in check.detail) == (status, True)


def test_a_folder_that_cannot_be_written_to_fails_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.check_disk("output folder", tmp_path / "file" / "runs", "run.output_folder")
    assert (check.status, check.fix) == ("fail", "Choose another folder with run.output_folder.")


def test_a_locale_without_utf_8_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do: "ANSI_X3.4-1968")
    check = doctor.check_locale()
    assert (check.status, check.fix) == ("warn", "export LANG=C.UTF-8")


@pytest.mark.parametrize(
    ("term", "size", "status"),
    [
        ("xterm-256color", (120, 40), "pass"),
        ("dumb", (120, 40), "warn"),
        ("", (120, 40), "warn"),
        ("x", (79, 24), "warn"),
    ],
)
def test_the_terminal_must_be_known_and_large_enough(
    monkeypatch: pytest.MonkeyPatch, term: str, size: tuple[int, int], status: str
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size(size))
    check = doctor.check_terminal()
    assert check.status == status
    assert f"inside tmux, {size[0]} x {size[1]}, true color" in check.detail


def test_the_hub_is_asked_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_network(url: str, timeout: float) -> None:
        asked.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert doctor.check_hub(ask=False).status == "skip"
    assert asked == []
    check = doctor.check_hub(ask=True)
    assert (check.status, "no route" in check.detail, asked) == ("warn", True, [doctor.HUB_URL])


def test_the_doctor_itself_does_not_import_torch() -> None:
    code = "import sys, lorasmith.engine.doctor; sys.exit('torch' in sys.modules or 'bitsandbytes' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
