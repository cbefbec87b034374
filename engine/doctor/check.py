"""What a check says, and how it is kept from raising, hanging or taking others down with it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lorasmith.engine.run_log import plain_text

Status = Literal["pass", "warn", "fail", "skip"]
Choice = tuple[str, Any]
"""A setting's dotted key and one of its values."""
Combination = tuple[Choice, ...]
"""Choices that cannot be used with each other, though each may be usable by itself."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    `meaning` says in a sentence what it means for the user; `fix` is one line to copy or to follow. Both are empty
    where nothing is to be done. `disables` are the choices that cannot be used on this machine because of it, and
    `disables_together` those that cannot be used with each other. What is `optional` stops no training by failing: its
    choices are taken away. `crashed` where trying it ended or hung a process. `speedup` is how many times as fast as
    without it something was, where that was measured. `seconds` is how long the check took.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    meaning: str = ""
    disables: tuple[Choice, ...] = ()
    disables_together: tuple[Combination, ...] = ()
    optional: bool = False
    crashed: bool = False
    speedup: float = 0.0
    seconds: float = field(default=0.0, compare=False)

    @property
    def blocking(self) -> bool:
        """Whether no training should be started before this is mended."""
        return self.status == "fail" and not self.optional

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and whether it is `blocking`, as JSON can hold them."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**found, "blocking": self.blocking, "seconds": round(self.seconds, 2)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Check:
        """Return the check that `to_json` gave; raises TypeError, KeyError or ValueError where it is damaged."""
        known = {each.name: stored[each.name] for each in fields(cls)}
        known["disables"] = tuple(_choice(each) for each in stored["disables"])
        known["disables_together"] = tuple(
            tuple(_choice(each) for each in combination) for combination in stored["disables_together"]
        )
        return cls(**known)


def _choice(stored: Any) -> Choice:
    key, value = stored
    return str(key), value


class NoAnswerError(Exception):
    """Something took longer than it may."""


def answer_within(seconds: float, call: Callable[[], Check]) -> Check:
    """Return what `call` says within `seconds`; raises what it raises, or NoAnswerError while it goes on behind.

    It runs in a thread of its own, which ends with the process: a driver, a disk or a network may never answer.
    """
    answers: list[Check] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise NoAnswerError(no_answer(seconds))
    return answers[0]


def no_answer(seconds: float) -> str:
    """Return in words that something took longer than `seconds`."""
    return f"did not answer in {seconds:g} s"


def broken(name: str, error: BaseException) -> Check:
    """Return the failed check that stands for an exception in the middle of it."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = lines[0] if isinstance(error, NoAnswerError) else f"{type(error).__name__}: {lines[0]}"
    return Check(name, "fail", plain_text(text))


def isolated(name: str, call: Callable[[], Check], seconds: float | None = None) -> Check:
    """Return what `call` says; a failed check where it raises, ends the process, or takes more than `seconds`."""
    started = time.monotonic()
    try:
        check = call() if seconds is None else answer_within(seconds, call)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        check = broken(name, error)
    return replace(check, seconds=time.monotonic() - started)


def is_wsl() -> bool:
    """Tell whether this Linux runs inside Windows (WSL), where driver and disks belong to Windows."""
    try:
        with open("/proc/sys/kernel/osrelease", encoding="ascii", errors="replace") as file:
            return "microsoft" in file.read().lower()
    except OSError:
        return False


def reinstall(*requirements: str) -> str:
    """Return the command that installs these requirements anew, as they are, into this environment."""
    wanted = " ".join(f"'{requirement}'" for requirement in requirements)
    return f"{sys.executable} -m pip install --force-reinstall --no-deps {wanted}"
