"""Extending a run: more steps, or another learning rate, with the schedule planned anew from its newest checkpoint.

Its own action, since a longer run is another run: a cosine that ends at step 1500 nowhere equals one that ends at 1000.
`schedule.start_step` is set to the checkpoint's step; what lies before stays as it was, and `words` say what comes.
Nothing is written before `apply_extension`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tomlkit

from lorasmith.engine.checkpoints import Checkpoint, load_checkpoint, newest_checkpoint
from lorasmith.engine.combinations import ONE_RATE
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError, ConfigError
from lorasmith.engine.lr_schedules import lr_factor
from lorasmith.engine.resume import MAY_CHANGE, MAY_EXTEND, settings_before
from lorasmith.engine.run_file import Layer, flatten, resolve_config, update_toml
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.storage import atomic_write

START, WARMUP, STEPS = "schedule.start_step", "schedule.warmup_steps", "train.steps"
_WARMUP_SHARE = 10
"""A warm-up that does not fit is shortened to one in so many of the steps that are left."""
_SHAPES = {
    "constant": "the rate is constant",
    "linear": "the rate falls in a straight line",
    "cosine": "the cosine begins anew",
    "cosine_restarts": "the cosines with restarts begin anew",
    "polynomial": "the polynomial fall begins anew",
    "rex": "the REX fall begins anew",
    "wsd": "the stable part with its fall begins anew",
    "inverse_sqrt": "the fall by the square root begins anew",
}


@dataclass(frozen=True)
class Extension:
    """A planned extension: the whole settings, the step it begins after, and what will happen in plain sentences.

    `changes` are those of run.toml by dotted key; `before` is the run file that they were planned for.
    """

    config: RunConfig
    checkpoint_step: int
    words: list[str]
    changes: dict[str, Any]
    before: str


def plan_extension(run: RunFolder, steps: int | None, assignments: Layer | None) -> Extension:
    """Plan to train `run` on from its newest intact checkpoint, to `steps` in all (None: as many as so far).

    `assignments` may change the schedule, learning rates, weight decay, clipping and number format. Raises ConfigError
    naming the setting that an extension cannot change or that does not fit, CheckpointError without a checkpoint.
    """
    before = _read(run)
    current = run.load_config().config
    damaged: list[str] = []
    checkpoint = newest_checkpoint(run.checkpoints, lambda path, why: damaged.append(f"{path.name} ({why})"))
    if checkpoint is None:
        raise CheckpointError(
            f"{run.path} has no intact checkpoint, so there is nothing to extend.",
            why=f"Damaged: {', '.join(damaged)}." if damaged else "None was saved yet.",
            fix="Start a new run with the settings that you want.",
        )
    origin = assignments.origin if assignments else "extension"
    changes = dict(flatten(assignments.values)) if assignments else {}
    changes |= {} if steps is None else {STEPS: steps}
    _refuse_other_settings(changes, origin)
    past = resolve_config([Layer("checkpoint", checkpoint.state["config"])]).config
    changes[START] = checkpoint.step
    # Checked by themselves first: what follows counts with them.
    wanted = _resolved(current, {key: value for key, value in changes.items() if key != START} | {START: 0}, origin)
    _require_steps_left(wanted, checkpoint, past)
    warmup, warmup_words = _plan_warmup(past, wanted, checkpoint.step, asked=WARMUP in changes)
    config = _resolved(current, changes | {WARMUP: warmup}, origin)
    changes |= {WARMUP: warmup} if warmup != current.schedule.warmup_steps else {}
    words = [*_past_words(checkpoint.step, damaged), *_rate_words(past, config, checkpoint.step), *warmup_words]
    words += [*_other_words(current, config), *_file_words(run, config)]
    return Extension(config, checkpoint.step, words, changes, before)


def apply_extension(run: RunFolder, extension: Extension) -> None:
    """Write the extension into the run's run.toml; the old one is kept beside it as run.toml.before-STEP.

    The next start of the run trains on. Raises RunLockedError where somebody works on the run, ConfigError where its
    settings, or CheckpointError where its checkpoint, are no longer those that the extension was planned for.
    """
    lock = RunLock(run)
    try:
        if _read(run) != extension.before:
            raise ConfigError(f"{run.run_file} has changed meanwhile.", fix="Plan the extension again.")
        load_checkpoint(run.checkpoints, extension.checkpoint_step)
        kept = settings_before(run.path, extension.checkpoint_step)
        if not kept.exists():
            # Where it does, this is a second plan for the same step, and the file is from before the first.
            atomic_write(kept, extension.before.encode())
            kept.chmod(0o600)
        atomic_write(run.run_file, _extended_file(extension).encode())
        run.run_file.chmod(0o600)
    finally:
        lock.release()


def _extended_file(extension: Extension) -> str:
    """Return the new text of run.toml; each changed setting says where it comes from."""
    items = {key: tomlkit.item(value) for key, value in extension.changes.items()}
    for item in items.values():
        item.comment(f"from the extension at step {extension.checkpoint_step}")
    return update_toml(extension.before, items)


def _read(run: RunFolder) -> str:
    try:
        return run.run_file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the run file {run.run_file}.", why=str(error), fix="Check the file.") from error


def _resolved(current: RunConfig, changes: Mapping[str, Any], origin: str) -> RunConfig:
    return resolve_config([Layer("run.toml", current.model_dump()), Layer(origin, changes)]).config


def _refuse_other_settings(changes: Mapping[str, Any], origin: str) -> None:
    for key in changes:
        if key == START:
            raise ConfigError(
                f"{START} ({origin}) is not yours to set: an extension begins at the newest checkpoint.",
                fix="Leave it out.",
            )
        if not key.startswith(MAY_CHANGE + MAY_EXTEND):
            allowed = ", ".join(name + "*" if name.endswith(".") else name for name in MAY_EXTEND)
            raise ConfigError(
                f"An extension cannot change {key} ({origin}).",
                why=f"What was learnt so far depends on it. These can be changed: {allowed}.",
                fix="Start a new run with it.",
            )


def _require_steps_left(wanted: RunConfig, checkpoint: Checkpoint, past: RunConfig) -> None:
    step, total = checkpoint.step, wanted.train.steps
    if total <= step:
        raise ConfigError(
            f"The run has reached step {step} already, and train.steps is {total}.",
            why="An extension needs steps to train: train.steps counts from the beginning of the run.",
            fix=f"Ask for more, for example {step + max(1, step // 2)}.",
        )
    if past.schedule.start_step == step > 0:
        raise ConfigError(
            f"The schedule of this run begins at step {step} already, and no step was trained since.",
            fix="Resume the run, stop it after some steps, and extend it then.",
        )


def _plan_warmup(past: RunConfig, wanted: RunConfig, step: int, *, asked: bool) -> tuple[int, list[str]]:
    """Return the steps of the warm-up, and a sentence where they differ from what the settings say.

    It is left out where the rate does not rise, and shortened where it does not fit; neither where it was asked for.
    """
    warmup, left = wanted.schedule.warmup_steps, wanted.train.steps - step
    if asked or not warmup or step == 0:
        return warmup, []
    if wanted.optimizer.learning_rate <= _rate(past, step):
        return 0, [f"There is no warm-up, since the rate does not rise (schedule.warmup_steps was {warmup})."]
    if warmup < left:
        return warmup, []
    short = left // _WARMUP_SHARE
    return short, [f"The warm-up is shortened from {warmup} to {short} of the {left} steps that are left."]


def _rate(config: RunConfig, step: int) -> float:
    """Return the learning rate in the step that is the `step`-th, counted from 1."""
    return config.optimizer.learning_rate * lr_factor(config.schedule, step - 1, config.train.steps)


def _past_words(step: int, damaged: list[str]) -> list[str]:
    words = [f"The newer checkpoint {name} is damaged and is not used." for name in reversed(damaged)]
    if step == 0:
        return [*words, "Nothing was learnt yet: the run begins at step 1."]
    steps = "Step 1 stays as it was" if step == 1 else f"Steps 1 to {step} stay as they were"
    return [*words, f"{steps}; weights and optimizer go on from the checkpoint of step {step}."]


def _rate_words(past: RunConfig, config: RunConfig, step: int) -> list[str]:
    """Say how the rate goes on, and what it would have done."""
    name, warmup, total = config.schedule.name, config.schedule.warmup_steps, config.train.steps
    top = f"{config.optimizer.learning_rate:g}"
    rises = f" after rising over {warmup} step{'' if warmup == 1 else 's'}" if warmup else ""
    restarts = f", {config.schedule.restarts} times" if name == "cosine_restarts" else ""
    words = f"From step {step + 1} {_SHAPES[name]} at {top}{rises}{restarts} and ends at step {total}"
    old = f"{past.optimizer.learning_rate:g}"
    end = past.train.steps
    if past.schedule.name == "constant":
        told = f"{words}; until now the rate was to stay at {old} to step {end}."
    else:
        had = "ended" if step == end else "would have ended"
        told = f"{words}; until now the rate {had} at {_rate(past, end):.2g} at step {end}."
    sentences = [told]
    if step and (last := _rate(past, step)) != (first := _rate(config, step + 1)):
        sentences.append(f"The rate goes from {last:.3g} in step {step} to {first:.3g} in step {step + 1}.")
    if config.optimizer.name in ONE_RATE:
        sentences.append(f"These rates are factors on the one that {config.optimizer.name.capitalize()} finds.")
    return sentences


def _other_words(current: RunConfig, config: RunConfig) -> list[str]:
    """Name the settings that change beside steps, schedule and learning rate."""
    told = (STEPS, "schedule.", "optimizer.learning_rate")
    old, new = flatten(current.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    changed = [key for key in new if old.get(key) != new[key] and not key.startswith(told)]
    return [f"{key} changes from {old.get(key)} to {new[key]}." for key in changed]


def _file_words(run: RunFolder, config: RunConfig) -> list[str]:
    """Warn of the LoRA file that the end of the extended run replaces."""
    names = sorted(path.name for path in run.export.glob("*.safetensors")) if run.export.is_dir() else []
    if not names:
        return []
    return [f"At the end {', '.join(names)} in {run.export} is written anew; copy it to keep what it is now."]
