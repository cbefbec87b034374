"""What passes between a training and whoever runs it: events out, the user's commands in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lorasmith.engine.commands import Command
from lorasmith.engine.events import CommandReceived, Event


class RunPaths(Protocol):
    """The part of `run_folder.RunFolder` that training needs."""

    @property
    def path(self) -> Path:
        """The run's own folder."""

    @property
    def checkpoints(self) -> Path:
        """Folder of resumable checkpoints."""

    @property
    def previews(self) -> Path:
        """Folder of preview pictures."""

    @property
    def export(self) -> Path:
        """Folder of shareable files."""


class Host(Protocol):
    """Who runs a training: takes its events and passes on the user's commands. No method may block for long."""

    def emit(self, event: Event) -> None:
        """Record an event."""

    def next_commands(self) -> list[Command]:
        """Return the commands that came since the last call, without waiting."""

    def wait_command(self, timeout: float) -> Command | None:
        """Wait up to `timeout` seconds for a command."""


@dataclass
class Controls:
    """The user's commands; taken up between steps, and while pictures are encoded or drawn."""

    host: Host
    step: int
    paused: bool = False
    wanted: set[Command] = field(default_factory=set)

    def poll(self) -> None:
        """Take up the commands that came in, without waiting."""
        for command in self.host.next_commands():
            self.take(command)

    def take(self, command: Command) -> None:
        """Record one command as received; the latest of pause, park and resume counts."""
        self.host.emit(CommandReceived(command=command.value, step=self.step))
        if command in (Command.PAUSE, Command.RESUME):
            self.paused = command is Command.PAUSE
            self.wanted.discard(Command.PARK)
        else:
            self.wanted.add(command)

    def stop_wanted(self) -> bool:
        """Tell whether the user asked to stop; once asked, it stays so."""
        self.poll()
        return Command.STOP in self.wanted
