"""The monitor over a session without torch, as a program for tests in a real pty: FOLDER STEPS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from textual.app import App

from lorasmith.tui.screen_host import run_app
from lorasmith.tui.screens.monitor import MonitorScreen
from tests.tui.fake_session import BeatingSession


class HostedApp(App[int]):
    def __init__(self, session: BeatingSession) -> None:
        super().__init__()
        self.session = session

    def on_mount(self) -> None:
        self.push_screen(MonitorScreen(self.session))

    async def action_quit(self) -> None:
        screen: Any = self.screen
        screen.request_quit()


def main() -> int:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    session = BeatingSession(folder, steps)
    session.start()
    app = HostedApp(session)
    return run_app(app, lambda: session, folder / "screen.log")


if __name__ == "__main__":
    sys.exit(main())
