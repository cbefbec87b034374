"""Trying a run from the review page: in a process of its own, shown as it goes, stopped with the same key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.errors import HardwareError
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.measuring import Measuring, report_of
from tests.tui.conftest import go_to, screen_text, settle

MakeApp = Callable[..., LorasmithApp]


class Tried:
    """A rehearsal that waits until it may end, or is stopped."""

    def __init__(self, path: str) -> None:
        self.path, self.may_end, self.stopped = path, threading.Event(), False

    def measure(self, tell: Callable[[str, int, int], None]) -> list[str]:
        tell("step … Training 2 steps", 0, 0)
        self.may_end.wait(30)
        if self.stopped:
            raise HardwareError("The rehearsal was stopped; nothing of it is kept.")
        return ["step  6.10 GiB (forecast 6.0), 1.2 s", "time  at most about 20 min"]

    def stop(self) -> None:
        self.stopped = True
        self.may_end.set()


@pytest.fixture
def made() -> list[Tried]:
    """The rehearsals that were begun."""
    return []


@pytest.fixture
def app(make_app: MakeApp, made: list[Tried]) -> LorasmithApp:
    """A wizard whose rehearsals only wait."""

    def measure(path: str) -> Any:
        made.append(Tried(path))
        return made[-1]

    return make_app(measure=measure)


async def test_a_run_is_tried_with_one_key_and_its_figures_are_shown(app: LorasmithApp, made: list[Tried]) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        await settle(pilot)
        assert "m tries each stage" in screen_text(app)
        await pilot.press("m")
        await pilot.pause(0.2)
        assert "m stops it" in screen_text(app)
        assert Path(made[0].path).read_text().startswith(("#", "version"))
        made[0].may_end.set()
        await settle(pilot)
        shown = screen_text(app)
        assert "✓ Tried on this machine" in shown
        assert "6.10 GiB (forecast 6.0)" in shown


async def test_the_same_key_stops_it(app: LorasmithApp, made: list[Tried]) -> None:
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        await settle(pilot)
        await pilot.press("m")
        await pilot.pause(0.1)
        await pilot.press("m")
        await settle(pilot)
        assert made[0].stopped
        assert "The rehearsal was stopped" in screen_text(app)
        await pilot.press("m")
        await pilot.pause(0.1)
        await go_to(pilot, "settings")
    assert made[1].stopped


def test_the_report_is_what_follows_the_progress() -> None:
    lines = ["load  …  Loading\n", "load  done 1 GiB\n", "\n", "run   my-lora\n", "step  6 GiB, 1 s\n"]
    assert report_of(lines) == ["run   my-lora", "step  6 GiB, 1 s"]


def test_a_rehearsal_that_cannot_begin_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "run.toml"
    broken.write_text("[run\n")
    with pytest.raises(HardwareError) as caught:
        Measuring(str(broken)).measure(lambda *rest: None)
    assert "run.toml" in str(caught.value)
