"""What the wizard knows so far: the looks it took, and what follows from them for the draft as it stands now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import DatasetError, LorasmithError
from lorasmith.tui.draft import Draft, Problem
from lorasmith.tui.findings import FoundBase, FoundDataset, Look, Probes, recommend

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.buckets import BucketPlan
    from lorasmith.engine.run_file import ResolvedConfig


class Known:
    """Takes looks in threads, keeps each until its question changes, and calls `told(name, look)` from the thread."""

    def __init__(self, draft: Callable[[], Draft], probes: Probes, told: Callable[[str, Look], None]) -> None:
        self.looks: dict[str, Look] = {}
        self.probes = probes
        self._get_draft = draft
        self._told = told
        self._advice: tuple[tuple[object, ...], list[Advice]] = ((), [])
        self._plan: tuple[tuple[object, ...], BucketPlan] | None = None

    @property
    def draft(self) -> Draft:
        """The draft as it stands."""
        return self._get_draft()

    def look(self, name: str, key: tuple[Any, ...], probe: Callable[..., Any]) -> Look:
        """Take a look in a thread of its own, unless the same one was taken or is under way."""
        known = self.looks.get(name)
        if known is not None and known.key == key:
            return known
        look = self.looks[name] = Look(key)
        # Daemon threads: leaving must not wait for a download.
        threading.Thread(target=self._take, args=(name, look, probe), name=f"look-{name}", daemon=True).start()
        return look

    def _take(self, name: str, look: Look, probe: Callable[..., Any]) -> None:
        try:
            look.value = probe(look.tell)
        except LorasmithError as error:
            look.error = error
        except Exception as error:
            look.error = LorasmithError("This failed unexpectedly.", why=f"{type(error).__name__}: {error}")
        look.done = True
        self._told(name, look)

    def look_at_hardware(self) -> Look:
        """Look at the machine."""
        return self.look("hardware", (), self.probes.hardware)

    def looking(self) -> bool:
        """Whether any look is under way."""
        return any(not look.done for look in self.looks.values())

    def look_at_base(self, *, again: bool = False) -> Look | None:
        """Locate and recognise the chosen base model; None while none is chosen."""
        key = self._base_key()
        if not key[0]:
            return None
        if again and (known := self.looks.get("base_model")) and known.error is not None:
            del self.looks["base_model"]
        return self.look("base_model", key, partial(self.probes.base, *key))

    def look_at_dataset(self, *, again: bool = False) -> Look | None:
        """Scan the chosen folder; None while none is chosen."""
        settings = self.dataset_settings()
        if not settings.folder.strip():
            return None
        if again:
            self.looks.pop("dataset", None)
        return self.look("dataset", self._dataset_key(), partial(self.probes.dataset, settings))

    def look_at_words(self) -> Look | None:
        """Load the base's tokenizers; None while the base is not known."""
        base = self.base
        return None if base is None else self.look("words", self._base_key(), partial(self.probes.tokenizers, base))

    def look_at_plan(self, resolved: ResolvedConfig) -> Look:
        """Work out what the run will do."""
        key = (resolved.config.model_dump_json(), id(self.base), id(self.dataset))
        return self.look("plan", key, partial(self.probes.plan, resolved, self.base, self.dataset))

    def _base_key(self) -> tuple[str, str, str]:
        merged = self.draft.merged()
        return tuple(str(merged[f"base.{name}"][0]).strip() for name in ("model", "revision", "family"))  # type: ignore[return-value]

    def _dataset_key(self) -> tuple[object, ...]:
        settings = self.dataset_settings()
        return settings.folder, settings.regularization_folder, settings.repeats, settings.alpha_background

    def dataset_settings(self) -> DatasetSettings:
        """Return the dataset's settings as they stand."""
        from lorasmith.engine.config import DatasetSettings

        merged = self.draft.merged(self.advice())
        return DatasetSettings.model_validate(
            {name: merged[f"dataset.{name}"][0] for name in DatasetSettings.model_fields}
        )

    def plan(self) -> BucketPlan | None:
        """Return the bucket plan of the scanned pictures with the settings as they stand; kept until either changes."""
        found = self.dataset
        if found is None:
            return None
        multiple = self.base.family.SPEC.pixel_multiple if self.base else 8
        key = (id(found), self.dataset_settings().model_dump_json(), multiple)
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, found.plan(self.dataset_settings(), multiple))
        return self._plan[1]

    def current(self, name: str) -> Look | None:
        """Return the look that answers the draft as it is now, done or not."""
        look = self.looks.get(name)
        keys: Mapping[str, Callable[[], tuple[Any, ...]]] = {
            "base_model": self._base_key,
            "dataset": self._dataset_key,
            "words": self._base_key,
        }
        return look if look is not None and (name not in keys or look.key == keys[name]()) else None

    @property
    def base(self) -> FoundBase | None:
        """The recognised base model, if the current choice is recognised."""
        look = self.looks.get("base_model")
        return look.value if look is not None and look.key == self._base_key() else None

    @property
    def dataset(self) -> FoundDataset | None:
        """The scanned pictures, if the current folder is scanned."""
        look = self.current("dataset")
        return look.value if look is not None else None

    def advice(self) -> list[Advice]:
        """Return what is recommended for what is known; kept until something else is known."""
        hardware = self.looks["hardware"].value if "hardware" in self.looks else None
        dataset = self.looks["dataset"].value if "dataset" in self.looks else None
        key = (id(hardware), id(self.base), id(dataset), self.draft.is_demo, self.draft.kept.get("goal"))
        if self._advice[0] != key:
            self._advice = (key, recommend(self.draft, hardware, self.base, dataset))
        return self._advice[1]

    def failures(self) -> dict[str, LorasmithError]:
        """Return what the looks found wrong, by setting key."""
        found: dict[str, LorasmithError] = {}
        for name, key in (("base_model", "base.model"), ("dataset", "dataset.folder")):
            look = self.current(name)
            if look is not None and look.error is not None:
                found[key] = look.error
        if (
            self.dataset is not None
            and self.dataset.captionless
            and self.draft.value("dataset.missing_captions") == "ask"
        ):
            count = len(self.dataset.captionless)
            found["dataset.missing_captions"] = DatasetError(
                f"{count} pictures have no caption.", fix="Choose: use the trigger alone, or leave them out."
            )
        return found

    def problems(self) -> list[Problem]:
        """Return everything that keeps the run from starting."""
        return self.draft.problems(self.advice(), self.failures())
