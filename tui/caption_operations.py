"""The changes that can be made in many captions at once: what each asks for, and the function from text to text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Edit = Callable[[str], str]


@dataclass(frozen=True)
class Operation:
    """One kind of change: `fields` are what it asks for, up to two; `label` names it, `about` says what it does."""

    name: str
    label: str
    about: str
    fields: tuple[str, ...] = ()

    def build(self, first: str, second: str) -> Edit:
        """Return the change for what was typed; the change raises ConfigError where that is not enough."""
        from lorasmith.engine.dataset import caption_edits as edits

        made: dict[str, Edit] = {
            "add-last": lambda text: edits.add_tag(text, first),
            "add-first": lambda text: edits.add_tag(text, first, first=True),
            "remove": lambda text: edits.remove_tag(text, first),
            "rename": lambda text: edits.rename_tag(text, first, second),
            "replace": lambda text: edits.replace_text(text, first, second),
            "regex": lambda text: edits.replace_text(text, first, second, regex=True),
            "tidy": edits.tidy,
            "trigger": lambda text: edits.put_trigger_first(text, first),
            "letters": edits.cp1252_to_utf8,
        }
        return made[self.name]


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "add-last", "add a tag last", "Puts a tag or some words at the end; where it is already, nothing.", ("Tag",)
    ),
    Operation("add-first", "add a tag first", "Puts a tag or some words at the start, or moves it there.", ("Tag",)),
    Operation("remove", "remove a tag", "Takes a tag out, between its commas; its case does not matter.", ("Tag",)),
    Operation("rename", "rename a tag", "Gives a tag another name, once in each caption.", ("Tag", "New name")),
    Operation("replace", "replace text", "Replaces text wherever it stands, inside words too.", ("Text", "By")),
    Operation("regex", "replace by regex", r"Python's re; \1 in “By” is the first group.", ("Expression", "By")),
    Operation("tidy", "tidy up", "Takes out repeated spaces, empty tags, invisible characters."),
    Operation("trigger", "move trigger first", "Puts the trigger word once and first, as training does.", ("Trigger",)),
    Operation("letters", "repair letters", "Puts right what was read in the wrong encoding: cafÃ© becomes café."),
)
BY_LABEL = {operation.label: operation for operation in OPERATIONS}
BY_NAME = {operation.name: operation for operation in OPERATIONS}
