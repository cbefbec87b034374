"""`lorasmith plan --all` and `--fit`: what is printed, what is written, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import cli, hardware
from lorasmith.engine.families import families
from lorasmith.engine.fit import machine, tiers
from lorasmith.engine.hardware import Disk, HardwareSnapshot, Memory
from lorasmith.engine.memory import ModelMemory
from lorasmith.engine.nvml import Gpu
from lorasmith.engine.run_file import load_run_file, resolve_config
from tests.memory_sample import big_transformer

RUN = """# My run, which took long to write
[base]
model = "someone/large"  # not on this machine

[dataset]
resolution = 1024

[train]
gradient_checkpointing = true  # a guess
steps = 1000
"""


def gpu(free_gib: float) -> Gpu:
    name = "NVIDIA GeForce RTX 4090"
    return Gpu("GPU-1", 0, name, 24.0, free_gib, (8, 9), "580.1", 0.0, 40.0, 30.0, ())


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only one model is derived, and one family knows it."""

    def memories(family: str) -> tuple[ModelMemory, ...]:
        return (big_transformer(),) if family == "flux1" else ()

    monkeypatch.setattr(machine, "model_memories", memories)
    monkeypatch.setattr(tiers, "model_memories", memories)
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def use_card(monkeypatch: pytest.MonkeyPatch, free_gib: float | None, ram_gib: float = 60.0) -> None:
    gpus = () if free_gib is None else (gpu(free_gib),)

    def snapshot(folders: Any = (), timeout: float = 0.0) -> HardwareSnapshot:
        disks = tuple(Disk(folder, 900.0, 500.0) for folder in folders)
        note = "" if gpus else "No NVIDIA driver was found."
        return HardwareSnapshot(gpus, note, (13, 0), Memory(64.0, ram_gib), disks, "CPU", 8)

    monkeypatch.setattr(hardware, "snapshot", snapshot)


def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "RUN.toml"
    path.write_text(RUN)
    return path


@pytest.mark.usefixtures("derived")
class TestFit:
    def test_it_says_what_fits_and_what_it_costs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        use_card(monkeypatch, 11.0)
        assert cli.main(["plan", str(run_file(tmp_path)), "--fit"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("fits: needs ")
        assert "block swap" in printed
        assert "memory.swapped_blocks = " in printed
        assert "s a step" in printed
        assert "At fal.ai 1000 steps cost $2.00" in printed
        assert (tmp_path / "RUN.toml").read_text() == RUN

    def test_write_changes_the_file_and_keeps_its_comments(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        use_card(monkeypatch, 11.0)
        path = run_file(tmp_path)
        assert cli.main(["plan", str(path), "--fit", "--write", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        written = resolve_config([load_run_file(path)]).config
        assert told["settings"]["memory.swapped_blocks"] == written.memory.swapped_blocks > 0
        assert "# My run, which took long to write" in path.read_text()
        assert "# not on this machine" in path.read_text()
        assert written.train.steps == 1000
        assert cli.main(["plan", str(path), "--fit", "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["settings"], again["verdict"]) == ({}, "fits")

    def test_what_is_set_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        use_card(monkeypatch, 11.0)
        arguments = ["plan", str(run_file(tmp_path)), "--fit", "--json", "--set", "memory.swapped_blocks=0"]
        assert cli.main(arguments) == 0
        told = json.loads(capsys.readouterr().out)
        assert "memory.swapped_blocks" not in told["settings"]
        assert told["settings"]["memory.quantize"] in ("int8", "nf4")

    def test_what_does_not_fit_ends_with_the_nearest_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        use_card(monkeypatch, 3.0)
        assert cli.main(["plan", str(run_file(tmp_path)), "--fit", "--write"]) == 6
        told = capsys.readouterr()
        assert "This run does not fit: it needs at least" in told.err
        assert "Fix: close other programs on the card until" in told.err
        assert (tmp_path / "RUN.toml").read_text() == RUN

    def test_without_a_card_it_points_to_the_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        use_card(monkeypatch, None)
        assert cli.main(["plan", str(run_file(tmp_path)), "--fit"]) == 6
        assert "lorasmith plan --all" in capsys.readouterr().err

    def test_it_needs_a_file_and_a_known_base(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--fit"]) == 3
        path = tmp_path / "other.toml"
        path.write_text('[base]\nmodel = "someone/else"\n')
        assert cli.main(["plan", str(path), "--fit"]) == 4
        assert "The memory of someone/else is not known." in capsys.readouterr().err


@pytest.mark.usefixtures("derived")
class TestAll:
    def test_each_tier_has_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--all"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("A large transformer (goal: ")
        assert len(lines) == 1 + len(tiers.TIERS)
        assert "px" in lines[-1]

    def test_one_size_of_card_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--all", "--family", "flux1", "--vram", "11", "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert (told["vram_gb"], told["family"], told["verdict"]) == (11, "flux1", "fits")
        assert told["seconds"]["low"] < told["seconds"]["usual"] < told["seconds"]["high"]

    def test_unknown_names_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["plan", "--all", "--family", "nothing"]) == 3
        assert cli.main(["plan", "--all", "--goal", "nothing"]) == 3
        assert "Known families: " + ", ".join(sorted(families())) in capsys.readouterr().err
