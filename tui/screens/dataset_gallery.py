"""All pictures of a dataset as thumbnails, and the files that are not used with their reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import Key
from textual.widgets import Button, Footer, Input, OptionList, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.checks import MARKS, Checked
from lorasmith.tui.forms import SafeInput, Status
from lorasmith.tui.screens.dataset_sheet import DatasetSheet, tiles_of
from lorasmith.tui.text import safe_str, safe_text
from lorasmith.tui.widgets.gallery import Gallery
from lorasmith.tui.widgets.picture import Picture

if TYPE_CHECKING:
    from lorasmith.engine.dataset.items import ImageItem, Refusal
    from lorasmith.tui.findings import FoundDataset

MAX_LISTED = 5000


class GalleryScreen(DatasetSheet):
    """A grid of the pictures in use; `/` finds some of them, `t` lists the files that are not used."""

    TITLE_WORDS = "Gallery"
    AUTO_FOCUS = "#grid"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "gallery", "sheet")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("gallery")]
    HELP_TEXT: ClassVar[str] = (
        "Arrow keys, page up and down, home and end move; + and - show larger or smaller pictures.\n\n"
        "A mark before a name says that something was found about the picture: ✗ error, ! warning, · note. What it is "
        "stands beside the selected picture.\n\n"
        "x leaves the selected picture out, or takes it in again in the list of files that are not used (t). Your own "
        "files are never changed."
    )

    def __init__(self, wanted: str = "", start: str = "") -> None:
        """Show the pictures that `wanted` finds, all where it is empty, and select `start`."""
        super().__init__()
        self._filter = wanted
        self._start = start
        self._items: dict[str, ImageItem] = {}
        self._unused: list[Refusal] = []
        self._shown: tuple[FoundDataset, Checked | None, str] | None = None

    def compose(self) -> ComposeResult:
        """Title, filter, pictures with the selected one beside them, buttons."""
        yield Static("", id="sheet-title", markup=False)
        yield SafeInput(self._filter, id="filter", placeholder="part of a name, a caption or a finding")
        with Horizontal(id="gallery-frame"):
            with Vertical(id="pictures"):
                yield Gallery(id="grid")
                yield OptionList(id="unused", markup=False, compact=True)
                yield Static("", id="caption", markup=False)
            with VerticalScroll(id="closeup", can_focus=False):
                yield Picture(id="large")
                yield Status(id="facts", classes="gap")
        yield Static("", id="hint", markup=False)
        with Horizontal(id="buttons"):
            yield Button("Not used (t)", id="toggle_unused", compact=True)
            yield Button("Leave out (x)", id="exclude", compact=True)
            yield Button("Caption (e)", id="edit_caption", compact=True)
            yield Button("Back", id="back", compact=True)
        yield Footer(show_command_palette=False, compact=True)

    @property
    def listing(self) -> bool:
        """Whether the files that are not used are shown instead of the pictures."""
        return self.query_one("#unused").display

    def on_mount(self) -> None:
        """Begin with the pictures."""
        self.query_one("#unused").display = False
        super().on_mount()
        self.query_one("#filter").set_class(bool(self._filter), "-open")
        if self._start:
            self.query_one("#grid", Gallery).select(self._start)

    def draft_changed(self) -> None:
        """Show the pictures as they are known now."""
        found = self.found
        if found is None:
            return
        checked = self.checked
        self._items = {item.relative: item for item in found.dataset.items}
        shown = (found, checked, self._filter)
        # Ten thousand tiles take a while: made anew only where something about them is another.
        if self._shown is None or any(new is not old for new, old in zip(shown, self._shown, strict=True)):
            self._shown = shown
            self.query_one("#grid", Gallery).show(tiles_of(filtered(*shown), checked))
            self._fill_unused(found)
        self._show_title(found, len(self.query_one("#grid", Gallery).tiles))
        self._show_selected()
        self.show_progress()

    def _show_title(self, found: FoundDataset, count: int) -> None:
        grid = self.query_one("#grid", Gallery)
        total = len(found.dataset.items)
        if self.listing:
            words = f"Not used: {len(found.dataset.refused):,} of {found.dataset.found:,} files"
        else:
            which = f"picture {grid.index + 1:,} of {count:,}" if count else "no picture"
            words = f"Gallery: {which}" + (f" found among {total:,}" if self._filter.strip() else "")
        self.query_one("#sheet-title", Static).update(safe_text(f"lorasmith · Dataset · {words}"))

    def _fill_unused(self, found: FoundDataset) -> None:
        unused = list(found.dataset.refused[:MAX_LISTED])
        if unused == self._unused:
            return
        listed = self.query_one("#unused", OptionList)
        place = listed.highlighted or 0
        self._unused = unused
        listed.clear_options()
        listed.add_options([safe_text(f"{refusal.relative}: {refusal.reason}") for refusal in unused])
        listed.highlighted = min(place, len(unused) - 1) if unused else None

    def selected(self) -> str:
        """Return the selected picture, or file that is not used."""
        if self.listing:
            index = self.query_one("#unused", OptionList).highlighted
            return self._unused[index].relative if index is not None and index < len(self._unused) else ""
        tile = self.query_one("#grid", Gallery).selected
        return tile.relative if tile is not None else ""

    def _show_selected(self) -> None:
        item = None if self.listing else self._items.get(self.selected())
        self.query_one("#large", Picture).show(item.path if item is not None else None)
        self.query_one("#facts", Status).say(facts_text(item, self.checked) if item is not None else "")
        self.query_one("#caption", Static).update(short_text(item, self.checked) if item is not None else "")

    def usual_hint(self) -> str:
        """Return what the keys do."""
        if self.listing:
            return "x use a picture again that you left out · t back to the pictures"
        return "arrows move · + - size · / filter · x leave out · e caption · t files not used"

    # Keys

    def action_filter(self) -> None:
        """Type what to find."""
        field = self.query_one("#filter", SafeInput)
        field.add_class("-open")
        field.focus()

    @on(Input.Changed, "#filter")
    def _filter_typed(self, event: Input.Changed) -> None:
        self._filter = event.value
        if self.ready:
            self.draft_changed()

    @on(Input.Submitted, "#filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        self.query_one("#filter").set_class(bool(self._filter), "-open")
        self._focus_list()

    def on_key(self, event: Key) -> None:
        """Let escape in the filter clear it, and the arrow down leave it."""
        if self.focused is not self.query_one("#filter"):
            return
        if event.key == "escape":
            event.stop()
            event.prevent_default()
            self._clear_filter()
        elif event.key == "down":
            event.stop()
            self._focus_list()

    def _clear_filter(self) -> None:
        field = self.query_one("#filter", SafeInput)
        field.value = ""
        field.remove_class("-open")
        self._focus_list()

    def _focus_list(self) -> None:
        self.query_one("#unused" if self.listing else "#grid").focus()

    def action_back(self) -> None:
        """Forget the filter first, then go back."""
        if self.focused is self.query_one("#filter"):
            self._clear_filter()
        elif self.listing:
            self.action_toggle_unused()
        else:
            super().action_back()

    def action_toggle_unused(self) -> None:
        """Show the files that are not used, or the pictures."""
        listing = not self.listing
        self.query_one("#unused").display = listing
        self.query_one("#grid").display = not listing
        self.query_one("#toggle_unused", Button).label = "Pictures (t)" if listing else "Not used (t)"
        self.query_one("#exclude", Button).label = "Use again (x)" if listing else "Leave out (x)"
        self.query_one("#edit_caption", Button).disabled = listing
        self._focus_list()
        self.draft_changed()

    def action_exclude(self) -> None:
        """Leave the picture out, or use one again that was left out."""
        found, relative = self.found, self.selected()
        edit = found.edits.get(relative) if found is not None else None
        if self.listing and (edit is None or not edit.exclude):
            self.say("Only pictures that you left out can be used again.")
            return
        super().action_exclude()

    def action_edit_caption(self) -> None:
        """Edit the selected picture's caption; a file that is not used has none."""
        if not self.listing:
            super().action_edit_caption()

    @on(Gallery.Selected, "#grid")
    def _picture_selected(self) -> None:
        self._show_selected()
        if self.found is not None:
            self._show_title(self.found, len(self.query_one("#grid", Gallery).tiles))

    @on(Gallery.Opened, "#grid")
    def _picture_opened(self) -> None:
        self.action_edit_caption()


def filtered(found: FoundDataset, checked: Checked | None, wanted: str) -> list[ImageItem]:
    """Return the pictures whose name, caption or findings hold `wanted`, in any case; all where it is empty."""
    words = wanted.strip().casefold()
    if not words:
        return list(found.dataset.items)
    concerned = checked.by_file if checked is not None else {}

    def holds(item: ImageItem) -> bool:
        if words in item.relative.casefold() or any(words in text.casefold() for text in item.captions):
            return True
        return any(
            words in f"{finding.title}\n{finding.code}".casefold() for finding in concerned.get(item.relative, ())
        )

    return [item for item in found.dataset.items if holds(item)]


def facts_text(item: ImageItem, checked: Checked | None) -> Text:
    """Return what is known of a picture: name, size, caption, findings."""
    text = Text()
    text.append(f"{safe_str(item.relative)}\n", "bold")
    text.append(f"{_facts(item)}\n", "dim")
    text.append("\n".join(_one_line(caption) for caption in item.captions) or "(no caption)")
    for note in item.notes:
        text.append(f"\n· {safe_str(note)}", "dim")
    for finding in (checked.by_file if checked is not None else {}).get(item.relative, ()):
        detail = finding.details.get(item.relative, "")
        text.append(f"\n\n{MARKS[finding.severity]} {safe_str(finding.title)}", "bold")
        text.append(f"\n  {safe_str(detail)}" if detail else "")
    return text


def short_text(item: ImageItem, checked: Checked | None) -> Text:
    """Return the same in at most three lines: name and size, caption, the worst finding."""
    text = Text()
    text.append(f"{safe_str(item.relative)} · {_facts(item)}\n", "bold")
    text.append("(no caption)" if item.caption is None else _one_line(item.caption))
    findings = (checked.by_file if checked is not None else {}).get(item.relative, [])
    if findings:
        worst = findings[0]
        detail = worst.details.get(item.relative, "")
        more = f" · and {len(findings) - 1} more" if len(findings) > 1 else ""
        text.append(f"\n{MARKS[worst.severity]} {safe_str(detail or worst.title)}{more}")
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _facts(item: ImageItem) -> str:
    facts = [f"{item.width}×{item.height}", item.format, f"{item.repeats:g}× an epoch" if item.repeats != 1 else ""]
    facts += ["regularization" if item.regularization else "", "mask" if item.mask_path is not None else ""]
    return safe_str(" · ".join(fact for fact in facts if fact))


def _one_line(caption: str) -> str:
    """Return a caption without the line ends that say nothing."""
    return safe_str(" ".join(caption.split())) or "(empty caption)"
