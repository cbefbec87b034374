"""For which base model a LoRA file is: by the sizes and names of its layers, or else by what it says. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

_UNET_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""Width of the text embedding that cross-attention reads."""
_CROSS_ATTENTION = re.compile(r"(down|mid|up|input|middle|output)_blocks?[._].*attn2[._]to_[kv]$")
_STATED = (
    (r"stable-diffusion-xl|sdxl", "SDXL"),
    (r"stable-diffusion-3|\bsd3", "Stable Diffusion 3"),
    (r"stable-diffusion-v2|sd_v2", "Stable Diffusion 2.x"),
    (r"stable-diffusion-v1|sd_v1", "Stable Diffusion 1.x"),
    (r"flux[-_]?2", "FLUX.2"),
    (r"\bchroma", "Chroma"),
    (r"flux", "FLUX.1"),
    (r"qwen", "Qwen-Image"),
    (r"z[-_]?image", "Z-Image"),
    (r"lumina", "Lumina-Image 2.0"),
    (r"krea[-_]?2", "Krea 2"),
    (r"\banima", "Anima"),
)
"""What `modelspec.architecture` and `ss_base_model_version` say."""
_SIGNS: tuple[tuple[str, Iterable[int], str], ...] = (
    (r"to_qkv_mlp_proj|ff(_context)?[._]linear_in|double_stream_modulation", (), "FLUX.2"),
    (r"single_blocks[._]\d+[._]linear1$", (6144,), "FLUX.2"),
    (r"(double_blocks|single_blocks|single_transformer_blocks)[._]", (), "FLUX"),
    (r"joint_blocks[._]", (), "Stable Diffusion 3"),
    (r"text_?fusion|attn[._]to_gate|blocks[._]\d+[._]attn[._]w[qkvo]$", (), "Krea 2"),
    (r"transformer_blocks[._]\d+[._](img_mlp|img_mod|txt_mlp|txt_mod)", (), "Qwen-Image"),
    (r"transformer_blocks[._]\d+[._]attn2?[._]", (1536, 2432), "Stable Diffusion 3"),
    (r"transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj", (3072,), "Qwen-Image"),
    (r"layers[._]\d+[._](attn|attention)[._]", (2304,), "Lumina-Image 2.0"),
    (r"layers[._]\d+[._](attention|feed_forward)[._]", (), "Z-Image"),
    (r"llm_adapter[._]|(?<!r_)blocks[._]\d+[._](cross_attn|self_attn)[._]", (), "Anima"),
    (r"transformer_blocks[._]\d+[._]attn[12][._]", (2048, 1024), "Anima"),
)
"""Pattern of a layer's name and widths of its input, one of which it must have where any are given; first found counts.

FLUX.1 and Chroma have the same names and sizes. Counted on the models' own configurations.
"""


class Layer(Protocol):
    """What is known of an adapted layer."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def component(self) -> str:
        """The part of the base model that it belongs to."""

    @property
    def inputs(self) -> int:
        """The width of its input."""


def guess_base(layers: Iterable[Layer], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return the base model, or "unknown", and what tells it. Sizes count more than what a file says of itself."""
    layers = list(layers)
    for layer in layers:
        if _CROSS_ATTENTION.search(layer.name) and layer.component == "denoiser" and layer.inputs:
            return _UNET_WIDTHS.get(layer.inputs, f"a UNet with text width {layer.inputs}"), "by its shapes"
    for key in ("modelspec.architecture", "ss_base_model_version"):
        stated = metadata.get(key, "").lower()
        label = next((label for sign, label in _STATED if stated and re.search(sign, stated)), "")
        if label:
            return label, f"as {key} says"
    for sign, widths, label in _SIGNS:
        for layer in layers:
            if re.search(sign, layer.name) and (not widths or layer.inputs in widths):
                return label, "by its keys"
    return "unknown", "no sign of any"
