"""The monitor of a run that another process trains: whole history, commands, other clients, and every way to end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from lorasmith.engine import events
from lorasmith.engine.commands import Command
from lorasmith.engine.control import ask
from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from lorasmith.tui import bridge
from lorasmith.tui.attach import AttachApp
from lorasmith.tui.bridge import AttachedRun
from lorasmith.tui.screens.ask import AskScreen
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.state import RunState, reduce
from tests.engine.beating_run import READY, make_run, steps_done
from tests.tui.terminal_program import ROOT

SIZES = [(80, 24), (120, 36)]
MANY = 1_000_000
Train = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A run folder that nobody works on yet, and a folder for sockets of its own."""
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        monkeypatch.setenv("LORASMITH_RUNTIME", made)
        yield make_run(tmp_path / "runs" / "cats-1")


@pytest.fixture
def train(run: RunFolder) -> Iterator[Train]:
    """Start a process that works on the run; it is killed at the end of the test if it still lives."""
    processes: list[subprocess.Popen[str]] = []

    def start(steps: int = MANY, seconds: float = 0.02, first: int = 0) -> subprocess.Popen[str]:
        arguments = ["-m", "tests.engine.beating_run", str(run.path), str(steps), str(seconds), str(first)]
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@asynccontextmanager
async def attached(
    run: RunFolder, size: tuple[int, int] = (80, 24), *, read_only: bool = False
) -> AsyncIterator[Pilot[int]]:
    source = AttachedRun(run, read_only=read_only)
    app = AttachApp(source)
    async with app.run_test(size=size) as pilot:
        await wait_for(pilot, lambda: isinstance(app.screen, MonitorScreen))
        yield pilot
    source.close()
    source._thread.join(20)


async def wait_for(pilot: Pilot[int], seen: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, shown(pilot)
        await asyncio.sleep(0.05)
        await pilot.pause()


def shown(pilot: Pilot[int]) -> str:
    return "\n".join(strip.text.rstrip() for strip in pilot.app.screen._compositor.render_strips())


async def shows(pilot: Pilot[int], *words: str) -> None:
    await wait_for(pilot, lambda: all(word in " ".join(shown(pilot).split()) for word in words))


async def in_control(pilot: Pilot[int]) -> None:
    assert isinstance(pilot.app, AttachApp)
    source = pilot.app.source
    await wait_for(pilot, lambda: source.in_control)
    await shows(pilot, "p Pause")


def told(run: RunFolder) -> list[events.Event]:
    return list(replay(run.journal))


def started(total: int = 400, resumed_from: int = 0) -> events.RunStarted:
    return events.RunStarted(
        run="cats-1", total_steps=total, resumed_from=resumed_from, config={}, versions={}, device="cpu"
    )


def gauges(vram: float | None) -> events.HardwareSampled:
    return events.HardwareSampled(
        vram_used_gib=vram, vram_total_gib=24.0, gpu_utilization_percent=9.0, temperature_c=60.0, power_w=100.0,
        ram_used_gib=2.0, ram_total_gib=8.0, process_ram_gib=1.0,
    )  # fmt: skip


def journal(run: RunFolder, *what: events.Event) -> None:
    writer = Journal(run.journal)
    for event in what:
        writer.append(event)
    writer.close()


@pytest.mark.parametrize("size", SIZES)
async def test_a_running_training_is_shown_with_its_past_and_obeys(
    run: RunFolder, train: Train, size: tuple[int, int]
) -> None:
    process = train()
    await asyncio.sleep(0.2)
    async with attached(run, size) as pilot:
        await in_control(pilot)
        await shows(pilot, "cats-1 · training", "attached", "k Park", "q Leave")
        await pilot.press("p")
        await shows(pilot, "PAUSED - p goes on")
        await pilot.press("p", "k")
        assert isinstance(pilot.app.screen, AskScreen)
        assert "Park at step" in shown(pilot)
        await pilot.press("y")
        await shows(pilot, "PARKED - p brings it back", "7.9 GiB of the card are free for other programs")
        await pilot.press("k")
        assert not isinstance(pilot.app.screen, AskScreen)
        await pilot.press("p")
        await wait_for(pilot, lambda: "PARKED" not in shown(pilot))
        await pilot.press("s")
        await shows(pilot, "Checkpoint of step")
        await pilot.press("x", "y")
        await shows(pilot, "STOPPED", "Go on from step", "lorasmith train --resume")
        await pilot.press("q")
    assert pilot.app.return_code == 130
    assert process.wait(20) == 0


async def test_read_only_watches_without_keys_that_command(run: RunFolder, train: Train) -> None:
    process = train()
    async with attached(run, read_only=True) as pilot:
        await shows(pilot, "watching only")
        await pilot.press("p", "k", "x", "s", "v")
        assert isinstance(pilot.app.screen, MonitorScreen)
        assert "Pause" not in shown(pilot)
        await pilot.press("q")
    assert pilot.app.return_code == 0
    assert process.poll() is None
    assert not [event for event in told(run) if isinstance(event, events.CommandReceived)]


async def test_several_clients_see_what_each_of_them_did(run: RunFolder, train: Train) -> None:
    train()
    async with attached(run) as one, attached(run, (120, 36)) as other:
        await in_control(one)
        await in_control(other)
        await one.press("p")
        await shows(other, "PAUSED")
        await other.press("p")
        await wait_for(one, lambda: "PAUSED" not in shown(one))
        ask(run, {"request": Command.PARK.value})
        await shows(one, "PARKED")
        await shows(other, "PARKED")


@pytest.mark.parametrize("key", ["q", "enter", "ctrl+q"])
async def test_leaving_asks_nothing_and_the_run_goes_on(run: RunFolder, train: Train, key: str) -> None:
    process = train()
    async with attached(run) as pilot:
        await pilot.press(key)
        await wait_for(pilot, lambda: not pilot.app.is_running)
    assert pilot.app.return_code == 0
    before = len(told(run))
    await asyncio.sleep(0.3)
    assert len(told(run)) > before
    assert process.poll() is None


async def test_a_process_that_dies_without_a_word_is_said_within_seconds(run: RunFolder, train: Train) -> None:
    process = train()
    async with attached(run) as pilot:
        await in_control(pilot)
        process.kill()
        process.wait()
        await shows(pilot, "Interrupted at step", str(process.pid))
        assert "p Pause" not in shown(pilot)


async def test_a_run_that_somebody_resumes_while_its_end_is_shown_comes_back_to_life(
    run: RunFolder, train: Train
) -> None:
    process = train()
    async with attached(run) as pilot:
        await in_control(pilot)
        process.kill()
        process.wait()
        await shows(pilot, "Interrupted at step")
        train(first=5)
        await in_control(pilot)
        await wait_for(pilot, lambda: "Interrupted" not in shown(pilot))
        await pilot.press("x", "y")
        await shows(pilot, "STOPPED")
        train(first=6)
        await in_control(pilot)
        assert "STOPPED" not in shown(pilot)


async def test_a_run_that_ends_tells_what_became_of_it(run: RunFolder, train: Train) -> None:
    train(20)
    async with attached(run) as pilot:
        await shows(pilot, "FINISHED", "Finished: It ended.")
        await pilot.press("q")
    assert pilot.app.return_code == 0


PAST = {
    "finished": (events.RunEnded(outcome="finished", step=20, message="Done."), ["FINISHED", "Done."], 0),
    "stopped": (
        events.RunEnded(outcome="stopped", step=20, message="Stopped.", exit_code=130),
        ["STOPPED", "Go on from step 20: lorasmith train --resume"],
        130,
    ),
    "failed": (
        events.RunEnded(outcome="failed", step=20, message="No.", why="Because.", fix="Do it.", exit_code=9),
        ["FAILED", "No.", "Because.", "Do it.", "Go on from step 20"],
        9,
    ),
    "interrupted": (None, ["Interrupted at step 20 of 400", "Go on from step 20: lorasmith train --resume"], 1),
}


@pytest.mark.parametrize(("kind", "size"), [*((kind, SIZES[0]) for kind in PAST), ("failed", SIZES[1])])
async def test_a_run_that_is_over_tells_how_and_what_can_be_done(
    run: RunFolder, kind: str, size: tuple[int, int]
) -> None:
    ended, words, code = PAST[kind]
    saved = events.CheckpointSaved(step=20, path=str(run.checkpoints / "step-00000020"), bytes=1, seconds=0.1)
    journal(run, started(), *map(steps_done, range(1, 21)), saved, *([ended] if ended else []))
    async with attached(run, size) as pilot:
        await shows(pilot, *words)
        assert "p Pause" not in shown(pilot)
        await pilot.press("q")
    assert pilot.app.return_code == code


WAITING = {
    "paused": (events.Paused(step=20), ["PAUSED - p goes on"]),
    "waiting for the disk": (
        events.Paused(step=20, reason="The disk is full: cannot write /data/x (900 bytes needed, 12 bytes free)."),
        ["WAITING - p tries again", "900 bytes needed, 12 bytes free"],
    ),
    "parked": (events.Parked(step=20, freed_gib=7.94), ["PARKED", "7.9 GiB of the card are free"]),
    "stalled": (
        events.Stalled(step=20, seconds=130.0, where="torch.cuda.synchronize", stacks="/runs/cats-1/stacks.txt"),
        ["STALLED", "in torch.cuda.synchronize", "/runs/cats-1/stacks.txt"],
    ),
}


@pytest.mark.parametrize(("kind", "size"), [*((kind, SIZES[0]) for kind in WAITING), ("stalled", SIZES[1])])
async def test_a_run_that_waits_tells_why(run: RunFolder, kind: str, size: tuple[int, int]) -> None:
    waiting, words = WAITING[kind]
    lock = RunLock(run)
    journal(run, started(), *map(steps_done, range(1, 21)), waiting)
    async with attached(run, size) as pilot:
        await shows(pilot, *words)
    lock.release()


async def test_a_run_that_cannot_be_commanded_says_why(run: RunFolder) -> None:
    lock = RunLock(run)
    journal(run, started(), steps_done(1))
    async with attached(run) as pilot:
        await shows(pilot, "Not in control: The run cats-1 cannot be reached", "watching only")
        assert "p Pause" not in shown(pilot)
    lock.release()


async def test_a_silent_process_is_said(run: RunFolder) -> None:
    lock = RunLock(run)
    journal(run, started(), steps_done(1))
    os.utime(run.journal, (time.time() - 100, time.time() - 100))
    async with attached(run, (120, 36)) as pilot:
        await shows(pilot, "NO SIGN OF LIFE for 1:")
    lock.release()


async def test_a_damaged_journal_is_said_and_does_not_end_the_monitor(run: RunFolder) -> None:
    run.journal.write_text('{"event": "JournalHeader", "schema": 99}\n')
    lock = RunLock(run)
    async with attached(run, (120, 36)) as pilot:
        await shows(pilot, "newer version")
    lock.release()


def test_what_is_read_of_the_past_is_what_a_live_view_knew(run: RunFolder) -> None:
    past: list[events.Event] = [started()]
    for step in range(1, 2001):
        past += [gauges([3.0, None, 9.5, 4.0][step % 4] if step < 1500 else 1.0), steps_done(step)]
    journal(run, *past)
    live = RunState()
    for event in told(run):
        live = reduce(live, event)
    source = AttachedRun(run)
    read = sum(len(part) for _, part in source._watch.past())
    assert read < len(past) * 0.6
    source = AttachedRun(run)
    source.start()
    end = time.monotonic() + 20
    while source.share_read < 1.0 and time.monotonic() < end:
        time.sleep(0.01)
    source.close()
    assert source.state == live
    assert source.state.vram_peak_gib == 9.5


async def test_a_long_journal_is_read_behind_the_screen(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    journal(run, started(), *map(steps_done, range(1, 50)))
    read = bridge.RunWatch.past

    def slowly(watch: bridge.RunWatch) -> Iterator[tuple[float, list[events.Event]]]:
        for share, part in read(watch):
            yield share / 3, []
            while not released:
                time.sleep(0.01)
            yield share, part

    released: list[bool] = []
    monkeypatch.setattr(bridge.RunWatch, "past", slowly)
    source = AttachedRun(run)
    app = AttachApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Reading what cats-1 did so far: 33 %")
        released.append(True)
        await shows(pilot, "Interrupted at step 49 of 400")
    source.close()
