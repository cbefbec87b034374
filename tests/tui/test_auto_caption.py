"""Captions by a model: nothing of a person's is replaced, failures cost nothing else, stopping keeps what is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from textual.widgets import Button

from lorasmith.engine.captioners import Captioner, captioners
from lorasmith.engine.dataset.overlay import Edit
from lorasmith.engine.errors import CaptionerError, ConfigError
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.captioner_form import WANTED, facts_of, options_of, order_captioners, read_options, size_of
from lorasmith.tui.forms import Choice
from lorasmith.tui.screens.ask import AskScreen
from lorasmith.tui.screens.auto_caption import AutoCaption
from lorasmith.tui.screens.caption_editor import CaptionEditor
from tests.tui.caption_screens import a_draft, edits_of, open_over_scan, until
from tests.tui.conftest import SIZES, replace_text, screen_text, settle

MakeApp = Callable[..., LorasmithApp]


class FakeCaptioner:
    """Says the picture's color; waits for `gate` before each, and fails at the pictures whose number is in `bad`."""

    where = "CPU, fp32"

    def __init__(self, name: str, bad: tuple[int, ...] = ()) -> None:
        self.spec = captioners()[name].SPEC
        self.bad = bad
        self.gate = threading.Semaphore(0)
        self.calls = 0
        self.closed = False

    def caption(self, image: Image.Image) -> str:
        self.gate.acquire(timeout=30)
        self.calls += 1
        if self.calls in self.bad:
            raise ValueError("an odd picture\nmore")
        return f"color {image.getpixel((0, 0))} \x1b[31m"

    def close(self) -> None:
        self.closed = True


class Loader:
    """Hands out one fake captioner and remembers what was asked for."""

    def __init__(self, captioner: FakeCaptioner | None = None, error: Exception | None = None) -> None:
        self.captioner = captioner
        self.error = error
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []

    def __call__(self, name: str, model: str, settings: Mapping[str, Any], tell: Any) -> Captioner:
        self.asked.append((name, model, settings))
        tell("model.safetensors", 1_000_000, 2_000_000)
        if self.error is not None:
            raise self.error
        assert self.captioner is not None
        return self.captioner


@pytest.fixture
def uncaptioned(pictures: Path) -> Path:
    """Pictures of which only a.png has a caption; all have other bytes."""
    for number, name in enumerate("bcd"):
        (pictures / f"{name}.txt").unlink(missing_ok=True)
        Image.new("RGB", (96, 64), (number, 9, 9)).save(pictures / f"{name}.png")
    return pictures


def with_loader(load: Any) -> Callable[[Any], AutoCaption]:
    return lambda found: AutoCaption(found, None, load)


@pytest.mark.parametrize("size", SIZES)
async def test_the_form_recommends_what_the_base_reads_and_says_what_it_costs(
    make_app: MakeApp, uncaptioned: Path, size: tuple[int, int]
) -> None:
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=size) as pilot:
        await open_over_scan(pilot, with_loader(Loader()))
        shown = screen_text(app)
        for words in ("✓ Writes tags, which Stable Diffusion", "Apache 2.0", "MB download", "3 pictures", "0.35"):
            assert words in shown
        for button in app.screen.query(Button):
            assert str(button.label) in shown
        await pilot.press("right")
        await pilot.pause()
        await pilot.pause()
        assert "! Writes sentences; Stable Diffusion" in screen_text(app)
        await pilot.press("f1", "end")
        assert "Stop after this picture; all written stay." in screen_text(app)


async def test_captions_are_written_one_failure_costs_nothing_else_and_a_persons_stay(
    make_app: MakeApp, uncaptioned: Path
) -> None:
    before = {path.name: path.read_bytes() for path in uncaptioned.iterdir()}
    captioner = FakeCaptioner("wd14", bad=(2,))
    load = Loader(captioner)
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, with_loader(load))
        app.screen.query_one("#captioner-model").focus()
        await replace_text(pilot, "owner/other")
        app.screen.query_one("#option-blacklist").focus()
        await replace_text(pilot, "hat | red hair")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(load.asked))
        captioner.gate.release()
        await until(pilot, lambda: "1 of 3 pictures" in screen_text(app))
        assert "CPU, fp32" in screen_text(app)
        assert "color (0, 9, 9) [31m" in screen_text(app)
        assert edits_of(app) == {"b.png": Edit(("color (0, 9, 9) [31m",), by="wd14")}
        captioner.gate.release(2)
        await until(pilot, lambda: "✓ Done: 2 captions written, 1 failed." in screen_text(app))
        shown = screen_text(app)
        assert "2 written, 1 failed" in shown
        assert "c.png: ValueError: an odd picture" in shown
        assert "2 edited" in shown
        assert captioner.closed
        await pilot.press("escape", "escape")
        await until(pilot, lambda: bool(returned))
    assert returned == [True]
    assert load.asked[0][:2] == ("wd14", "owner/other")
    assert load.asked[0][2]["blacklist"] == ["hat", "red hair"]
    assert set(edits_of(app)) == {"b.png", "d.png"}
    assert {path.name: path.read_bytes() for path in uncaptioned.iterdir()} == before


async def test_stopping_keeps_what_is_done_and_the_next_start_goes_on(make_app: MakeApp, uncaptioned: Path) -> None:
    captioner = FakeCaptioner("wd14")
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, with_loader(Loader(captioner)))
        await pilot.press("ctrl+s")
        captioner.gate.release()
        await until(pilot, lambda: "1 of 3 pictures" in screen_text(app))
        await pilot.press("x")
        captioner.gate.release()
        await until(pilot, lambda: "✓ Stopped: 2 captions written." in screen_text(app))
        assert set(edits_of(app)) == {"b.png", "c.png"}
        await pilot.press("escape")
        assert "1 picture" in screen_text(app)
        await pilot.press("ctrl+s")
        captioner.gate.release()
        await until(pilot, lambda: "✓ Done: 1 caption written." in screen_text(app))
    assert set(edits_of(app)) == {"b.png", "c.png", "d.png"}


async def test_leaving_while_it_works_asks_and_stops_first(make_app: MakeApp, uncaptioned: Path) -> None:
    captioner = FakeCaptioner("wd14")
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, with_loader(Loader(captioner)))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "looking at the first picture" in screen_text(app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        await pilot.press("g")
        assert not returned
        await pilot.press("ctrl+q")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        await pilot.press("x")
        captioner.gate.release()
        await until(pilot, lambda: app.return_code is not None)
    assert captioner.closed
    assert set(edits_of(app)) == {"b.png"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CaptionerError("The model is damaged.", fix="Download it again."), "✗ The model is damaged."),
        (RuntimeError("odd"), "✗ The captioner failed unexpectedly."),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_told_in_the_form(
    make_app: MakeApp, uncaptioned: Path, error: Exception, words: str
) -> None:
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, with_loader(Loader(error=error)))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: words in screen_text(app))
        assert "No caption was written." in screen_text(app)
        assert not app.screen.query_one("#start", Button).disabled
    assert edits_of(app) == {}


async def test_an_option_that_is_not_allowed_is_told_before_anything_is_loaded(
    make_app: MakeApp, uncaptioned: Path
) -> None:
    load = Loader()
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, with_loader(load))
        app.screen.query_one("#option-general_threshold").focus()
        await pilot.pause()
        assert "General tags are written from this probability on" in screen_text(app)
        await replace_text(pilot, "2")
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "✗ general_threshold = 2.0: " in screen_text(app)
        assert not load.asked


async def test_pictures_with_captions_are_captioned_only_when_asked_and_edits_of_a_person_never(
    make_app: MakeApp, uncaptioned: Path
) -> None:
    draft = a_draft(uncaptioned, b=Edit(("by me",)), c=Edit(("old",), by="blip"))
    captioner = FakeCaptioner("wd14")
    captioner.gate.release(9)
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, with_loader(Loader(captioner)))
        wanted = app.screen.query_one("#captioner-wanted", Choice)
        wanted.focus()
        for value, counted in zip(WANTED, ("1 picture ", "2 pictures ", "3 pictures "), strict=True):
            assert wanted.value == value
            assert f" {counted}" in screen_text(app)
            await pilot.press("right")
        await pilot.press("left", "ctrl+s")
        await until(pilot, lambda: "✓ Done: 3 captions written." in screen_text(app))
    assert edits_of(app)["b.png"] == Edit(("by me",))
    assert {name for name, edit in edits_of(app).items() if edit.by == "wd14"} == {"a.png", "c.png", "d.png"}
    assert (uncaptioned / "a.txt").read_text() == "a red picture a"


async def test_what_a_model_wrote_is_undone_in_the_editor_as_one_step(
    make_app: MakeApp, uncaptioned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = FakeCaptioner("wd14")
    captioner.gate.release(9)
    monkeypatch.setattr("lorasmith.tui.screens.auto_caption.load_captioner", Loader(captioner))
    app = make_app(a_draft(uncaptioned))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("escape", "a")
        await until(pilot, lambda: isinstance(app.screen, AutoCaption) and "3 pictures" in screen_text(app))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "✓ Done" in screen_text(app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, CaptionEditor))
        await settle(pilot)
        assert screen_text(app).count("~  ") == 3
        await pilot.press("u")
        assert "Undone: the captions by wd14." in screen_text(app)
        assert "3 missing" in screen_text(app)
        await until(pilot, lambda: set(edits_of(app).values()) == {Edit()})


def test_captioners_that_write_what_the_base_reads_come_first_small_ones_before_large() -> None:
    modules = captioners()
    for style in ("tags", "prose"):
        specs = [module.SPEC for module in order_captioners(modules, style)]
        assert len(specs) == len(modules)
        fitting = [spec.kind == style for spec in specs]
        assert fitting == sorted(fitting, reverse=True)
        sizes = [spec.bytes for spec in specs if spec.kind == style]
        assert sizes == sorted(sizes)


def test_a_missing_package_and_an_unknown_base_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = captioners()["wd14"].SPEC
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = [line for line, _ in facts_of(spec, "", "")]
    assert any("pip install 'lorasmith[captions]'" in line for line in lines)
    assert "known when the base model is" in lines[0]
    assert size_of(1_600_000_000) == "1.6 GB"


@pytest.mark.parametrize("name", sorted(captioners()))
def test_every_option_of_every_captioner_reads_back_as_its_default(name: str) -> None:
    module = captioners()[name]
    texts = {option.key: option.default for option in options_of(module)}
    assert module.Settings.model_validate(read_options(module, texts)) == module.Settings()


def test_pairs_are_read_and_a_half_pair_is_told() -> None:
    module = captioners()["wd14"]
    assert read_options(module, {"replace": "grey = gray | a b=c"}) == {"replace": {"grey": "gray", "a b": "c"}}
    with pytest.raises(ConfigError, match="is no pair"):
        read_options(module, {"replace": "grey"})
