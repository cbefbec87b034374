"""Form fields are made of the settings' own declarations."""

from __future__ import annotations

from textual import on
from textual.app import App, ComposeResult

from lorasmith.tui.fields import bounds_of, choices_of, help_of, kind_of, label_of, settings
from lorasmith.tui.forms import Choice, SafeInput, SettingField
from tests.tui.test_text import HOSTILE


class Form(App[None]):
    CSS = ".label { width: 20; } Choice { width: 1fr; height: 1; }"

    def __init__(self, key: str, text: str) -> None:
        super().__init__()
        self.field = SettingField(key, text)
        self.changes: list[str] = []

    def compose(self) -> ComposeResult:
        yield self.field

    @on(SettingField.Changed)
    def _changed(self, event: SettingField.Changed) -> None:
        self.changes.append(event.text)


def test_every_setting_has_a_label_help_and_a_control() -> None:
    labels = [label_of(key) for key in settings()]
    assert len(set(labels)) == len(labels)
    assert all(help_of(key) for key in settings())
    assert kind_of("dataset.flip") == "switch"
    assert kind_of("previews.prompts") == "texts"
    assert choices_of("dataset.crop") == ("center", "random")
    assert bounds_of("dataset.resolution") == "from 64 to 2,048 in steps of 64"
    assert bounds_of("adapter.alpha") == "above 0 to 4,096"


async def test_a_choice_moves_with_arrows_and_around_the_end() -> None:
    app = Form("dataset.crop", "center")
    async with app.run_test(size=(80, 24)) as pilot:
        assert isinstance(app.field.control, Choice)
        app.field.control.focus()
        await pilot.press("right", "right", "left")
        assert app.changes == ["random", "center", "random"]


async def test_a_number_field_takes_numbers_and_leaves_letters_to_the_keys() -> None:
    app = Form("adapter.rank", "")
    async with app.run_test(size=(80, 24)) as pilot:
        app.field.control.focus()
        await pilot.press("n", "1", "p", "6", "r")
        assert isinstance(app.field.control, SafeInput)
        assert app.field.control.value == "16"


async def test_a_problem_is_told_in_words_under_the_field() -> None:
    app = Form("adapter.rank", "0")
    async with app.run_test(size=(80, 24)) as pilot:
        app.field.tell("wizard", "", "Rank must be at least 1.")
        await pilot.pause()
        assert "✗ Rank must be at least 1." in _shown(app)
        app.field.tell("preset sd15", "24 GB tier", "")
        await pilot.pause()
        assert "preset sd15 · 24 GB tier" in _shown(app)


async def test_controls_in_an_input_are_shown_as_marks() -> None:
    for text in HOSTILE:
        app = Form("captions.trigger", text)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            assert "\x1b" not in _shown(app)
            assert "\u202e" not in _shown(app)


def _shown(app: App[None]) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def test_a_long_list_of_words_is_counted_in_the_note_and_listed_in_the_help() -> None:
    app = Form("optimizer.name", "adamw")
    async with app.run_test(size=(80, 24)) as pilot:
        app.field.tell("default", "", "")
        await pilot.pause()
        number = len(choices_of("optimizer.name"))
        assert f"default · {number} to choose from" in _shown(app)
        assert "adamw8bit" not in _shown(app)
        assert "adamw8bit" in app.field.help_for()[1]


async def test_words_that_this_machine_cannot_use_are_passed_over_and_the_help_says_why() -> None:
    app = Form("memory.quantize", "none")
    async with app.run_test(size=(80, 24)) as pilot:
        app.field.forbid({"nf4": "bitsandbytes cannot be imported.", "fp8": "This card has none."})
        app.field.control.focus()
        await pilot.pause()
        assert "[none]  (fp8)  int8  (nf4)" in _shown(app)
        await pilot.press("right", "right")
        assert app.changes == ["int8", "none"]
        assert "(nf4) cannot be used here: bitsandbytes cannot be imported." in app.field.help_for()[1]


async def test_a_warning_is_told_with_a_mark_and_a_problem_comes_first() -> None:
    app = Form("optimizer.learning_rate", "0.001")
    async with app.run_test(size=(80, 24)) as pilot:
        app.field.tell("wizard", "", "", "", "Ten times the usual rate.")
        await pilot.pause()
        assert "! Ten times the usual rate." in _shown(app)
        app.field.tell("wizard", "", "Must be less than 1.", "", "Ten times the usual rate.")
        await pilot.pause()
        assert "✗ Must be less than 1." in _shown(app)


async def test_a_recommendation_that_comes_late_never_replaces_what_is_being_typed() -> None:
    app = Form("train.steps", "320")
    async with app.run_test(size=(80, 24)):
        app.field.follow("400")
        assert app.field.control.value == "400"
        # Typed, and not yet told to anybody.
        app.field.control.value = "24"
        app.field.follow("500")
        assert app.field.control.value == "24"
        app.field.show("500")
        assert app.field.control.value == "500"
