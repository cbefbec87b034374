"""The wizard's list of runs: what became of each, and resuming, watching, extending, renaming and deleting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import OptionList

from lorasmith.engine.events import CheckpointSaved, Event, Paused, RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import RunLock
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import PAGES, Draft
from lorasmith.tui.screens.ask import AskScreen
from lorasmith.tui.screens.ask_text import AskText
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.screens.runs import RunsScreen
from tests.tui.caption_screens import until
from tests.tui.conftest import SIZES, FakeSession, go_to, screen_text, settle

MakeApp = Callable[..., LorasmithApp]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def make_run(output: Path, name: str, *events: Event) -> RunFolder:
    """Make a run of 300 steps whose journal holds `events` behind its start."""
    values = {
        "run": {"name": name, "output_folder": str(output)},
        "captions": {"trigger": "zqx"},
        "train": {"steps": 300},
    }
    run = create_run(resolve_config([Layer("test", values)]))
    journal = Journal(run.journal)
    for event in (
        RunStarted(run=run.name, total_steps=300, resumed_from=0, config={}, versions={}, device="cpu"),
        *events,
    ):
        journal.append(event)
    journal.close()
    return run


def steps(step: int) -> StepsDone:
    return StepsDone(step=step, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0)


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=f"/x/checkpoints/step-{step:08d}", bytes=9, seconds=0.1)


def draft_of(output: Path) -> Draft:
    draft = Draft()
    draft.answers["run.output_folder"] = str(output)
    return draft


async def open_runs(pilot: Any) -> RunsScreen:
    await settle(pilot)
    await pilot.press("f7")
    await until(pilot, lambda: isinstance(pilot.app.screen, RunsScreen))
    await settle(pilot)
    assert isinstance(pilot.app.screen, RunsScreen)
    return pilot.app.screen


@pytest.mark.parametrize("size", SIZES)
async def test_each_run_is_told_with_state_size_and_reason(
    make_app: MakeApp, output: Path, size: tuple[int, int]
) -> None:
    make_run(output, "broken", RunEnded(outcome="failed", step=7, message="The disk is full: /x.", exit_code=7))
    make_run(output, "cut off", saved(100), steps(120))
    app = make_app(draft_of(output))
    async with app.run_test(size=size) as pilot:
        await open_runs(pilot)
        text = screen_text(app)
        assert "interrupted at step 120 of 300" in text
        assert "failed at step 7 of 300" in text
        assert " KiB  " in text
        assert "Enter resumes it from step 100." in text
        assert "Newest checkpoint: step 100." in text
        await pilot.press("down")
        assert "The disk is full: /x." in screen_text(app)


@pytest.mark.parametrize("page", list(PAGES))
async def test_the_list_opens_from_every_page(make_app: MakeApp, output: Path, page: str) -> None:
    app = make_app(draft_of(output))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, page)
        await pilot.press("f7")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen))
        await settle(pilot)
        assert "There are no runs in this folder yet." in screen_text(app)
        await pilot.press("escape")
        assert app.page is app.screen


@pytest.mark.parametrize("size", SIZES)
async def test_the_first_page_offers_an_interrupted_run(make_app: MakeApp, output: Path, size: tuple[int, int]) -> None:
    make_run(output, "cut off", saved(100), steps(120))
    app = make_app(draft_of(output))
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "interrupted at step 120 of 300. Resume it? F7" in _joined(app))


def _joined(app: LorasmithApp) -> str:
    return " ".join(screen_text(app).split())


async def test_enter_resumes_an_interrupted_run_in_the_monitor(make_app: MakeApp, output: Path) -> None:
    run = make_run(output, "cut", saved(100), steps(120))
    resumed: list[RunFolder] = []

    def resume(found: RunFolder, tell: Any) -> tuple[Any, Any]:
        resumed.append(found)
        resolved = found.load_config()
        return FakeSession(resolved), resolved

    app = make_app(draft_of(output), resume=resume)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, MonitorScreen))
        assert resumed == [run]


async def test_a_run_that_cannot_be_resumed_says_why(make_app: MakeApp, output: Path) -> None:
    run = make_run(output, "cut", steps(120))
    app = make_app(draft_of(output))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_runs(pilot)
        lock = RunLock(run)
        try:
            await pilot.press("enter")
            await until(pilot, lambda: "Another process trains in" in _joined(app))
        finally:
            lock.release()
        assert isinstance(app.screen, RunsScreen)


async def test_a_run_of_another_process_is_watched_and_not_deleted(make_app: MakeApp, output: Path) -> None:
    run = make_run(output, "live", steps(120), Paused(step=120, reason="The disk is full: cannot write x."))
    lock = RunLock(run)
    app = make_app(draft_of(output))
    try:
        async with app.run_test(size=(120, 36)) as pilot:
            await open_runs(pilot)
            text = screen_text(app)
            assert "paused at step 120 of 300" in text
            assert "The disk is full: cannot write x." in text
            await pilot.press("d")
            await until(pilot, lambda: "Somebody works on this run" in screen_text(app))
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, MonitorScreen))
            assert app.screen.state.step == 120
            await pilot.press("q")
            await until(pilot, lambda: isinstance(app.screen, RunsScreen))
    finally:
        lock.release()
    assert run.run_file.exists()


async def test_a_deletion_tells_what_goes_and_can_be_refused(make_app: MakeApp, output: Path) -> None:
    run = make_run(output, "old", RunEnded(outcome="finished", step=300, message="Done."))
    app = make_app(draft_of(output))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(pilot)
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        assert "journal, log and settings" in _joined(app)
        await pilot.press("escape")
        await pilot.pause()
        assert run.path.exists()
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        await pilot.press("d")
        await until(pilot, lambda: not run.path.exists())
        await until(pilot, lambda: app.screen.query_one(OptionList).option_count == 0)
        assert "Deleted old-" in screen_text(app)


async def test_a_run_is_renamed_and_stays_selected(make_app: MakeApp, output: Path) -> None:
    make_run(output, "old", RunEnded(outcome="finished", step=300, message="Done."))
    app = make_app(draft_of(output))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(pilot)
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, AskText))
        await pilot.press(*"new", "enter")
        await until(pilot, lambda: "Renamed to new-" in screen_text(app))
        assert [path.name[:4] for path in output.iterdir()] == ["new-"]


async def test_an_extension_says_what_comes_and_names_what_is_missing(make_app: MakeApp, output: Path) -> None:
    make_run(output, "old", RunEnded(outcome="finished", step=300, message="Done."))
    app = make_app(draft_of(output))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_runs(pilot)
        await pilot.press("e")
        await until(pilot, lambda: isinstance(app.screen, AskText))
        assert "It has 300 steps now." in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen) and "checkpoint" in _joined(app))


async def test_foreign_text_in_a_run_reaches_no_terminal(make_app: MakeApp, output: Path) -> None:
    run = make_run(output, "evil", RunEnded(outcome="failed", step=1, message="[/] \x1b[2J gone", exit_code=1))
    run.path.rename(run.path.with_name("[b]evil[\x1b[2J"))
    app = make_app(draft_of(output))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_runs(pilot)
        text = screen_text(app)
        assert "[b]evil[␛[2J" in text
        assert "[/] ␛[2J gone" in text
        assert "\x1b" not in text
