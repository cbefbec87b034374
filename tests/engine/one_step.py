"""One training step of a flow model on fixed pictures and noise, compared with a reference that a test computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.families import Family
from lorasmith.engine.objectives import build_objective

PROMPTS = ("a red circle", "a much longer prompt of a blue square")


@dataclass
class OneStep:
    """What the engine computed: the loss, the gradients of the adapter, and from which pictures and noise."""

    pixels: torch.Tensor
    level: float
    noise: torch.Tensor
    loss: torch.Tensor
    parameters: Sequence[torch.nn.Parameter]
    gradients: Sequence[torch.Tensor]

    def compare(self, reference: torch.Tensor) -> None:
        """Require that the reference's loss is the engine's, and that its backward pass gives the same gradients."""
        reference.backward()
        torch.testing.assert_close(self.loss, reference, rtol=1e-5, atol=1e-5)
        assert sum(float(gradient.abs().max()) > 1e-6 for gradient in self.gradients) > len(self.gradients) // 2
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


def take_step(family: Family, level: float = 0.3, prompts: Sequence[str] = PROMPTS) -> OneStep:
    """Attach an adapter that changes something, and do one step's forward and backward pass at a noise level."""
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    pixels = torch.rand((len(prompts), 3, 64, 64), generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = family.encode_images(pixels)
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    batch = objective.at(latents, level, list(range(5, 5 + len(prompts))))
    conditioning = family.collate(family.encode_prompts(prompts))
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    parameters = [tensor for module in adapter.modules for tensor in module.tensors.values()]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None
    noise = (batch.target + latents.float()).detach()
    return OneStep(pixels, level, noise, loss.detach(), parameters, gradients)
