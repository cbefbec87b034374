"""The running training: loss chart, gauges, previews, log, and the keys that command the run.

One timer polls the events, twice a second. What a person waits for (a pause, a stage, a log line, a preview) is shown
at once, the numbers once a second and the curve every other second, all in one pass: the screen and the training share
one interpreter, and each refresh costs the training up to 9 ms. The engine never waits for this screen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container, Horizontal
from textual.screen import Screen
from textual.widgets import Footer

from lorasmith.engine.commands import Command
from lorasmith.tui.bridge import AttachedRun, Bridge, FollowedRun, RunSource
from lorasmith.tui.end_bell import ring
from lorasmith.tui.screens import monitor_text as say
from lorasmith.tui.screens.monitor_help import MonitorHelp
from lorasmith.tui.screens.monitor_keys import KEYS
from lorasmith.tui.screens.monitor_questions import LEAVE, PARK, STOP, ask_park, ask_quit, ask_stop
from lorasmith.tui.state import LogLine, RunState
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
    """Shows `source` and sends it commands; leaving ends the application with its exit code, or calls `when_left`.

    While a training of this process goes on, leaving asks first: `request_quit` is what the application's quit action
    calls. A run of another process is left without a question: nothing here can end it but the stop command.
    """

    CSS_PATH = Path(__file__).with_name("monitor.tcss")
    AUTO_FOCUS = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012  (textual declares it so)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [*KEYS]

    def __init__(
        self,
        source: RunSource,
        resolved: object = None,
        state: RunState | None = None,
        when_left: Callable[[], None] | None = None,
    ) -> None:
        """Watch `source` from `state` on; `resolved`, the run's settings, is shown by what the events say of it."""
        super().__init__()
        self._when_left = when_left
        self.bridge = Bridge(source, state)
        self.charts_paused = False
        self._asked: Command | None = None
        self._asked_after: LogLine | None = None
        self._was_in_control = False
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
        self._notice = Summary(id="notice")
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
        """Whether the run belongs to another process, so that leaving never touches it."""
        return isinstance(self.bridge.source, FollowedRun | AttachedRun)

    @property
    def in_control(self) -> bool:
        """Whether commands reach the run."""
        source = self.bridge.source
        return source.in_control if isinstance(source, FollowedRun | AttachedRun) else True

    def compose(self) -> ComposeResult:
        """Three rows of words, chart and previews, gauges or the summary, log, keys."""
        yield from (self._headline, self._progress, self._numbers, self._notice)
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
        if self.over != self._summary_shown:
            self._show_end() if self.over else self._show_going_on()
        if self.in_control != self._was_in_control:
            self._was_in_control = self.in_control
            self.refresh_bindings()

    def _news(self) -> tuple[object, ...]:
        """What is worth a refresh at once."""
        state = self.state
        last_log = state.logs[-1] if state.logs else None
        return state.stage, state.paused, state.stopping, state.ended, last_log, len(state.previews), state.validations

    def _forget_asked(self) -> None:
        if self._asked and say.is_answered(self._asked, self.state, self._asked_after):
            self._asked = None

    def _show_words(self) -> None:
        state, marks, width = self.state, glyphs(), self.size.width - 2
        left, right = say.headline(state, self._asked, self.charts_paused, marks)
        if self.watching and not self.over:
            right = [*say.attached_words(self.bridge.source), *right]
        self._headline.show(left, right)
        self._progress.show(*say.progress_line(state, state.last_event_at, width, marks))
        self._numbers.show(say.numbers_line(state, self._chart.smoothed_loss(), width, marks))
        self._notice.show([] if self.over else say.notice_rows(state, getattr(self.bridge.source, "problem", "")))

    def _show_parts(self) -> None:
        state = self.state
        for gauge, reading in zip(self._gauges, hardware_readings(state.hardware), strict=True):
            gauge.show(reading)
        self._preview.show(state.previews)
        self._log.show(state.logs)

    def _show_chart(self) -> None:
        if not self.charts_paused:
            self._chart.show(self.state.losses, self.state.marks, self.state.validations)

    def _show_end(self) -> None:
        self._summary_shown = True
        self._asked = None
        self.charts_paused = False
        self._show_chart()
        self._show_words()
        source = self.bridge.source
        self._summary.show(
            say.summary_rows(self.state, watching=self.watching, sudden_end=getattr(source, "last_words", ""))
        )
        self.add_class("-ended")
        self.refresh_bindings()
        ring(self.app, self.state.ended, self.state.run)
        if self._leave_when_over:
            self._leave()

    def _show_going_on(self) -> None:
        """Show a run again that somebody resumed while its end was shown."""
        self._summary_shown = False
        self._summary.show([])
        self.remove_class("-ended")
        self.refresh_bindings()

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys that do something now: commands while the run goes on, leaving when it is over."""
        if action == "leave":
            return self.over or self.watching
        if action in ("pause_or_resume", "save_now", "preview_now", "park", "stop"):
            return self.in_control and not self.over
        if action == "pause_charts":
            return not self.over
        return True

    def send(self, command: Command) -> None:
        """Send `command` to the run and say that it was asked."""
        if self.over or not self.in_control:
            return
        self._asked = command
        self._asked_after = self.state.logs[-1] if self.state.logs else None
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

    def action_park(self) -> None:
        """Ask, then move everything off the card until the run is asked to go on."""
        if self.over or self.state.stopping:
            return
        if self.state.parked is not None:
            self.notify("It is parked already; p brings it back.", timeout=4)
            return
        self.app.push_screen(ask_park(self.state), self._answered)

    def action_stop(self) -> None:
        """Ask, then save a checkpoint and end the run."""
        if not (self.over or self.state.stopping):
            self.app.push_screen(ask_stop(self.state), self._answered)

    def _answered(self, answer: str | None) -> None:
        command = {STOP: Command.STOP, PARK: Command.PARK}.get(answer or "")
        if command is not None:
            self.send(command)

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

    def action_levels(self) -> None:
        """Show the held-out loss by noise level, or the curve again."""
        self._chart.toggle_levels()

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
        self.app.push_screen(MonitorHelp(self.attach_command))

    @property
    def attach_command(self) -> str:
        """The command that shows this run in any terminal, "" before its name is known."""
        return f"lorasmith attach {self.state.run}" if self.state.run else ""

    def action_leave(self) -> None:
        """Leave the monitor when the run is over or belongs to another process."""
        if self._when_left is not None:
            self._when_left()
        elif self.over or self.watching:
            self._leave()

    def action_request_quit(self) -> None:
        """Leave, or ask while training."""
        self.request_quit()

    def request_quit(self) -> None:
        """Leave when the run is over or belongs to another process; while training, ask what shall become of it."""
        if self.over or self.watching:
            self._leave()
        else:
            self.app.push_screen(ask_quit(self.attach_command), self._quit_answered)

    def _quit_answered(self, answer: str | None) -> None:
        if answer == LEAVE:
            self.app.exit(0)
        elif answer == STOP:
            self._leave_when_over = True
            if self.over:
                self._leave()
            else:
                self.send(Command.STOP)

    def _leave(self) -> None:
        """End the application with the run's exit code, 0 while it goes on and 1 where it ended without a word."""
        ended = self.state.ended
        code = ended.exit_code if ended else int(self.over)
        self.app.exit(code, return_code=code)
