"""`lorasmith plan --measure`: every stage of a run tried once on this machine, and what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.engine.cli.output import columns, say, say_json, visible

if TYPE_CHECKING:
    from lorasmith.engine.memory.measured import RehearsalProgress
    from lorasmith.engine.run_file import ResolvedConfig


def show_measure(resolved: ResolvedConfig, *, as_json: bool) -> None:
    """Rehearse a run and print what each stage took; lines on the way are left out with `as_json`.

    Ctrl-C ends it at once and leaves nothing behind.
    """
    from lorasmith.engine.doctor.set_aside import set_aside_broken_packages

    set_aside_broken_packages()
    # Torch takes seconds, which no other plan needs.
    from lorasmith.engine.rehearsal import rehearse

    def show(progress: RehearsalProgress) -> None:
        if not as_json:
            mark = "done" if progress.measured is not None else "…"
            say(f"{progress.stage:12} {mark:4} {visible(progress.message)}")

    found = rehearse(resolved, show)
    if as_json:
        say_json(found.to_json())
        return
    say("")
    for line in columns([("run", resolved.config.run.name), *found.rows()], indent=""):
        print(line)
