"""The headless commands: `lorasmith train`, `demo`, `attach`, `check`, `caption`, `plan`, `runs`, `export` and more.

Starting is cheap: each command imports what it needs when it runs, so `--version` and `--help` never load torch.
A LorasmithError ends with its three parts on stderr and its own exit code, anything unexpected with the path of a log.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lorasmith.engine import errors
from lorasmith.engine.cli.attach import attach as _attach
from lorasmith.engine.cli.caption import caption_app
from lorasmith.engine.cli.caption_edit import edit as _edit
from lorasmith.engine.cli.caption_edit import restore as _restore
from lorasmith.engine.cli.caption_edit import tags as _tags
from lorasmith.engine.cli.caption_edit import write as _write
from lorasmith.engine.cli.check import check as _check
from lorasmith.engine.cli.doctor import doctor as _doctor
from lorasmith.engine.cli.export import export as _export
from lorasmith.engine.cli.inspect import inspect as _inspect
from lorasmith.engine.cli.output import fail, make_streams_safe, write_crash_log
from lorasmith.engine.cli.plan import plan as _plan
from lorasmith.engine.cli.queue import queue_app
from lorasmith.engine.cli.runs import runs_app
from lorasmith.engine.cli.train import NEWEST
from lorasmith.engine.cli.train import demo as _demo
from lorasmith.engine.cli.train import train as _train
from lorasmith.engine.errors import EXIT_STOPPED, LorasmithError


def _exit_codes() -> str:
    return "Exit codes" + (errors.__doc__ or "").partition("\nExit codes")[2].strip("\n")


app = typer.Typer(
    name="lorasmith",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=_exit_codes(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Train image LoRAs on this machine. Without a command, lorasmith opens its wizard.",
)


for _command in (_train, _demo, _attach, _check, _plan, _doctor, _inspect, _export):
    app.command()(_command)
for _caption_command in (_edit, _tags, _write, _restore):
    caption_app.command()(_caption_command)
app.add_typer(caption_app, name="caption")
app.add_typer(runs_app, name="runs")
app.add_typer(queue_app, name="queue")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lorasmith {importlib.metadata.version('lorasmith')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Hold the options that come before a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; prints every error, raises none."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    make_streams_safe()
    try:
        app(args=_complete_resume(given), prog_name="lorasmith")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except LorasmithError as error:
        fail(error, as_json="--json" in given)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except Exception as error:
        fail(write_crash_log(error), as_json="--json" in given)
        return LorasmithError.exit_code
    return 0


def _complete_resume(arguments: Sequence[str]) -> list[str]:
    """Give a bare `--resume` its value: the parser knows no option whose value may be left out."""
    completed = []
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else "-"
        bare = argument == "--resume" and (following.startswith("-") or following.endswith(".toml"))
        completed.append(f"--resume={NEWEST}" if bare else argument)
    return completed
