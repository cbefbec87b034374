"""Every place of the screen that a mistake can be put into: name → what breaks it, given the application."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from textual.app import App

from lorasmith.engine import event_words
from lorasmith.tui import bridge, driver
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.widgets.chart import LossChart
from lorasmith.tui.widgets.line import Line

Break = Callable[[App[Any]], App[Any] | None]
AFTER_CALLS = 6
LATER_SECONDS = 0.8


class Mistake(Exception):
    """What a crash of the screen raises here; the text tries to reach the terminal."""

    def __init__(self) -> None:
        super().__init__("a mistake\x1b[2J[red]")


def fail(*_: Any, **__: Any) -> None:
    raise Mistake


def later(action: Callable[[App[Any]], object]) -> Break:
    """Break something a moment after the screen is shown."""

    def break_it(app: App[Any]) -> None:
        kind: Any = type(app)
        mount = kind.on_mount

        def mounted(app: App[Any]) -> None:
            mount(app)
            app.set_timer(LATER_SECONDS, lambda: action(app))

        kind.on_mount = mounted

    return break_it


def method(owner: Any, name: str, *, after: int = 0, error: type[BaseException] = Mistake) -> Break:
    """Let a method fail from its call number `after` on."""

    def break_it(app: App[Any]) -> None:
        original, calls = getattr(owner, name), []

        def broken(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise error() if error is Mistake else error("a mistake")
            return original(*arguments, **options)

        setattr(owner, name, broken)

    return break_it


def raising(error: BaseException) -> Callable[[App[Any]], object]:
    def act(app: App[Any]) -> None:
        raise error

    return act


async def failing_worker() -> None:
    fail()


def start_async_worker(app: App[Any]) -> None:
    app.run_worker(failing_worker())


def start_thread_worker(app: App[Any]) -> None:
    app.run_worker(fail, thread=True)


def break_css(app: App[Any]) -> None:
    type(app).CSS = "Screen { color: no-such-color; }"


def break_late_css(app: App[Any]) -> None:
    app.screen.styles.background = "no-such-color"


def break_fold_and_words(app: App[Any]) -> None:
    method(bridge, "reduce", after=AFTER_CALLS)(app)
    method(event_words, "describe_event")(app)


def break_driver_stop(app: App[Any]) -> None:
    method(driver.SafeDriver, "stop_application_mode")(app)
    later(fail)(app)


def recurse(app: App[Any]) -> None:
    recurse(app)


def leave_by_exit(app: App[Any]) -> None:
    sys.exit(3)


def break_loop(app: App[Any]) -> None:
    loop: Any = app._loop
    loop.stop()


class Poison:
    """A report that shows local variables would fail once more, inside the handling of the first failure."""

    __repr__ = __rich_repr__ = fail


def hold_poison(app: App[Any]) -> None:
    poison = Poison()
    raise RuntimeError("with poison at hand", type(poison))


CRASHES: dict[str, Break] = {
    "compose": method(MonitorScreen, "compose"),
    "on_mount": method(MonitorScreen, "on_mount"),
    "timer": later(fail),
    "key": method(MonitorScreen, "action_help"),
    "key-lookup": method(MonitorScreen, "check_action", after=40),
    "render_line": method(Line, "render_line", after=AFTER_CALLS),
    "render_chart": method(LossChart, "render_line", after=AFTER_CALLS),
    "poll": method(MonitorScreen, "poll", after=3),
    "worker": later(start_async_worker),
    "thread-worker": later(start_thread_worker),
    "driver-start": method(driver.SafeDriver, "start_application_mode"),
    "driver-stop": break_driver_stop,
    "driver-write": method(driver.SafeDriver, "write", after=16),
    "writer-thread": method(driver.SafeWriter, "_write_all", after=12),
    "writer-memory": method(driver.SafeWriter, "_write_all", after=12, error=MemoryError),
    "input-thread": method(driver.XTermParser, "tick", after=10),
    "css": break_css,
    "late-css": later(break_late_css),
    "memory": later(raising(MemoryError("no memory"))),
    "recursion": later(recurse),
    "exit": later(leave_by_exit),
    "interrupt": later(raising(KeyboardInterrupt())),
    "loop": later(break_loop),
    "poison": later(hold_poison),
    "fold": method(bridge, "reduce", after=AFTER_CALLS),
    "bridge": method(bridge.Bridge, "poll", after=3),
    "fold-and-words": break_fold_and_words,
}
