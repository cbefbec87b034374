"""The running training: loss chart, gauges, previews, log, and the keys that command the run.

One timer polls the events, twice a second. What a person waits for (a pause, a stage, a log line, a preview) is shown
at once, the numbers once a second and the curve every other second, all in one pass: the screen and the training share
one interpreter, and each refresh costs the training up to 9 ms. The engine never waits for this screen.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal
from textual.screen import Screen
from textual.widgets import Footer

from lorasmith.engine.commands import Command
from lorasmith.tui.bridge import Bridge, FollowedRun, RunSource
from lorasmith.tui.screens import monitor_text as say
from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.screens.monitor_help import MonitorHelp
from lorasmith.tui.state import RunState
from lorasmith.tui.widgets.chart import LossChart
from lorasmith.tui.widgets.gauge import Gauge, hardware_readings
from lorasmith.tui.widgets.line import Line, glyphs
from lorasmith.tui.widgets.log_tail import LogTail
from lorasmith.tui.widgets.preview import Preview
from lorasmith.tui.widgets.summary import Summary

POLL_SECONDS = 0.5
POLLS_PER_REFRESH = 2
POLLS_PER_CHART = 4


class MonitorScreen(Screen[None]):
    """Shows `source` and sends it commands; leaving ends the application with the run's exit code.

    While a training goes on, leaving asks first: `request_quit` is what the application's quit action calls.
    """

    CSS_PATH = Path(__file__).with_name("monitor.tcss")
    AUTO_FOCUS = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012  (textual declares it so)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause_or_resume", "Pause", id="monitor.pause"),
        Binding("s", "save_now", "Save", id="monitor.save"),
        Binding("v", "preview_now", "Preview", id="monitor.preview"),
        Binding("x", "stop", "Stop", id="monitor.stop"),
        Binding("space", "pause_charts", "Charts", id="monitor.charts"),
        Binding("l", "log_y", "Log y", show=False, id="monitor.log_y"),
        Binding("left_square_bracket", "smooth(-1)", "Smooth less", show=False, id="monitor.smooth_less"),
        Binding("right_square_bracket", "smooth(1)", "Smooth more", show=False, id="monitor.smooth_more"),
        Binding("z", "window", "Window", show=False, id="monitor.window"),
        Binding("left", "browse(-1, 0)", "Earlier preview", show=False, id="monitor.earlier"),
        Binding("right", "browse(1, 0)", "Later preview", show=False, id="monitor.later"),
        Binding("up", "browse(0, -1)", "Previous prompt", show=False, id="monitor.prompt_before"),
        Binding("down", "browse(0, 1)", "Next prompt", show=False, id="monitor.prompt_after"),
        Binding("y", "copy_path", "Copy path", show=False, id="monitor.copy"),
        Binding("f1,question_mark", "help", "Help", id="monitor.help", key_display="F1"),
        Binding("enter,q", "leave", "Leave", id="monitor.leave", key_display="enter"),
        Binding("ctrl+q", "request_quit", "Quit", id="monitor.quit"),
    ]

    def __init__(self, source: RunSource, resolved: object = None, state: RunState | None = None) -> None:
        """Watch `source` from `state` on; `resolved`, the run's settings, is shown by what the events say of it."""
        super().__init__()
        self.bridge = Bridge(source, state)
        self.charts_paused = False
        self._asked: Command | None = None
        self._leave_when_over = False
        self._polls = 0
        self._unseen = False
        self._news_shown: tuple[object, ...] = ()
        self._summary_shown = False
        self._headline = Line(id="headline")
        self._progress = Line(id="progress")
        self._numbers = Line(id="numbers")
        self._chart = LossChart(id="chart")
        self._preview = Preview(id="preview")
        self._gauges = [Gauge(reading) for reading in hardware_readings(None)]
        self._summary = Summary(id="summary")
        self._log = LogTail(id="log")

    @property
    def state(self) -> RunState:
        """What is known of the run."""
        return self.bridge.state

    @property
    def over(self) -> bool:
        """Whether the run ended, or its thread is gone without a word."""
        return self.state.ended is not None or self.bridge.source.finished

    @property
    def watching(self) -> bool:
        """Whether the run belongs to another process, so that it can be watched but not commanded."""
        return isinstance(self.bridge.source, FollowedRun)

    def compose(self) -> ComposeResult:
        """Three rows of words, chart and previews, gauges or the summary, log, keys."""
        yield from (self._headline, self._progress, self._numbers)
        with Horizontal(id="pictures"):
            yield from (self._chart, self._preview)
        with Container(id="gauges"):
            yield from self._gauges
        yield from (self._summary, self._log)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Start polling."""
        self.set_class(glyphs().name == "ascii", "-ascii")
        self.set_interval(POLL_SECONDS, self.poll)
        self.call_after_refresh(self.poll)

    def poll(self) -> None:
        """Take in what the engine said since the last time and show what changed."""
        self._unseen = self.bridge.poll() or self._unseen
        self._polls += 1
        news = self._news()
        is_new = news != self._news_shown
        if is_new or self._polls % POLLS_PER_REFRESH == 0:
            self._news_shown = news
            if self._unseen:
                self._forget_asked()
                self._show_parts()
            if is_new or self._polls % POLLS_PER_CHART == 0:
                self._show_chart()
            self._unseen = False
            self._show_words()
        if self.over and not self._summary_shown:
            self._show_end()

    def _news(self) -> tuple[object, ...]:
        """What is worth a refresh at once."""
        state = self.state
        last_log = state.logs[-1] if state.logs else None
        return state.stage, state.paused, state.stopping, state.ended, last_log, len(state.previews)

    def _forget_asked(self) -> None:
        state = self.state
        answered = {
            Command.PAUSE: state.paused,
            Command.RESUME: not state.paused,
            Command.STOP: state.stopping,
        }
        # Saving and previews are told by the log as they happen; the word goes when the engine took the command up.
        latest = state.logs[-1].message if state.logs else ""
        if self._asked and answered.get(self._asked, latest.startswith("Command at")):
            self._asked = None

    def _show_words(self) -> None:
        state, marks, width = self.state, glyphs(), self.size.width - 2
        left, right = say.headline(state, self._asked, self.charts_paused, marks)
        if self.watching and not self.over:
            right = [("watching another process  ", "dim"), *right]
        self._headline.show(left, right)
        self._progress.show(*say.progress_line(state, time.time(), width, marks))
        self._numbers.show(say.numbers_line(state, self._chart.smoothed_loss(), width, marks))

    def _show_parts(self) -> None:
        state = self.state
        for gauge, reading in zip(self._gauges, hardware_readings(state.hardware), strict=True):
            gauge.show(reading)
        self._preview.show(state.previews)
        self._log.show(state.logs)

    def _show_chart(self) -> None:
        if not self.charts_paused:
            self._chart.show(self.state.losses)

    def _show_end(self) -> None:
        self._summary_shown = True
        self._asked = None
        self.charts_paused = False
        self._show_chart()
        self._show_words()
        self._summary.show(say.summary_rows(self.state, watching=self.watching))
        self.add_class("-ended")
        self.refresh_bindings()
        if self._leave_when_over:
            self.action_leave()

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys that do something now: commands while the run goes on, leaving when it is over."""
        if action == "leave":
            return self.over
        if action in ("pause_or_resume", "save_now", "preview_now", "stop"):
            return not (self.over or self.watching)
        if action == "pause_charts":
            return not self.over
        return True

    def send(self, command: Command) -> None:
        """Send `command` to the run and say that it was asked."""
        if self.over or self.watching:
            return
        self._asked = command
        self.bridge.source.send(command)
        self._show_words()

    def action_pause_or_resume(self) -> None:
        """Pause training at the next step, or go on."""
        self.send(Command.RESUME if self.state.paused else Command.PAUSE)

    def action_save_now(self) -> None:
        """Save a checkpoint at the next step."""
        self.send(Command.SAVE_NOW)

    def action_preview_now(self) -> None:
        """Draw the previews at the next step."""
        self.send(Command.PREVIEW_NOW)

    def action_stop(self) -> None:
        """Ask, then save a checkpoint and end the run."""
        if self.over or self.state.stopping:
            return
        answers = (Answer("y", "Stop and save", "stop"), Answer("n", "Keep going", ""))
        question = f"Stop at step {self.state.step} of {self.state.total_steps}?"
        detail = "A checkpoint is saved first; the run can be resumed from it exactly."
        self.app.push_screen(AskScreen(question, detail, answers), self._stop_answered)

    def _stop_answered(self, answer: str | None) -> None:
        if answer:
            self.send(Command.STOP)

    def action_pause_charts(self) -> None:
        """Hold the chart still, or let it go on; training is not touched."""
        self.charts_paused = not self.charts_paused
        self._show_words()
        if not self.charts_paused:
            self._show_chart()

    def action_log_y(self) -> None:
        """Switch the y axis."""
        self._chart.toggle_log()

    def action_smooth(self, direction: int) -> None:
        """Smooth the curve more or less."""
        self._chart.smooth_more(direction)
        self._show_words()

    def action_window(self) -> None:
        """Show all steps or the last ones."""
        self._chart.next_window()

    def action_browse(self, steps: int, prompts: int) -> None:
        """Select another preview."""
        self._preview.browse(steps, prompts)

    def action_copy_path(self) -> None:
        """Copy the path of the LoRA when the run is over, else of the selected preview."""
        selected = self._preview.browser.selected
        path = self.state.exports[-1].path if self.state.exports else selected.path if selected else ""
        if not path:
            self.notify("There is no file yet.", timeout=3)
            return
        copy: Any = getattr(self.app, "copy_text", self.app.copy_to_clipboard)
        copy(path)

    def action_help(self) -> None:
        """Explain the screen and its keys."""
        self.app.push_screen(MonitorHelp())

    def action_leave(self) -> None:
        """Leave the monitor when the run is over."""
        if not self.over:
            return
        ended = self.state.ended
        self.app.exit(ended.exit_code if ended else 1, return_code=ended.exit_code if ended else 1)

    def action_request_quit(self) -> None:
        """Leave, or ask while training."""
        self.request_quit()

    def request_quit(self) -> None:
        """Leave when the run is over or belongs to another process; while training, ask what shall become of it."""
        if self.over or self.watching:
            ended = self.state.ended
            code = ended.exit_code if ended else 0
            self.app.exit(code, return_code=code)
            return
        answers = (Answer("y", "Stop, save, quit", "stop"), Answer("n", "Keep going", ""))
        detail = "A checkpoint is saved first; the run can be resumed from it exactly. Quitting waits for it."
        self.app.push_screen(AskScreen("Training goes on. Stop it and quit?", detail, answers), self._quit_answered)

    def _quit_answered(self, answer: str | None) -> None:
        if not answer:
            return
        self._leave_when_over = True
        if self.over:
            self.action_leave()
        else:
            self.send(Command.STOP)
