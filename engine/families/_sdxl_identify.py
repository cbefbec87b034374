"""Recognizing Stable Diffusion XL from configurations and headers, before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity, Prediction
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_clip as clip
from lorasmith.engine.families._weights import FoundWeights, find_weights, stored_precision
from lorasmith.engine.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    from lorasmith.engine.sources import BaseFiles

TOKENS = 77
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_SIZE_NUMBERS, SIZE_WIDTH = 6, 256
"""Six numbers of size and crop, each embedded in 256 (SDXL's paper, section 2.2)."""
_DEPTHS = (0, 2, 10)
_LINEAGES = {"pony": "Pony", "illustrious": "Illustrious", "noob": "NoobAI", "animagine": "Animagine"}
_DISTILLED = re.compile(r"turbo|lightning|hyper|dmd2?\b|\blcm\b", re.IGNORECASE)
_V_NAME = re.compile(r"v[-_ ]?pred", re.IGNORECASE)
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
"""What ComfyUI tells Playground v2.5 and CosXL by, which are trained with other noise."""


@dataclass(frozen=True)
class UNetShape:
    """What the header of a UNet tells: widths, and the transformer layers of each level of blocks."""

    channels: int
    latent_channels: int
    context: int
    pooled: int
    depths: tuple[int, ...]
    original_names: bool


@dataclass(frozen=True)
class Told:
    """What the denoiser predicts, and how that is known."""

    prediction: Prediction
    zero_snr: bool
    reason: str


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is; raises BaseModelError where its denoiser is trained in another way."""
    index, unet, vae = files.config(""), files.config("unet"), files.config("vae")
    if index.get("_class_name") != "StableDiffusionXLPipeline" or unet.get("addition_embed_type") != "text_time":
        return None
    channels = unet.get("in_channels", 4)
    # The refiner has the second text encoder only.
    if channels != vae.get("latent_channels", channels) or not index.get("text_encoder", [None])[0]:
        return None
    scheduler = files.config("scheduler")
    told = scheduler.get("prediction_type", "epsilon")
    if told not in ("epsilon", "v_prediction") or str(scheduler.get("_class_name", "")).startswith("EDM"):
        raise _untrainable(files, f"predicts {told} with the scheduler {scheduler.get('_class_name')}")
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [part for part in _TOKENIZERS if not (files.path / part).is_dir()]
    size = unet.get("sample_size") or 128
    side = int(size[0] if isinstance(size, list) else size) * 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    details: dict[str, Any] = {"license": files.license()}
    width, pooled = unet.get("cross_attention_dim"), files.config("text_encoder_2").get("projection_dim")
    if isinstance(width, int) and isinstance(pooled, int):
        tokens = int(files.config("text_encoder").get("max_position_embeddings", TOKENS))
        details["prompt_numbers"] = min(TOKENS, tokens) * width + pooled
    depths = unet.get("transformer_layers_per_block")
    variant = "base" if depths == [1, *_DEPTHS[1:]] else "custom"
    known = Told(told, bool(scheduler.get("rescale_betas_zero_snr")), "its scheduler")
    return _identity(files, variant, known, side, files.tensors("unet"), tuple(missing), details)


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: everything in the original layout, or the UNet alone; None for the refiner."""
    found = find_unet(files)
    shape = unet_shape(found.tensors) if found else None
    if found is None or shape is None:
        return None
    tensors = files.tensors("")
    if any(name in tensors for name in _EDM):
        raise _untrainable(files, "is trained with the noise of EDM")
    encoders = clip.find_sizes(files)
    have = {"vae": autoencoder.find(files), "text_encoder": encoders.get("L"), "text_encoder_2": encoders.get("G")}
    missing = tuple(part for part, weights in have.items() if weights is None)
    variant = "base" if shape.depths == _DEPTHS else "custom"
    details = {"prompt_numbers": TOKENS * shape.context + shape.pooled}
    return _identity(files, variant, _told_prediction(files, tensors), 1024, found.tensors, missing, details)


def find_unet(files: BaseFiles) -> FoundWeights | None:
    """Return where the UNet of a single-file base is."""
    return find_weights([files.path], _PREFIXES, lambda tensors: unet_shape(tensors) is not None)


def unet_shape(tensors: Mapping[str, TensorInfo]) -> UNetShape | None:
    """Return the shape of an SDXL text-to-image UNet in the original or diffusers' names, or None where it is none.

    SD 2.x has attention in its first level and the refiner has four levels; inpainting takes more channels in.
    """
    original = "input_blocks.0.0.weight" in tensors
    names = ("input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight")
    if not original:
        names = ("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight")
    first, last, added = (tensors.get(name) for name in names)
    blocks = ("input_blocks.1.1.", "input_blocks.4.1.", "input_blocks.7.1.")
    fourth = "input_blocks.9.0.op.weight" if original else "down_blocks.3.resnets.0.conv1.weight"
    if not original:
        blocks = ("down_blocks.0.attentions.0.", "down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")
    context = tensors.get(f"{blocks[1]}transformer_blocks.0.attn2.to_k.weight")
    if not (first and last and added and context) or fourth in tensors:
        return None
    depths = tuple(_depth(tensors, begin) for begin in blocks)
    if [len(info.shape) for info in (first, last, added, context)] != [4, 4, 2, 2]:
        return None
    if first.shape[1] != last.shape[0] or depths[0]:
        return None
    pooled = added.shape[1] - _SIZE_NUMBERS * SIZE_WIDTH
    return UNetShape(first.shape[0], first.shape[1], context.shape[1], pooled, depths, original)


def _depth(tensors: Mapping[str, TensorInfo], block: str) -> int:
    begin = f"{block}transformer_blocks."
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})


def _told_prediction(files: BaseFiles, tensors: Mapping[str, TensorInfo]) -> Told:
    """Return what one file says of its prediction; only where it says nothing, its name counts, as a guess."""
    metadata = files.metadata()
    zero_snr = "ztsnr" in tensors or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    told = metadata.get("modelspec.prediction_type", "").lower()
    if told in ("v", "v_prediction", "v-prediction") or "v_pred" in tensors:
        return Told("v_prediction", zero_snr, "the file says so")
    if told in ("epsilon", "eps"):
        return Told("epsilon", zero_snr, "the file says so")
    if _V_NAME.search(files.path.stem):
        # All well-known v-prediction models of SDXL were trained down to pure noise.
        return Told("v_prediction", True, "guessed from its name")
    return Told("epsilon", zero_snr, "usual for SDXL")


def _untrainable(files: BaseFiles, words: str) -> BaseModelError:
    return BaseModelError(
        f"{files.origin} {words}, which lorasmith cannot train.",
        why="Known are epsilon and v-prediction with the noise of Stable Diffusion XL.",
        fix="Choose another base model.",
    )


def _identity(
    files: BaseFiles,
    variant: str,
    told: Told,
    side: int,
    unet: Mapping[str, TensorInfo],
    missing: tuple[str, ...],
    details: Mapping[str, Any],
) -> BaseIdentity:
    parameters = sum(math.prod(info.shape) for info in unet.values())
    precision = stored_precision(unet)
    words = "epsilon" if told.prediction == "epsilon" else "v-prediction"
    words += " with zero-terminal SNR" if told.zero_snr else ""
    words += f" ({told.reason})" if told.reason.startswith("guessed") else ""
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    kind = "Stable Diffusion XL" if variant == "base" else "Stable Diffusion XL of another depth"
    label = ", ".join([kind, *_name_hints(files), words, precision, count])
    details = {
        **details,
        "prediction_from": told.reason,
        "zero_snr": told.zero_snr,
        "architecture": "stable-diffusion-xl-v1-base",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    return BaseIdentity("sdxl", label, variant, told.prediction, side, parameters, precision, missing, details)


def _name_hints(files: BaseFiles) -> list[str]:
    """Say what the model may descend from, by its name and title alone."""
    title = read_header(files.path)[1].get("modelspec.title", "") if files.kind == "single_file" else ""
    name = f"{files.origin.replace('_', ' ')} {title}"
    hints = [f"perhaps {label} by its name" for sign, label in _LINEAGES.items() if sign in name.lower()][:1]
    return hints + (["perhaps distilled to few steps by its name"] if _DISTILLED.search(name) else [])
