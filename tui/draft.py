"""The wizard's choices so far, and how they become a run: layers, origins, open problems. No screen, no torch.

A draft holds what the user said and nothing else. What is recommended, and what the pages found out about the base and
the pictures, is handed in where it is needed; so going back never loses a value and advice can change under it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ConfigError, LorasmithError

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.run_file import Layer, ResolvedConfig

DRAFT_VERSION = 1
DEMO = "demo"
PAGES: dict[str, str] = {
    "hardware": "Hardware",
    "base_model": "Base model",
    "dataset": "Dataset",
    "trigger": "Trigger",
    "settings": "Settings",
    "review": "Review",
}
"""The wizard's pages in order: name and title."""
REQUIRED = {
    "base.model": "Choose the base model that the LoRA is trained for.",
    "dataset.folder": "Choose the folder with your pictures.",
    "captions.trigger": "Choose a trigger word: without it, nothing calls the LoRA.",
}


@dataclass(frozen=True)
class Problem:
    """One thing that keeps the run from starting: where it is asked, which setting, and what to do in words."""

    page: str
    key: str
    message: str


@dataclass
class Draft:
    """The user's answers by dotted setting key.

    `unreadable` keeps what was typed into a field and is no allowed value; `kept` holds inputs of choices that are not
    taken now (a Hub id while the demo is chosen). `visited` are the pages seen, `page` the one left last.
    """

    answers: dict[str, Any] = field(default_factory=lambda: {"base.model": DEMO})
    unreadable: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)
    page: str = "hardware"

    def put(self, key: str, text: str) -> str:
        """Take a typed text as the setting's value; return what is wrong with it in words, "" where it is fine."""
        from lorasmith.tui.fields import read_text

        try:
            self.answers[key] = read_text(key, text)
        except ValueError as error:
            self.unreadable[key] = text
            return str(error)
        self.unreadable.pop(key, None)
        return ""

    def reset(self, key: str) -> None:
        """Forget the user's value, so that the recommended one counts again."""
        self.answers.pop(key, None)
        self.unreadable.pop(key, None)

    def changed(self, key: str) -> bool:
        """Whether the user gave this setting a value."""
        return key in self.answers or key in self.unreadable

    @property
    def is_demo(self) -> bool:
        """Whether the embedded base model is chosen."""
        return bool(self.answers.get("base.model") == DEMO)

    def layers(self, advice: Sequence[Advice] = ()) -> list[Layer]:
        """Return the settings from the least to the most specific: advice, demo preset, the user's own."""
        from lorasmith.engine.advisor import as_layers
        from lorasmith.engine.run_file import Layer

        demo = [Layer("demo preset", demo_settings())] if self.is_demo else []
        path = self.overlay_path()
        edits = [Layer("edited captions", {"dataset": {"overlay": str(path)}})] if path and path.exists() else []
        return [*as_layers(advice), *demo, *edits, Layer("wizard", _nest(self.answers))]

    def overlay_path(self) -> Path | None:
        """Return where edited captions of the chosen pictures go, None while none are chosen.

        It is the user's own `dataset.overlay`, else a file of these pictures beside the draft: another folder has
        other edits, and coming back to this one finds them again.
        """
        if own := str(self.answers.get("dataset.overlay", "")).strip():
            return Path(own)
        folder = str(self.answers.get("dataset.folder", "")).strip()
        if not folder and self.is_demo:
            folder = str(demo_settings()["dataset"]["folder"])
        if not folder:
            return None
        full = os.path.abspath(os.path.expanduser(folder))
        digest = hashlib.sha256(full.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return state_folder() / "captions" / f"{digest}.jsonl"

    def resolve(self, advice: Sequence[Advice] = ()) -> ResolvedConfig:
        """Return the checked configuration; raises ConfigError while settings contradict each other."""
        from lorasmith.engine.run_file import resolve_config

        return resolve_config(self.layers(advice))

    def merged(self, advice: Sequence[Advice] = ()) -> dict[str, tuple[Any, str]]:
        """Return each setting's value and origin as the form shows them, also while settings contradict each other."""
        from lorasmith.engine.run_file import flatten
        from lorasmith.tui.fields import settings

        shown = {key: (info.default, "default") for key, info in settings().items()}
        for layer in self.layers(advice):
            shown |= {key: (value, layer.origin) for key, value in flatten(layer.values).items() if key in shown}
        return shown

    def value(self, key: str, advice: Sequence[Advice] = ()) -> Any:
        """Return the setting's value as it stands; for an unreadable text, the last allowed value."""
        return self.merged(advice)[key][0]

    def text(self, key: str, advice: Sequence[Advice] = ()) -> str:
        """Return what the setting's field shows: the user's text even where it is not allowed."""
        from lorasmith.tui.fields import write_text

        return self.unreadable[key] if key in self.unreadable else write_text(key, self.value(key, advice))

    def problems(
        self, advice: Sequence[Advice] = (), failures: Mapping[str, LorasmithError] | None = None
    ) -> list[Problem]:
        """Return everything that keeps the run from starting; `failures` are what the pages found, by setting key."""
        found = self._unreadable_problems() + self._missing_problems(advice)
        found += self._contradictions(advice)
        known = {problem.key for problem in found}
        from lorasmith.tui.fields import page_of

        found += [Problem(page_of(k), k, str(error)) for k, error in (failures or {}).items() if k not in known]
        return sorted(found, key=lambda problem: list(PAGES).index(problem.page))

    def _unreadable_problems(self) -> list[Problem]:
        from lorasmith.tui.fields import page_of, read_text

        problems = []
        for key, text in self.unreadable.items():
            try:
                read_text(key, text)
            except ValueError as error:
                problems.append(Problem(page_of(key), key, str(error)))
        return problems

    def _missing_problems(self, advice: Sequence[Advice]) -> list[Problem]:
        from lorasmith.tui.fields import page_of

        merged = self.merged(advice)
        return [
            Problem(page_of(key), key, message)
            for key, message in REQUIRED.items()
            if key not in self.unreadable and not str(merged[key][0]).strip()
        ]

    def _contradictions(self, advice: Sequence[Advice]) -> list[Problem]:
        from lorasmith.tui.fields import page_of, settings

        try:
            self.resolve(advice)
        except ConfigError as error:
            sentences = re.split(r"(?<=\.)\s+(?=[a-z_]+\.[a-z_]+ )", f"{error.what} {error.why}".strip())
            keyed = [
                (next((k for k in settings() if sentence.startswith(f"{k} ")), "run.name"), sentence)
                for sentence in sentences
            ]
            # A blank trigger is reported as missing already.
            return [
                Problem(page_of(key), key, text) for key, text in keyed if not (key in REQUIRED and "blank" in text)
            ]
        return []

    def to_json(self) -> str:
        """Return the draft as text for `from_json`."""
        return json.dumps({"version": DRAFT_VERSION, "saved_at": time.time(), **asdict(self)}, indent=1)


def from_json(text: str) -> Draft | None:
    """Return the draft that `text` holds, or None where it is none; values no longer allowed are kept as typed text."""
    from lorasmith.tui.fields import settings, write_text

    try:
        record = json.loads(text)
        draft = Draft(
            answers={},
            unreadable={str(k): str(v) for k, v in record["unreadable"].items() if k in settings()},
            kept={str(k): str(v) for k, v in record["kept"].items()},
            visited=[page for page in record["visited"] if page in PAGES],
            page=record["page"] if record["page"] in PAGES else "hardware",
        )
        for key, value in record["answers"].items():
            if key in settings():
                draft.put(key, write_text(key, value))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return draft


def state_folder() -> Path:
    """Return where drafts and the wizard's log live (`engine.storage.state_folder`)."""
    # Imported late: the first page comes before the hashes and folders that the engine's module imports.
    from lorasmith.engine import storage

    return storage.state_folder()


def draft_path() -> Path:
    """Return the file of the current draft."""
    return state_folder() / "draft.json"


def load_draft(path: Path) -> tuple[Draft, float] | None:
    """Return the saved draft and the seconds since it was saved, or None where there is none that can be read."""
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
        draft = from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return (draft, age) if draft is not None else None


@cache
def demo_settings() -> dict[str, Any]:
    """Return the demo's preset as nested values, its bundled pictures included."""
    from lorasmith.presets import demo

    return demo.settings()


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        nested.setdefault(section, {})[name] = value
    return nested
