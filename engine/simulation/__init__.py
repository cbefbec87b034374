"""The memory of one real step, counted on the meta device: no weights, no card."""

from __future__ import annotations

from lorasmith.engine.simulation.card_kernels import fused_kernels as fused_kernels
from lorasmith.engine.simulation.forward import simulate_forward as simulate_forward
from lorasmith.engine.simulation.live_bytes import LiveBytes as LiveBytes
from lorasmith.engine.simulation.on_the_fly import count_model as count_model
from lorasmith.engine.simulation.on_the_fly import simulated_step_memory as simulated_step_memory
from lorasmith.engine.simulation.step import PROMPT_TOKENS as PROMPT_TOKENS
from lorasmith.engine.simulation.step import StepPeak as StepPeak
from lorasmith.engine.simulation.step import StepShape as StepShape
from lorasmith.engine.simulation.step import forward_tflop as forward_tflop
from lorasmith.engine.simulation.step import simulate_step as simulate_step
