"""Everything that was found about a dataset: why it matters, what to do, and the pictures concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Footer, OptionList, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.checks import MARKS, severity_counts
from lorasmith.tui.forms import Hanging, Status
from lorasmith.tui.screens.dataset_sheet import DatasetSheet, tiles_of
from lorasmith.tui.text import safe_str, safe_text
from lorasmith.tui.widgets.gallery import Gallery

if TYPE_CHECKING:
    from lorasmith.engine.dataset.findings import Finding
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.widgets.tiles import Tile


class FindingsScreen(DatasetSheet):
    """The findings as a list, worst first; beside it, or below it, what the highlighted one means and its pictures."""

    TITLE_WORDS = "Findings"
    AUTO_FOCUS = "#list"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "findings", "sheet")
    BINDINGS: ClassVar[list[BindingType]] = [
        *bindings("findings"),
        Binding("left", "move(-1)", "Previous picture", show=False, id="finding-left"),
        Binding("right", "move(1)", "Next picture", show=False, id="finding-right"),
    ]
    HELP_TEXT: ClassVar[str] = (
        "✗ error: the run cannot start or would fail. ! warning: the result suffers. · note: worth knowing.\n\n"
        "Up and down go through the list, left and right through the pictures of a finding; tab moves between list, "
        "pictures and buttons.\n\n"
        "a makes the change that the finding proposes. Your own files are never changed: left-out pictures and new "
        "captions are kept beside the draft, and u takes the newest change back."
    )

    def __init__(self) -> None:
        """Open on the worst finding."""
        super().__init__()
        self._shown: tuple[Finding, ...] | None = None
        self._code = ""

    def compose(self) -> ComposeResult:
        """Title, list, explanation, pictures, buttons."""
        yield Static("", id="sheet-title", markup=False)
        with Horizontal(id="findings-frame"):
            yield OptionList(id="list", markup=False, compact=True)
            with Vertical(id="about"):
                with VerticalScroll(id="why-scroll", can_focus=False):
                    yield Status(id="why")
                yield Gallery(id="concerned")
                yield Static("", id="detail", markup=False)
        yield Static("", id="hint", markup=False)
        with Horizontal(id="buttons"):
            yield Button("Do it (a)", id="apply", variant="primary", compact=True)
            yield Button("Undo (u)", id="undo", compact=True)
            yield Button("Back", id="back", compact=True)
        yield Footer(show_command_palette=False, compact=True)

    @property
    def finding(self) -> Finding | None:
        """The highlighted finding."""
        index = self.query_one("#list", OptionList).highlighted
        return self._shown[index] if self._shown and index is not None and index < len(self._shown) else None

    def draft_changed(self) -> None:
        """Show the findings as they are now; the highlighted one stays highlighted where it is still there."""
        checked = self.checked
        findings = checked.findings if checked is not None else ()
        self.query_one("#sheet-title", Static).update(
            safe_text(f"lorasmith · Dataset · Findings: {severity_counts(findings)}")
        )
        self._fill(findings)
        self.query_one("#undo", Button).disabled = not self.wizard.editing.undos
        self._show_finding()
        self.show_progress()

    def _fill(self, findings: tuple[Finding, ...]) -> None:
        if findings == self._shown:
            return
        before, listed = self.finding, self.query_one("#list", OptionList)
        place = listed.highlighted or 0
        self._shown = findings
        with self.prevent(OptionList.OptionHighlighted):
            listed.clear_options()
            listed.add_options([Hanging(title_line(finding)) for finding in findings])
            same = [n for n, finding in enumerate(findings) if before is not None and finding.code == before.code]
            listed.highlighted = None if not findings else same[0] if same else min(place, len(findings) - 1)

    def _show_finding(self) -> None:
        finding = self.finding
        button = self.query_one("#apply", Button)
        action = finding.action if finding is not None else None
        button.disabled = action is None
        button.label = safe_text(f"{action.label} (a)" if action is not None else "Do it (a)")
        button.refresh(layout=True)
        self.query_one("#why", Status).say(about_text(finding, titled=self.has_class("-wide")))
        gallery = self.query_one("#concerned", Gallery)
        tiles, groups = self._tiles(finding)
        gallery.display = bool(tiles)
        gallery.show(tiles, groups)
        code = finding.code if finding is not None else ""
        if code != self._code:
            self._code = code
            gallery.action_select(0)
        self._show_detail()
        self.refresh_bindings()

    def _tiles(self, finding: Finding | None) -> tuple[list[Tile], list[int]]:
        """Return the pictures of a finding; those that belong together one after the other."""
        found = self.found
        if finding is None or found is None:
            return [], []
        items = {item.relative: item for item in found.dataset.items}
        grouped = [[items[name] for name in group if name in items] for group in finding.groups]
        inside = {name for group in finding.groups for name in group}
        alone: list[ImageItem] = [items[name] for name in finding.files if name in items and name not in inside]
        groups = [group for group in [*grouped, alone] if group]
        return tiles_of([item for group in groups for item in group], self.checked), [len(group) for group in groups]

    def _show_detail(self) -> None:
        finding, relative = self.finding, self.selected()
        words = finding.details.get(relative, "") if finding is not None else ""
        others = len(finding.files) if finding is not None else 0
        text = f"{relative}: {words}" if words else relative
        if relative and others > 1:
            gallery = self.query_one("#concerned", Gallery)
            text = f"{gallery.index + 1} of {len(gallery.tiles)} · {text}"
        elif finding is not None and not relative and finding.files:
            text = ", ".join(
                f"{name}{f': {finding.details[name]}' if name in finding.details else ''}"
                for name in finding.files[:20]
            )
        self.query_one("#detail", Static).update(safe_text(text))

    def selected(self) -> str:
        """Return the picture that is selected below the finding."""
        tile = self.query_one("#concerned", Gallery).selected
        return tile.relative if tile is not None else ""

    def usual_hint(self) -> str:
        """Return what the keys do for the highlighted finding."""
        finding = self.finding
        if finding is None:
            return "Nothing to report · esc back to the page"
        act = "a do it · " if finding.action is not None else ""
        return f"{act}left right its pictures · x leave one out · e its caption"

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the action's key only where the finding has one."""
        if action == "apply" and self.ready and (self.finding is None or self.finding.action is None):
            return False
        return super().check_action(action, parameters)

    @on(OptionList.OptionHighlighted, "#list")
    def _highlighted(self) -> None:
        self._show_finding()
        self.show_progress()

    @on(OptionList.OptionSelected, "#list")
    def _chosen(self) -> None:
        gallery = self.query_one("#concerned", Gallery)
        (gallery if gallery.display else self.query_one("#apply")).focus()

    @on(Gallery.Selected, "#concerned")
    def _picture_selected(self) -> None:
        self._show_detail()

    @on(Gallery.Opened, "#concerned")
    def _picture_opened(self) -> None:
        self.action_gallery()

    def action_move(self, by: int) -> None:
        """Go to another picture of the finding while the list has the focus."""
        self.query_one("#concerned", Gallery).action_move(by)

    def action_apply(self) -> None:
        """Make the change that the finding proposes."""
        finding = self.finding
        if finding is None or finding.action is None:
            return
        self.wizard.carry_out(finding.action)
        self.say(f"Done: {finding.action.label} (u takes it back)")

    def action_gallery(self) -> None:
        """Show the pictures of the finding in the gallery."""
        from lorasmith.tui.screens.dataset_gallery import GalleryScreen

        finding = self.finding
        if finding is not None:
            self.app.push_screen(GalleryScreen(finding.title, self.selected()))


def title_line(finding: Finding) -> Text:
    """Return a finding's line in the list: mark, severity, title."""
    text = Text()
    text.append(f"{MARKS[finding.severity]} {finding.severity}: ", "bold")
    text.append(safe_str(finding.title))
    return text


def about_text(finding: Finding | None, *, titled: bool = True) -> Text:
    """Return why a finding matters and what to do, below its title."""
    text = Text()
    if finding is None:
        text.append("✓ The pictures and captions were checked, and there is nothing to report.")
        return text
    if titled:
        text.append(f"{MARKS[finding.severity]} {safe_str(finding.title)}\n", "bold")
    for words in (finding.why, finding.fix):
        if words:
            text.append(f"{safe_str(words)}\n")
    text.rstrip()
    return text
