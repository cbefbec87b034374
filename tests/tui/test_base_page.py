"""The page of the base model: usual models to choose from, and fields for the parts that a file lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from textual.widgets import OptionList

from lorasmith.engine.families import families
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import Draft
from lorasmith.tui.forms import SafeInput
from tests.tui.conftest import a_base, go_to, screen_text, settle

MakeApp = Callable[..., LorasmithApp]
SIZES = [(80, 24), (120, 36)]


def local_draft(model: str = "/models/flux.safetensors", **answers: Any) -> Draft:
    draft = Draft(kept={"choice": "local", "local": model})
    draft.put("base.model", model)
    for key, text in answers.items():
        draft.put(key, text)
    return draft


def lacking(model: str, revision: str, family: str, vae: str, encoders: tuple[str, ...], tell: Any) -> Any:
    """A base that lacks what is not given apart."""
    found = a_base(model)
    files = dataclasses.replace(found.files, kind="single_file")
    missing = (*(() if vae else ("vae",)), *(() if encoders else ("text_encoder",)))
    return dataclasses.replace(found, files=files, identity=dataclasses.replace(found.identity, parts_missing=missing))


@pytest.mark.parametrize("size", SIZES)
async def test_a_usual_model_is_chosen_from_the_list(make_app: MakeApp, size: tuple[int, int]) -> None:
    app = make_app(Draft(kept={"choice": "hub"}, answers={"base.model": ""}))
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, "base_model")
        usual = app.screen.query_one("#usual", OptionList)
        assert usual.display
        assert usual.option_count == sum(len(module.SPEC.hub_ids) for module in families().values())
        usual.focus()
        await pilot.press("end", "enter")
        await settle(pilot)
        last = max((module.SPEC for module in families().values()), key=lambda spec: spec.denoiser_parameters)
        assert app.draft.answers["base.model"] == last.hub_ids[-1]
        assert last.hub_ids[-1] in screen_text(app)


@pytest.mark.parametrize("size", SIZES)
async def test_parts_that_a_file_lacks_are_asked_for_and_taken(make_app: MakeApp, size: tuple[int, int]) -> None:
    app = make_app(local_draft(), base=lacking)
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, "base_model")
        assert not app.screen.query_one("#vae", SafeInput).display
        app.screen.query_one("#model", SafeInput).focus()
        await pilot.press("enter")
        await settle(pilot)
        vae, encoders = app.screen.query_one("#vae", SafeInput), app.screen.query_one("#encoders", SafeInput)
        assert vae.display
        assert encoders.display
        assert "Missing in these files: vae, text_encoder" in screen_text(app)
        assert "base.vae" in {problem.key for problem in app.known.problems()}
        vae.value = "/models/ae.safetensors"
        encoders.value = "/models/clip_l.safetensors | /models/t5xxl.safetensors"
        await settle(pilot)
        assert app.draft.answers["base.vae"] == "/models/ae.safetensors"
        assert app.draft.answers["base.text_encoders"] == ["/models/clip_l.safetensors", "/models/t5xxl.safetensors"]
        encoders.focus()
        await pilot.press("enter")
        await settle(pilot)
        known = app.known.current("base_model")
        assert known is not None
        assert known.value.identity.parts_missing == ()
        assert not {problem.key for problem in app.known.problems()} & {"base.vae", "base.text_encoders"}
        vae.value = ""
        await settle(pilot)
        assert "base.vae" not in app.draft.answers


async def test_neither_list_nor_fields_are_there_for_the_demo(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "base_model")
        assert not any(app.screen.query_one(name).display for name in ("#usual", "#vae", "#encoders"))


@pytest.mark.parametrize("size", SIZES)
async def test_the_sizes_are_shown_before_a_download_begins(make_app: MakeApp, size: tuple[int, int]) -> None:
    taken: list[str] = []

    def base(model: str, *rest: Any) -> Any:
        taken.append(model)
        return a_base(model)

    words = "To download: 23.8 GB (transformer 22.1 GB, vae 1.7 GB); 100 GB free."
    draft = Draft(kept={"choice": "hub", "hub": "someone/large"}, answers={"base.model": "someone/large"})
    app = make_app(draft, base=base, download=lambda model, revision, tell: words)
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, "base_model")
        app.screen.query_one("#model", SafeInput).focus()
        await pilot.press("enter")
        await settle(pilot)
        assert "transformer 22.1 GB" in " ".join(screen_text(app).split())
        assert "Enter downloads it." in screen_text(app)
        assert "someone/large" not in taken
        await pilot.press("enter")
        await settle(pilot)
        assert taken[-1] == "someone/large"
        assert "Base someone/large" in screen_text(app)


async def test_a_model_that_is_here_already_is_looked_at_with_one_enter(make_app: MakeApp) -> None:
    draft = Draft(kept={"choice": "hub", "hub": "someone/here"}, answers={"base.model": "someone/here"})
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "base_model")
        app.screen.query_one("#model", SafeInput).focus()
        await pilot.press("enter")
        await settle(pilot)
        assert "Base someone/here" in screen_text(app)


async def test_a_setting_that_the_base_cannot_use_keeps_the_run_from_starting(make_app: MakeApp) -> None:
    draft = Draft(kept={"choice": "hub", "hub": "someone/here"}, answers={"base.model": "someone/here"})
    draft.put("objective.timestep_sampling", "logit_normal")
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "base_model")
        app.screen.query_one("#model", SafeInput).focus()
        await pilot.press("enter")
        await settle(pilot)
        (problem,) = [item for item in app.known.problems() if item.key == "objective.timestep_sampling"]
        assert "set it to auto" in problem.message
        assert problem.page == "settings"


async def test_coming_back_to_the_page_keeps_what_was_recognized(make_app: MakeApp) -> None:
    asked: list[str] = []

    def base(model: str, *rest: Any) -> Any:
        asked.append(model)
        return a_base(model)

    draft = Draft(kept={"choice": "local", "local": "/models/x"}, answers={"base.model": "/models/x"})
    app = make_app(draft, base=base)
    async with app.run_test(size=(80, 24)) as pilot:
        app.known.look_at_base()
        await settle(pilot)
        await go_to(pilot, "settings")
        await go_to(pilot, "base_model")
        assert app.known.base is not None
        assert "Base /models/x" in screen_text(app)
    assert asked == ["/models/x"]
