"""In a tmux pane, as a user meets it: from the first page to the LoRA run's end, with real keys and a real training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.tui.draft import PAGES
from tests.tui.tmux import TMUX, TmuxPane

pytestmark = pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
Start = Callable[..., TmuxPane]
STEPS = 60


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    panes: list[TmuxPane] = []

    def run(*arguments: str) -> TmuxPane:
        panes.append(TmuxPane(tmp_path, *arguments))
        return panes[-1]

    yield run
    for pane in panes:
        pane.close()


def wait_for_page(pane: TmuxPane, name: str) -> str:
    number = list(PAGES).index(name) + 1
    return pane.wait_for(f"Step {number}/6 · {PAGES[name]}")


def go_to_monitor(pane: TmuxPane) -> None:
    """Press Enter through the pages, as the defaults have it, but train a few steps only."""
    for name in ("hardware", "base_model", "dataset", "trigger"):
        wait_for_page(pane, name)
        if name == "dataset":
            pane.wait_for("regularization pictures ·")
            pane.press("NPage")
            pane.wait_for("Checked: nothing to report")
        pane.press("Enter")
    wait_for_page(pane, "settings")
    pane.press("Tab")
    pane.wait_for("Steps: ")
    pane.fill(str(STEPS))
    pane.wait_for("changed by you")
    pane.press("Enter")
    wait_for_page(pane, "review")
    pane.wait_for(lambda text: "Ready to train" in text and f"{STEPS}, each of " in text)
    pane.press("NPage")
    pane.wait_for("The same without the wizard")
    pane.press("Enter")


def test_a_demo_run_is_watched_paused_saved_and_stopped_with_a_checkpoint(start: Start, tmp_path: Path) -> None:
    pane = start("demo")
    go_to_monitor(pane)
    shown = pane.wait_for(re.compile(rf"Step [1-9]\d*/{STEPS} ").search)
    assert re.search(r"loss \d", shown)
    assert re.search(r"RAM  .*GiB", shown)
    assert "VRAM" in shown
    pane.wait_for(re.compile("│.*[⠁-⣿]").search)  # a braille curve right of the axis

    pane.press("p")
    pane.wait_for("PAUSED - p goes on")
    pane.press("p")
    pane.wait_for(lambda text: "PAUSED" not in text and "going on" not in text)
    pane.press("s")
    pane.wait_for(re.compile(r"saved step \d+").search)

    pane.resize(120, 36)
    pane.wait_for("learning rate")
    assert max(map(len, pane.text().splitlines())) > 100
    pane.resize(80, 24)
    pane.wait_for(re.compile(r" lr \d").search)

    pane.press("x")
    pane.wait_for(f"of {STEPS}?")
    pane.press("y")
    shown = pane.wait_for("STOPPED")
    assert "lorasmith train --resume runs/demo-zqx-" in " ".join(shown.split())
    assert pane.modes == "1 1"
    pane.press("q")
    assert pane.exit_code() == 130
    assert pane.modes == "0 0"
    assert "The run: " in pane.text()
    assert "Measuring" not in pane.text()
    check_checkpoint(tmp_path)


def check_checkpoint(folder: Path) -> None:
    from lorasmith.engine.checkpoints import damage, newest_checkpoint

    (run,) = (folder / "runs").iterdir()
    checkpoint = newest_checkpoint(run / "checkpoints", lambda path, reason: pytest.fail(reason))
    assert checkpoint is not None
    assert 0 < checkpoint.step < STEPS
    assert damage(checkpoint.path) is None


def test_going_back_and_forward_and_leaving_keeps_what_was_typed(start: Start, tmp_path: Path) -> None:
    pane = start("demo")
    wait_for_page(pane, "hardware")
    pane.wait_for("Press Enter to begin.")
    pane.press("5")
    wait_for_page(pane, "settings")
    pane.press("Tab")
    pane.wait_for("Steps: ")
    # All in one go, as over a slow connection: no key may overtake another.
    pane.press("End", "C-u", "7", "7", "Escape")
    wait_for_page(pane, "trigger")
    pane.press("End", "C-u", *"ohwx", "Escape")
    wait_for_page(pane, "dataset")
    pane.wait_for("regularization pictures ·")
    pane.press("Enter")
    assert "ohwx" in wait_for_page(pane, "trigger")
    pane.press("Enter")
    wait_for_page(pane, "settings")
    pane.wait_for(re.compile(r"Steps +77").search)
    pane.press("C-q")
    assert pane.exit_code() == 0
    assert "Your choices are kept" in pane.text()
    answers = json.loads((tmp_path / "state" / "draft.json").read_text())["answers"]
    assert (answers["train.steps"], answers["captions.trigger"]) == (77, "ohwx")

    again = start()
    again.wait_for("Go on with it:")
    again.press("Enter")
    wait_for_page(again, "settings")
    again.wait_for(re.compile(r"Steps +77").search)
    again.press("C-q")
    assert again.exit_code() == 0


def test_escape_sequences_and_markup_of_a_dataset_are_shown_and_never_obeyed(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "pictures \x1b[2J[red]"
    folder.mkdir()
    name = "a\x1b]0;pwned\x07[@click=app.quit]"
    Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("a \x1b[2J[bold]loud[/bold] \x9b31m red \u202epicture")
    (folder / "b\x1b[31m[link=x].png").write_text("no picture")

    pane = start("demo")
    wait_for_page(pane, "hardware")
    pane.wait_for("Press Enter to begin.")
    pane.press("3")
    wait_for_page(pane, "dataset")
    pane.fill(str(tmp_path / "pictures ?"))
    pane.wait_for("pictures ?")
    pane.press("C-q")
    assert pane.exit_code() == 0
    # No key types an escape character: the draft brings it, as a pasted path would.
    draft = tmp_path / "state" / "draft.json"
    record = json.loads(draft.read_text())
    record["answers"]["dataset.folder"] = str(folder)
    draft.write_text(json.dumps(record))

    pane = start()
    pane.wait_for("Go on with it:")
    pane.press("Enter")
    shown = wait_for_page(pane, "dataset")
    pane.resize(170, 70)
    shown = pane.wait_for(lambda text: "Prompts as" in text and "Not used (1)" in text)
    for words in (
        "pictures ␛[2J[red]",
        "zqx, a ␛[2J[bold]loud[/bold] <U+009B>31m red <U+202E>picture",
        "a␛]0;pwned␇[@click=app.quit].png",
        "b␛[31m[link=x].png",
    ):
        assert words in shown
    assert "Step 3/6 · Dataset" in shown
    assert "pwned" not in pane.title
    pane.press("C-q")
    assert pane.exit_code() == 0
