"""Recognizing FLUX.1 dev, schnell, Krea and Kontext from configurations and headers, before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _flux_files as own
from lorasmith.engine.families import _flux_names as names
from lorasmith.engine.families._weights import stored_precision

if TYPE_CHECKING:
    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

TOKENS = 512
SCHNELL_TOKENS = 256
"""T5 tokens that schnell was made for (its model card: max_sequence_length=256)."""
SCHNELL_ADAPTER = "ostris/FLUX.1-schnell-training-adapter/pytorch_lora_weights.safetensors"
"""The LoRA that undoes schnell's distillation while it is trained (Apache 2.0)."""
_PIPELINES = {"FluxPipeline": "", "FluxKontextPipeline": "kontext"}
_EDITING_PIPELINES = ("FluxFillPipeline", "FluxControlPipeline")
_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_GUIDANCE = "time_text_embed.guidance_embedder.linear_1.weight"
_LABELS = {
    "dev": "dev",
    "schnell": "schnell",
    "krea": "Krea dev",
    "kontext": "Kontext dev",
    "de-distilled": "de-distilled",
}
_DE_DISTILLED = re.compile(r"(de|un)[-_ ]?distill|openflux|libreflux")
"""Names of models whose distillation was undone by training: they have no guidance built in, and need a real one."""
_DRAWING: Mapping[str, tuple[int, float]] = {
    # Steps and embedded guidance of each model card's example; dev's 50 steps differ little from diffusers' usual 28.
    "dev": (28, 3.5),
    "krea": (28, 4.5),
    "kontext": (28, 2.5),
    "schnell": (4, 1.0),
    "de-distilled": (28, 3.5),
}


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is; raises BaseModelError for Fill, Canny and Depth."""
    pipeline = files.config("").get("_class_name")
    if pipeline not in (*_PIPELINES, *_EDITING_PIPELINES):
        return None
    config = files.config("transformer")
    own.require_text_to_image(files, int(config.get("in_channels", own.CHANNELS)))
    if pipeline in _EDITING_PIPELINES:
        return None
    tensors = files.tensors("transformer")
    own.require_readable(files, tensors)
    guided = bool(config.get("guidance_embeds", _GUIDANCE in tensors))
    variant, guessed = _variant(files, guided, _PIPELINES[pipeline])
    numbers = _prompt_numbers(
        variant, int(config.get("joint_attention_dim", 4096)), int(config.get("pooled_projection_dim", 768))
    )
    side = files.config("vae").get("sample_size") or own.NATIVE_SIDE
    missing = own.missing_parts(files, _PARTS)
    return _identity(
        files, tensors, (variant, guessed), int(side[0] if isinstance(side, list) else side), missing, numbers
    )


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is; raises BaseModelError for Fill, Canny and Depth, and for packed weights."""
    found = own.find_transformer(files, "FLUX.1")
    if found is None:
        return None
    own.require_readable(files, found.tensors)
    shapes = names.diffusers_shapes(found.tensors)
    own.require_text_to_image(files, shapes["x_embedder.weight"][1])
    variant, guessed = _variant(files, _GUIDANCE in shapes, "")
    pooled = shapes["time_text_embed.text_embedder.linear_1.weight"][1]
    numbers = _prompt_numbers(variant, shapes["context_embedder.weight"][1], pooled)
    missing = own.missing_parts(files, _PARTS)
    return _identity(files, found.tensors, (variant, guessed), own.NATIVE_SIDE, missing, numbers)


def tokens_of(variant: str) -> int:
    """Return how many T5 tokens the variant reads."""
    return SCHNELL_TOKENS if variant == "schnell" else TOKENS


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the transformer's configuration from the shapes of its weights under diffusers' names; torch-free."""
    return {
        **own.size_config(shapes),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": _GUIDANCE in shapes,
    }


def _variant(files: BaseFiles, guided: bool, told: str) -> tuple[str, str]:
    """Return the variant and, where only a name tells it, that it is a guess.

    Krea and Kontext have dev's architecture to the last shape, de-distilled models that of schnell.
    """
    if told:
        return told, ""
    metadata = files.metadata()
    hints = [files.path.name, files.origin, str(files.config("transformer").get("_name_or_path", ""))]
    hints += [metadata.get(key, "") for key in ("modelspec.title", "modelspec.architecture", "general.name")]
    text = " ".join(hints).lower()
    found = next((variant for variant in ("kontext", "krea") if variant in text), "") if guided else ""
    if not guided and _DE_DISTILLED.search(text):
        found = "de-distilled"
    return (found, ", guessed from its name") if found else ("dev" if guided else "schnell", "")


def _prompt_numbers(variant: str, width: int, pooled: int) -> int:
    return tokens_of(variant) * width + pooled


def _identity(
    files: BaseFiles,
    tensors: Mapping[str, TensorInfo],
    variant: tuple[str, str],
    side: int,
    missing: tuple[str, ...],
    prompt_numbers: int,
) -> BaseIdentity:
    name, guessed = variant
    parameters = sum(math.prod(shape) for shape in names.diffusers_shapes(tensors).values())
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    label = f"FLUX.1 {_LABELS[name]}{guessed}, {precision}, {count}"
    steps, guidance = _DRAWING[name]
    details: dict[str, Any] = {
        "license": files.license(),
        "prompt_numbers": prompt_numbers,
        "draw_steps": steps,
        "draw_guidance": guidance,
        "architecture": "flux-1-schnell" if name == "schnell" else "flux-1-dev",
        "ss_base_model_version": "flux1",
    }
    if name == "schnell":
        details["training_adapter"] = SCHNELL_ADAPTER
    return BaseIdentity("flux1", label, name, "velocity", side, parameters, precision, missing, details)
