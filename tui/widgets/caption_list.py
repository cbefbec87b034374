"""The pictures of a dataset by name, each with a mark for its caption; filtered by words, or to those with a mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input

from lorasmith.tui.caption_state import SHOWS, SIGNS, Mark, Show
from lorasmith.tui.forms import SafeInput
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Line, Part, glyphs
from lorasmith.tui.widgets.row_list import RowList

if TYPE_CHECKING:
    from lorasmith.tui.caption_work import CaptionWork

ROLES: dict[Mark, str] = {"file": "", "edited": "good", "machine": "bar", "empty": "high", "missing": "high"}
"""The role that each mark is painted in, beside its sign."""


class CaptionList(Vertical):
    """Filter, count and rows; `names` are the pictures that are listed, `chosen` the selected one ("": none)."""

    DEFAULT_CSS = """
    CaptionList { width: 27; height: 1fr; }
    """

    class Moved(Message):
        """Another picture was selected."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Chosen(Moved):
        """Enter was pressed on a picture."""

    class Filtered(Message):
        """The user is about to see other pictures."""

    def __init__(self, work: CaptionWork, chosen: str, *, id: str | None = None) -> None:
        """List the pictures of `work`."""
        super().__init__(id=id)
        self.captions = work
        self.names = list(work.state.items)
        self.chosen = chosen
        self.show_only: Show = "all"
        self._filter = SafeInput("", id="caption-filter", placeholder="/ filter by words")
        self._count = Line(id="caption-shown")
        self._rows = RowList(id="caption-rows", empty="No picture matches.")

    def compose(self) -> ComposeResult:
        """Filter, count, rows."""
        yield from (self._filter, self._count, self._rows)

    @property
    def filtering(self) -> bool:
        """Whether the filter has the focus."""
        return self.app.focused is self._filter

    def focus_filter(self) -> None:
        """Move to the filter."""
        self._filter.focus()

    def focus_rows(self) -> None:
        """Move to the rows."""
        self._rows.focus()

    def clear_filter(self) -> None:
        """List all words again."""
        self._filter.value = ""

    def cycle(self) -> None:
        """List only what the next mark is said of, or all again."""
        self.show_only = SHOWS[(SHOWS.index(self.show_only) + 1) % len(SHOWS)]
        self._show_and_stay()

    def refresh_rows(self) -> None:
        """List what matches now, the chosen picture selected where it is among them."""
        state = self.captions.state
        self.names = state.matching(self._filter.value, self.show_only, self.captions.too_long)
        self._rows.show(len(self.names), self._row, self._index())
        missing = len(state.without_caption())
        counted = f"{len(self.names):,} of {len(state.items):,}" + (f" · {missing:,} missing" if missing else "")
        parts: list[Part] = [(counted, "dim")]
        if self.show_only != "all":
            parts = [(f"{self.show_only} only (m) ", "strong"), *parts]
        self._count.show(parts)

    def select(self, name: str) -> None:
        """Choose a picture; the list stays as it is where that is in it."""
        self.chosen = name
        if name in self.names:
            self._rows.select(self._index())
        else:
            self.refresh_rows()

    def neighbor(self, by: int) -> str:
        """Return the picture `by` further down the list, "" at its ends."""
        index = self.names.index(self.chosen) + by if self.chosen in self.names else 0
        return self.names[index] if 0 <= index < len(self.names) else ""

    def _index(self) -> int:
        return self.names.index(self.chosen) if self.chosen in self.names else 0

    def _row(self, index: int, line: int) -> list[Part]:
        name = self.names[index]
        mark, long = self.captions.state.mark(name), name in self.captions.too_long
        shown, width = safe_str(name), self._rows.size.width - 6
        if len(shown) > width > 1:  # the end of a path tells more than its beginning
            shown = glyphs().ellipsis + shown[1 - width :]
        return [(f"{SIGNS[mark]}{'+' if long else ' '} ", ROLES[mark] or ("high" if long else "")), (shown, "")]

    def _show_and_stay(self) -> None:
        self.post_message(self.Filtered())
        self.refresh_rows()
        if self.names and self.chosen not in self.names:
            self.post_message(self.Moved(self.names[0]))

    @on(Input.Changed)
    def _filter_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._show_and_stay()

    @on(Input.Submitted)
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        self.focus_rows()

    @on(RowList.Moved)
    def _row_moved(self, event: RowList.Moved) -> None:
        event.stop()
        self.post_message(self.Moved(self.names[event.index]))

    @on(RowList.Chosen)
    def _row_chosen(self, event: RowList.Chosen) -> None:
        event.stop()
        self.post_message(self.Chosen(self.names[event.index]))
