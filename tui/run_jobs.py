"""What the wizard does with earlier runs: listing, measuring and resuming them. No screen and no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.engine.run_actions import RunSizes
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.engine.run_summary import RunSummary
    from lorasmith.tui.findings import Tell

RESUMABLE = frozenset({"interrupted", "stopped", "failed", "not started"})
"""States of runs that can go on from their newest checkpoint, or from the beginning."""


@dataclass(frozen=True)
class FoundRun:
    """A run with what became of it and how large it is."""

    summary: RunSummary
    sizes: RunSizes

    @property
    def run(self) -> RunFolder:
        """Its folder."""
        return self.summary.run


def find_runs(output_folder: str, tell: Tell) -> list[FoundRun]:
    """Return the runs of `output_folder`, the last changed first."""
    from lorasmith.engine.run_actions import measure_run
    from lorasmith.engine.run_summary import list_runs

    found = []
    summaries = list_runs(Path(output_folder))
    for number, summary in enumerate(summaries):
        tell("measuring the runs", number, len(summaries))
        found.append(FoundRun(summary, measure_run(summary.run)))
    return found


def resume_session(run: RunFolder, tell: Tell) -> tuple[Any, Any]:
    """Start the engine thread on an earlier run; return the session and the settings. Raises LorasmithError."""
    from lorasmith.engine.session import Session
    from lorasmith.tui.findings import HEAVY_IMPORTS

    resolved = run.load_config()
    tell("loading PyTorch", 0, 0)
    with HEAVY_IMPORTS:
        pass  # the engine thread imports the same packages
    session = Session(run, resolved.config)
    session.start()
    return session, resolved


def newest_interrupted(found: list[FoundRun]) -> FoundRun | None:
    """Return the run that most likely waits to be resumed: the last changed one whose process vanished."""
    return next((run for run in found if run.summary.state == "interrupted"), None)
