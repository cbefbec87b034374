"""What the caption screens of one dataset share: the captions, their way to the disk, their length, their prompts.

Everything that takes time happens in threads; `tick` tells a screen that something new is known.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.tui.caption_state import CaptionState, Length, Ruler
from lorasmith.tui.overlay_writer import OverlayWriter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasmith.engine.dataset.overlay import Edit
    from lorasmith.tui.findings import FoundDataset
    from lorasmith.tui.known import Known


MEASURED_AT_ONCE = 200
"""Pictures whose prompts a tokenizer reads before the screen's thread is let in."""


class CaptionWork:
    """The captions as they stand (`state`), their way to the disk (`writer`), and the base's tokenizers (`ruler`)."""

    def __init__(self, known: Known, found: FoundDataset, overlay: Path) -> None:
        """Begin with what the scan found; takes the looks that are needed and not under way."""
        config = known.check_config()
        self.known = known
        self.found = found
        self.settings = config.captions
        self.seed = config.run.seed
        self.state = CaptionState(found.dataset, found.edits)
        self.writer = OverlayWriter(overlay.expanduser())
        self.ruler = Ruler()
        self.too_long: frozenset[str] = frozenset()
        self._measured: dict[str, bool] = {}
        self._measuring = 0
        self._news = False
        self._own_known = not any(item.caption_source == "overlay" for item in found.dataset.items)
        known.look_at_words()
        self.tick()

    @property
    def edited(self) -> bool:
        """Whether anything was written since the scan."""
        return self.writer.written > 0 or self.writer.waiting

    def prompt(self, relative: str, text: str | None) -> str:
        """Return the text that the encoder reads for a caption, nothing drawn or dropped."""
        from lorasmith.engine.dataset.captions import full_prompt

        return full_prompt(text, self.settings, self.state.items[relative].regularization)

    def drawn(self, relative: str, texts: Sequence[str]) -> str:
        """Return the prompt of the picture's first use where each use draws another one, "" where none does."""
        from lorasmith.engine.dataset.captions import caption_for, is_drawn

        item = replace(self.state.items[relative], captions=tuple(texts))
        return caption_for(item, self.settings, self.seed, 0, 0) if is_drawn(item, self.settings) else ""

    def length(self, relative: str, text: str) -> Length:
        """Return how long the prompt of a caption is."""
        return self.ruler.measure(self.prompt(relative, text))

    def save(self, edits: Mapping[str, Edit]) -> None:
        """Send edits to the overlay, and measure their pictures anew."""
        self.writer.add(edits)
        for name in edits:
            self._measured[name] = self._is_too_long(name)
        self._count_long()

    def take_written(self, edits: Mapping[str, Edit], label: str) -> int:
        """Take in what was written to the overlay by something else, as one step; return how many captions changed."""
        before = self.state.edited()
        self.state.take(edits, label)
        changed = [name for name, edit in self.state.edited().items() if edit != before.get(name)]
        self.writer.written += len(changed)
        for name in changed:
            self._measured[name] = self._is_too_long(name)
        self._count_long()
        return len(changed)

    def tick(self) -> bool:
        """Take in what threads found out; True where a screen has something new to show."""
        self._take_own()
        self._take_words()
        news, self._news = self._news, False
        if news:
            self._count_long()
        return news

    @property
    def measuring(self) -> bool:
        """Whether the lengths of all captions are still being counted."""
        return self._measuring > 0

    def _take_own(self) -> None:
        if self._own_known:
            return
        settings = self.known.dataset_settings().model_copy(update={"overlay": ""})
        # The scan remembers each file's facts, so that this second one only reads captions.
        key = (settings.folder, id(self.found))
        look = self.known.look("own captions", key, partial(self.known.probes.dataset, settings))
        if look.done:
            self._own_known = self._news = True
            if look.value is not None:
                self.state.learn_own(look.value.dataset)

    def _take_words(self) -> None:
        look, base = self.known.current("words"), self.known.base
        if look is None or not look.done or not look.value or base is None or self.ruler.tokenizers:
            return
        from lorasmith.engine.dataset.check_captions import reading_tokenizers, token_limit

        limit = token_limit(base.family.SPEC, look.value)
        self.ruler = Ruler(tuple(reading_tokenizers(look.value, limit)), limit)
        self._news = True
        self._measuring += 1
        threading.Thread(target=self._measure_all, name="caption-lengths", daemon=True).start()

    def _measure_all(self) -> None:
        try:
            names = list(self.state.items)
            for start in range(0, len(names), MEASURED_AT_ONCE):
                part = names[start : start + MEASURED_AT_ONCE]
                self.ruler.measure_all([prompt for name in part for prompt in self._prompts(name)])
                # Asked again, not taken from above: a caption may have been edited meanwhile.
                self._measured |= {name: self._is_too_long(name) for name in part}
                time.sleep(50e-6)  # lets the screen's thread in
        finally:
            self._measuring -= 1
            self._news = True

    def _prompts(self, name: str) -> list[str]:
        return [self.prompt(name, text) for text in self.state.captions(name) or ("",)]

    def _is_too_long(self, name: str) -> bool:
        lengths = self.ruler.measure_all(self._prompts(name))
        return any(length.too_long for length in lengths.values())

    def _count_long(self) -> None:
        self.too_long = frozenset(name for name, long in tuple(self._measured.items()) if long)
