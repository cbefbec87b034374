"""The monitor, driven by keys at several sizes: it shows what the engine said and sends what the user asked."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Static

from lorasmith.engine import events
from lorasmith.engine.commands import Command
from lorasmith.tui.bridge import FollowedRun, RunSource
from lorasmith.tui.screens.ask import AskScreen
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.widgets.chart import LossChart
from lorasmith.tui.widgets.log_tail import LogTail
from tests.tui.fake_session import HandFedSession

SIZES = [(80, 24), (120, 36), (160, 45)]


class MonitorApp(App[int]):
    def __init__(self, source: RunSource) -> None:
        super().__init__()
        self.source = source

    def on_mount(self) -> None:
        self.push_screen(MonitorScreen(self.source))

    async def action_quit(self) -> None:
        screen: Any = self.screen
        screen.request_quit()


@asynccontextmanager
async def monitor(source: RunSource, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Pilot[int]]:
    app = MonitorApp(source)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        await show(pilot)
        yield pilot


async def show(pilot: Pilot[int]) -> None:
    """Let the monitor poll as its timer does, the chart included."""
    screen = pilot.app.screen_stack[1]
    assert isinstance(screen, MonitorScreen)
    for _ in range(4):
        screen.poll()
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()


def text(pilot: Pilot[int]) -> str:
    return "\n".join(strip.text.rstrip() for strip in pilot.app.screen._compositor.render_strips())


def monitor_screen(pilot: Pilot[int]) -> MonitorScreen:
    screen = pilot.app.screen_stack[1]
    assert isinstance(screen, MonitorScreen)
    return screen


def begun() -> list[events.Event]:
    config = {"captions": {"trigger": "zqx"}}
    return [
        events.RunStarted(
            time=1000.0, run="cats", total_steps=400, resumed_from=0, config=config, versions={}, device="cpu"
        ),
        events.StageChanged(stage="cache", label="Encoding pictures"),
        events.DatasetReady(images=16, refused=1, regularization=0, buckets={"64x64": 16}, steps_per_epoch=16),
    ]


def training(folder: Path, step: int = 200) -> list[events.Event]:
    told = [*begun(), events.StageChanged(stage="train", label="Training")]
    for last in range(10, step + 1, 10):
        losses = [0.5 / (last + i) for i in range(10)]
        told.append(
            events.StepsDone(
                step=last, epoch=last // 16, losses=losses, learning_rate=1e-4, grad_norm=0.3, seconds_per_step=0.5
            )
        )
    for number, prompt in enumerate(("zqx, a red circle", "a red circle")):
        path = folder / f"{number}.png"
        Image.new("RGB", (64, 64), (200, 50 * number, 0)).save(path)
        told.append(events.PreviewReady(step=100, prompt=prompt, seed=1, path=str(path), line="x"))
    told.append(
        events.HardwareSampled(
            vram_used_gib=23.6, vram_total_gib=24.0, gpu_utilization_percent=97.0, temperature_c=71.0, power_w=300.0,
            ram_used_gib=5.0, ram_total_gib=8.0, process_ram_gib=1.0,
        )
    )  # fmt: skip
    return told


def the_end(outcome: events.Outcome = "finished", code: int = 0) -> events.RunEnded:
    return events.RunEnded(time=1130.0, outcome=outcome, step=400, message="That was it.", exit_code=code)


@pytest.mark.parametrize("size", SIZES)
async def test_a_training_run_is_told_in_full_at_every_size(tmp_path: Path, size: tuple[int, int]) -> None:
    async with monitor(HandFedSession(*training(tmp_path)), size) as pilot:
        shown = text(pilot)
        for words in (
            "cats · training", "Step 200/400", "50 %", "2.0 steps/s", "ETA 1:40", "loss 0.00239", "23.6/24.0 GiB",
            "98 % CRITICAL", "5.0/8.0 GiB", "97 %", "71 °C", "step 100 (1 of 1)", "zqx, a red circle", "0.png",
            "p Pause", "x Stop", "F1 Help",
        ):  # fmt: skip
            assert words in shown, words
        assert any("\u2800" <= mark <= "\u28ff" for mark in shown)
        assert shown.count("▀") > 50


async def test_before_training_the_stage_its_progress_and_the_elapsed_time_are_shown() -> None:
    progress = events.Progress(stage="cache", label="Encoding pictures", done=4, total=16, seconds_left=95.0)
    source = HandFedSession(*begun(), progress)
    async with monitor(source) as pilot:
        shown = text(pilot)
        assert "Encoding pictures 4/16" in shown
        assert "25 %" in shown
        assert "so far   ETA 1:35" in shown
        assert "16 pictures (16 of 64x64), 1 refused" in shown
        assert "The loss appears here" in shown


async def test_foreign_text_is_shown_harmless() -> None:
    nasty = "\x1b[2J[red]boo[/red]\u202e\udcff"
    source = HandFedSession(*begun(), events.Logged(severity="warning", message=nasty))
    async with monitor(source) as pilot:
        shown = text(pilot)
        assert "WARNING ␛[2J[red]boo[/red]<U+202E><FF>" in shown
        assert "\x1b" not in shown


async def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    bad = events.StepsDone(
        step=210, epoch=1, losses=[math.nan], learning_rate=1e-4, grad_norm=math.inf, seconds_per_step=1.0
    )
    async with monitor(HandFedSession(*training(tmp_path), bad)) as pilot:
        assert "loss not finite" in text(pilot)
        assert "10 not finite" in text(pilot)


@pytest.mark.parametrize(
    ("key", "command", "words"),
    [
        ("p", Command.PAUSE, "pausing after this step"),
        ("s", Command.SAVE_NOW, "saving after this step"),
        ("v", Command.PREVIEW_NOW, "preview after this step"),
    ],
)
async def test_a_key_sends_its_command_and_says_so_until_the_engine_took_it_up(
    tmp_path: Path, key: str, command: Command, words: str
) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        await pilot.press(key)
        assert source.sent == [command]
        assert words in text(pilot)
        source.waiting += [events.CommandReceived(command=command, step=201)]
        if command is Command.PAUSE:
            source.waiting += [events.Paused(step=201)]
        await show(pilot)
        assert words not in text(pilot)


async def test_p_resumes_a_paused_run(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path), events.Paused(step=200))
    async with monitor(source) as pilot:
        assert "PAUSED" in text(pilot)
        await pilot.press("p")
        assert source.sent == [Command.RESUME]
        source.waiting.append(events.Resumed(step=200))
        await show(pilot)
        assert "PAUSED" not in text(pilot)


@pytest.mark.parametrize("size", SIZES[:2])
async def test_parking_asks_first_and_tells_what_it_does(tmp_path: Path, size: tuple[int, int]) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source, size) as pilot:
        for harmless in ("n", "escape", "ctrl+q"):
            await pilot.press("k")
            assert isinstance(pilot.app.screen, AskScreen)
            assert "Park at step 200 of 400?" in text(pilot)
            detail = str(pilot.app.screen.query_one("#detail", Static).render())
            for words in ("A checkpoint is saved", "p brings it back", "23.6 GiB", "3.0 GiB"):
                assert words in detail
            await pilot.press(harmless)
            assert source.sent == []
        await pilot.press("k", "y")
        assert source.sent == [Command.PARK]
        assert "parking after this step" in text(pilot)
        source.waiting += [events.CommandReceived(command="park", step=201), events.Parked(step=201, freed_gib=7.94)]
        await show(pilot)
        assert "PARKED - p brings it back" in text(pilot)
        assert "Parked at step 201: 7.9 GiB of the card are free for other programs" in text(pilot)
        await pilot.press("p")
        assert source.sent == [Command.PARK, Command.RESUME]
        full = "The card is full; the run stays parked."
        source.waiting += [
            events.CommandReceived(command="resume", step=201), events.Logged(severity="warning", message=full)
        ]  # fmt: skip
        await show(pilot)
        assert "PARKED - p brings it back" in text(pilot)
        source.waiting.append(events.Resumed(step=201))
        await show(pilot)
        assert "PARKED" not in text(pilot)
        assert "free for other programs" not in text(pilot)


@pytest.mark.parametrize("size", SIZES[:2])
async def test_why_a_run_waits_stays_on_the_screen_while_it_waits(tmp_path: Path, size: tuple[int, int]) -> None:
    reason = "The disk is full: cannot write /data/runs/cats/checkpoints (734003200 bytes needed, 512 bytes free)."
    source = HandFedSession(*training(tmp_path), events.Paused(step=200, reason=reason))
    async with monitor(source, size) as pilot:
        source.waiting += [events.Logged(severity="info", message=f"line {number}") for number in range(50)]
        await show(pilot)
        assert "WAITING - p tries again" in text(pilot)
        assert reason in " ".join(text(pilot).split())
        source.waiting.append(events.Resumed(step=200))
        await show(pilot)
        assert "734003200" not in text(pilot)


async def test_a_stall_tells_where_and_which_file_holds_the_stacks(tmp_path: Path) -> None:
    stall = events.Stalled(step=200, seconds=130.0, where="synchronize", stacks=str(tmp_path / "stacks.txt"))
    source = HandFedSession(*training(tmp_path), stall)
    async with monitor(source) as pilot:
        shown = " ".join(text(pilot).split())
        assert "STALLED" in shown
        assert "in synchronize. All stacks: " in shown
        assert "stacks.txt" in shown
        source.waiting.append(events.StallEnded(step=200, seconds=150.0))
        await show(pilot)
        assert "STALLED" not in text(pilot)
        assert "Goes on after a stall of 150 s" in text(pilot)


async def test_steps_that_were_not_finite_are_marked_on_the_chart_and_counted(tmp_path: Path) -> None:
    bad = events.NotFinite(step=150, what="gradient", files=["a.png"])
    async with monitor(HandFedSession(*training(tmp_path), bad), (120, 36)) as pilot:
        assert "× not finite" in text(pilot)
        assert text(pilot).count("×") == 2
        assert "1 not finite" in text(pilot)
        assert "The gradient of step 150 is no number" in text(pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_held_out_losses_are_on_the_curve_and_by_noise_level_at_a_key(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    levels = [0.1, 0.3, 0.5, 0.7, 0.9]
    told = [
        events.Validated(step=step, levels=levels, losses=[loss] * 5, pictures=4)
        for step, loss in ((0, 0.08), (100, 0.04))
    ]
    async with monitor(HandFedSession(*training(tmp_path), *told), size) as pilot:
        assert "Loss  ◆ held out 0.04" in text(pilot)
        assert text(pilot).count("◆") == 2
        assert "Validation at step 100: loss 0.0400 on 4 held-out pictures" in text(pilot)
        await pilot.press("n")
        rows = text(pilot)
        assert "Held-out loss by noise  step 100" in rows
        assert all(f"{level:.0%}" in rows for level in levels)
        assert rows.count("-50%") == 6
        await pilot.press("n")
        assert "Loss  ◆ held out 0.04" in text(pilot)


async def test_memory_that_was_reduced_is_told_beside_the_numbers(tmp_path: Path) -> None:
    told = events.MemoryReduced(step=200, phase="step", change="gradient checkpointing is on")
    async with monitor(HandFedSession(*training(tmp_path), told), (120, 36)) as pilot:
        assert "memory reduced" in text(pilot)
        assert "WARNING Out of memory (step, step 200): gradient checkpointing is on; tried again" in text(pilot)


async def test_a_save_that_is_quicker_than_the_screen_is_not_waited_for(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        await pilot.press("s")
        source.waiting += [
            events.CommandReceived(command="save_now", step=201),
            events.CheckpointSaved(step=201, path=str(tmp_path / "x"), bytes=1, seconds=0.1),
        ]
        await show(pilot)
        assert "saving after this step" not in text(pilot)


async def test_a_command_that_another_terminal_overtook_is_not_waited_for(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path), events.Paused(step=200))
    async with monitor(source) as pilot:
        await pilot.press("p")
        assert "going on" in text(pilot)
        source.waiting += [
            events.CommandReceived(command="resume", step=200),
            events.Resumed(step=200),
            events.CommandReceived(command="park", step=200),
            events.Parked(step=200, freed_gib=7.9),
        ]
        await show(pilot)
        assert "PARKED - p brings it back" in text(pilot)


@pytest.mark.parametrize("size", [(60, 18), *SIZES])
async def test_the_screen_can_be_left_while_training_goes_on_in_this_process(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source, size) as pilot:
        await pilot.press("ctrl+q")
        for answer in ("y  Stop, save, quit", "l  Leave the screen", "n  Keep going"):
            assert answer in text(pilot)
        detail = str(pilot.app.screen.query_one("#detail", Static).render())
        assert "the shell is free when the run is over" in detail
        assert "lorasmith attach cats shows it again" in detail
        await pilot.press("l")
        await pilot.pause()
    assert pilot.app.return_code == 0
    assert source.sent == []


async def test_stopping_asks_first(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        for harmless in ("n", "escape", "ctrl+q"):
            await pilot.press("x")
            assert isinstance(pilot.app.screen, AskScreen)
            assert "Stop at step 200 of 400?" in text(pilot)
            await pilot.press(harmless)
            assert source.sent == []
        await pilot.press("x", "y")
        assert source.sent == [Command.STOP]
        assert "stopping: saving a checkpoint" in text(pilot)
        source.waiting.append(events.CommandReceived(command="stop", step=201))
        await show(pilot)
        assert "STOPPING" in text(pilot)


async def test_space_holds_the_chart_and_never_touches_the_training(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        await pilot.press("space")
        assert "charts paused" in text(pilot)
        before = len(monitor_screen(pilot).query_one(LossChart)._curve)
        source.waiting += [
            events.StepsDone(step=s, epoch=9, losses=[9.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=0.5)
            for s in range(201, 211)
        ]
        await show(pilot)
        # The header goes on.
        assert "Step 210/400" in text(pilot)
        assert len(monitor_screen(pilot).query_one(LossChart)._curve) == before
        await pilot.press("space")
        assert len(monitor_screen(pilot).query_one(LossChart)._curve) == 210
        assert source.sent == []


async def test_the_chart_keys_change_how_the_curve_is_shown(tmp_path: Path) -> None:
    async with monitor(HandFedSession(*training(tmp_path)), (120, 36)) as pilot:
        assert "smoothed 0.9  linear y  all steps" in text(pilot)
        await pilot.press("l", "right_square_bracket", "z", "z")
        assert "smoothed 0.95  log y  last 500" in text(pilot)
        await pilot.press(*["left_square_bracket"] * 9)
        assert "smoothed" not in text(pilot).splitlines()[monitor_screen(pilot).query_one(LossChart).region.y]


async def test_arrows_browse_the_previews(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    later = tmp_path / "later.png"
    Image.new("RGB", (64, 64), "blue").save(later)
    source.waiting.append(events.PreviewReady(step=200, prompt="zqx", seed=1, path=str(later), line=""))
    async with monitor(source) as pilot:
        assert "step 200 (2 of 2)" in text(pilot)
        await pilot.press("left")
        assert "step 100 (1 of 2)" in text(pilot)
        await pilot.press("down")
        await show(pilot)
        assert str(tmp_path / "1.png")[-20:] in text(pilot)
        await pilot.press("right")
        assert "step 200 (2 of 2)" in text(pilot)


async def test_tab_goes_through_chart_previews_and_log(tmp_path: Path) -> None:
    async with monitor(HandFedSession(*training(tmp_path))) as pilot:
        seen = []
        for _ in range(3):
            await pilot.press("tab")
            seen.append(pilot.app.focused.id if pilot.app.focused else None)
        assert seen == ["chart", "preview", "log"]


async def test_the_log_can_be_looked_back_in_and_stays_there(tmp_path: Path) -> None:
    lines = [events.Logged(severity="info", message=f"line {number:03}") for number in range(100)]
    source = HandFedSession(*begun(), *lines)
    async with monitor(source) as pilot:
        assert "line 099" in text(pilot)
        monitor_screen(pilot).query_one(LogTail).focus()
        await pilot.press("home")
        assert "Run cats started" in text(pilot)
        await pilot.press("end", "pageup")
        assert "line 089" in text(pilot)
        source.waiting.append(events.Logged(severity="info", message="line new"))
        await show(pilot)
        assert "line 089" in text(pilot)
        assert "line new" not in text(pilot)
        await pilot.press("end")
        assert "line new" in text(pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_the_end_tells_where_the_results_are_and_what_to_do_next(tmp_path: Path, size: tuple[int, int]) -> None:
    lora = "/runs/cats/export/cats.safetensors"
    export = events.ExportDone(step=400, path=lora, layout="kohya", keys=96, bytes=1, programs=["ComfyUI", "diffusers"])
    async with monitor(HandFedSession(*training(tmp_path), export, the_end()), size) as pilot:
        shown = text(pilot)
        for words in (
            "FINISHED",
            "Finished: That was it.",
            lora,
            str(tmp_path),
            'Write "zqx" in the prompt',
            "Copy the LoRA to models/loras (ComfyUI).",
            "took 2:10",
        ):
            assert words in shown, words
        assert "Enter or q leaves" in shown
        assert "x Stop" not in shown


async def test_a_stopped_run_tells_how_to_go_on(tmp_path: Path) -> None:
    saved = events.CheckpointSaved(step=200, path="/runs/cats/checkpoints/step-00000200", bytes=1, seconds=0.1)
    async with monitor(HandFedSession(*training(tmp_path), saved, the_end("stopped", 130)), (120, 36)) as pilot:
        assert "Go on from step 200: lorasmith train --resume /runs/cats" in text(pilot)


async def test_a_failed_run_tells_what_why_and_what_to_do() -> None:
    failed = events.RunEnded(
        outcome="failed", step=0, message="No memory.", why="8 GiB is too little.", fix="Lower the rank.", exit_code=6
    )
    async with monitor(HandFedSession(*begun(), failed)) as pilot:
        for words in ("FAILED", "Failed: No memory.", "8 GiB is too little.", "Lower the rank.", "ERROR"):
            assert words in text(pilot), words
        await pilot.press("q")
        await pilot.pause()
    assert pilot.app.return_code == 6


async def test_an_engine_that_dies_without_a_word_is_said() -> None:
    source = HandFedSession(*begun())
    async with monitor(source) as pilot:
        source.finished = True
        await show(pilot)
        assert "ended without a word" in text(pilot)


@pytest.mark.parametrize("key", ["enter", "q", "ctrl+q"])
async def test_enter_q_and_ctrl_q_leave_when_the_run_is_over(key: str) -> None:
    async with monitor(HandFedSession(*begun(), the_end("stopped", 130))) as pilot:
        await pilot.press(key)
        await pilot.pause()
    assert pilot.app.return_code == 130


@pytest.mark.parametrize("key", ["enter", "q"])
async def test_enter_and_q_do_nothing_while_training(key: str, tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        await pilot.press(key)
        assert pilot.app.is_running
        assert source.sent == []


async def test_quitting_while_training_stops_saves_and_then_leaves(tmp_path: Path) -> None:
    source = HandFedSession(*training(tmp_path))
    async with monitor(source) as pilot:
        await pilot.press("ctrl+q")
        assert "What shall become of it?" in text(pilot)
        await pilot.press("n")
        assert source.sent == []
        await pilot.press("ctrl+q", "y")
        assert source.sent == [Command.STOP]
        assert pilot.app.is_running
        source.waiting.append(the_end("stopped", 130))
        await show(pilot)
    assert pilot.app.return_code == 130


@pytest.mark.parametrize("key", ["f1", "question_mark"])
async def test_help_lists_the_keys_and_closes_on_any_key(key: str) -> None:
    async with monitor(HandFedSession(*begun())) as pilot:
        await pilot.press(key)
        assert "linear or logarithmic y axis" in text(pilot)
        assert "n           held-out loss by noise level" in text(pilot)
        assert "ctrl+q      quit; asks while this process trains" in text(pilot)
        await pilot.press("escape")
        assert "linear or logarithmic" not in text(pilot)


async def test_a_followed_run_can_be_watched_but_not_commanded(tmp_path: Path) -> None:
    class Tail:
        def __init__(self) -> None:
            self.told = training(tmp_path)

        def poll(self) -> list[events.Event]:
            told, self.told = self.told, []
            return told

    async with monitor(FollowedRun(Tail()), (120, 36)) as pilot:
        assert "Step 200/400" in text(pilot)
        assert "watching only" in text(pilot)
        assert "p Pause" not in text(pilot)
        await pilot.press("p", "x")
        assert not isinstance(pilot.app.screen, AskScreen)
        await pilot.press("ctrl+q")
        await pilot.pause()
    assert pilot.app.return_code == 0


async def test_nothing_is_repainted_when_nothing_changed(tmp_path: Path) -> None:
    async with monitor(HandFedSession(*training(tmp_path), the_end())) as pilot:
        screen = monitor_screen(pilot)
        painted: list[object] = []
        for widget in screen.query("*"):
            widget.refresh = lambda *regions, painted=painted, widget=widget, **options: painted.append(widget)  # type: ignore[assignment,misc]
        for _ in range(8):
            screen.poll()
        assert painted == []


@pytest.mark.parametrize("size", [(60, 18), (40, 12), (200, 60)])
async def test_other_sizes_do_not_fail(tmp_path: Path, size: tuple[int, int]) -> None:
    async with monitor(HandFedSession(*training(tmp_path), the_end()), (80, 24)) as pilot:
        await pilot.resize_terminal(*size)
        await show(pilot)
        assert "cats" in text(pilot)
