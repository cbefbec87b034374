"""Promise 2: an error at every file-system call of a save or of a resume, once and from then on for ever."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.checkpoint_scenarios import SITUATIONS, read_with_each_error, save_with_each_error, short_writes
from tests.faults.fault_server import FaultServer

Record = Callable[[int, str, str], None]
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EMFILE")
WAYS = {"once": (False, False), "for ever": (True, False), "for ever, where it can happen": (True, True)}
SAMPLE = 29
"""Without --campaign every 29th call fails."""


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_at_any_call_of_a_save_is_told_and_leaves_whole_checkpoints(
    name: str, faults: FaultServer, quick_folder: Path, campaign: bool, record: Record
) -> None:
    complaints: list[str] = []
    injected = refused = 0
    for number, situation in enumerate(SITUATIONS):
        for way, (forever, plausible) in WAYS.items():
            folder = quick_folder / f"{number} {way}"
            folder.mkdir()
            arguments = (situation, getattr(errno, name), forever, plausible, 1 if campaign else SAMPLE)
            outcome = faults.run(save_with_each_error, str(folder), *arguments)
            assert outcome.error == "", outcome.trace
            complaints += [f"{situation}, {way}: {text}" for text in outcome.value["complaints"]]
            injected += outcome.value["injected"]
            refused += outcome.value["refused"]
    assert not complaints, "\n".join(complaints)
    assert refused > injected / 2
    record(
        2, f"{name} at the calls of a save", f"{injected} injected, {injected} left whole checkpoints, {refused} told"
    )


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_write_that_writes_half_is_finished_or_told(
    situation: str, faults: FaultServer, quick_folder: Path, campaign: bool
) -> None:
    outcome = faults.run(short_writes, str(quick_folder), situation, 1 if campaign else 11)
    assert outcome.error == "", outcome.trace
    assert outcome.value["complaints"] == []


@pytest.mark.parametrize("name", ["EIO", "EACCES", "EMFILE"])
@pytest.mark.parametrize("forever", [False, True])
def test_an_error_while_a_checkpoint_is_read_is_told_in_words_and_changes_nothing(
    name: str, forever: bool, faults: FaultServer, quick_folder: Path, campaign: bool, record: Record
) -> None:
    outcome = faults.run(read_with_each_error, str(quick_folder), getattr(errno, name), forever, 1 if campaign else 4)
    assert outcome.error == "", outcome.trace
    value = outcome.value
    assert value["complaints"] == []
    assert value["injected"] > (50 if campaign else 12)
    how = f"{value['refused']} told, {value['fallen_back']} on to an older one, named, {value['injected']} unharmed"
    record(
        2,
        f"{name} {'from' if forever else 'at'} each call of reading checkpoints",
        f"{value['injected']} injected, {how}",
    )
