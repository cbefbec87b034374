"""What `lorasmith plan` finds out by trying: `--measure` does every stage of a run once; a step can be simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.engine.cli.output import columns, say, say_json, visible

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import BaseIdentity
    from lorasmith.engine.memory.calibration import Calibration
    from lorasmith.engine.memory.measured import RehearsalProgress
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.sources import BaseFiles


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


def measured_here(config: RunConfig, identity: BaseIdentity | None) -> Calibration:
    """Return what earlier runs of this family have measured on the card that the run will have."""
    from lorasmith.engine import hardware
    from lorasmith.engine.memory.calibration import UNKNOWN, card_key, read

    gpu = hardware.gpu_for(hardware.snapshot().gpus, config.train.device) if identity is not None else None
    return UNKNOWN if gpu is None or identity is None else read(card_key(gpu, identity.family))


def count_step(config: RunConfig, files: BaseFiles, identity: BaseIdentity) -> None:
    """Have the memory of one step counted where nobody has done so with such a model or adapter; it is kept.

    Whatever goes wrong there only means that there is no forecast.
    """
    from lorasmith.engine.families import families
    from lorasmith.engine.memory.of_run import Known, lacks_only_counting

    module = families()[identity.family]
    if not lacks_only_counting(config, Known(module.SPEC, files, config.dataset.resolution**2)):
        return
    say(
        "Counting the memory of one step with such a model and adapter, once; that can take some minutes.",
        to_stderr=True,
    )
    from lorasmith.engine.simulation import count_model

    try:
        count_model(module, files, identity, config)
    except Exception as error:
        say(f"It could not be counted: {error}", to_stderr=True)
