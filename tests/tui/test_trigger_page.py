"""The page about the trigger word: what is doubtful about it, with and without a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.run_file import Layer, resolve_config, to_toml
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import Draft

from .conftest import go_to, replace_text, screen_text, settle

MakeApp = Callable[..., LorasmithApp]


def finished_run(folder: Path, trigger: str) -> None:
    values = {"run": {"name": "old cat"}, "captions": {"trigger": trigger}}
    (folder / "export").mkdir(parents=True)
    (folder / "run.toml").write_text(to_toml(resolve_config([Layer("test", values)])))
    (folder / "export" / "old-cat.safetensors").write_bytes(b"")


def refuse(*arguments: Any) -> Any:
    raise BaseModelError("There is no such base model.")


def draft(output: Path) -> Draft:
    begun = Draft()
    begun.put("run.output_folder", str(output))
    return begun


async def test_the_trigger_of_an_earlier_run_is_told(make_app: MakeApp, tmp_path: Path) -> None:
    finished_run(tmp_path / "cat-20250101-120000", "zqx")
    app = make_app(draft(tmp_path))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, "ZQX")
        await settle(pilot)
        assert "1 other LoRA is called by “ZQX” too" in screen_text(app)
        assert "cat-20250101-120000" in screen_text(app)
        await replace_text(pilot, "ohwx")
        await settle(pilot)
        assert "A rare word" in screen_text(app)


async def test_letters_are_judged_while_the_base_is_not_known(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(draft(tmp_path), base=refuse)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, "zqx7")
        await settle(pilot)
        assert "The base model is not known yet" in screen_text(app)
        assert "Digits are split" in screen_text(app)
        await replace_text(pilot, "zqx")
        await settle(pilot)
        assert "A rare word" not in screen_text(app)


async def test_every_doubt_fits_a_small_screen(make_app: MakeApp, tmp_path: Path) -> None:
    finished_run(tmp_path / "cat-20250101-120000", "zq7é(dog)")
    app = make_app(draft(tmp_path))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "trigger")
        await replace_text(pilot, "zq7é(dog)")
        await settle(pilot)
        for words in ("unknown to the base", "Digits are split", "is long", "read as commands", "other LoRA"):
            assert words in " ".join(screen_text(app).split()), words
