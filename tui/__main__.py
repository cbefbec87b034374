"""The command `lorasmith`: the wizard on a terminal, the headless commands everywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.engine.session import Session

USAGE = """lorasmith: the wizard needs a terminal. Without one, use the commands:

  lorasmith demo --headless      train the demo LoRA and measure its trigger
  lorasmith train RUN.toml       train what a run file says (--set key=value changes it)
  lorasmith check FOLDER         look at a dataset
  lorasmith doctor               check this installation
  lorasmith --help               everything else
"""
EXIT_USAGE = 2
EXIT_STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the wizard, or one headless command, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"lorasmith {version('lorasmith')}")
        return 0
    if not arguments:
        if is_interactive():
            return run_wizard()
        print(USAGE, file=sys.stderr, end="")
        return EXIT_USAGE
    if arguments == ["demo"] and is_interactive():
        return run_wizard(demo=True)
    if arguments[0] == "attach" and is_interactive():
        put_monitor_into_attach()
    from lorasmith.engine.cli import main as run_command

    return run_command(arguments)


def put_monitor_into_attach() -> None:
    """Let `lorasmith attach` open the monitor: the commands know no screen."""
    from lorasmith.engine.cli import attach

    def open_monitor(run: RunFolder, read_only: bool) -> int:
        from lorasmith.tui.attach import open_attached

        return open_attached(run, read_only)

    attach.open_monitor = open_monitor


def is_interactive() -> bool:
    """Whether a full-screen interface can be shown: a real terminal, and no wish for plain lines."""
    if os.environ.get("TERM", "dumb") in ("dumb", "") or any(
        os.environ.get(n) for n in ("LORASMITH_PLAIN", "ACCESSIBLE")
    ):
        return False
    return sys.stdin.isatty() and sys.stdout.isatty()


def run_wizard(*, demo: bool = False) -> int:
    """Show the wizard until the user leaves; a training that still goes on is waited for."""
    from lorasmith.tui.app import LorasmithApp
    from lorasmith.tui.draft import Draft, state_folder
    from lorasmith.tui.screen_host import run_app

    # A worker that rarely lets go of the interpreter would hold the screen up for 5 ms a time at the default.
    sys.setswitchinterval(0.001)
    app = LorasmithApp(Draft() if demo else None, warm_up=True)
    code = run_app(app, lambda: app.session, state_folder() / "wizard.log")
    if app.for_tmux and app.session is None:
        from lorasmith.tui.disconnect import go_to_tmux

        try:
            go_to_tmux()
        except OSError as error:
            print(f"tmux could not be started: {error.strerror}.", file=sys.stderr)
    print("\n".join(app.last_words()), flush=True)
    if code == 0 and app.session is not None:
        code = measure_demo(app.session)
    if "torch" in sys.modules or is_working():
        end_now(code)
    return code


def measure_demo(session: Session) -> int:
    """Measure the trigger of a finished demo run on the plain terminal and return the exit code; others are left out.

    Ctrl-C leaves the measurement out: the LoRA is written by now.
    """
    import signal

    from lorasmith.engine.demo_run import is_demo, report_trigger
    from lorasmith.tui.text import safe_str

    config = session.config
    ended = session.outcome
    if ended is None or ended.outcome != "finished" or not is_demo(config.base.model, config.dataset.folder):
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return report_trigger(session.run, config, lambda line: print(safe_str(line), flush=True))
    except KeyboardInterrupt:
        print("Not measured. The LoRA is written all the same.")
        return EXIT_STOPPED


def is_working() -> bool:
    """Whether a thread of the wizard is still at work, such as a download."""
    import threading

    return any(thread.daemon for thread in threading.enumerate())


def end_now(code: int) -> NoReturn:
    """End the process without taking it apart.

    The run is joined and its files are closed by now. Taking torch and its company apart takes seconds (18 s were seen
    on a busy machine), and a half-done import or download in a daemon thread could crash it.
    """
    import atexit
    import logging

    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
