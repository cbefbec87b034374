"""CPU time of a training step of the engine over that of a bare hand-written loop on the same model.

    python benchmarks/engine_overhead.py [--rounds 8] [--steps 20] [--batch 1] [--workers 0] [--average 0.0]

Both train the same LoRA of the same loaded denoiser, one thread, in turns of A B B A segments; the engine's part is its
whole loop: batches, keyed noise, captions, meter, commands, journal on disk, gauges. Process CPU time, so its helper
threads count. Goal: at most 1.03. Prints JSON.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from facts import facts, percentile

GOAL = 1.03


class BareLoop:
    """What one would write by hand: tensors prepared beforehand, a dozen lines a step."""

    def __init__(self, learner: Any, log_every: int) -> None:
        import torch

        from lorasmith.engine.objectives import alphas_cumprod

        self.unet, self.parameters = learner.family.denoiser, learner.adapter.parameters()
        self.log_every, batches = log_every, learner.loader.batches_per_epoch
        drawn = [learner.loader.batch(index) for index in range(batches)]
        self.latents = [batch.latents for batch in drawn]
        self.text = [
            torch.stack([learner.conditionings[text]["prompt_embeds"] for text in batch.captions]) for batch in drawn
        ]
        self.alphas = alphas_cumprod(learner.family.noise_schedule).float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)
        self.velocity = learner.family.identity.prediction == "v_prediction"
        self.generator = torch.Generator().manual_seed(0)
        self.done = 0

    def run(self, steps: int) -> None:
        """Train `steps` steps."""
        import torch

        losses = []
        for _ in range(steps):
            latents, text = self.latents[self.done % len(self.latents)], self.text[self.done % len(self.latents)]
            noise = torch.randn(latents.shape, generator=self.generator)
            timesteps = torch.randint(0, 1000, (len(latents),), generator=self.generator)
            alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents if self.velocity else noise
            prediction = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            self.done += 1
            if self.done % self.log_every == 0:
                torch.stack(losses).tolist()
                losses.clear()


class EngineLoop:
    """The trainer's own loop between loading and finishing, with a journal on disk and the gauge sampler."""

    def __init__(self, learner: Any, material: Any, folder: Path) -> None:
        from lorasmith.engine.controls import Controls
        from lorasmith.engine.hardware import Sampler
        from lorasmith.engine.journal import Journal
        from lorasmith.engine.run_folder import RunFolder

        self.learner, self.material, self.run_folder = learner, material, RunFolder(folder)
        self.journal = Journal(self.run_folder.journal)
        self.controls = Controls(self, 0)
        self.sampler_type = Sampler

    def emit(self, event: Any) -> None:
        """Journal an event."""
        self.journal.append(event)

    def next_commands(self) -> list[Any]:
        """No commands."""
        return []

    def wait_command(self, timeout: float) -> None:
        """Never called: nothing pauses."""

    def run(self, steps: int) -> None:
        """Train `steps` more steps."""
        from lorasmith.engine.trainer import Training
        from lorasmith.engine.training_parts import TrainingParts

        train = self.learner.config.train
        train.steps = self.controls.step + steps
        sampler = self.sampler_type(self.emit, device="cpu")
        sampler.start()
        try:
            config = self.learner.config
            parts = TrainingParts(self.run_folder, config, self, self.controls, self.learner, self.material)
            assert Training(parts).run_steps()
        finally:
            sampler.stop()


def cpu_seconds(work: Callable[[int], None], steps: int) -> float:
    """Return the process CPU time of one step in a segment of `steps`."""
    started = time.process_time()
    work(steps)
    return (time.process_time() - started) / steps


def compare(base: str, resolution: int, batch: int, rounds: int, steps: int, **train: Any) -> dict[str, Any]:
    """Measure `rounds` blocks of A B B A on one base model; `train` are more settings of the engine's run."""
    import torch
    from training_parts import build, load_family, settings

    torch.set_num_threads(1)
    family = load_family(base, torch.device("cpu"), torch.float32)
    adapter = {"rank": 8, "alpha": 8.0}
    config = settings(base, resolution, batch, adapter, steps=1_000_000, precision="fp32", device="cpu", **train)
    learner, material = build(family, config)
    with tempfile.TemporaryDirectory() as folder:
        engine, bare = EngineLoop(learner, material, Path(folder)), BareLoop(learner, config.train.log_every)
        for loop in (engine, bare):
            loop.run(max(5, steps // 2))
        blocks = []
        for _ in range(rounds):
            a1, b1 = cpu_seconds(engine.run, steps), cpu_seconds(bare.run, steps)
            b2, a2 = cpu_seconds(bare.run, steps), cpu_seconds(engine.run, steps)
            blocks.append((a1 + a2, b1 + b2))
        engine.journal.close()
        learner.close()
    ratios = [a / b for a, b in blocks]
    return {
        "ratio": round(median(ratios), 4),
        "ratio_quartiles": [round(percentile(ratios, 25), 4), round(percentile(ratios, 75), 4)],
        "goal": GOAL,
        "engine_ms": round(1000 * fmean(a for a, _ in blocks) / 2, 2),
        "bare_ms": round(1000 * fmean(b for _, b in blocks) / 2, 2),
        "batch": batch,
        **train,
        "weights_millions": round(sum(p.numel() for p in family.denoiser.parameters()) / 1e6, 2),
        "blocks": rounds,
        "steps_in_a_segment": steps,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="demo", help="a base model as in base.model")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="train.loader_workers")
    parser.add_argument("--average", type=float, default=0.0, help="train.ema_decay")
    options = parser.parse_args()
    train = {"loader_workers": options.workers, "ema_decay": options.average}
    result = compare(options.base, options.resolution, options.batch, options.rounds, options.steps, **train)
    name = options.base if options.base == "demo" else "other"
    result = {"benchmark": "engine_overhead", "base": name} | result | facts("torch", "diffusers", "peft")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
