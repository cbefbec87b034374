"""The application: which page is shown, what is being looked up, the draft on the disk. It only wires."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import events
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.message import Message
from textual.screen import Screen

from lorasmith.engine.errors import DatasetError, LorasmithError
from lorasmith.tui.actions import actions_of, bindings
from lorasmith.tui.draft import PAGES, Draft, Problem
from lorasmith.tui.draft_file import DraftFile
from lorasmith.tui.findings import FoundBase, FoundDataset, Look, Probes, recommend
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.screens.too_small import TooSmall, fits
from lorasmith.tui.text import safe_str
from lorasmith.tui.theme import THEME, limited_colors

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.buckets import BucketPlan
    from lorasmith.engine.run_file import ResolvedConfig

WARM_UP_AFTER_SECONDS = 0.8


class LorasmithApp(App[int]):
    """The wizard and, once a run is started, its monitor."""

    TITLE = "lorasmith"
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("app")]

    class Looked(Message):
        """A look that a worker thread took is done."""

        def __init__(self, name: str, look: Look) -> None:
            super().__init__()
            self.name = name
            self.look = look

    def __init__(self, draft: Draft | None = None, probes: Probes | None = None, *, warm_up: bool = False) -> None:
        limited = limited_colors(os.environ)
        super().__init__(ansi_color=True if limited else None)
        self.register_theme(THEME)
        if limited or "TEXTUAL_THEME" not in os.environ:
            self.theme = "ansi-dark" if limited else THEME.name
        self.animation_level = "none"
        self.draft = draft or Draft()
        self.probes = probes or Probes()
        self.looks: dict[str, Look] = {}
        self.file = DraftFile()
        self.offer = self.file.load() if draft is None else None
        self.session: Any = None
        self._warm_up = warm_up
        self._advice: tuple[tuple[object, ...], list[Advice]] = ((), [])
        self._plan: tuple[tuple[object, ...], BucketPlan] | None = None
        self._unsaved = False

    # Pages

    def visit(self, name: str, key: str = "") -> None:
        """Show a page, at the field of `key` if one is given, and remember that it was seen."""
        for seen in (self.draft.page, name):
            if seen not in self.draft.visited:
                self.draft.visited.append(seen)
        self.draft.page = name
        self.touch()
        page = self._page(name)
        self.switch_screen(page)
        if key:
            self.call_after_refresh(page.reveal, key)

    def _page(self, name: str) -> WizardPage:
        module = importlib.import_module(f"lorasmith.tui.screens.{name}")
        return cast(WizardPage, module.PAGE_CLASS())

    @property
    def page(self) -> WizardPage | None:
        """The wizard page that is shown or lies under a help sheet."""
        pages = [screen for screen in self.screen_stack if isinstance(screen, WizardPage)]
        return pages[-1] if pages else None

    def on_mount(self) -> None:
        """Look at the machine and, when the first page stands, begin to load torch behind it."""
        self.push_screen(self._page("hardware"))
        if not fits(self.size.width, self.size.height):
            self.push_screen(TooSmall())
        self.look("hardware", (), self.probes.hardware)
        if self._warm_up:
            self.call_after_refresh(self.set_timer, WARM_UP_AFTER_SECONDS, self._begin_warm_up)

    def _begin_warm_up(self) -> None:
        from lorasmith.tui.warm_up import import_heavy

        threading.Thread(target=import_heavy, name="warm-up", daemon=True).start()

    def on_resize(self, event: events.Resize) -> None:
        """Cover the pages while the terminal is too small for them."""
        if not fits(event.size.width, event.size.height) and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall())

    async def action_quit(self) -> None:
        """Save the draft and leave; a screen with a running training asks first (`request_quit`)."""
        request = getattr(self.screen, "request_quit", None)
        if request is not None:
            request()
            return
        self.save_draft_now()
        self.exit(0)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every action of the current screen, the steps, the theme and quitting."""
        if isinstance(screen, WizardPage):
            for action in actions_of("page", "settings", "review"):
                if action.name != "step" and hasattr(screen, f"action_{action.name}"):
                    yield SystemCommand(action.label, action.help, partial(screen.run_action, action.name))
            for name, title in PAGES.items():
                yield SystemCommand(f"Go to step: {title}", "Show that page.", partial(self.visit, name))
        yield SystemCommand("Theme", "Change the colors.", self.action_change_theme)
        yield SystemCommand("Quit", "Leave lorasmith; the draft is kept.", self.action_quit)

    # The draft

    def touch(self) -> None:
        """Note that the draft changed: it is written a moment later, and the page is redrawn."""
        if not self._unsaved:
            self._unsaved = True
            self.set_timer(0.3, self._save_draft)

    def change(self, key: str, text: str) -> str:
        """Take a typed value into the draft; return what is wrong with it, in words."""
        if text == self.draft.text(key, self.advice()):  # an input tells its first value too
            return ""
        problem = self.draft.put(key, text)
        self.changed()
        return problem

    def changed(self) -> None:
        """Tell the page and the disk that the draft is another."""
        self.touch()
        if self.page is not None and self.page.is_mounted:
            self.page.draft_changed()

    def _save_draft(self) -> None:
        self._unsaved = False
        self.file.save_behind(self.draft.to_json())

    def save_draft_now(self) -> None:
        """Write the draft before leaving, if it changed."""
        if self._unsaved:
            self._unsaved = False
            self.file.save(self.draft.to_json())

    # Looking things up

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
        self.post_message(self.Looked(name, look))

    def on_lorasmith_app_looked(self, message: Looked) -> None:
        """Take a finished look up; one that was overtaken by a newer question is dropped."""
        if self.looks.get(message.name) is not message.look:
            return
        if message.name == "start":
            self._started(message.look)
        if self.page is not None and self.page.is_mounted:
            self.page.draft_changed()

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
        key = (hardware, self.base, dataset, self.draft.is_demo)
        if self._advice[0] != tuple(map(id, key)):
            self._advice = (tuple(map(id, key)), recommend(self.draft, hardware, self.base, dataset))
        return self._advice[1]

    # What is open

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

    def marks(self) -> dict[str, str]:
        """Return the mark of each step: ✓ seen and in order, ! has a problem, • not seen."""
        # Before the second page there is nothing to check, and checking imports pydantic: the first paint comes first.
        wrong = {problem.page for problem in self.problems()} if len(self.draft.visited) > 1 else set()
        seen = self.draft.visited
        return {name: "•" if name not in seen else "!" if name in wrong else "✓" for name in PAGES}

    def start(self, resolved: ResolvedConfig) -> Look:
        """Make the run folder and start the engine; the monitor follows."""
        self.save_draft_now()
        self.looks.pop("start", None)
        return self.look("start", (id(resolved),), partial(self._start_probe, resolved))

    def _start_probe(self, resolved: ResolvedConfig, tell: Callable[..., None]) -> tuple[Any, ResolvedConfig]:
        # Kept from this thread on: whoever leaves now must still find the run.
        self.session = self.probes.start(resolved, tell)
        return self.session, resolved

    def _started(self, look: Look) -> None:
        if look.value is None:
            return
        from lorasmith.tui.screens.monitor import MonitorScreen

        self.push_screen(MonitorScreen(*look.value))

    def last_words(self) -> list[str]:
        """Return what was written where, for the terminal after the screen is gone; plain and safe."""
        words = []
        if self.session is not None:
            words.append(f"The run: {self.session.run.path}")
        if self.file.problem:
            words.append(f"The draft could not be saved: {self.file.problem}")
        elif self.file.saved:
            words.append(f"Your choices are kept in {self.file.path}; `lorasmith` offers them again.")
        else:
            words.append("Nothing was written.")
        return [safe_str(line) for line in words]
