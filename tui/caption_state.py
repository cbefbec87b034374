"""The captions of a dataset as they stand: the files' own, the edits over them, and a way back for each step.

No screen here. Every change returns the edits that have to be added to the overlay; reading that file again gives the
same captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.overlay import PERSON, Edit

Mark = Literal["file", "edited", "machine", "empty", "missing"]
"""Where a caption comes from: its file, a person's edit, a captioner; or it has no words, or there is none."""
Show = Literal["all", "missing", "edited", "machine", "too long"]
SHOWS: tuple[Show, ...] = get_args(Show)
SIGNS: dict[Mark, str] = {"file": " ", "edited": "*", "machine": "~", "empty": "0", "missing": "!"}
"""One character for each mark, so that a list needs no color."""
WORDS: dict[Mark, str] = {
    "file": "from its file",
    "edited": "edited by you",
    "machine": "written by a model",
    "empty": "empty: the trigger alone",
    "missing": "no caption",
}


@dataclass(frozen=True)
class Step:
    """One thing that can be undone: its name for the user, and the edits as they were before."""

    label: str
    before: Mapping[str, Edit | None]


class CaptionState:
    """The pictures in their order, each with its captions; `own` are those of its own file where they are known."""

    def __init__(self, dataset: Dataset, edits: Mapping[str, Edit] | None = None) -> None:
        """Begin with what a scan found, and with the edits that its overlay holds."""
        self.dataset = dataset
        self.items: dict[str, ImageItem] = {item.relative: item for item in dataset.items}
        self._edits: dict[str, Edit] = dict(edits or {})
        self._own = {item.relative: item for item in dataset.items if item.caption_source != "overlay"}
        self._steps: list[Step] = []
        self._folded: dict[str, tuple[tuple[str, ...], str]] = {}

    def learn_own(self, dataset: Dataset) -> None:
        """Take the files' own captions from a scan that was made without the overlay."""
        self._own |= {item.relative: item for item in dataset.items if item.relative in self.items}

    def own(self, relative: str) -> tuple[str, ...] | None:
        """Return the captions of the picture's own file, None while they are not known."""
        item = self._own.get(relative)
        return None if item is None else item.captions

    def own_items(self) -> list[ImageItem]:
        """Return the pictures as their own files tell; as the scan found them where that is not known."""
        return [self._own.get(name, item) for name, item in self.items.items()]

    def captions(self, relative: str) -> tuple[str, ...]:
        """Return the captions that count now; none where there are none."""
        edit = self._edits.get(relative)
        if edit is not None and edit.captions is not None:
            return edit.captions
        return self._own.get(relative, self.items[relative]).captions

    def author(self, relative: str) -> str:
        """Return who wrote the captions that count: "" for the picture's own file."""
        edit = self._edits.get(relative)
        return edit.by if edit is not None and edit.captions is not None else ""

    def mark(self, relative: str) -> Mark:
        """Return what there is to say of the picture's caption in one word."""
        captions, author = self.captions(relative), self.author(relative)
        if not captions:
            return "missing"
        if not any(text.strip() for text in captions):
            return "empty"
        return "file" if not author else "edited" if author == PERSON else "machine"

    def edited(self) -> dict[str, Edit]:
        """Return the edits that count: pictures whose captions differ from their file's."""
        return {name: edit for name, edit in self._edits.items() if edit.captions is not None and name in self.items}

    def current(self) -> Dataset:
        """Return the dataset with the captions as they stand."""
        return replace(self.dataset, items=tuple(self._current(name, item) for name, item in self.items.items()))

    def _current(self, name: str, item: ImageItem) -> ImageItem:
        captions = self.captions(name)
        return item if captions == item.captions else replace(item, captions=captions)

    def put(self, captions: Mapping[str, Sequence[str]], label: str, by: str = PERSON) -> dict[str, Edit]:
        """Give pictures new captions as one step; return what to add to the overlay.

        What does not change is left out. The file's own text, or no words where it has none, is no edit any more.
        """
        changed = {}
        for relative, texts in captions.items():
            new = tuple(texts)
            if new == self.captions(relative):
                continue
            own = self.own(relative)
            back = new == own or (own == () and not any(text.strip() for text in new))
            changed[relative] = self._edit(relative, None if back else new, by)
        return self._take(changed, label)

    def revert(self, names: Sequence[str], label: str) -> dict[str, Edit]:
        """Let the files' own captions count again as one step; return what to add to the overlay."""
        return self._take({name: self._edit(name, None, PERSON) for name in names if self.author(name)}, label)

    def take(self, edits: Mapping[str, Edit], label: str) -> None:
        """Take in what an overlay holds by now, for example after a captioner wrote to it, as one step."""
        known = {name: edit for name, edit in edits.items() if name in self.items}
        self._take({name: edit for name, edit in known.items() if edit != self._edits.get(name)}, label)

    def learn_written(self, names: Sequence[str]) -> dict[str, Edit]:
        """Note that the captions of these pictures stand in their own files now; return what to add to the overlay.

        What was written to files is not undone here, so the steps are forgotten.
        """
        for name in names:
            # Several captions are written one a line, and read again as one text of several lines.
            text = "\n".join(self.captions(name))
            self._own[name] = replace(self.items[name], captions=(text,), caption_source="sidecar")
        edits = {name: self._edit(name, None, PERSON) for name in names}
        self._edits |= edits
        self._steps.clear()
        return edits

    def undo(self) -> tuple[str, dict[str, Edit]]:
        """Take the last step back; return its name ("": there is none) and what to add to the overlay."""
        if not self._steps:
            return "", {}
        step = self._steps.pop()
        for name, before in step.before.items():
            if before is None:
                del self._edits[name]
            else:
                self._edits[name] = before
        return step.label, {name: before or Edit() for name, before in step.before.items()}

    def matching(self, text: str, show: Show = "all", too_long: frozenset[str] = frozenset()) -> list[str]:
        """Return the pictures, in order, whose name or caption holds every word of `text`, and that `show` asks for."""
        words = text.casefold().split()
        return [name for name in self.items if self._shown(name, show, too_long) and self._holds(name, words)]

    def without_caption(self) -> list[str]:
        """Return the pictures that have no words."""
        return [name for name in self.items if self.mark(name) in ("missing", "empty")]

    def _shown(self, name: str, show: Show, too_long: frozenset[str]) -> bool:
        if show == "all":
            return True
        if show == "too long":
            return name in too_long
        mark = self.mark(name)
        return mark == show or (show == "missing" and mark == "empty")

    def _holds(self, name: str, words: Sequence[str]) -> bool:
        if not words:
            return True
        captions = self.captions(name)
        folded = self._folded.get(name)
        if folded is None or folded[0] != captions:
            folded = self._folded[name] = (captions, "\n".join((name, *captions)).casefold())
        return all(word in folded[1] for word in words)

    def _edit(self, relative: str, captions: tuple[str, ...] | None, by: str) -> Edit:
        before = self._edits.get(relative)
        return Edit(captions, before.exclude if before is not None else False, by)

    def _take(self, edits: dict[str, Edit], label: str) -> dict[str, Edit]:
        if edits:
            self._steps.append(Step(label, {name: self._edits.get(name) for name in edits}))
            self._edits |= edits
        return edits


@dataclass(frozen=True)
class Length:
    """How long a prompt is; `tokens` count its start and end, 0 where no tokenizer is known, `limit` 0 likewise."""

    words: int
    tokens: int = 0
    limit: int = 0

    @property
    def too_long(self) -> bool:
        """Whether the text encoder would not read its end."""
        return bool(self.limit) and self.tokens > self.limit

    def told(self) -> str:
        """Return the length in words for the user."""
        words = f"{self.words} word{'' if self.words == 1 else 's'}"
        if not self.tokens:
            return words
        if self.too_long:
            return f"! {self.tokens} of {self.limit} tokens: the last {self.tokens - self.limit} are not read"
        return f"{self.tokens}{f' of {self.limit}' if self.limit else ''} tokens · {words}"


@dataclass(frozen=True)
class Ruler:
    """Measures prompts with the base's own tokenizers; without any, in words."""

    tokenizers: Sequence[Any] = ()
    limit: int = 0

    def measure(self, prompt: str) -> Length:
        """Return the prompt's length."""
        return self.measure_all([prompt])[prompt]

    def measure_all(self, prompts: Sequence[str]) -> dict[str, Length]:
        """Return the length of each prompt, by the tokenizer that needs the most tokens."""
        from lorasmith.engine.dataset.check_captions import count_tokens

        tokens = count_tokens(prompts, self.tokenizers)
        return {prompt: Length(len(prompt.split()), tokens[prompt], self.limit) for prompt in tokens}
