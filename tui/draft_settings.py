"""The draft as the engine's own settings, worked out once for each state of the draft: screens ask many times a second.

They are whole also while settings contradict each other, so that pictures can be looked at before all is decided.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lorasmith.engine.errors import ConfigError
from lorasmith.tui.draft import Draft

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import DatasetSettings, RunConfig

T = TypeVar("T")
BaseKey = tuple[str, str, str, str, tuple[str, ...]]
"""What a look at the base model depends on; see `DraftSettings.base`."""
UNSCANNED = {"resolution", "more_resolutions", "buckets", "bucket_step", "crop", "flip", "missing_captions"}
"""Settings of the dataset that change nothing about what a scan finds."""
UNCHECKED: dict[str, Any] = {"run": {"name"}, "checkpoints": True, "previews": True, "export": True}
"""Parts of the configuration that no check of a dataset depends on."""


class DraftSettings:
    """Answers for the draft and the advice as they are at each call."""

    def __init__(self, draft: Callable[[], Draft], advice: Callable[[], list[Advice]]) -> None:
        """Ask these for the draft and for what is recommended for it."""
        self._draft = draft
        self._advice = advice
        self._kept: dict[str, tuple[object, Any]] = {}

    def base(self) -> BaseKey:
        """Return the base's model, revision, family, autoencoder file and text encoder files."""

        def make() -> BaseKey:
            merged = self._draft().merged()
            model, revision, family, vae = (
                str(merged[f"base.{name}"][0]).strip() for name in ("model", "revision", "family", "vae")
            )
            return model, revision, family, vae, tuple(merged["base.text_encoders"][0])

        return self._once("base", self._answers(), make)

    def dataset(self) -> DatasetSettings:
        """Return the dataset's settings."""

        def make() -> DatasetSettings:
            from lorasmith.engine.config import DatasetSettings

            merged = self._draft().merged(self._advice())
            return DatasetSettings.model_validate(
                {name: merged[f"dataset.{name}"][0] for name in DatasetSettings.model_fields}
            )

        return self._once("dataset", self._all(), make)

    def config(self) -> RunConfig:
        """Return the whole configuration; where settings contradict each other, it is not valid as a whole."""
        return self._once("config", self._all(), lambda: _whole(self._draft(), self._advice()))

    def scan_key(self) -> tuple[object, ...]:
        """Return what a scan's result depends on, the folder first."""
        settings = self.dataset()
        text = self._once("scan", self._all(), lambda: settings.model_dump_json(exclude=UNSCANNED))
        return settings.folder, text, stamp(settings.overlay)

    def check_text(self) -> str:
        """Return the settings that the checks of a dataset depend on."""
        config = self.config()
        return self._once("check", self._all(), lambda: config.model_dump_json(exclude=UNCHECKED))

    def everything(self) -> tuple[object, ...]:
        """Return what all settings depend on: the answers and the advice."""
        return self._all()

    def _answers(self) -> tuple[object, ...]:
        draft = self._draft()
        overlay = draft.overlay_path()
        # The file of edits becomes a setting when it comes into being.
        return repr(draft.answers), overlay is not None and overlay.exists()

    def _all(self) -> tuple[object, ...]:
        return *self._answers(), tuple((item.key, repr(item.value)) for item in self._advice())

    def _once(self, name: str, key: object, make: Callable[[], T]) -> T:
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            kept = self._kept[name] = (key, make())
        return cast(T, kept[1])


def _whole(draft: Draft, advice: list[Advice]) -> RunConfig:
    from lorasmith.engine.config import RunConfig

    try:
        return draft.resolve(advice).config
    except ConfigError:
        merged = draft.merged(advice)
    sections = {}
    for name, info in RunConfig.model_fields.items():
        kind: Any = info.annotation
        if name != "version":
            sections[name] = kind.model_validate({key: merged[f"{name}.{key}"][0] for key in kind.model_fields})
    # A copy is not validated: each section holds, only their combination does not.
    return RunConfig().model_copy(update=sections)


def stamp(path: str) -> tuple[int, int]:
    """Return what changes whenever the file is written; zeros where there is none."""
    if not path.strip():
        return 0, 0
    try:
        facts = os.stat(os.path.expanduser(path))
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size
