"""The draft on the disk: read once, written atomically, and never in the screen's own thread while it runs."""

from __future__ import annotations

import threading

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.draft import Draft, draft_path, load_draft


class DraftFile:
    """`problem` says in words why the last write failed, "" while all is well; newer drafts win over older ones."""

    def __init__(self) -> None:
        self.path = draft_path()
        self.problem = ""
        self.saved = False
        self._lock = threading.Lock()
        self._asked = 0
        self._written = 0

    def load(self) -> tuple[Draft, float] | None:
        """Return the saved draft and its age in seconds, or None."""
        return load_draft(self.path)

    def save_behind(self, text: str) -> None:
        """Write `text` in a thread, since syncing can take long on a busy disk."""
        self._asked += 1
        threading.Thread(target=self._write, args=(text, self._asked), name="draft", daemon=True).start()

    def save(self, text: str) -> None:
        """Write `text` now."""
        self._asked += 1
        self._write(text, self._asked)

    def _write(self, text: str, number: int) -> None:
        from lorasmith.engine.storage import atomic_write

        with self._lock:
            if number < self._written:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                atomic_write(self.path, text.encode())
            except (OSError, LorasmithError) as error:
                self.problem = str(error)
                return
            self._written, self.problem, self.saved = number, "", True
