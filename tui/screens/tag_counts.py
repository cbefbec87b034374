"""How often each tag is used, with a bar, and the pictures that have it; from here tags are removed and renamed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Button, Input

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.forms import SafeInput
from lorasmith.tui.screens.tool import ToolScreen
from lorasmith.tui.text import safe_str
from lorasmith.tui.while_open import while_open
from lorasmith.tui.widgets.line import Line, Part, glyphs
from lorasmith.tui.widgets.picture import Picture
from lorasmith.tui.widgets.row_list import RowList

if TYPE_CHECKING:
    from lorasmith.tui.caption_work import CaptionWork
    from lorasmith.tui.findings import FoundDataset

MAX_BAR = 20


class TagCounts(ToolScreen):
    """A table of the training pictures' tags; the pictures of the selected one at the right."""

    TITLE_WORDS = "Tags"
    AUTO_FOCUS = "#tag-rows"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "tool", "tags")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("tags")]
    HELP_TEXT: ClassVar[str] = (
        "A tag is what stands between two commas; case and spaces do not matter. The bar is the share of the training "
        "pictures that have the tag.\n\n"
        "What is tagged can be left out of a prompt later; what is never tagged becomes part of the trigger word. So "
        "remove the tags of what the trigger is to stand for (d), and give one thing one name (r).\n\n"
        "Enter moves to the pictures with the tag, Enter there edits the caption."
    )
    DEFAULT_CSS = """
    TagCounts #tag-table { width: 1fr; margin-right: 1; }
    TagCounts #tag-one { width: 30; }
    TagCounts.-wide #tag-one { width: 46; }
    TagCounts #tag-filter { width: 100%; }
    TagCounts #tag-picture { height: 2fr; }
    TagCounts #tag-pictures { height: 1fr; min-height: 5; }
    """

    def __init__(self, found: FoundDataset, work: CaptionWork | None = None) -> None:
        """Open on a scanned dataset."""
        super().__init__(found, work)
        self.counts: list[tuple[str, int]] = []
        self.shown: list[tuple[str, int]] = []
        self.names: list[str] = []
        self.total = 0

    def compose_body(self) -> ComposeResult:
        """The table with its filter, and the pictures."""
        with Horizontal():
            with Vertical(id="tag-table"):
                yield SafeInput("", id="tag-filter", placeholder="/ filter by letters")
                yield Line(id="tag-count")
                yield RowList(id="tag-rows", empty="No tag.")
            with Vertical(id="tag-one"):
                yield Line(id="tag-name")
                yield RowList(id="tag-pictures")
                yield Picture(id="tag-picture")

    def compose_buttons(self) -> ComposeResult:
        """What can be done with the selected tag."""
        yield Button("Remove (d)", id="remove", compact=True)
        yield Button("Rename (r)", id="rename", compact=True)

    def refresh_all(self) -> None:
        """Count anew."""
        super().refresh_all()
        self.run_worker(while_open(self, self._count()), exclusive=True, group="count")
        self.hint("Enter: the pictures with this tag · d: remove it everywhere · r: rename it")

    async def _count(self) -> None:
        self.counts, self.total = await asyncio.to_thread(self._counted)
        self._show_table()

    def _counted(self) -> tuple[list[tuple[str, int]], int]:
        from lorasmith.engine.dataset.caption_edits import tag_counts

        pictures = [item for item in self.work.state.current().items if not item.regularization]
        return tag_counts(pictures), len(pictures)

    # The table

    @property
    def tag(self) -> str:
        """The selected tag, "" where there is none."""
        index = self.query_one("#tag-rows", RowList).selected
        return self.shown[index][0] if index < len(self.shown) else ""

    def _show_table(self) -> None:
        words = self.query_one("#tag-filter", SafeInput).value.casefold().split()
        before = self.tag
        self.shown = [entry for entry in self.counts if all(word in entry[0].casefold() for word in words)]
        names = [tag for tag, _ in self.shown]
        rows = self.query_one("#tag-rows", RowList)
        rows.show(len(self.shown), self._row, names.index(before) if before in names else 0)
        once = sum(count == 1 for _, count in self.counts)
        counted = f"{len(self.shown):,} of {len(self.counts):,} tags · {once:,} used once"
        self.query_one("#tag-count", Line).show([(counted, "dim")])
        self._show_pictures()

    def _row(self, index: int, line: int) -> list[Part]:
        tag, count = self.shown[index]
        width = self.query_one("#tag-rows", RowList).size.width - 3
        bar_width = max(4, min(MAX_BAR, width // 4))
        share = count / max(1, self.total)
        filled = max(1, round(share * bar_width))
        room = max(6, width - bar_width - 13)
        name = safe_str(tag)
        name = name if len(name) <= room else name[: room - 1] + glyphs().ellipsis
        return [
            (f"{name:<{room}} ", ""),
            (f"{count:>5} {share:>4.0%} ", "dim"),
            (glyphs().bar_full * filled, "bar"),
            (glyphs().bar_empty * (bar_width - filled), "dim"),
        ]

    @on(RowList.Moved, "#tag-rows")
    def _tag_selected(self, event: RowList.Moved) -> None:
        event.stop()
        self._show_pictures()

    @on(RowList.Chosen, "#tag-rows")
    def _tag_chosen(self, event: RowList.Chosen) -> None:
        event.stop()
        self.action_pictures()

    @on(Input.Changed, "#tag-filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._show_table()

    @on(Input.Submitted, "#tag-filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        self.query_one("#tag-rows").focus()

    # The pictures with the selected tag

    def _show_pictures(self) -> None:
        index = self.query_one("#tag-rows", RowList).selected
        count = self.shown[index][1] if index < len(self.shown) else 0
        title = f"{count:,} picture{'' if count == 1 else 's'}: {self.tag}" if count else ""
        self.query_one("#tag-name", Line).show([(title, "strong")])
        self.run_worker(while_open(self, self._find_pictures(self.tag)), exclusive=True, group="pictures")

    async def _find_pictures(self, tag: str) -> None:
        self.names = await asyncio.to_thread(self._pictures_with, tag)
        rows = self.query_one("#tag-pictures", RowList)
        rows.show(len(self.names), lambda index, line: [(self.names[index], "")], 0)
        self._show_picture()

    def _pictures_with(self, tag: str) -> list[str]:
        from lorasmith.engine.dataset.caption_edits import remove_tag

        state = self.work.state
        return [
            name
            for name, item in state.items.items()
            if tag and not item.regularization and any(remove_tag(text, tag) != text for text in state.captions(name))
        ]

    def _show_picture(self) -> None:
        index = self.query_one("#tag-pictures", RowList).selected
        path = self.work.state.items[self.names[index]].path if index < len(self.names) else None
        self.query_one(Picture).show(path)

    @on(RowList.Moved, "#tag-pictures")
    def _picture_selected(self, event: RowList.Moved) -> None:
        event.stop()
        self._show_picture()

    @on(RowList.Chosen, "#tag-pictures")
    def _picture_chosen(self, event: RowList.Chosen) -> None:
        from lorasmith.tui.screens.caption_editor import CaptionEditor

        event.stop()
        self.app.push_screen(CaptionEditor(self.found, self.names[event.index], self.work))

    # Actions

    def action_close(self) -> None:
        """Go back by one: from the pictures or the filter to the table, from there to the screen below."""
        rows, field = self.query_one("#tag-rows"), self.query_one("#tag-filter", SafeInput)
        if self.focused is field:
            field.value = ""
        if self.focused in (field, self.query_one("#tag-pictures")):
            rows.focus()
        else:
            super().action_close()

    def action_filter(self) -> None:
        """Move to the filter."""
        self.query_one("#tag-filter").focus()

    def action_pictures(self) -> None:
        """Move to the pictures with the selected tag."""
        if self.tag:
            self.query_one("#tag-pictures").focus()

    def action_remove(self) -> None:
        """Show what removing the selected tag changes; it is done from there."""
        self._edit("remove")

    def action_rename(self) -> None:
        """Ask for another name of the selected tag."""
        self._edit("rename")

    def _edit(self, operation: str) -> None:
        from lorasmith.tui.screens.bulk_edit import BulkEdit

        if self.tag:
            self.app.push_screen(BulkEdit(self.found, self.work, operation, self.tag))

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do what the button says."""
        if event.button.id in ("remove", "rename"):
            event.stop()
            self._edit(event.button.id)
