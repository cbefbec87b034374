"""A run that is put into the queue from the review page instead of being trained at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.demo_run import resolve_demo
from lorasmith.engine.errors import StorageError
from lorasmith.engine.run_file import Layer, ResolvedConfig
from lorasmith.engine.run_queue import RunQueue, entry_state
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.findings import queue_run
from tests.tui.conftest import FakeSession, go_to, settle

MakeApp = Callable[..., LorasmithApp]


def test_a_run_is_made_and_waits_in_the_queue(tmp_path: Path) -> None:
    resolved = resolve_demo(Layer("test", {"run": {"output_folder": str(tmp_path / "runs")}}))
    assert queue_run(resolved) == "1 run waits. Start with: lorasmith queue run"
    assert queue_run(resolved).startswith("2 runs wait")
    entries = RunQueue().entries()
    assert [entry_state(entry).status for entry in entries] == ["waiting", "waiting"]
    assert {entry.folder.path.parent for entry in entries} == {tmp_path / "runs"}


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_the_review_page_adds_the_run_and_starts_nothing(
    make_app: MakeApp, started: list[FakeSession], size: tuple[int, int]
) -> None:
    added: list[ResolvedConfig] = []

    def queue(resolved: ResolvedConfig) -> str:
        added.append(resolved)
        return "1 run waits."

    app = make_app(queue=queue)
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, "review")
        await pilot.press("a")
        await app.workers.wait_for_complete()
        await settle(pilot)
        assert [toast.message for toast in app._notifications] == ["1 run waits."]
    assert [resolved.config.base.model for resolved in added] == ["demo"]
    assert not started


async def test_a_queue_that_cannot_be_written_is_told_in_words(make_app: MakeApp) -> None:
    def queue(resolved: ResolvedConfig) -> str:
        raise StorageError("The queue cannot be written.", why="The disk is full.", fix="Free some space.")

    app = make_app(queue=queue)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "review")
        await pilot.press("a")
        await app.workers.wait_for_complete()
        await settle(pilot)
        (toast,) = app._notifications
        assert "The disk is full." in toast.message
