"""What the card can do: on the first page, beside each base model, and on the settings page after each change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from lorasmith.engine.families import families, identify_base
from lorasmith.engine.fit import Fit
from lorasmith.engine.hardware import Disk, Gpu, GpuProcess, HardwareSnapshot, Memory
from lorasmith.engine.sources import locate_base
from lorasmith.tui.app import CARD_AFTER_SECONDS, LorasmithApp
from lorasmith.tui.draft import PAGES, Draft
from lorasmith.tui.findings import FoundBase
from lorasmith.tui.forms import SettingField, field_id
from tests.sparse_base import build_sparse_base
from tests.tui.conftest import SIZES, go_to, replace_text, screen_text, settle

MakeApp = Callable[..., LorasmithApp]
CARDS = {8: "RTX 4060", 12: "RTX 3060", 16: "RTX 4080", 24: "RTX 4090", 80: "H100 80GB HBM3"}


def machine(vram: int, held: float = 0.4) -> Callable[[Any], HardwareSnapshot]:
    """A machine with one card of so many GiB, some of them held by another program."""
    holder = GpuProcess(4711, held, "python3")
    name = f"NVIDIA GeForce {CARDS[vram]}" if vram < 80 else f"NVIDIA {CARDS[vram]}"
    gpu = Gpu("GPU-1", 0, name, float(vram), vram - held, (8, 9), "580.95", 0.0, 40.0, 30.0, (holder,))
    disk = Disk(Path("/"), 500.0, 400.0)
    return lambda tell: HardwareSnapshot((gpu,), "", (13, 0), Memory(64.0, 56.0), (disk,), "A processor", 8)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> FoundBase:
    """The real configurations and headers of FLUX.1 dev over files that are all hole."""
    files = locate_base(str(build_sparse_base(tmp_path_factory.mktemp("bases") / "dev", "flux1", "dev")))
    return FoundBase(files, families()["flux1"], identify_base(files)[1])


@pytest.fixture
def app_on(make_app: MakeApp, full_size: FoundBase) -> Callable[..., LorasmithApp]:
    """A wizard on a card of so many GiB, with that base model chosen."""

    def make(vram: int, **looks: Any) -> LorasmithApp:
        model = str(full_size.files.path)
        draft = Draft(kept={"choice": "local", "local": model}, answers={"base.model": model})
        return make_app(draft, **({"hardware": machine(vram), "base": lambda *rest: full_size} | looks))

    return make


async def look(pilot: Pilot[Any], page: str) -> None:
    """Look at machine and base, then visit a page and wait for the plan."""
    app = pilot.app
    assert isinstance(app, LorasmithApp)
    await settle(pilot)
    app.known.look_at_card()
    app.known.look_at_base()
    await settle(pilot)
    await go_to(pilot, page)
    await settle(pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_the_first_page_says_what_the_card_can_train_and_who_holds_it(
    app_on: MakeApp, size: tuple[int, int]
) -> None:
    app = app_on(12)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        await pilot.pause(2 * CARD_AFTER_SECONDS)
        await settle(pilot)
        shown = " ".join(screen_text(app).split())
        assert "12 GB class" in shown
        assert "python3 (4711) holds 0.4 GiB" in shown
        assert "✓ trains:" in shown
        assert "Stable Diffusion XL" in shown


async def test_each_usual_model_says_whether_it_fits_with_memory_and_time(app_on: MakeApp) -> None:
    app = app_on(12)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.pause(2 * CARD_AFTER_SECONDS)
        await settle(pilot)
        app.draft.kept["choice"] = "hub"
        await go_to(pilot, "base_model")
        listed = app.screen.query_one("#usual", OptionList).options
        rows = [str(option.prompt) for option in listed if "stable-diffusion-xl-base-1.0" in str(option.prompt)]
        assert len(rows) == 1
        assert "✓" in rows[0]
        assert "fits" in rows[0]
        assert "GiB, about" in rows[0]


@pytest.mark.parametrize("vram", [8, *(pytest.param(gib, marks=pytest.mark.campaign) for gib in (12, 16, 24, 80))])
async def test_a_card_gets_to_a_plan_without_a_number_typed(
    app_on: MakeApp, pictures: Path, started: list[Any], vram: int
) -> None:
    app = app_on(vram)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        app.change("dataset.folder", str(pictures))
        app.change("dataset.missing_captions", "trigger")
        app.change("captions.trigger", "zqx")
        for page in PAGES:
            await go_to(pilot, page)
        for _ in range(2):
            await settle(pilot)
        assert app.known.problems() == []
        plan = app.known.fitting.plan()
        assert isinstance(plan, Fit)
        assert plan.verdict in ("fits", "tight")
        estimate = app.known.fitting.estimate()
        assert estimate is not None
        assert estimate.view.verdict == plan.verdict
        assert estimate.view.peak_gib == pytest.approx(plan.forecast.peak.total, rel=0.02)
        assert estimate.view.peak_gib <= vram - 0.4
        assert "Ready to train" in screen_text(app)


@pytest.mark.parametrize("size", SIZES)
async def test_the_settings_page_shows_the_bar_the_time_and_what_was_done(
    app_on: MakeApp, size: tuple[int, int]
) -> None:
    app = app_on(12)
    async with app.run_test(size=size) as pilot:
        await look(pilot, "settings")
        shown = screen_text(app)
        assert "of 11.6 GiB free FITS" in shown
        assert "weights" in shown
        assert "time about" in shown
        assert "fit  " in shown


async def test_a_change_moves_the_bar_and_the_time(app_on: MakeApp) -> None:
    app = app_on(24)
    async with app.run_test(size=(120, 36)) as pilot:
        await look(pilot, "settings")
        before = app.known.fitting.estimate()
        app.screen.query_one(f"#{field_id('adapter.rank')}", SettingField).control.focus()
        await replace_text(pilot, "128")
        await settle(pilot)
        after = app.known.fitting.estimate()
        assert before is not None
        assert after is not None
        assert dict(after.view.segments)["LoRA"] > 2 * dict(before.view.segments)["LoRA"]
        assert f"{after.view.peak_gib:.1f} of 23.6 GiB" in screen_text(app)


async def test_what_the_user_set_is_never_changed_to_fit(app_on: MakeApp) -> None:
    app = app_on(12)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot)
        for key, text in (("memory.quantize", "none"), ("memory.swapped_blocks", "0")):
            app.draft.put(key, text)
        await look(pilot, "settings")
        estimate = app.known.fitting.estimate()
        assert estimate is not None
        assert estimate.view.verdict == "no"
        shown = " ".join(screen_text(app).split())
        assert "DOES NOT FIT" in shown
        assert "memory.quantize =" in shown or "memory.swapped_blocks =" in shown
        config = app.known.check_config()
        assert (config.memory.quantize, config.memory.swapped_blocks) == ("none", 0)


async def test_what_does_not_work_here_is_neither_chosen_nor_offered(app_on: MakeApp) -> None:
    broken = {("memory.quantize", "nf4"): "bitsandbytes: it cannot be imported.", ("memory.quantize", "fp8"): "No."}
    app = app_on(12, unusable=lambda *rest: broken)
    async with app.run_test(size=(120, 36)) as pilot:
        await look(pilot, "settings")
        await pilot.pause()
        await app.screen.run_action("toggle_all")
        await settle(pilot)
        assert app.known.check_config().memory.quantize in ("none", "int8")
        field = app.screen.query_one(f"#{field_id('memory.quantize')}", SettingField)
        assert "(nf4) cannot be used here: bitsandbytes" in field.help_for()[1]


async def test_a_warning_is_mended_with_one_key(app_on: MakeApp) -> None:
    app = app_on(24)
    async with app.run_test(size=(120, 36)) as pilot:
        await look(pilot, "settings")
        app.screen.query_one(f"#{field_id('optimizer.learning_rate')}", SettingField).control.focus()
        await replace_text(pilot, "0.005")
        await settle(pilot)
        assert app.known.fitting.foot_guns()
        await pilot.press("f")
        await settle(pilot)
        assert not [gun for gun in app.known.fitting.foot_guns() if "optimizer.learning_rate" in gun.fix]
        assert app.known.check_config().optimizer.learning_rate < 0.005


async def test_without_a_card_the_pages_say_so_and_search_nothing(make_app: MakeApp, full_size: FoundBase) -> None:
    searched: list[Any] = []
    model = str(full_size.files.path)
    draft = Draft(kept={"choice": "local", "local": model}, answers={"base.model": model})
    app = make_app(draft, base=lambda *rest: full_size, fit=lambda *rest: searched.append(rest))
    async with app.run_test(size=(80, 24)) as pilot:
        await look(pilot, "settings")
        assert "no NVIDIA GPU" in screen_text(app)
    assert not searched


async def test_a_card_whose_memory_changed_gives_another_plan(app_on: MakeApp) -> None:
    plans = []
    for held in (0.4, 6.0):
        app = app_on(16, hardware=machine(16, held))
        async with app.run_test(size=(80, 24)) as pilot:
            await look(pilot, "settings")
            plans.append(app.known.fitting.plan())
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[1].forecast.peak.total < plans[0].forecast.peak.total
    assert replace(plans[1], switches=()) != replace(plans[0], switches=())


async def test_a_slice_of_a_card_is_not_taken_for_the_whole_or_for_none(app_on: MakeApp) -> None:
    app = app_on(24)
    async with app.run_test(size=(80, 24)) as pilot:
        app.draft.put("train.device", "MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f")
        await look(pilot, "settings")
        assert app.known.fitting.plan() is None
        assert "the memory of this card cannot be read" in " ".join(screen_text(app).split())
