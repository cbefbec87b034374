"""The networks of a pebble, and a random one on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 32


class PebbleBlock(nn.Module):
    """Attention over picture and text, then two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        tokens = tokens + self.to_out(mixed)
        return tokens + self.down(nn.functional.gelu(self.up(tokens)))


class PebbleDenoiser(nn.Module):
    """Two blocks between a patch of latents and its velocity."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.proj_in, self.proj_out = nn.Linear(48, WIDTH), nn.Linear(WIDTH, 48)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([PebbleBlock() for _ in range(2)])

    def forward(self, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        pixels = self.proj_in(latents.flatten(2).transpose(1, 2))
        pixels = pixels + self.time(times.to(pixels.dtype)[:, None, None])
        tokens = torch.cat([pixels, text], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.proj_out(tokens[:, : height * width])
        return patches.transpose(1, 2).reshape(batch, 48, height, width)


class PebbleEncoder(nn.Module):
    """An embedding of bytes and one layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.bytes, self.mix = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.mix(self.bytes(ids))
        return embeds


class PebblePatches(nn.Module):
    """A factor on patches of pixels."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.scale = nn.Parameter(torch.tensor(0.8))


KINDS = {"denoiser": PebbleDenoiser, "text_encoder": PebbleEncoder, "vae": PebblePatches}


def build_pebble(folder: Path) -> Path:
    """Write a random pebble to `folder` and return it."""
    from tests.contracts.outside import pebble

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, kind in KINDS.items():
            (folder / part).mkdir()
            save_file(kind({}).state_dict(), folder / part / "model.safetensors")
            (folder / part / "config.json").write_text(json.dumps({"kind": part}))
    pebble.write_index(folder)
    return folder
