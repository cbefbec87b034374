"""The wizard as its user meets it: Enter goes through, nothing typed is lost, nothing foreign is more than text."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from textual.widgets import Button, OptionList

from lorasmith.engine.errors import BaseModelError, StorageError
from lorasmith.engine.families import BaseIdentity, License
from lorasmith.presets import demo
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import PAGES, Draft, load_draft
from lorasmith.tui.forms import SafeInput, SettingField, field_id
from lorasmith.tui.screens.base_model import base_text
from lorasmith.tui.screens.help import HelpScreen
from lorasmith.tui.screens.too_small import TooSmall
from lorasmith.tui.theme import limited_colors
from tests.tui.conftest import SIZES, FakeSession, go_to, replace_text, screen_text, settle

MakeApp = Callable[..., LorasmithApp]
ESCAPES = ["\x1b[2J", "\x1b]0;pwned\x07", "\x9b31m", "\u202e", "[/]", "[@click=app.quit]x[/]", "[link=http://e]x"]


@pytest.mark.parametrize("size", SIZES)
async def test_enter_through_the_defaults_reaches_the_running_demo(
    make_app: MakeApp, started: list[FakeSession], size: tuple[int, int]
) -> None:
    app = make_app()
    async with app.run_test(size=size) as pilot:
        for number, (name, title) in enumerate(PAGES.items(), 1):
            await settle(pilot)
            assert app.draft.page == name
            assert f"Step {number}/6 · {title}" in screen_text(app)
            await pilot.press("enter")
        await settle(pilot)
        await settle(pilot)
        assert type(app.screen).__name__ == "MonitorScreen"
    config = started[0].resolved.config
    assert (config.base.model, config.captions.trigger) == ("demo", "zqx")


async def test_enter_before_the_checks_are_done_starts_when_they_are(
    make_app: MakeApp, started: list[FakeSession]
) -> None:
    gate = __import__("threading").Event()

    def slow_base(model: str, *rest: Any) -> Any:
        gate.wait(60)
        from tests.tui.conftest import a_base

        return a_base(model, *rest)

    app = make_app(base=slow_base)
    async with app.run_test(size=(80, 24)) as pilot:
        for _ in PAGES:
            await pilot.pause(0.05)
            await pilot.press("enter")
        await pilot.pause()
        assert "Training starts by itself" in screen_text(app)
        assert not started
        gate.set()
        await settle(pilot)
        await settle(pilot)
        assert len(started) == 1


async def test_back_keeps_every_value_even_one_that_is_not_allowed(
    make_app: MakeApp, started: list[FakeSession]
) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "settings")
        app.screen.query_one(f"#{field_id('adapter.rank')}", SettingField).control.focus()
        await replace_text(pilot, "0")
        assert "✗ Rank must be at least 1." in screen_text(app)
        await pilot.press("escape")
        await settle(pilot)
        assert app.draft.page == "trigger"
        assert "! 5 Settings" in screen_text(app)
        await pilot.press("enter")
        await settle(pilot)
        assert _field(app, "adapter.rank").value == "0"
        await pilot.press("enter")
        await settle(pilot)
        assert "1 thing to solve before the start" in screen_text(app)
        assert app.screen.query_one("#next", Button).disabled
        await pilot.press("enter")
        await settle(pilot)
        assert app.focused is _field(app, "adapter.rank")
        await replace_text(pilot, "4")
        await pilot.press("enter")
        await settle(pilot)
        assert "Ready to train" in screen_text(app)
    assert not started


async def test_every_open_problem_is_listed_on_the_review_page(make_app: MakeApp) -> None:
    draft = Draft(answers={"base.model": ""})
    draft.put("optimizer.name", "prodigy")
    app = make_app(draft)
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        shown = screen_text(app)
        for words in (
            "Base model · Base model",
            "Dataset · Folder",
            "Trigger · Trigger word",
            "Settings · Learning rate",
        ):
            assert words in shown
        assert app.screen.query_one("#problems", OptionList).option_count == 4


async def test_a_base_model_that_is_refused_is_explained_and_blocks_the_start(make_app: MakeApp) -> None:
    def refused(model: str, *rest: Any) -> Any:
        raise BaseModelError("It is a LoRA, not a base model.", why="It holds lora_down keys.", fix="Choose its base.")

    app = make_app(base=refused)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "base_model")
        for words in (
            "It is a LoRA, not a base model.",
            "It holds lora_down keys.",
            "Choose its base.",
            "! 2 Base model",
        ):
            assert words in screen_text(app)
        await go_to(pilot, "review")
        assert app.screen.query_one("#next", Button).disabled


@pytest.mark.parametrize(
    ("own", "line"),
    [("apache-2.0", "License: apache-2.0 (from the model card)"), ("", "License: Usual. It may be sold.")],
)
def test_the_license_of_the_model_itself_is_shown_before_that_of_its_family(own: str, line: str) -> None:
    identity = BaseIdentity("f", "A base", "v", "epsilon", 64, 5, "fp32", details={"license": own})
    usual = License("Usual", "https://example.org", "It may be sold.")
    spec = SimpleNamespace(license=usual, token_limits={"CLIP": 77}, uses={})
    found: Any = SimpleNamespace(
        family=SimpleNamespace(SPEC=spec),
        identity=identity,
        files=SimpleNamespace(origin="x", path=Path("/x"), license=lambda: "apache-2.0"),
    )
    lines = [text.strip() for text in base_text(found).plain.splitlines()]
    assert line in lines
    assert ("https://example.org" in lines) == (not own)


async def test_what_was_typed_for_one_kind_of_base_stays_when_another_is_chosen(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "base_model")
        await pilot.press("down", "enter", *"me/mine")
        assert app.draft.value("base.model") == "me/mine"
        await pilot.press("shift+tab", "up")
        assert app.draft.is_demo
        await pilot.press("down", "enter", "enter")
        await settle(pilot)
        assert "Base me/mine" in screen_text(app)
        assert "License" in screen_text(app)
        assert app.draft.page == "base_model"
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft.page == "dataset"


async def test_missing_captions_are_a_question_that_must_be_answered(make_app: MakeApp, pictures: Path) -> None:
    app = make_app()
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "dataset")
        await replace_text(pilot, str(pictures))
        await pilot.press("enter")
        await settle(pilot)
        shown = screen_text(app)
        regular = len(list(demo.REGULAR.glob("*.png")))
        assert f"4 pictures and {regular} regularization pictures" in shown
        assert "1 without a caption: d.png" in shown
        app.screen.query_one("#details").scroll_visible(animate=False, top=True)
        await settle(pilot)
        shown = screen_text(app)
        assert "64 × 64" in shown
        assert "zqx, a red picture a" in shown
        assert "dataset.missing_captions" in [problem.key for problem in app.known.problems()]
        app.screen.query_one("#captions-choice").focus()
        await pilot.press("right")
        await settle(pilot)
        assert app.draft.value("dataset.missing_captions") == "trigger"
        assert "dataset.missing_captions" not in [problem.key for problem in app.known.problems()]


async def test_a_folder_that_does_not_exist_is_told_at_once(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "dataset")
        await replace_text(pilot, str(tmp_path / "nowhere"))
        await pilot.press("enter")
        await settle(pilot)
        assert app.draft.page == "dataset"
        assert "does not exist" in screen_text(app)


@pytest.mark.parametrize(
    ("word", "warning"),
    [
        ("dog", "The base knows this word already"),
        ("x1", "Digits are split"),
        ("zqé", "unknown to the base"),
        ("zqx", "A rare word"),
    ],
)
async def test_the_trigger_is_judged_as_the_base_reads_it(make_app: MakeApp, word: str, warning: str) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, word)
        await settle(pilot)
        assert warning in screen_text(app)


async def test_r_gives_a_field_its_recommended_value_again(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "settings")
        app.screen.query_one(f"#{field_id('train.steps')}", SettingField).control.focus()
        await replace_text(pilot, "7")
        assert "changed by you" in screen_text(app)
        await pilot.press("r")
        await pilot.pause()
        assert _field(app, "train.steps").value == str(demo.settings()["train"]["steps"])
        assert not app.draft.changed("train.steps")
        assert "changed by you" not in screen_text(app)


async def test_a_opens_all_settings_and_keeps_them_open(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "settings")
        app.screen.query_one(f"#{field_id('train.steps')}", SettingField).control.focus()
        await pilot.press("a")
        await settle(pilot)
        assert app.screen.query(f"#{field_id('objective.min_snr_gamma')}")
        await go_to(pilot, "review")
        await go_to(pilot, "settings")
        assert app.screen.query(f"#{field_id('objective.min_snr_gamma')}")


async def test_any_step_can_be_visited_from_the_list(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("s", "down", "down", "down", "down", "down", "enter")
        await settle(pilot)
        assert app.draft.page == "review"
        await pilot.press("1")
        await settle(pilot)
        assert app.draft.page == "hardware"


async def test_a_look_that_ends_while_a_page_opens_is_shown_when_it_stands(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        for name in PAGES:
            app.visit(name)
            app.changed()  # before the page has any widget
            await settle(pilot)
            assert f"· {PAGES[name]}" in screen_text(app)


async def test_a_key_pressed_before_the_review_stands_starts_nothing(
    make_app: MakeApp, started: list[FakeSession]
) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        app.visit("review")
        page = app.page
        assert page is not None
        await page.run_action("next")
        await settle(pilot)
        assert not started
        await page.run_action("next")
        await settle(pilot)
        assert len(started) == 1


async def test_help_explains_the_focused_field(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "settings")
        app.screen.query_one(f"#{field_id('adapter.alpha')}", SettingField).control.focus()
        await pilot.press("f1")
        await pilot.pause()
        assert isinstance(app.screen, HelpScreen)
        assert "the change is scaled by alpha / rank" in screen_text(app)
        await pilot.press("x")
        await pilot.pause()
        assert not isinstance(app.screen, HelpScreen)


async def test_the_draft_is_saved_and_offered_the_next_time(make_app: MakeApp, state_folder: Path) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, "ohwx")
        await pilot.press("ctrl+q")
    saved = load_draft(state_folder / "draft.json")
    assert saved is not None
    assert saved[0].value("captions.trigger") == "ohwx"
    again = make_app()
    async with again.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "Go on with it: demo" in screen_text(again)
        await pilot.press("enter")
        await settle(pilot)
        assert again.draft.page == "trigger"
        assert again.screen.query_one("#trigger", SafeInput).value == "ohwx"


async def test_the_draft_is_on_the_disk_a_moment_after_a_change(make_app: MakeApp, state_folder: Path) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, "ohwx")
        for _ in range(100):
            await asyncio.sleep(0.02)
            saved = load_draft(state_folder / "draft.json")
            if saved is not None and saved[0].answers.get("captions.trigger") == "ohwx":
                return
    pytest.fail("the draft was not written")


async def test_starting_anew_leaves_the_old_draft_alone_until_something_changes(
    make_app: MakeApp, state_folder: Path
) -> None:
    draft = Draft()
    draft.put("captions.trigger", "ohwx")
    state_folder.mkdir()
    (state_folder / "draft.json").write_text(draft.to_json())
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("ctrl+q")
    saved = load_draft(state_folder / "draft.json")
    assert saved is not None
    assert saved[0].value("captions.trigger") == "ohwx"


async def test_a_start_that_fails_is_explained_and_can_be_repeated(make_app: MakeApp) -> None:
    def refused(resolved: Any, tell: Any) -> Any:
        raise StorageError("The folder runs is not writable.", fix="Choose another output folder.")

    app = make_app(start=refused)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "review")
        await pilot.press("enter")
        await settle(pilot)
        assert "The folder runs is not writable." in screen_text(app)
        assert not app.screen.query_one("#next", Button).disabled


async def test_a_small_terminal_is_covered_until_it_grows(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.resize_terminal(50, 15)
        await settle(pilot)
        assert isinstance(app.screen, TooSmall)
        assert "need 60×18, have 50×15" in screen_text(app)
        await pilot.press("enter")
        assert app.draft.page == "hardware"
        await pilot.resize_terminal(60, 18)
        await settle(pilot)
        assert not isinstance(app.screen, TooSmall)


async def test_every_page_fits_the_smallest_terminal(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(60, 18)) as pilot:
        for name in PAGES:
            await go_to(pilot, name)
            shown = screen_text(app)
            assert f"/6 · {PAGES[name]}" in shown
            assert "Back" in shown


async def test_nothing_from_files_is_markup_or_an_escape_sequence(make_app: MakeApp, tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31m[x]pictures"
    folder.mkdir()
    for number, hostile in enumerate(ESCAPES):
        name = hostile.replace("/", "∕")
        Image.new("RGB", (64, 64)).save(folder / f"{number}{name}.png")
        (folder / f"{number}{name}.txt").write_text(f"a cat {hostile}")
        (folder / f"{number}{name}.xyz").write_text("not a picture")
    (folder / "bad\udcff.png").write_bytes(b"not a picture")

    def base(model: str, *rest: Any) -> Any:
        raise BaseModelError("".join(ESCAPES), why="\x1b[2J [/]", fix="[@click=app.quit]x[/]")

    draft = Draft(kept={"choice": "local", "local": "\x1b[2J[/]"})
    draft.put("base.model", "\x1b[2J[/]")
    draft.put("dataset.folder", str(folder))
    draft.put("captions.trigger", "\x1b]0;pwned\x07[/]")
    app = make_app(draft, base=base)
    async with app.run_test(size=(100, 50)) as pilot:
        for name in PAGES:
            await go_to(pilot, name)
            _refuse_live_text(app)
            app.screen.query_one("#body").scroll_end(animate=False)
            await settle(pilot)
            _refuse_live_text(app)
        await go_to(pilot, "dataset")
        assert f"{len(ESCAPES)} pictures" in screen_text(app)


def _refuse_live_text(app: LorasmithApp) -> None:
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            assert all(unicodedata.category(c) not in ("Cc", "Cs") and c != "\u202e" for c in segment.text), segment
            assert segment.style is None or segment.style.link is None
            assert segment.style is None or "app.quit" not in str(segment.style.meta.get("@click"))


def _field(app: LorasmithApp, key: str) -> SafeInput:
    control = app.screen.query_one(f"#{field_id(key)}", SettingField).control
    assert isinstance(control, SafeInput)
    return control


async def test_without_colors_the_focus_is_still_seen(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        for name, marked in (("hardware", "Next"), ("base_model", "Demo: comes along"), ("trigger", "zqx")):
            await go_to(pilot, name)
            segments = [segment for strip in app.screen._compositor.render_strips() for segment in strip]
            styled = [s.text for s in segments if s.style is not None and (s.style.reverse or s.style.underline)]
            assert any(marked in text for text in styled), name


def test_sixteen_colors_are_used_where_there_are_no_more_or_none_are_wanted() -> None:
    assert limited_colors({"TERM": "xterm-256color", "NO_COLOR": ""})
    assert limited_colors({"TERM": "linux"})
    assert not limited_colors({"TERM": "screen-256color"})
    assert not limited_colors({"TERM": "xterm", "COLORTERM": "truecolor"})


def test_the_first_page_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; import lorasmith.tui.app, lorasmith.tui.screens.hardware as page; page.PAGE_CLASS\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'pydantic', 'numpy', 'PIL', 'tomlkit'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_a_terminal_the_commands_are_explained() -> None:
    done = subprocess.run([sys.executable, "-m", "lorasmith.tui"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "lorasmith train RUN.toml" in done.stderr


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_rank_and_alpha_tell_the_scale_that_they_amount_to(make_app: MakeApp, size: tuple[int, int]) -> None:
    app = make_app()
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, "settings")
        app.change("adapter.rank", "16")
        app.change("adapter.alpha", "4")
        await settle(pilot)
        notes = [
            str(note.render()) for note in app.screen.query("#field-adapter-alpha .note, #field-adapter-rank .note")
        ]
        assert len(notes) == 2
        assert all("scale 0.25" in note for note in notes)
        app.change("adapter.rslora", "on")
        await settle(pilot)
        assert "scale 1" in str(app.screen.query_one("#field-adapter-alpha .note").render())
