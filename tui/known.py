"""What the wizard knows so far: the looks it took, and what follows from them for the draft as it stands now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lorasmith.engine.errors import BaseModelError, ConfigError, DatasetError, LorasmithError
from lorasmith.tui.draft import Draft, Problem
from lorasmith.tui.draft_settings import BaseKey, DraftSettings
from lorasmith.tui.findings import FoundBase, FoundDataset, Look, Probes, goal_of, recommend
from lorasmith.tui.fitting import Fitting

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import DatasetSettings, RunConfig
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.tui.checks import Checked
    from lorasmith.tui.prospects import Prospect


class Known:
    """Takes looks in threads, keeps each until its question changes, and calls `told(name, look)` from the thread."""

    def __init__(self, draft: Callable[[], Draft], probes: Probes, told: Callable[[str, Look], None]) -> None:
        self.looks: dict[str, Look] = {}
        self.probes = probes
        self._get_draft = draft
        self._told = told
        self._advice: tuple[tuple[object, ...], list[Advice]] = ((), [])
        self._settings = DraftSettings(draft, self.advice)
        # What is done to fit the card follows from the pictures, so finding them must not follow from that.
        self.unfitted = DraftSettings(draft, self.preset_advice)
        self.fitting = Fitting(self)
        self.page_stands = False
        """Whether the first page was painted, before which nothing heavy is imported."""
        self._scan_again = False

    @property
    def draft(self) -> Draft:
        """The draft as it stands."""
        return self._get_draft()

    def look(self, name: str, key: tuple[Any, ...], probe: Callable[..., Any]) -> Look:
        """Take a look in a thread of its own, unless the same one was taken or is under way."""
        known = self.looks.get(name)
        if known is not None and known.key == key:
            return known
        before = known.value or known.before if known is not None and known.key[:1] == key[:1] else None
        look = self.looks[name] = Look(key, before=before)
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

    def look_at_card(self) -> None:
        """Work out what the machine can train, and what does not work on it; imports much of the engine."""
        self.page_stands = True
        self.look_at_prospects()
        self.look_at_doctor()

    def look_at_prospects(self) -> Look | None:
        """Work out what the card can train; None without a card."""
        snapshot = self.looks["hardware"].value if "hardware" in self.looks else None
        if snapshot is None or not snapshot.gpus:
            return None
        return self.look("prospects", (id(snapshot),), partial(self.probes.prospects, snapshot))

    @property
    def prospects(self) -> list[Prospect]:
        """What the card can train, as far as that is worked out."""
        look = self.looks.get("prospects")
        return look.value or [] if look is not None and look.done else []

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

    def look_at_download(self) -> Look | None:
        """Ask the Hub what would be downloaded; None where the base is not one of the Hub's."""
        from lorasmith.engine.sources import on_hub

        model, revision = self._base_key()[:2]
        if not on_hub(model):
            return None
        known = self.looks.get("download")
        if known is not None and known.error is not None:
            del self.looks["download"]
        return self.look("download", (model, revision), partial(self.probes.download, model, revision))

    def look_at_dataset(self, *, again: bool = False) -> Look | None:
        """Scan the chosen folder; None while none is chosen."""
        settings = self.dataset_settings()
        if not settings.folder.strip():
            return None
        if again:
            self.looks.pop("dataset", None)
        return self.look("dataset", self.unfitted.scan_key(), partial(self.probes.dataset, settings))

    def look_again(self) -> None:
        """Scan the dataset as it is now, after an edit; only when the scan that is under way is over."""
        look = self.looks.get("dataset")
        self._scan_again = look is not None and not look.done
        if not self._scan_again:
            self.look_at_dataset()

    def follow_up(self, name: str) -> None:
        """Take the looks that the end of the look `name` makes possible."""
        if name == "dataset" and self._scan_again:
            self.look_again()
        if name == "hardware" and self.page_stands:
            self.look_at_card()
        download = self.current("download") if name == "download" else None
        if download is not None and download.value == "":
            self.look_at_base(again=True)
        if name in ("dataset", "base_model", "words"):
            self.look_at_checks()

    def look_at_checks(self) -> Look | None:
        """Check the scanned pictures for the base and the settings as they stand; None while none are scanned."""
        from lorasmith.tui.checks import Question

        found = self.dataset
        if found is None:
            return None
        words = self.current("words")
        tokenizers = words.value if words is not None and words.value else ()
        question = Question(self.check_config(), self.base, tokenizers, self.goal())
        return self.look("checks", self._checks_key(), partial(self.probes.checks, found, question))

    def goal(self) -> str:
        """Return what the LoRA shall learn; "" while the base model is not known."""
        return goal_of(self.draft, self.base.identity.family) if self.base is not None else ""

    def _checks_key(self) -> tuple[Any, ...]:
        scan, words = self.looks.get("dataset"), self.current("words")
        folder, settings = self.dataset_settings().folder, self._settings.check_text()
        base = (self._base_key(), self.base is not None, words is not None and bool(words.value), self.goal())
        return folder, scan.started if scan else 0.0, settings, *base

    def check_config(self) -> RunConfig:
        """Return the configuration as it stands, also while settings contradict each other."""
        return self._settings.config()

    def look_at_words(self) -> Look | None:
        """Load the base's tokenizers; None while the base is not known."""
        base = self.base
        return None if base is None else self.look("words", self._base_key(), partial(self.probes.tokenizers, base))

    def look_at_plan(self, resolved: ResolvedConfig) -> Look:
        """Work out what the run will do."""
        key = (resolved.config.model_dump_json(), id(self.base), id(self.dataset))
        return self.look("plan", key, partial(self.probes.plan, resolved, self.base, self.dataset))

    def _base_key(self) -> BaseKey:
        return self._settings.base()

    def dataset_settings(self) -> DatasetSettings:
        """Return the dataset's settings as they stand."""
        return self._settings.dataset()

    def current(self, name: str) -> Look | None:
        """Return the look that answers the draft as it is now, done or not."""
        if name == "fit":
            return self.fitting.look()
        look = self.looks.get(name)
        keys: Mapping[str, Callable[[], tuple[Any, ...]]] = {
            "base_model": self._base_key,
            "download": lambda: self._base_key()[:2],
            "dataset": self.unfitted.scan_key,
            "words": self._base_key,
            "checks": self._checks_key,
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

    @property
    def shown_dataset(self) -> FoundDataset | None:
        """What the last scan of this folder found, also while it is scanned again."""
        return cast("FoundDataset | None", self._last("dataset"))

    @property
    def checked(self) -> Checked | None:
        """What the checks say of the dataset and the settings as they stand."""
        look = self.current("checks") if self.dataset is not None else None
        return look.value if look is not None else None

    @property
    def shown_checks(self) -> Checked | None:
        """What the last checks of this folder said, also while it is checked again."""
        return cast("Checked | None", self._last("checks"))

    def _last(self, name: str) -> Any:
        look = self.looks.get(name)
        same = look is not None and look.key[0] == self.dataset_settings().folder
        return (look.value or look.before) if look is not None and same else None

    def advice(self) -> list[Advice]:
        """Return what is recommended: the preset's values, and over them what makes the run fit the card."""
        fit = self.fitting.plan()
        if fit is None:
            return [*self.preset_advice(), *self.fitting.caution()]
        from lorasmith.engine.fit import fit_advice

        fitted = {item.key: item for item in fit_advice(fit)}
        return [*(item for item in self.preset_advice() if item.key not in fitted), *fitted.values()]

    def unusable(self) -> dict[tuple[str, Any], str]:
        """Return the choices that do not work on this machine, each with its reason, as far as they were tried."""
        look = self.looks.get("doctor")
        return (look.value or look.before or {}) if look is not None else {}

    def look_at_doctor(self, *, try_now: bool = False) -> Look | None:
        """Ask what does not work in this installation; with `try_now` it is tried where nobody has yet."""
        machine = self.looks["hardware"].value if "hardware" in self.looks else None
        if machine is None:
            return None
        return self.look("doctor", (id(machine), try_now), partial(self.probes.unusable, machine, try_now))

    def preset_advice(self) -> list[Advice]:
        """Return what is recommended for what is known, whatever is free on the card; kept until more is known."""
        hardware = self.looks["hardware"].value if "hardware" in self.looks else None
        scan = self.looks.get("dataset")
        dataset = (scan.value or scan.before) if scan is not None else None
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
        found |= self._missing_parts() | self._unsuited()
        found |= self._caption_failure()
        checked = self.checked
        # A question about captions is asked already by the setting that answers it.
        asked = "dataset.missing_captions"
        errors = [
            error
            for error in (checked.errors() if checked is not None else [])
            if not (asked in found and error.action is not None and asked in error.action.settings)
        ]
        if errors and "dataset.folder" not in found:
            found["dataset.folder"] = DatasetError(
                " ".join(error.title for error in errors), fix="The dataset page shows them with what to do."
            )
        return found

    def _unsuited(self) -> dict[str, LorasmithError]:
        """Return the settings that cannot hold with the recognised base."""
        if self.base is None or self.draft.is_demo:
            return {}
        from lorasmith.engine.combinations import base_contradictions
        from lorasmith.engine.memory.blocks import block_problems
        from lorasmith.tui.fields import settings

        config = self.check_config()
        sentences = base_contradictions(config, self.base.family.SPEC, self.base.identity)
        sentences += block_problems(config.memory, self.base.identity)
        keyed = [
            (next((key for key in settings() if text.startswith(f"{key} ")), "base.model"), text) for text in sentences
        ]
        return {key: ConfigError(f"{text}.") for key, text in keyed}

    def _missing_parts(self) -> dict[str, LorasmithError]:
        """Return what a recognised base lacks, by the setting that can name it."""
        missing = self.base.identity.parts_missing if self.base is not None else ()
        if self.base is None or not missing:
            return {}
        error = BaseModelError(f"{self.base.files.origin} has no {', no '.join(missing)}.", fix="Name the files apart.")
        if self.base.files.kind == "folder":
            return {"base.model": BaseModelError(error.what, fix="Choose a complete base model.")}
        return {"base.vae" if "vae" in missing else "base.text_encoders": error}

    def _caption_failure(self) -> dict[str, LorasmithError]:
        checked = self.checked
        if checked is not None:
            return {} if checked.problem is None else {"dataset.missing_captions": checked.problem}
        missing = self.dataset.captionless if self.dataset is not None else []
        if not missing or self.draft.value("dataset.missing_captions") != "ask":
            return {}
        error = DatasetError(
            f"{len(missing)} pictures have no caption.",
            fix="Choose on the dataset page: the trigger alone, the file's or folder's name, or leave them out.",
        )
        return {"dataset.missing_captions": error}

    def problems(self) -> list[Problem]:
        """Return everything that keeps the run from starting."""
        return self.draft.problems(self.advice(), self.failures())
