"""Captions one by one: the list of pictures, the chosen one with its caption, and the prompt that the encoder reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Button, TextArea

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.caption_state import WORDS
from lorasmith.tui.forms import Status
from lorasmith.tui.screens.tool import ToolScreen
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.caption_area import CaptionArea
from lorasmith.tui.widgets.caption_list import ROLES, CaptionList
from lorasmith.tui.widgets.line import Line, Part
from lorasmith.tui.widgets.picture import Picture

if TYPE_CHECKING:
    from lorasmith.tui.caption_work import CaptionWork
    from lorasmith.tui.findings import FoundDataset


class CaptionEditor(ToolScreen):
    """Edits go to the overlay when a picture is left; the user's files are written on request only."""

    TITLE_WORDS = "Captions"
    AUTO_FOCUS = "#caption"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "tool", "captions")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("captions")]
    CSS_PATH = "caption_editor.tcss"
    HELP_TEXT: ClassVar[str] = (
        "Type the caption; it is kept as soon as you leave the picture, beside your draft and not in your files. Below "
        "stands the prompt as the text encoder reads it, with the trigger, and how many tokens it takes.\n\n"
        "In the text, Enter goes on to the next picture and ctrl+j begins a new line; escape moves to the list, where "
        "the single letters work.\n\n"
        "Marks in the list:   * edited by you   ~ written by a model   ! no caption   0 empty   + too long"
    )

    def __init__(self, found: FoundDataset, start: str = "", work: CaptionWork | None = None) -> None:
        """Open on a scanned dataset, at the picture whose `relative` path is `start`."""
        super().__init__(found, work)
        names = [item.relative for item in found.dataset.items]
        self.chosen = start if start in names else names[0] if names else ""
        self.which = 0
        """The number of the caption that is edited, among the picture's captions."""

    def compose_body(self) -> ComposeResult:
        """The list with its filter, and the chosen picture."""
        with Horizontal():
            yield CaptionList(self.work, self.chosen)
            with Vertical(id="caption-one"):
                yield Picture(id="caption-picture")
                yield Line(id="caption-source")
                yield CaptionArea(id="caption")
                yield Line(id="caption-length")
                yield Status(id="caption-prompt")

    def compose_buttons(self) -> ComposeResult:
        """What works on many captions."""
        yield Button("Bulk edit (b)", id="bulk", compact=True)
        yield Button("Tags (t)", id="tags", compact=True)
        yield Button("Auto-caption (a)", id="auto", compact=True)
        yield Button("Write (w)", id="write", compact=True)

    def on_mount(self) -> None:
        """Show the chosen picture."""
        super().on_mount()
        self.load_chosen()

    def title_parts(self) -> list[Part]:
        """How many pictures there are."""
        count = len(self.work.state.items)
        return [(f" · {count:,} picture{'' if count == 1 else 's'}", "")]

    def refresh_all(self) -> None:
        """Show list, caption and title as they stand; a text that is being typed stays."""
        super().refresh_all()
        area = self.query_one(CaptionArea)
        if not area.touched:
            self.load_chosen()
        self.show_list()

    @property
    def pictures(self) -> CaptionList:
        """The list of pictures."""
        return self.query_one(CaptionList)

    @on(CaptionList.Filtered)
    def _filtered(self, event: CaptionList.Filtered) -> None:
        event.stop()
        self.keep_typed()

    @on(CaptionList.Moved)
    def _moved(self, event: CaptionList.Moved) -> None:
        event.stop()
        self.go_to(event.name)

    @on(CaptionList.Chosen)
    def _picked(self, event: CaptionList.Chosen) -> None:
        event.stop()
        self.query_one(CaptionArea).focus()

    def show_list(self) -> None:
        """List the pictures as they stand."""
        self.pictures.chosen = self.chosen
        self.pictures.refresh_rows()

    # The chosen picture

    def go_to(self, name: str) -> None:
        """Keep what was typed and show another picture."""
        self.keep_typed()
        self.chosen, self.which = name, 0
        self.load_chosen()
        self.pictures.select(name)

    def load_chosen(self) -> None:
        """Show the chosen picture with its caption as it stands."""
        area = self.query_one(CaptionArea)
        area.read_only = not self.chosen
        if not self.chosen:
            return
        captions = self.work.state.captions(self.chosen)
        self.which = min(self.which, max(0, len(captions) - 1))
        text = captions[self.which] if captions else ""
        if area.text != text or area.touched:
            area.show(text)
        item = self.work.state.items[self.chosen]
        self.query_one(Picture).show(item.path, f"{item.relative} · {item.width} × {item.height}")
        self.show_words()

    def show_words(self) -> None:
        """Show where the caption comes from, how long it is, and the prompt that it gives."""
        name, text = self.chosen, self.query_one(CaptionArea).text
        state, item = self.work.state, self.work.state.items[self.chosen]
        captions, mark = state.captions(name), state.mark(name)
        parts: list[Part] = [("Caption", "strong")]
        if len(captions) > 1:
            parts.append((f" {self.which + 1} of {len(captions)} (c: next)", "strong"))
        author = state.author(name)
        source = f"written by {author}" if mark == "machine" else WORDS[mark]
        if mark == "file" and item.caption_path is not None:
            source = f"from {item.caption_path.name}"
        parts.append((f" · {'typing' if self.query_one(CaptionArea).touched else source}", ROLES[mark] or "dim"))
        parts += [(f" · {note}", "dim") for note in item.notes]
        self.query_one("#caption-source", Line).show(parts)
        length = self.work.length(name, text)
        self.query_one("#caption-length", Line).show([(length.told(), "high" if length.too_long else "dim")])
        prompt = Text("Prompt: ", "bold")
        prompt.append(safe_str(self.work.prompt(name, text)) or "(empty)", "not bold")
        texts = [*captions] or [""]
        texts[self.which] = text
        if first := self.work.drawn(name, texts):
            prompt.append("\nDrawn anew each time; first: ", "bold")
            prompt.append(safe_str(first), "not bold")
        self.query_one("#caption-prompt", Status).say(prompt)
        in_text = "Enter: next picture · escape: to the list" if self.focused is self.query_one(CaptionArea) else ""
        self.hint(f"{in_text or 'Enter: edit the caption'} · kept when you leave the picture")

    @on(TextArea.Changed, "#caption")
    def _typed(self, event: TextArea.Changed) -> None:
        event.stop()
        if self.chosen:
            self.show_words()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Say what Enter does where the focus is now."""
        if self.chosen:
            self.show_words()

    def keep_typed(self) -> None:
        """Keep the text of the chosen picture where it was changed."""
        area = self.query_one(CaptionArea)
        if not self.chosen or not area.touched:
            return
        captions = list(self.work.state.captions(self.chosen) or ("",))
        captions[self.which] = area.text
        self.work.save(self.work.state.put({self.chosen: captions}, f"the caption of {self.chosen}"))
        area.show(area.text)
        self.show_title()
        self.show_list()

    # Actions

    def action_picture(self, by: int) -> None:
        """Keep this caption and go to the next or previous picture of the list."""
        # Asked first: what is kept now may take the chosen picture out of the list.
        name = self.pictures.neighbor(by)
        self.keep_typed()
        if name:
            self.go_to(name)
        else:
            self.refresh_all()
            self.hint("This is the last picture of the list." if by > 0 else "This is the first picture of the list.")

    def action_focus_list(self) -> None:
        """Move to the list, where letters are keys."""
        self.keep_typed()
        self.pictures.focus_rows()
        self.refresh_all()

    def action_close(self) -> None:
        """Clear the filter first, if there is one."""
        if self.pictures.filtering:
            self.pictures.clear_filter()
            self.action_focus_list()
        else:
            super().action_close()

    def action_filter(self) -> None:
        """Move to the filter."""
        self.pictures.focus_filter()

    def action_cycle_show(self) -> None:
        """Show all pictures, or only those that something is to be said of."""
        self.pictures.cycle()

    def action_keep(self) -> None:
        """Save this caption now."""
        self.keep_typed()
        self.refresh_all()

    def action_other(self) -> None:
        """Edit the next of the picture's captions."""
        self.keep_typed()
        captions = self.work.state.captions(self.chosen) if self.chosen else ()
        if len(captions) > 1:
            self.which = (self.which + 1) % len(captions)
            self.load_chosen()
        else:
            self.hint("This picture has one caption.")

    def action_own_text(self) -> None:
        """Take the caption of the picture's own file again."""
        self.keep_typed()
        if not self.chosen or not self.work.state.author(self.chosen):
            self.hint("This caption is that of the file.")
        elif self.work.state.own(self.chosen) is None:
            self.hint("The caption files are still being read; try again in a moment.")
        else:
            label = f"taking the file's text for {self.chosen}"
            self.work.save(self.work.state.revert([self.chosen], label))
            self.refresh_all()
            self.hint("This is the file's own text again; u takes that back.")

    def action_undo(self) -> None:
        """Take the last saved change back, and show where it was."""
        self.keep_typed()
        label, edits = self.work.state.undo()
        if not label:
            self.hint("There is nothing to undo.")
            return
        self.work.save(edits)
        if self.chosen not in edits:
            self.chosen, self.which = next(iter(edits)), 0
        self.load_chosen()
        self.refresh_all()
        self.hint(f"Undone: {label}.")

    def action_bulk(self) -> None:
        """Change many captions at once."""
        from lorasmith.tui.screens.bulk_edit import BulkEdit

        self.keep_typed()
        self.app.push_screen(BulkEdit(self.found, self.work))

    def action_tags(self) -> None:
        """Count the tags."""
        from lorasmith.tui.screens.tag_counts import TagCounts

        self.keep_typed()
        self.app.push_screen(TagCounts(self.found, self.work))

    def action_auto(self) -> None:
        """Have a model write captions."""
        from lorasmith.tui.screens.auto_caption import AutoCaption

        self.keep_typed()
        self.app.push_screen(AutoCaption(self.found, self.work))

    def action_write(self) -> None:
        """Write the edits to the user's own files, after asking."""
        from lorasmith.tui.screens.write_captions import write_to_files

        self.keep_typed()
        self.run_worker(write_to_files(self), exclusive=True, group="write")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do what the button says."""
        if event.button.id in ("bulk", "tags", "auto", "write"):
            event.stop()
            getattr(self, f"action_{event.button.id}")()
