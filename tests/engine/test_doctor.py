"""What the doctor promises: every check made in order, no crash or hang whatever is broken, and nothing taken away
but what is broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import doctor
from lorasmith.engine.doctor import Check, checks_behind, remembered, run_checks, trials, unusable_choices
from lorasmith.engine.doctor.choices import DISABLED_BY, DISABLED_TOGETHER_BY
from lorasmith.engine.doctor.installation import MINIMUM_PYTHON
from lorasmith.engine.doctor.torch_builds import TORCH_PIN
from lorasmith.engine.run_file import check_setting, setting_fields

ROOT = Path(__file__).parents[2]
WITHOUT_HUB = [name for names in doctor.GROUPS.values() for name in names if name not in ("hub token", "gated models")]
FAKES: Mapping[str, str] = {
    "works": """
from types import SimpleNamespace
__version__, version = "2.13.0+cpu", SimpleNamespace(cuda=None)
cuda = SimpleNamespace(is_available=lambda: False)
""",
    "raises": "raise ImportError('libcudart.so.13: cannot open')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "hangs": "import time; time.sleep(600)",
    "exits": "raise SystemExit(3)",
    "prints": "print('{\"name\": \"torch\"}'); raise RuntimeError('CUDA Setup failed\\nmore')",
}


@pytest.fixture(autouse=True)
def _process_settings_restored() -> Iterator[None]:
    environment = dict(os.environ)
    yield
    logging.captureWarnings(False)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a package in front of the real one for child processes."""

    def make(name: str, way: str) -> None:
        folder = tmp_path / "fakes" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(FAKES[way])
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))

    return make


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the trials' child say these lines instead of trying anything."""

    def make(*checks: Check) -> None:
        def run_trials(names: Sequence[str], *_: Any, **__: Any) -> Iterator[Check]:
            known = {check.name: check for check in checks}
            yield from (known.get(name, Check(name, "pass", "fine")) for name in names)

        monkeypatch.setattr(trials, "run_trials", run_trials)

    return make


# The whole


def test_every_check_is_made_in_order_and_told_as_it_comes_without_torch_in_this_process(tmp_path: Path) -> None:
    code = """
import json, sys
from pathlib import Path
from lorasmith.engine import doctor
told, begun = [], []
checks = doctor.run_checks(Path(sys.argv[1]), on_check=told.append, on_start=begun.append)
assert told == checks
known = doctor.remembered_checks()
print(json.dumps({
    "checks": [check.to_json() for check in checks],
    "begun": begun,
    "known": [check.name for check in known if check in checks],
    "torch": "torch" in sys.modules or "bitsandbytes" in sys.modules,
}))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert not said["torch"]
    assert not (tmp_path / "runs").exists(), "a check leaves nothing behind"
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    by_name = {check["name"]: check for check in said["checks"]}
    assert list(by_name) == said["begun"] == WITHOUT_HUB
    assert said["known"] == list(trials.TRIALS)
    tried = ("torch", "bf16", "fp16", "attention", "bitsandbytes", "nf4", "int8", "fp8", "int8 product", "fp8 product")
    for name in ("python", "packages", *tried):
        assert by_name[name]["status"] == "pass", by_name[name]
    for name in ("output folder", "cache folder"):
        assert by_name[name]["status"] in ("pass", "warn"), by_name[name]
        assert "MiB/s" in by_name[name]["detail"]
    assert by_name["hub"]["status"] == "skip"
    for check in by_name.values():
        assert check["detail"]
        assert not check["blocking"]
        assert "\n" not in check["fix"] + check["detail"] + check["meaning"]
        assert (check["fix"] and check["meaning"]) or check["status"] in ("pass", "skip"), check


def test_a_check_without_torch_that_hangs_or_raises_is_a_failed_check_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., None]
) -> None:
    told()
    monkeypatch.setattr(doctor.machine, "check_clock", lambda: time.sleep(5))
    monkeypatch.setattr(doctor.disks, "check_disk", lambda *_: time.sleep(5))
    monkeypatch.setattr(doctor.terminals, "check_locale", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "LOCAL_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "DISK_SECONDS", 0.2)
    by_name = {check.name: check for check in run_checks(tmp_path)}
    assert list(by_name) == WITHOUT_HUB
    assert (by_name["clock"].status, by_name["clock"].detail) == ("fail", "did not answer in 0.2 s")
    assert by_name["locale"].detail == "ZeroDivisionError: division by zero"
    blocking = [name for name, check in by_name.items() if check.blocking]
    assert blocking == ["output folder", "cache folder"], "a clock that hangs stops no training"
    assert all(by_name[name].fix for name in ("clock", "locale", "output folder"))


def test_leaving_the_doctor_early_ends_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def run_trials(names: Sequence[str], *_: Any, **__: Any) -> Iterator[Check]:
        try:
            yield Check(names[0], "pass", "fine")
        finally:
            ended.append("child")

    def interrupt(check: Check) -> None:
        if check.name == "gpu":
            raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run_trials", run_trials)
    with pytest.raises(KeyboardInterrupt):
        run_checks(tmp_path, on_check=interrupt)
    assert ended == ["child"]


# The child process


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("raises", "ImportError: libcudart.so.13: cannot open"),
        ("crashes", "crashed (SIGILL)"),
        ("hangs", "did not answer in 0.8 s"),
        ("exits", "SystemExit: 3"),
        ("prints", "RuntimeError: CUDA Setup failed"),
    ],
)
def test_a_torch_that_breaks_in_whatever_way_blocks_and_skips_what_needs_it(
    way: str, words: str, fake_package: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package("torch", way)
    # The interpreter itself takes half a second on a loaded machine.
    monkeypatch.setitem(trials.SECONDS, "torch", 0.8 if way == "hangs" else 60.0)
    torch, *others = trials.run_trials(["torch", "bf16", "nf4"])
    assert (torch.status, torch.blocking) == ("fail", True)
    assert words in torch.detail
    assert torch.fix.endswith(f"'torch=={TORCH_PIN}'")
    assert torch.meaning == "Nothing can be trained."
    assert [(check.name, check.status, check.disables) for check in others] == [
        ("bf16", "skip", ()),
        ("nf4", "skip", ()),
    ]


def test_a_crash_in_bitsandbytes_takes_only_its_choices_and_the_next_trials_are_made(
    fake_package: Callable[[str, str], None],
) -> None:
    fake_package("torch", "works")
    fake_package("bitsandbytes", "crashes")
    broken, nf4, torch = trials.run_trials(["bitsandbytes", "nf4", "torch"])
    assert (broken.status, broken.blocking, broken.crashed, nf4.status) == ("fail", False, True, "fail")
    assert "crashed (SIGILL)" in broken.detail
    assert "-m pip install --force-reinstall --no-deps 'bitsandbytes" in broken.fix
    assert "adamw and the others work" in broken.meaning
    assert torch.status == "pass", "a new process went on"
    lost = unusable_choices([broken, nf4, torch])
    assert ("optimizer.name", "adamw8bit") in lost
    assert ("memory.quantize", "nf4") in lost
    assert {key for key, _ in lost} == {"optimizer.name", "memory.quantize", "memory.quantize_text_encoders"}
    assert "crashed (SIGILL)" in lost["optimizer.name", "lion8bit"]
    assert "pip install" in lost["optimizer.name", "lion8bit"]


def test_a_child_that_is_left_early_is_ended(
    fake_package: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package("torch", "works")
    fake_package("bitsandbytes", "hangs")
    processes: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def remember(*arguments: Any, **settings: Any) -> subprocess.Popen[str]:
        processes.append(real(*arguments, **settings))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    running = trials.run_trials(["torch", "bitsandbytes"], on_start=lambda name: None)
    assert next(running).name == "torch"
    running.close()
    (child,) = processes
    assert child.poll() is not None


SET_ASIDE = """
import sys
from lorasmith.engine import doctor
assert doctor.set_aside_broken_packages(trying=False) == ""
assert "bitsandbytes" not in sys.modules
why = doctor.set_aside_broken_packages()
assert doctor.set_aside_broken_packages()
import importlib.util
assert importlib.util.find_spec("bitsandbytes") is None
from diffusers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
sys.stdout.write(why)
"""


def test_a_broken_bitsandbytes_is_not_there_for_diffusers_which_would_fail_with_it(
    fake_package: Callable[[str, str], None],
) -> None:
    fake_package("bitsandbytes", "raises")
    said = subprocess.run([sys.executable, "-c", SET_ASIDE], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "ImportError: libcudart.so.13: cannot open"), said.stderr


def test_a_bitsandbytes_that_crashed_a_process_is_not_tried_in_this_one(
    fake_package: Callable[[str, str], None],
) -> None:
    fake_package("bitsandbytes", "crashes")
    doctor.remember([Check("bitsandbytes", "fail", "crashed (SIGILL)", crashed=True)])
    code = (
        "import sys; from lorasmith.engine import doctor; "
        "sys.stdout.write(doctor.set_aside_broken_packages(trying=False)); assert sys.modules['bitsandbytes'] is None"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "crashed (SIGILL)" in said


# Choices


def test_every_choice_that_a_check_can_take_away_is_a_setting_with_that_value() -> None:
    fields = dict(setting_fields())
    together = [combination for combinations in DISABLED_TOGETHER_BY.values() for combination in combinations]
    choices = [choice for group in (*DISABLED_BY.values(), *together) for choice in group]
    assert len(choices) > 15
    for key, value in choices:
        assert key in fields
        assert check_setting(key, value) == "", (key, value)
    assert set(DISABLED_BY) | set(DISABLED_TOGETHER_BY) <= set(trials.TRIALS)


def test_what_cannot_be_used_together_is_told_for_the_values_that_the_others_have() -> None:
    check = trials.explained(Check("fp8 product", "skip", "this card has none"))
    assert unusable_choices([check]) == {}
    reason = "fp8 product: this card has none."
    assert unusable_choices([check], {"memory.quantize": "fp8"}) == {("memory.quantized_matmul", True): reason}
    assert unusable_choices([check], {"memory.quantize": "int8"}) == {}
    assert list(unusable_choices([check], {"memory.quantized_matmul": True})) == [("memory.quantize", "fp8")]
    assert unusable_choices([check], {"memory.quantized_matmul": 1}) == {}


def test_products_that_no_format_has_are_not_to_be_chosen_at_all() -> None:
    checks = [trials.explained(Check(f"{name} product", "fail", "no kernel")) for name in ("fp8", "int8")]
    assert list(unusable_choices(checks)) == [("memory.quantized_matmul", True)]
    assert unusable_choices(checks[:1]) == unusable_choices(checks[1:]) == {}


def test_which_checks_a_run_hangs_on() -> None:
    assert checks_behind({"optimizer.name": "adamw", "memory.quantize": "none"}) == []
    assert checks_behind({"optimizer.name": "adamw8bit", "memory.quantize": "nf4"}) == ["bitsandbytes", "nf4"]
    values = {"memory.quantize": "int8", "memory.quantized_matmul": True, "train.precision": "bf16"}
    assert checks_behind(values) == ["bf16", "int8", "int8 product"]


# Memory


BROKEN = trials.explained(Check("bitsandbytes", "fail", "does not load"))


def test_what_was_found_is_known_at_the_next_start_and_forgotten_with_another_driver_or_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., None]
) -> None:
    assert doctor.remembered_checks() == []
    told(BROKEN, trials.explained(Check("fp8 product", "skip", "this card has none")))
    run_checks(tmp_path)
    known = unusable_choices(doctor.remembered_checks(), {"memory.quantize": "fp8"})
    assert ("optimizer.name", "adamw8bit") in known
    assert ("memory.quantized_matmul", True) in known
    with monkeypatch.context() as changed:
        changed.setattr(remembered, "_version", lambda name: "another")
        assert doctor.remembered_checks() == []
    with monkeypatch.context() as changed:
        changed.setattr(remembered, "_installed_at", lambda name: 1)
        assert doctor.remembered_checks() == [], "the same version, installed anew"
    assert doctor.remembered_checks() != []


def test_a_retry_replaces_what_was_known_of_that_check_alone(told: Callable[..., None]) -> None:
    doctor.remember([BROKEN, trials.explained(Check("fp8", "fail", "wrong"))])
    told()
    assert [check.status for check in doctor.retry(["bitsandbytes"])] == ["pass"]
    assert {check.name: check.status for check in doctor.remembered_checks()} == {"bitsandbytes": "pass", "fp8": "fail"}


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"format": 1, "of": {}}', "\x00" * 40])
def test_a_damaged_memory_is_none(damage: str) -> None:
    doctor.remember([BROKEN])
    assert doctor.remembered_checks() == [BROKEN]
    remembered.memory_file().write_text(damage)
    assert doctor.remembered_checks() == []


def test_a_memory_with_other_fields_is_none() -> None:
    doctor.remember([BROKEN])
    stored = json.loads(remembered.memory_file().read_text())
    del stored["checks"][0]["disables"]
    remembered.memory_file().write_text(json.dumps(stored))
    assert doctor.remembered_checks() == []


def test_a_disk_that_refuses_the_memory_does_not_stop_the_doctor(tmp_path: Path, told: Callable[..., None]) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    told(BROKEN)
    assert run_checks(tmp_path)[-1].name == "hub"
    assert doctor.remembered_checks() == []


# Pins


def test_the_torch_pin_is_the_one_of_the_constraints_file() -> None:
    assert f"torch=={TORCH_PIN}" in (ROOT / "constraints.txt").read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, MINIMUM_PYTHON))
