"""A session whose engine thread trains a small network in many small operations, as the trainer does.

Many tiny kernels are the worst case for a screen in the same process: the thread is inside Python nearly all the time.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from queue import SimpleQueue

from lorasmith.engine import events
from lorasmith.engine.commands import Command
from lorasmith.engine.session import SWITCH_SECONDS
from lorasmith.engine.trainer import YIELD_SECONDS

LOG_EVERY = 10
LAYERS = 60


class BusySession:
    """The session's interface around a real torch loop; `steps` holds (end of the step, seconds) of each step."""

    outcome = None

    def __init__(self, total_steps: int = 1_000_000) -> None:
        self.finished = False
        self.steps: list[tuple[float, float]] = []
        self.waiting: list[events.Event] = []
        self._total = total_steps
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        """Start training."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def drain(self) -> list[events.Event]:
        """Return the events since the last call."""
        taken, self.waiting = self.waiting, []
        return taken

    def send(self, command: Command) -> None:
        """End on STOP; nothing else is understood."""
        self._commands.put(command)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread."""
        self._thread.join(timeout)
        return self.finished

    def _run(self) -> None:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
        started = events.RunStarted(
            run="benchmark", total_steps=self._total, resumed_from=0, config={}, versions={}, device="cpu"
        )
        self.waiting += [started, events.StageChanged(stage="train", label="Training")]
        layers = [torch.nn.Linear(32, 32) for _ in range(LAYERS)]
        optimizer = torch.optim.AdamW([weight for layer in layers for weight in layer.parameters()], lr=1e-4)
        gc.collect()
        gc.freeze()
        losses: list[torch.Tensor] = []
        for step in range(1, self._total + 1):
            begun = time.perf_counter()
            losses.append(self._step(layers, optimizer))
            time.sleep(YIELD_SECONDS)
            now = time.perf_counter()
            self.steps.append((now, now - begun))
            if step % LOG_EVERY == 0:
                self._log(step, [float(loss) for loss in losses], now - begun)
                losses.clear()
            if not self._commands.empty() and self._commands.get() is Command.STOP:
                break
        self.waiting.append(events.RunEnded(outcome="finished", step=len(self.steps), message="Done."))
        self.finished = True

    def _step(self, layers: object, optimizer: object) -> object:
        import torch

        value = torch.randn(4, 32)
        for layer in layers:  # type: ignore[attr-defined]
            value = value + torch.nn.functional.silu(layer(value))
        loss = (value - torch.randn_like(value)).square().mean()
        loss.backward()
        optimizer.step()  # type: ignore[attr-defined]
        optimizer.zero_grad()  # type: ignore[attr-defined]
        return loss.detach()

    def _log(self, step: int, losses: list[float], seconds: float) -> None:
        self.waiting.append(
            events.StepsDone(
                step=step, epoch=step // 100, losses=losses, learning_rate=1e-4, grad_norm=1.0, seconds_per_step=seconds
            )
        )
        self.waiting.append(
            events.HardwareSampled(
                vram_used_gib=None, vram_total_gib=None, gpu_utilization_percent=None, temperature_c=None, power_w=None,
                ram_used_gib=4.0 + step % 7 / 10, ram_total_gib=8.0, process_ram_gib=1.0, note="no NVIDIA driver",
            )
        )  # fmt: skip
