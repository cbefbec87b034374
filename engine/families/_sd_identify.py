"""Recognizing Stable Diffusion 1.x and 2.x from configurations and headers, before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity, Prediction
from lorasmith.engine.families import _sd_single_file as single_file

if TYPE_CHECKING:
    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

_PARTS = ("unet", "vae", "text_encoder")
_VERSIONS = {768: "1.x", 1024: "2.x"}
_TOKENS = 77


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is; raises BaseModelError where its denoiser predicts something else."""
    index, unet, vae = files.config(""), files.config("unet"), files.config("vae")
    if index.get("_class_name") != "StableDiffusionPipeline" or index.get("text_encoder", [0, 0])[1] != "CLIPTextModel":
        return None
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4) or unet.get("addition_embed_type"):
        return None
    told = files.config("scheduler").get("prediction_type", "epsilon")
    if told not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f"{files.origin} predicts {told}, which lorasmith cannot train.",
            why="Known are epsilon and v_prediction.",
            fix="Choose another base model.",
        )
    prediction: Prediction = told
    tensors = files.tensors("unet")
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    size = unet.get("sample_size") or 64
    side = int(size[0] if isinstance(size, list) else size) * 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    width = unet.get("cross_attention_dim", 0)
    variant = _VERSIONS.get(width, "custom")
    details: dict[str, Any] = {"prediction_from": "its scheduler", "license": files.license()}
    if isinstance(width, int) and width:
        tokens = files.config("text_encoder").get("max_position_embeddings", _TOKENS)
        details["prompt_numbers"] = min(_TOKENS, int(tokens)) * width
    return _identity(tensors, variant, prediction, side, tuple(missing), details)


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what a file in the original layout is."""
    tensors = files.tensors("")
    facts = single_file.read_facts(tensors)
    if facts is None:
        return None
    prediction, reason = single_file.guess_prediction(files, facts)
    side = 768 if facts.version == "2.x" and prediction == "v_prediction" else 512
    unet = {name: info for name, info in tensors.items() if name.startswith(single_file.UNET)}
    width = next((width for width, version in _VERSIONS.items() if version == facts.version), 768)
    details = {"prediction_from": reason, "prompt_numbers": _TOKENS * width}
    return _identity(unet, facts.version, prediction, side, facts.missing, details)


def _identity(
    unet: Mapping[str, TensorInfo],
    variant: str,
    prediction: Prediction,
    side: int,
    missing: tuple[str, ...],
    details: Mapping[str, Any],
) -> BaseIdentity:
    parameters = sum(math.prod(info.shape) for info in unet.values())
    counts: Counter[str] = Counter()
    for info in unet.values():
        counts[info.dtype] += math.prod(info.shape)
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    precision = "unknown"
    if counts:
        stored = counts.most_common(1)[0][0]
        precision = names.get(stored, stored.lower())
    kind = "small, custom" if variant == "custom" else variant
    words = "epsilon" if prediction == "epsilon" else "v-prediction"
    reason = details["prediction_from"]
    guessed = f" ({reason})" if reason.startswith("guessed") else ""
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    label = f"Stable Diffusion {kind}, {words}{guessed}, {precision}, {count}"
    details = {**details, **_lora_metadata(variant, prediction)}
    return BaseIdentity("sd15", label, variant, prediction, side, parameters, precision, missing, details)


def _lora_metadata(variant: str, prediction: Prediction) -> dict[str, Any]:
    """Return how LoRA files name this base: the modelspec id and Kohya's keys; small custom models as 1.x."""
    second, velocity = variant == "2.x", prediction == "v_prediction"
    version = "stable-diffusion-v1" if not second else f"stable-diffusion-v2-{'768-v' if velocity else '512'}"
    name = f"sd_v{2 if second else 1}{'_v' if velocity else ''}"
    return {"architecture": version, "ss_base_model_version": name, "ss_v2": second}
