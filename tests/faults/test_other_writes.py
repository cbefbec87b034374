"""Errors, short writes and kills at the file-system calls of everything that a run writes beside checkpoints."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.run_folder import open_run
from lorasmith.engine.run_summary import list_runs
from tests.faults import write_scenarios as scenarios
from tests.faults.fault_server import FaultServer, Outcome, Spoil
from tests.tiny import tiny_pictures

Record = Callable[[int, str, str], None]
SAMPLE = 24
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE)


def spoils(whole: Outcome, campaign: bool, most: int = 250) -> list[Spoil]:
    """Return the faults of a scenario: errors once and for ever, short writes, kills; a sample without `campaign`."""
    kinds: list[Callable[[int], Spoil]] = [Spoil.short, Spoil.kill]
    for number in ERRORS:
        kinds.append(lambda at, number=number: Spoil.error(at, number, plausible=number != errno.EIO))
        kinds.append(lambda at, number=number: Spoil.error(at, number, forever=True, plausible=number != errno.EIO))
    every = [kind(at) for at in range(1, whole.count + 1) for kind in kinds]
    limit = most if campaign else SAMPLE
    # A step that shares no factor with the number of kinds meets them all.
    step = next(step for step in range(1, len(every) + 2) if step % 2 and step % 3 and len(every) / step <= limit)
    return every[::step]


class Tally:
    """How many faults were injected, and how each ended."""

    def __init__(self) -> None:
        self.injected = self.killed = self.refused = self.passed = 0

    def add(self, outcome: Outcome, refused: bool = False) -> None:
        if outcome.spoilt is None and not outcome.killed:
            return
        self.injected += 1
        self.killed += outcome.killed
        refused = refused or bool(outcome.error)
        self.refused += refused
        self.passed += not (outcome.killed or refused)

    def __str__(self) -> str:
        return (
            f"{self.injected} faults injected: {self.passed} survived, {self.refused} told in words, "
            f"{self.killed} kills; nothing half-written was taken for whole"
        )


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") and not path.is_dir())


def told_in_words(outcome: Outcome, folder: Path) -> None:
    """A refusal is a StorageError that names the path."""
    assert outcome.error == "StorageError", outcome.trace
    assert str(folder) in outcome.text


@pytest.mark.campaign
def test_a_run_folder_is_made_whole_or_not_at_all(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    overlay = tmp_path / "edits.jsonl"
    overlay.write_text('{"file": "a.png", "captions": ["a cat"], "by": "person"}\n')
    whole = faults.run(scenarios.make_run, str(tmp_path / "whole"), str(overlay))
    assert whole.count > 10
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        output = tmp_path / str(number)
        outcome = faults.run(scenarios.make_run, str(output), str(overlay), spoil=spoil)
        tally.add(outcome)
        if outcome.error:
            told_in_words(outcome, output)
            if not spoil.forever:
                assert list_runs(output) == [], "a refused run is listed"
                assert not output.exists() or len(list(output.iterdir())) <= (
                    outcome.spoilt[0] in ("rmdir", "unlinkat")
                )
        for summary in list_runs(output):
            run = open_run(summary.run.path)
            assert run.load_config().config.dataset.overlay == str(run.overlay)
            assert "a cat" in run.overlay.read_text()
        again = faults.run(scenarios.make_run, str(output), str(overlay))
        assert again.value in {summary.run.name for summary in list_runs(output)}
    record(2, "run folder: errors, short writes and kills", str(tally))


def test_the_journal_loses_and_doubles_nothing(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    whole = faults.run(scenarios.keep_journal, str(tmp_path))
    assert whole.value == {
        "steps": [1, 2, 3, 4, 5, 6], "damaged": [], "ended": 1, "complete": True, "waited": False, "problem": "",
    }  # fmt: skip
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = faults.run(scenarios.keep_journal, str(folder), spoil=spoil)
        tally.add(outcome)
        if outcome.killed:
            journal = Journal(folder / "journal.jsonl")
            journal.close()
            steps = [event.step for event in replay(folder / "journal.jsonl") if hasattr(event, "step")]
            assert steps == list(range(1, len(steps) + 1))
        elif outcome.error:
            told_in_words(outcome, folder)
        else:
            found = outcome.value
            assert (found["steps"], found["damaged"], found["ended"]) == ([1, 2, 3, 4, 5, 6], [], 1)
            assert found["complete"]
            assert not found["waited"] or str(folder) in found["problem"] or not spoil.forever
    record(2, "journal: errors, short writes and kills", str(tally))


def test_a_preview_sheet_is_the_old_or_the_new_one(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    previews = tmp_path / "previews"
    previews.mkdir()
    faults.run(scenarios.write_sheet, str(previews), 10)
    old = (previews / "sheet.png").read_bytes()
    whole = faults.run(scenarios.write_sheet, str(previews), 200)
    new = (previews / "sheet.png").read_bytes()
    assert old != new
    tally = Tally()
    for spoil in spoils(whole, campaign):
        (previews / "sheet.png").write_bytes(old)
        outcome = faults.run(scenarios.write_sheet, str(previews), 200, spoil=spoil)
        tally.add(outcome)
        found = (previews / "sheet.png").read_bytes()
        assert found in (old, new)
        assert outcome.killed or outcome.error or found == new
        if outcome.error:
            told_in_words(outcome, previews)
        for path in previews.glob(".*"):
            assert outcome.killed or spoil.forever or outcome.spoilt[0].startswith("unlink"), f"{path} is left"
            path.unlink()
    record(2, "previews and their sheet: errors, short writes and kills", str(tally))


def test_an_overlay_keeps_every_earlier_edit(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    earlier, later = ["1.png", "1-b.png"], ["2.png", "2-b.png"]
    first = tmp_path / "first"
    assert faults.run(scenarios.edit_captions, str(first), 1).value == ["written", "", *earlier]
    counted = shutil.copytree(first, tmp_path / "counted")
    whole = faults.run(scenarios.edit_captions, str(counted), 2)
    assert whole.value == ["written", "", *earlier, *later]
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        folder = shutil.copytree(first, tmp_path / str(number))
        outcome = faults.run(scenarios.edit_captions, str(folder), 2, spoil=spoil)
        tally.add(outcome, refused=bool(outcome.value) and outcome.value[0] == "refused")
        assert not outcome.error, outcome.trace
        if not outcome.killed:
            verdict, text, *known = outcome.value
            assert known[:2] == earlier
            assert set(known[2:]) <= set(later)
            assert verdict == "refused" or known == [*earlier, *later]
            assert verdict == "written" or str(folder) in text
        after = faults.run(scenarios.edit_captions, str(folder), 3).value
        assert after[0] == "written"
        assert set(earlier) | {"3.png", "3-b.png"} <= set(after[2:])
    record(2, "edited captions: errors, short writes and kills", str(tally))


def test_a_cache_that_cannot_be_written_never_ends_a_run(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    whole = faults.run(scenarios.cache_tensor, str(tmp_path / "whole"), 3.0)
    assert whole.value == {"loaded": 3.0, "again": 3.0}
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        folder = tmp_path / str(number)
        outcome = faults.run(scenarios.cache_tensor, str(folder), 3.0, spoil=spoil)
        tally.add(outcome)
        assert not outcome.error, outcome.trace
        if not outcome.killed:
            assert outcome.value["loaded"] in (3.0, False)
            assert outcome.value["again"] in (3.0, False)
        assert faults.run(scenarios.cache_tensor, str(folder), 3.0).value == {"loaded": 3.0, "again": 3.0}
    record(2, "cache of latents and prompts: errors, short writes and kills", str(tally))


@pytest.mark.campaign
def test_a_scan_cache_that_cannot_be_written_is_done_without(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    pictures = tmp_path / "pictures"
    tiny_pictures(pictures, 2, captions=[None])
    whole = faults.run(scenarios.remember_facts, str(tmp_path / "whole"), str(pictures))
    assert whole.value == [True, True], whole.trace
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        folder = tmp_path / str(number)
        outcome = faults.run(scenarios.remember_facts, str(folder), str(pictures), spoil=spoil)
        tally.add(outcome)
        assert not outcome.error, outcome.trace
        if not outcome.killed:
            assert outcome.value == [True, True]
        assert faults.run(scenarios.remember_facts, str(folder), str(pictures)).value == [True, True]
    record(2, "scan cache: errors, short writes and kills", str(tally))


@pytest.mark.campaign
def test_an_export_is_the_old_file_or_the_proved_new_one(
    faults: FaultServer, tiny_sd15: Path, tmp_path: Path, campaign: bool, record: Record
) -> None:
    root, export = tmp_path / "root", tmp_path / "export"
    faults.warm(scenarios.load_trained, str(tiny_sd15), str(root))
    arguments = (str(tiny_sd15), str(root), str(export))
    first = faults.run(scenarios.write_export, *arguments, 100)
    assert first.value == ["tiny.safetensors"], first.trace
    file = export / "tiny.safetensors"
    old = file.read_bytes()
    whole = faults.run(scenarios.write_export, *arguments, 200)
    assert scenarios.steps_of_export(file) == 200
    tally = Tally()
    for spoil in spoils(whole, campaign):
        file.write_bytes(old)
        outcome = faults.run(scenarios.write_export, *arguments, 200, spoil=spoil)
        tally.add(outcome)
        step = scenarios.steps_of_export(file)
        assert step == 200 or outcome.killed or outcome.error in ("StorageError", "ExportError"), outcome.trace
        assert step in (100, 200)
        for path in export.glob(".*"):
            assert outcome.killed or spoil.forever or outcome.spoilt[0].startswith("unlink"), f"{path} is left"
            path.unlink()
    record(2, "export: errors, short writes and kills", str(tally))


def test_the_probe_of_a_folder_leaves_nothing(
    faults: FaultServer, tmp_path: Path, campaign: bool, record: Record
) -> None:
    whole = faults.run(scenarios.probe, str(tmp_path / "whole"))
    tally = Tally()
    for number, spoil in enumerate(spoils(whole, campaign)):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = faults.run(scenarios.probe, str(folder), spoil=spoil)
        tally.add(outcome)
        if outcome.error:
            told_in_words(outcome, folder)
        if leftovers(folder):
            assert outcome.killed or spoil.forever or outcome.spoilt[0].startswith("unlink")
    record(2, "probe of the output folder: errors, short writes and kills", str(tally))
