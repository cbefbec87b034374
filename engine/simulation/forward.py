"""The memory of running a network once without gradients: encoders, the autoencoder, one step of a drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lorasmith.engine.memory.constants import MIB
from lorasmith.engine.simulation.card_kernels import Kernels, fused_kernels
from lorasmith.engine.simulation.live_bytes import LiveBytes


def simulate_forward(
    call: Callable[[], object], device: torch.device, networks: Iterable[nn.Module], kernels: Kernels = "card"
) -> float:
    """Return the MiB that `call` takes at its peak on `device`, inputs that it makes and its result included.

    Weights and buffers of the `networks` that it runs are free.
    """
    kept = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    with torch.no_grad(), fused_kernels(kernels), LiveBytes(device, kept) as tracker:
        result = call()
        del result
        return float(tracker.peak) / MIB
