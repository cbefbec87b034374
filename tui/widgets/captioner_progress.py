"""How far a captioner is: a bar, the last picture with what was written for it, and the pictures that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Vertical

from lorasmith.tui.forms import Status
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Line, glyphs
from lorasmith.tui.widgets.picture import Picture
from lorasmith.tui.widgets.row_list import RowList

if TYPE_CHECKING:
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.captioner_job import CaptionerJob

MAX_BAR = 40


class CaptionerProgress(Vertical):
    """Shows a job; `show` is called by the screen's timer and repaints what changed."""

    DEFAULT_CSS = """
    CaptionerProgress { height: 1fr; }
    CaptionerProgress #progress-picture { height: 1fr; min-height: 4; margin-top: 1; }
    CaptionerProgress #progress-caption { max-height: 6; margin-top: 1; }
    CaptionerProgress #progress-failures { height: 4; }
    .-tall CaptionerProgress #progress-failures { height: 8; }
    """

    def __init__(self, items: Mapping[str, ImageItem]) -> None:
        """Know the pictures by their `relative` paths."""
        super().__init__(id="captioner-progress")
        self._items = items
        self._step: object = None

    def compose(self) -> ComposeResult:
        """Words, bar, picture, caption, failures."""
        yield Line(id="progress-words")
        yield Line(id="progress-bar")
        yield Picture(id="progress-picture")
        yield Status(id="progress-caption")
        yield Line(id="progress-failed")
        yield RowList(id="progress-failures")

    def show(self, job: CaptionerJob) -> None:
        """Show how far `job` is."""
        step = job.step
        where = f" · {job.where}" if job.where else ""
        self.query_one("#progress-words", Line).show([(job.progress(), "strong"), (where, "dim")])
        self._show_bar(step.done / step.total if step is not None and step.total else 0.0)
        if step is not self._step:
            self._step = step
            item = self._items.get(step.relative) if step is not None else None
            self.query_one("#progress-picture", Picture).show(
                item.path if item is not None else None, item.relative if item is not None else ""
            )
            said = (safe_str(step.caption) or f"✗ {safe_str(step.failed)}") if step is not None else ""
            self.query_one("#progress-caption", Status).say(said)
        self._show_failures(job)

    def _show_bar(self, share: float) -> None:
        width = max(8, min(MAX_BAR, self.size.width - 8))
        full = round(share * width)
        self.query_one("#progress-bar", Line).show(
            [(glyphs().bar_full * full, "bar"), (glyphs().bar_empty * (width - full), "dim"), (f" {share:.0%}", "")]
        )

    def _show_failures(self, job: CaptionerJob) -> None:
        failed = tuple(job.failed)
        rows, line = self.query_one("#progress-failures", RowList), self.query_one("#progress-failed", Line)
        rows.display = line.display = bool(failed)
        if len(failed) != rows.count:
            line.show([(f"{len(failed):,} failed; the others are not touched by that", "high")])
            rows.show(len(failed), lambda index, _: [(f"{failed[index][0]}: {failed[index][1]}", "")])
