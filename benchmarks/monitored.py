"""The program that the monitor's benchmarks run in a pty: the real monitor over a busy torch thread, or over nothing.

    monitored.py torch|idle [OUT.json SEGMENTS SECONDS]

With OUT.json, the monitor polls in every other segment only, and the steps' times of each segment are written there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from busy_session import BusySession
from textual.app import App

from lorasmith.engine.commands import Command
from lorasmith.engine.events import Event
from lorasmith.tui.screen_host import run_app
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.theme import THEME

WARM_UP_SECONDS = 6.0


class IdleSession:
    """No engine at all, one curve to show."""

    finished = False
    outcome = None

    def __init__(self) -> None:
        from lorasmith.engine import events

        losses = [1.0 / (step + 1) for step in range(300)]
        self._told: list[Event] = [
            events.RunStarted(
                run="idle", total_steps=1000, resumed_from=0, config={}, versions={}, device="cpu"
            ),
            events.StageChanged(stage="train", label="Training"),
            events.StepsDone(
                step=300, epoch=1, losses=losses, learning_rate=1e-4, grad_norm=1.0, seconds_per_step=1.0
            ),
        ]  # fmt: skip

    def drain(self) -> list[Event]:
        """Tell the curve once."""
        told, self._told = self._told, []
        return told

    def send(self, command: Command) -> None:
        """End when stopped."""
        self.finished = True

    def join(self, timeout: float | None = None) -> bool:
        """Nothing to wait for."""
        return True


class GatedMonitor(MonitorScreen):
    """A monitor whose polling can be switched off."""

    polling = True

    def poll(self) -> None:
        """Poll, if polling."""
        if self.polling:
            super().poll()


class MonitoredApp(App[int]):
    """Nothing but the monitor."""

    def __init__(self, session: BusySession | IdleSession, plan: tuple[Path, int, float] | None) -> None:
        super().__init__()
        self.session = session
        self.plan = plan
        self.register_theme(THEME)
        self.theme = THEME.name
        self.animation_level = "none"
        self.marks: list[tuple[float, float, bool]] = []

    def on_mount(self) -> None:
        """Show the monitor and, if asked, begin to switch it on and off."""
        self.monitor = GatedMonitor(self.session)
        self.push_screen(self.monitor)
        if self.plan:
            self.set_timer(WARM_UP_SECONDS, self.begin)

    def begin(self) -> None:
        """Start the first segment."""
        assert self.plan is not None
        self.switch()
        self.set_interval(self.plan[2], self.switch)

    def switch(self) -> None:
        """End one segment and start the next, the other way."""
        assert self.plan is not None
        path, segments, _ = self.plan
        self.marks.append((time.perf_counter(), time.thread_time(), self.monitor.polling))
        if len(self.marks) > segments:
            path.write_text(json.dumps(self.result()))
            self.session.send(Command.STOP)
            self.exit(0)
        else:
            self.monitor.polling = not self.monitor.polling

    def result(self) -> list[dict[str, float | bool]]:
        """Return for each segment: whether the monitor was on, the mean step, the steps, the screen's CPU time."""
        assert isinstance(self.session, BusySession)
        found: list[dict[str, float | bool]] = []
        for (begin, cpu_begin, _), (end, cpu_end, on) in zip(self.marks, self.marks[1:], strict=False):
            steps = [seconds for at, seconds in self.session.steps if begin + 0.05 < at - seconds and at <= end]
            share = (cpu_end - cpu_begin) / (end - begin)
            found.append({"on": on, "step_ms": 1e3 * fmean(steps), "steps": len(steps), "screen_cpu": share})
        return found


def main() -> int:
    """Run until stopped or measured."""
    session = BusySession() if sys.argv[1] == "torch" else IdleSession()
    if isinstance(session, BusySession):
        session.start()
    plan = (Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])) if len(sys.argv) > 4 else None
    log = Path(sys.argv[2]).with_suffix(".log") if len(sys.argv) > 2 else Path(tempfile.mkdtemp()) / "screen.log"
    return run_app(MonitoredApp(session, plan), lambda: session, log)


if __name__ == "__main__":
    sys.exit(main())
