"""Every error that lorasmith raises on purpose.

    LorasmithError                 what happened, why, what to do
    ├── ConfigError                a setting is unknown, of the wrong type, out of range or contradicts another
    ├── BaseModelError             the base model cannot be found, read, recognised or loaded
    │   ├── HubError               the Hub refused or could not be reached
    │   └── CaptionerError         a captioner's model, or a package that it needs, is missing or damaged
    ├── DatasetError               the dataset is empty, unreadable or has open questions (missing captions)
    ├── HardwareError              no usable device, or not enough memory
    ├── StorageError               a path is not writable, or the disk is full
    │   └── CheckpointError        a checkpoint is damaged or belongs to another run
    ├── RunLockedError             another process trains in this run folder
    ├── TrainingError              the loss is not finite, or an optimizer cannot go on
    └── ExportError                the written LoRA does not prove to be what was trained

Exit codes of the command line: 0 done · 1 an unexpected error · 2 wrong usage · 3 settings · 4 base model, captioner ·
5 dataset · 6 hardware · 7 storage · 8 run locked · 9 training · 10 export ·
130 stopped by Ctrl-C or SIGTERM: with a checkpoint saved, unless it was asked twice or nothing was trained yet.
"""

from __future__ import annotations

EXIT_STOPPED = 130


class LorasmithError(Exception):
    """An expected failure, told in three parts; any part may hold foreign text and must be shown through safe_text."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        """Keep what happened, why, and what to do, each one sentence."""
        self.what = what
        self.why = why
        self.fix = fix
        super().__init__(" ".join(part for part in (what, why, fix) if part))


class ConfigError(LorasmithError):
    """A setting is unknown, of the wrong type, out of range or contradicts another."""

    exit_code = 3


class BaseModelError(LorasmithError):
    """The base model cannot be found, read, recognised or loaded."""

    exit_code = 4


class HubError(BaseModelError):
    """The Hub refused access or could not be reached."""


class CaptionerError(BaseModelError):
    """A captioner's model, or a package that it needs, is missing or damaged."""


class DatasetError(LorasmithError):
    """The dataset is empty, unreadable or leaves a question open."""

    exit_code = 5


class HardwareError(LorasmithError):
    """There is no usable device, or not enough memory."""

    exit_code = 6


class StorageError(LorasmithError):
    """A path is not writable, or the disk is full."""

    exit_code = 7


class CheckpointError(StorageError):
    """A checkpoint is damaged or belongs to another run."""


class RunLockedError(LorasmithError):
    """Another process trains in this run folder."""

    exit_code = 8


class TrainingError(LorasmithError):
    """Training cannot go on: the loss is not finite, or a step failed."""

    exit_code = 9


class ExportError(LorasmithError):
    """The written LoRA does not prove to be what was trained."""

    exit_code = 10
