"""A captioner at work in a thread of its own: it can be asked to stop and how far it is, and it waits for nobody."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import LorasmithError

if TYPE_CHECKING:
    from lorasmith.engine.dataset.captioning import CaptioningResult, CaptioningStep
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.captioner_form import Load


@dataclass(frozen=True)
class Request:
    """What is asked of a captioner: its name, model and options, and the pictures."""

    captioner: str
    model: str
    settings: Mapping[str, Any]
    items: Sequence[ImageItem]
    overlay: Path
    replace_machine: bool = False


@dataclass
class CaptionerJob:
    """Loads the captioner and writes captions until all are done or `stop` was called; read by the screen's timer.

    `stage` says what is done before the first picture, `step` is the last finished picture. `failed` grows while the
    job runs; `result`, or `error`, is there once it is `over`.
    """

    request: Request
    load: Load
    started: float = field(default_factory=time.monotonic)
    stage: str = "importing the libraries"
    where: str = ""
    step: CaptioningStep | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    result: CaptioningResult | None = None
    error: LorasmithError | None = None
    over: bool = False
    stopping: bool = False

    def start(self) -> CaptionerJob:
        """Begin; the thread is no daemon, since one that computes must not outlive the interpreter."""
        threading.Thread(target=self._run, name="captioner").start()
        return self

    def stop(self) -> None:
        """End after the picture that is being captioned."""
        self.stopping = True

    @property
    def seconds(self) -> int:
        """Whole seconds since the start."""
        return int(time.monotonic() - self.started)

    def progress(self) -> str:
        """Return how far the job is, in words."""
        if self.over and self.result is not None:
            done, failed = len(self.result.done), len(self.result.failed)
            return f"{done:,} written, {failed:,} failed"
        if self.stopping:
            return f"stopping after this picture · {self.seconds} s"
        if self.step is None:
            return f"{self.stage} · {self.seconds} s"
        left = self.step.seconds_left
        eta = f" · about {_duration(left)} left" if left is not None and self.step.done < self.step.total else ""
        return f"{self.step.done:,} of {self.step.total:,} pictures{eta}"

    def _run(self) -> None:
        try:
            self._work()
        except LorasmithError as error:
            self.error = error
        except Exception as error:
            self.error = LorasmithError("The captioner failed unexpectedly.", why=f"{type(error).__name__}: {error}")
        finally:
            self.over = True

    def _work(self) -> None:
        from lorasmith.engine.dataset.captioning import caption_pictures

        request = self.request
        captioner = self.load(request.captioner, request.model, request.settings, self._tell)
        try:
            self.where, self.stage = captioner.where, "looking at the first picture"
            self.result = caption_pictures(
                request.items,
                captioner,
                request.overlay,
                replace_machine=request.replace_machine,
                on_progress=self._note,
                should_stop=lambda: self.stopping,
            )
        finally:
            captioner.close()
            del captioner
            gc.collect()

    def _tell(self, name: str, done: int, total: int) -> None:
        if self.stopping:
            raise LorasmithError("It was stopped before the model was there.", fix="What was downloaded is kept.")
        share = f" {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else ""
        self.stage = f"downloading {name}{share}"
        time.sleep(50e-6)  # lets the screen's thread in

    def _note(self, step: CaptioningStep) -> None:
        if step.failed:
            self.failed.append((step.relative, step.failed))
        self.step = step
        time.sleep(50e-6)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
