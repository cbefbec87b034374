"""Fused backward: the same numbers as a step over all weights, with gradients that are gone at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.engine.checkpoints import load_checkpoint
from lorasmith.engine.combinations import FUSABLE
from lorasmith.engine.config import AdapterSettings, OptimizerSettings
from lorasmith.engine.dataset.loader import Batch
from lorasmith.engine.events import NotFinite, StepsDone
from lorasmith.engine.learner import Learner
from lorasmith.engine.optimizers import FusedBackward, build_optimizer, optimizer_tensors, set_learning_rates
from tests.engine.running import run_training, tiny_config
from tests.engine.test_optimizers import small_adapter

GOOD, BAD = torch.zeros(()), torch.ones(())


class Toy:
    """Two layers of a LoRA that learn to give back what comes in."""

    def __init__(self, name: str, *, fused: bool) -> None:
        self.adapter = small_adapter()
        settings = OptimizerSettings(name=name, learning_rate=1e-2, lora_plus_ratio=2.0)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.adapter, settings, AdapterSettings())
        self.fused = FusedBackward(self.optimizer, self.adapter.parameters()) if fused else None
        self.most_gradients = 0

    def step(self, number: int, left_out: torch.Tensor = GOOD) -> tuple[float, float]:
        set_learning_rates(self.optimizer, 1.0 / number)
        generator = torch.Generator().manual_seed(number)
        loss = torch.zeros(())
        for module in self.adapter.modules:
            pictures = torch.randn(4, module.down.shape[1], generator=generator)
            loss = loss + ((pictures @ module.down.T @ module.up.T) - pictures[:, :1]).square().mean()
        if self.fused is None:
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), math.inf)
            if not left_out:
                self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.item(), norm.item()
        self.fused.arm(left_out, None)
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is None for parameter in self.adapter.parameters())
        return loss.item(), self.fused.finish().item()


@pytest.mark.parametrize("name", FUSABLE)
def test_every_loss_norm_weight_and_state_has_the_bits_of_the_plain_path(name: str) -> None:
    plain, fused = Toy(name, fused=False), Toy(name, fused=True)
    for number in range(1, 7):
        left_out = BAD if number == 3 else GOOD
        assert fused.step(number, left_out) == plain.step(number, left_out)
    for one, other in zip(plain.adapter.parameters(), fused.adapter.parameters(), strict=True):
        assert torch.equal(one, other)
    (tensors, rest), (fused_tensors, fused_rest) = (optimizer_tensors(toy.optimizer) for toy in (plain, fused))
    assert rest == fused_rest
    assert tensors.keys() == fused_tensors.keys()
    assert all(torch.equal(value, fused_tensors[key]) for key, value in tensors.items())


def test_before_the_first_weight_changes_somebody_is_asked_once_and_may_refuse() -> None:
    toy, calls = Toy("lion", fused=True), []
    before = [parameter.detach().clone() for parameter in toy.adapter.parameters()]
    assert toy.fused is not None

    def refuse() -> None:
        calls.append(1)
        raise MemoryError

    toy.fused.arm(GOOD, refuse)
    with pytest.raises(MemoryError):
        sum(p.square().sum() for p in toy.adapter.parameters()).backward()  # type: ignore[union-attr]
    toy.fused.cancel()
    assert calls == [1]
    assert all(torch.equal(old, new) for old, new in zip(before, toy.adapter.parameters(), strict=True))


def test_gradients_only_add_up_until_it_is_armed() -> None:
    toy = Toy("adamw", fused=True)
    parameters = toy.adapter.parameters()
    for _ in range(2):
        sum(p.sum() for p in parameters).backward()  # type: ignore[union-attr]
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in parameters if p.grad is not None)
    assert all(p.grad is not None for p in parameters)


def fused_config(base: Path, folder: Path, *, fused: bool, **train: Any) -> Any:
    optimizer = {"name": "adamw", "fused_backward": fused, "max_grad_norm": 0.0}
    return tiny_config(base, folder, optimizer=optimizer, train={"steps": 4, "log_every": 1, **train})


def test_a_whole_run_is_the_same_with_and_without_and_leaves_a_bad_loss_out(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.batch_loss

    def spoilt(learner: Learner, batch: Batch, step: int, first: int) -> torch.Tensor:
        loss = real(learner, batch, step, first)
        return loss * math.nan if step == 1 else loss

    monkeypatch.setattr(Learner, "batch_loss", spoilt)
    (plain, plain_host), (fused, fused_host) = (
        run_training(fused_config(tiny_sd15, tmp_path, fused=fused, ema_decay=0.9)) for fused in (False, True)
    )
    assert [event.step for event in fused_host.of(NotFinite)] == [2]
    told = [[(e.losses, e.grad_norm) for e in host.of(StepsDone) if e.step != 2] for host in (plain_host, fused_host)]
    assert told[0] == told[1]
    for name in ("adapter", "ema", "optimizer"):
        one, other = (load_checkpoint(run.checkpoints, 4).tensors(name) for run in (plain, fused))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
