"""Wheel and sdist hold the whole tree, and a wheel alone is enough to train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lorasmith.engine.errors import TrainingError

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "presets", "tui")
SHIPPED = {".py", ".toml", ".tcss", ".typed", ".png", ".txt", ".json", ".safetensors", ".md"}
"""Kinds of files that belong into the wheel where they lie in a package."""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def tree() -> set[str]:
    """Every file of the three packages that git would take up, as its path in the wheel."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, cwd=ROOT).stdout.split(
        "\n"
    )
    paths = {Path(name) for name in listed if name and (ROOT / name).is_file()}
    return {f"lorasmith/{path.as_posix()}" for path in paths if path.suffix in SHIPPED or not path.suffix}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a clean copy of the tree, and the wheel that was built from that sdist."""
    work = tmp_path_factory.mktemp("packaging")
    source = work / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", source, cwd=work)
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment with the wheel; its dependencies are lent by the present environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    target = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).stdout.strip()
    )
    # Lent without running its .pth files: the hook of the editable install would show the tree in place of the wheel.
    (target / "lent.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    return python


def test_the_wheel_holds_every_file_of_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    packaged = {name for name in inside if ".dist-info/" not in name}
    expected = {name for name in tree() if not name.endswith(".md") or "/demo/" in name}
    assert expected - packaged == set(), "missing from the wheel"
    assert packaged - expected == set(), "only in the wheel"
    assert {name.partition("/")[0] for name in packaged} == {"lorasmith"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_wheel_is_small_enough_to_share(wheel: Path) -> None:
    assert wheel.stat().st_size < 30_000_000


def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path) -> None:
    # `python -m build` makes the wheel from the unpacked sdist: what the sdist lacks, the wheel lacks too.
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "engine/cli/__init__.py", "tui/app.py"} <= names


def test_the_metadata_names_the_license_and_bounds_every_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    needed = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(needed) > 10
    for line in needed:
        assert ">=" in line, line
        assert "<" in line, line


def test_the_installed_command_tells_its_version_and_lies_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = run(installed.parent / "lorasmith", "--version", cwd=tmp_path)
    assert done.stdout.startswith("lorasmith ")
    code = "import lorasmith.engine, lorasmith.tui; print(lorasmith.engine.__file__, lorasmith.tui.__file__, sep='\\n')"
    for path in run(installed, "-c", code, cwd=tmp_path).stdout.splitlines():
        assert Path(path).is_relative_to(installed.parent.parent), path


def test_a_foreign_package_called_engine_does_not_disturb_the_command(installed: Path, tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    done = run(installed.parent / "lorasmith", "runs", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("No runs in")


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_installed_command_trains_and_judges_the_demo(installed: Path, tmp_path: Path) -> None:
    # Two steps prove the way from the packaged model and pictures to a LoRA and its measurement, which such a LoRA
    # rightly fails; the whole demo is `make demo`.
    few = ("train.steps=2", "schedule.warmup_steps=0", "previews.every=0", "checkpoints.every=0")
    # What the console script calls, but for four seeds of the 32.
    command = """
import sys
from functools import partial
from lorasmith.engine import demo_run
from lorasmith.tui.__main__ import main
demo_run.measure_trigger = partial(demo_run.measure_trigger, num_seeds=4)
sys.exit(main())
"""
    done = subprocess.run(
        [installed, "-c", command, "demo", "--headless", "--output", tmp_path / "runs"]
        + [part for setting in few for part in ("--set", setting)],
        cwd=tmp_path,
        env={**os.environ, "LORASMITH_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == TrainingError.exit_code, done.stdout + done.stderr
    (lora,) = tmp_path.glob("runs/*/export/*.safetensors")
    assert f"LoRA: {lora}" in done.stdout
    assert "concept shown with the trigger:      0.0%" in done.stdout
    assert "Traceback" not in done.stderr
