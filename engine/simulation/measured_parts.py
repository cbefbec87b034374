"""What a full-size model's parts weigh and take where no gradients are wanted, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.engine.block_checkpointing import denoiser_blocks
from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import Family
from lorasmith.engine.memory.constants import MIB, BlockGroup, Law, PartMemory
from lorasmith.engine.quantization import is_packed
from lorasmith.engine.simulation.forward import simulate_forward
from lorasmith.engine.simulation.full_prompts import text_encoder_work
from lorasmith.engine.simulation.shallow import PIXELS, SIDES, law_of
from lorasmith.engine.simulation.step import StepShape, forward_tflop

FLOP_SIDES = (512, 1024, 1536)
"""Sides in pixels of the pictures that the operations are counted for; three, for attention grows with the square."""
POINTS = ((1, SIDES[0]), (1, SIDES[1]), (2, SIDES[0]))
"""Pictures and sides that a law is read from."""


def sizes_of(module: nn.Module, *, packs: bool = True) -> PartMemory:
    """Return the numbers of weights of a part that quantization packs, or of one that it never touches."""
    layers = [layer.weight.numel() for _, layer in _packed_layers(module)] if packs else []
    whole = sum(weight.numel() for weight in module.parameters())
    return PartMemory(sum(layers), whole - sum(layers), max(layers, default=0))


def blocks_of(family: Family) -> tuple[BlockGroup, ...]:
    """Return the denoiser's blocks, equal ones that follow each other together."""
    denoiser = family.denoiser
    of_path = {path: layer.weight.numel() for path, layer in _packed_layers(denoiser)}

    def sizes(named: tuple[str, nn.Module]) -> tuple[str, int, int]:
        path, block = named
        packed = sum(count for inside, count in of_path.items() if inside.startswith(f"{path}."))
        return type(block).__name__, packed, sum(weight.numel() for weight in block.parameters()) - packed

    groups = [(key, len(list(equal))) for key, equal in groupby(sizes(named) for named in denoiser_blocks(family))]
    return tuple(BlockGroup(name, count, packed, plain) for (name, packed, plain), count in groups)


def text_parts(family: Family) -> dict[str, PartMemory]:
    """Return the text encoders with what reading full prompts takes."""
    one, two = (text_encoder_work(family, prompts) for prompts in (1, 2))
    laws = {part: Law(2 * one[part] - two[part], two[part] - one[part]) for part in one}
    return {part: replace(sizes_of(encoder), work=laws[part]) for part, encoder in family.text_encoders.items()}


def autoencoder_part(family: Family) -> PartMemory:
    """Return the autoencoder with what encoding and decoding pictures take in the format that it computes in."""
    loaded: Any = family
    vae = loaded._vae
    spec = family.spec

    def encode(pictures: int, side: int) -> Callable[[], object]:
        pixels = torch.zeros((pictures, 3, side, side), device=family.device)
        return lambda: family.encode_images(pixels)

    def decode(pictures: int, side: int) -> Callable[[], object]:
        latents = _latents(spec.latent_channels, pictures, side // spec.latent_downscale, family, loaded.vae_dtype)
        return lambda: loaded.pixels_of(vae, latents)

    laws = [_law(family, [vae], call) for call in (encode, decode)]
    return replace(sizes_of(vae, packs=False), work=laws[0], decode=laws[1])


def draw_law(family: Family, tokens: int) -> Law:
    """Return what one forward pass of the denoiser without gradients takes."""
    return _law(family, [family.denoiser], lambda pictures, side: _predict(family, pictures, side, tokens))


def inputs_law(family: Family, tokens: int) -> Law:
    """Return what the tensors take that the denoiser's blocks are given, each once: what full checkpointing keeps."""
    return law_of({(n, side): _inputs_mib(family, n, side, tokens) for n, side in POINTS})


def tflop_of(family: Family, config: RunConfig, tokens: int) -> tuple[float, float, float]:
    """Return a, b and c of one picture's TFLOP forward, a + b · megapixels + c · megapixels²."""
    counted = [forward_tflop(family, config, StepShape(1, side, side, tokens)) for side in FLOP_SIDES]
    c, b, a = np.polyfit([side**2 / PIXELS for side in FLOP_SIDES], counted, 2)
    return float(a), float(b), float(c)


def _law(family: Family, networks: list[nn.Module], call: Callable[[int, int], Callable[[], object]]) -> Law:
    points = {(n, side): simulate_forward(call(n, side), family.device, networks) for n, side in POINTS}
    return law_of(points)


def _predict(family: Family, pictures: int, side: int, tokens: int) -> Callable[[], object]:
    spec = family.spec
    noisy = _latents(spec.latent_channels, pictures, side // spec.latent_downscale, family, family.dtype)
    times = torch.zeros(pictures, device=family.device)
    prompts = family.collate([family.blank_prompt(tokens)] * pictures)
    return lambda: family.predict(noisy, times, prompts)


def _inputs_mib(family: Family, pictures: int, side: int, tokens: int) -> float:
    seen: dict[int, Tensor] = {}

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.device == family.device:
                # Kept, so that no other tensor comes to lie at the same place.
                seen.setdefault(value.untyped_storage()._cdata, value)

    hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for _, block in denoiser_blocks(family)]
    try:
        simulate_forward(_predict(family, pictures, side, tokens), family.device, [family.denoiser])
    finally:
        for hook in hooks:
            hook.remove()
    return sum(value.untyped_storage().nbytes() for value in seen.values()) / MIB


def _latents(channels: int, pictures: int, side: int, family: Family, dtype: torch.dtype) -> Tensor:
    return torch.zeros((pictures, channels, side, side), device=family.device, dtype=dtype)


def _packed_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    layers = module.named_modules()
    return [(path, layer) for path, layer in layers if isinstance(layer, nn.Linear) and is_packed(path, layer)]
