"""The shape of the code: what is torch-free stays so, what belongs in one place is nowhere else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("engine", "tui", "presets") for path in (ROOT / part).rglob("*.py"))
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "pytorch_optimizer")
DEVICE_MODULES = {"engine/hardware.py", "engine/compute.py"}
TORCH_FREE_LAYERS = 5
"""The last layers of the import contract; `engine.session` and `engine.cli` import torch only when they run."""


def layers() -> list[list[str]]:
    """The layers of pyproject.toml, top first, each with its module names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in settings["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    return [line.split(" : ") for line in contract["layers"]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lorasmith", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def loaded_after(modules: list[str], forbidden: tuple[str, ...]) -> dict[str, list[str]]:
    """Import `modules` one after the other in a new process; return each that brought in something forbidden."""
    code = f"""
import importlib, json, sys
found, seen = {{}}, set()
for name in {modules!r}:
    importlib.import_module(name)
    new = [bad for bad in {forbidden!r} if bad in sys.modules and bad not in seen]
    seen.update(new)
    if new:
        found[name] = new
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Every string constant of a file with its line, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_what_the_wizard_lives_on_imports_no_torch() -> None:
    torch_free = [name for layer in layers()[-TORCH_FREE_LAYERS:] for name in layer]
    families = [module_name(path) for path in SOURCES if path.parent.name == "families"]
    modules = [*torch_free, *families, "lorasmith.engine.session", "lorasmith.engine.cli", "lorasmith.engine.demo_run"]
    assert len(modules) > 25
    assert loaded_after(modules, HEAVY) == {}


def test_no_module_of_the_wizard_imports_torch_and_none_of_the_engine_textual() -> None:
    screens = [
        module_name(path) for path in SOURCES if path.parts[len(ROOT.parts)] == "tui" and path.stem != "__main__"
    ]
    assert "lorasmith.tui.app" in screens
    assert loaded_after(screens, HEAVY) == {}
    headless = [name for layer in layers()[1:4] + layers()[-TORCH_FREE_LAYERS:] for name in layer]
    assert loaded_after(headless, ("textual", "lorasmith.tui")) == {}


def test_every_engine_module_has_its_layer() -> None:
    placed = {name for layer in layers() for name in layer}
    inner = (
        "adapters",
        "captioners",
        "cli",
        "doctor",
        "export",
        "families",
        "fit",
        "foot_guns",
        "inspect_file",
        "lora_files",
        "memory",
        "objectives",
        "optimizers",
        "quantization",
        "rehearsal",
        "simulation",
    )
    packages = tuple(f"lorasmith.engine.{name}" for name in inner)
    for path in SOURCES:
        name = module_name(path)
        if not name.startswith("lorasmith.engine.") or name == "lorasmith.engine.dataset" or name.startswith(packages):
            continue
        assert name in placed, f"{name} is in no layer of pyproject.toml"
    assert placed >= set(packages)


def test_the_page_about_the_engine_names_every_module() -> None:
    page = (ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    for layer in layers():
        for name in layer:
            assert name.removeprefix("lorasmith.engine.").removeprefix("lorasmith.") in page, name


def test_only_the_command_line_prints_with_rich() -> None:
    graph = grimp.build_graph("lorasmith.engine", include_external_packages=True, cache_dir=None)
    importers = graph.find_modules_that_directly_import("rich") if "rich" in graph.modules else set()
    assert all(name.startswith("lorasmith.engine.cli.") for name in importers), importers


def test_the_gpu_is_named_in_one_place() -> None:
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if relative.as_posix() in DEVICE_MODULES or "demo" in path.parts or relative.parts[:2] == ("engine", "doctor"):
            continue
        found = [f"{path.name}:{line}" for line, text in strings(path) if text == "cuda" or text.startswith("cuda:")]
        assert not found, f"{found}: devices are chosen in engine/compute.py; ask `device.type != 'cpu'`"


def test_no_module_asks_which_family_it_is() -> None:
    from lorasmith.engine.families import families

    names = set(families())
    assert "sd15" in names
    for path in SOURCES:
        if path.parent.name == "families" or (ROOT / "presets") in path.parents:
            continue
        found = [f"{path.name}:{line}" for line, text in strings(path) if text in names]
        assert not found, f"{found}: what differs between families is a field of FamilySpec"
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if f"families.{name}" in text or f"families import {name}" in text], path


def test_every_family_has_its_preset() -> None:
    from lorasmith.engine.families import families

    for name in families():
        assert (ROOT / "presets" / f"{name}.toml").is_file(), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_enough_to_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 360, "split it: a file is one thing"
    assert path.stem not in ("utils", "util", "common", "base", "helpers", "manager", "misc")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long to read"
