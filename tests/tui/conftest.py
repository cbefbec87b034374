"""A wizard whose looks are quick: a fixed machine, a recognised demo base, a tokenizer of a few words, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from textual.events import Paste
from textual.pilot import Pilot

from lorasmith.engine.commands import Command
from lorasmith.engine.events import Event
from lorasmith.engine.families import BaseIdentity, families
from lorasmith.engine.hardware import HardwareSnapshot, Memory
from lorasmith.engine.run_file import ResolvedConfig
from lorasmith.engine.sources import BaseFiles
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import Draft
from lorasmith.tui.findings import FoundBase, Probes

SIZES = [(80, 24), (120, 36)]


class FakeSession:
    """A run that says nothing and never ends."""

    finished = False

    def __init__(self, resolved: ResolvedConfig) -> None:
        self.resolved = resolved
        self.sent: list[Command] = []

    def drain(self) -> list[Event]:
        return []

    def send(self, command: Command) -> None:
        self.sent.append(command)


class FakeTokenizer:
    """Knows `dog`; splits everything else into letters."""

    unk_token = "<unk>"
    model_max_length = 77

    def tokenize(self, word: str) -> list[str]:
        return ["dog</w>"] if word == "dog" else [letter if letter.isascii() else "<unk>" for letter in word]

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Give each text's tokens with a start and an end."""
        return SimpleNamespace(input_ids=[[0, *range(len(self.tokenize(text))), 1] for text in texts])


def a_machine(tell: Any) -> HardwareSnapshot:
    return HardwareSnapshot((), "No NVIDIA driver was found.", None, Memory(16.0, 12.0), (), "A processor", 2)


def a_base(model: str, *rest: Any) -> FoundBase:
    identity = BaseIdentity("sd15", f"Base {model}", "1.x", "epsilon", 512, 860_000_000, "fp16")
    return FoundBase(BaseFiles("folder", Path("/models/x"), model), families()["sd15"], identity)


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Drafts of a test stay with the test, and colors do not depend on who runs it."""
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    return tmp_path / "state"


@pytest.fixture
def started() -> list[FakeSession]:
    """Collects the sessions that the wizard started."""
    return []


@pytest.fixture
def make_app(started: list[FakeSession]) -> Callable[..., LorasmithApp]:
    """Make a wizard with quick looks; keyword arguments replace single looks."""

    def make(draft: Draft | None = None, **looks: Any) -> LorasmithApp:
        def start(resolved: ResolvedConfig, tell: Any) -> FakeSession:
            started.append(FakeSession(resolved))
            return started[-1]

        quick = {
            "hardware": a_machine,
            "base": a_base,
            "download": lambda model, revision, tell: "",
            "tokenizers": lambda base, tell: [FakeTokenizer()],
            "start": start,
            "unusable": lambda machine, try_now, tell: {},
        }
        return LorasmithApp(draft, Probes(**(quick | looks)))

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three captioned pictures and one without a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (96, 64), "red").save(folder / f"{name}.png")
        if name != "d":
            (folder / f"{name}.txt").write_text(f"a red picture {name}")
    return folder


async def settle(pilot: Pilot[Any]) -> None:
    """Wait until every look is done and shown."""
    app = pilot.app
    assert isinstance(app, LorasmithApp)
    await pilot.pause()
    for _ in range(500):
        if not app.known.looking():
            break
        await asyncio.sleep(0.01)
    await pilot.pause()
    await pilot.pause()


async def go_to(pilot: Pilot[Any], page: str) -> None:
    """Visit a page as the step list does, and wait for its looks."""
    assert isinstance(pilot.app, LorasmithApp)
    pilot.app.visit(page)
    await settle(pilot)


async def replace_text(pilot: Pilot[Any], text: str) -> None:
    """Paste `text` over what stands in the focused input."""
    await pilot.press("end", "ctrl+u")
    assert pilot.app.focused is not None
    pilot.app.focused.post_message(Paste(text))
    await pilot.pause()
    await pilot.pause()


def screen_text(app: LorasmithApp) -> str:
    """Return what the terminal shows, line by line."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())
