"""Stable Diffusion 1.x and 2.x in one file: what its header tells, and its conversion to diffusers modules.

A checkpoint in the original (LDM) layout carries no configuration. The architecture is always the same and only widths
differ, so the configurations are written from the tensors' shapes and nothing is fetched.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import Prediction
from lorasmith.engine.families._encoder_clip import load_tokenizer
from lorasmith.engine.families._loading import builds_skeletons, missing_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, read_weights
from lorasmith.engine.safetensors_header import TensorInfo, read_values
from lorasmith.engine.sources import BaseFiles

if TYPE_CHECKING:
    import torch

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
FACTOR = 8
"""Pixels per latent, each way."""
_V_SIGN = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class CheckpointFacts:
    """What the header of a checkpoint tells: `channels` is the width of the first UNet block."""

    version: Literal["1.x", "2.x"]
    channels: int
    latent_channels: int
    context: int
    linear_projection: bool
    missing: tuple[str, ...]


def read_facts(tensors: Mapping[str, TensorInfo]) -> CheckpointFacts | None:
    """Return the facts of a Stable Diffusion 1.x or 2.x text-to-image checkpoint, or None where it is none.

    SDXL, inpainting and unCLIP checkpoints share key names: they are told by their class embedding and input channels.
    """
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    context = tensors.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    projection = tensors.get(UNET + "input_blocks.1.1.proj_in.weight")
    last = tensors.get(UNET + "out.2.weight")
    if not (first and context and projection and last) or UNET + "label_emb.0.0.weight" in tensors:
        return None
    if len(first.shape) != 4 or first.shape[1] != last.shape[0] or len(context.shape) != 2:
        return None
    prefixes = {"vae": (VAE,), "text_encoder": (CLIP, OPEN_CLIP)}
    missing = tuple(part for part, begins in prefixes.items() if not any(name.startswith(begins) for name in tensors))
    second = any(name.startswith(OPEN_CLIP) for name in tensors)
    if "text_encoder" in missing:
        second = context.shape[1] == 1024
    linear = len(projection.shape) == 2
    return CheckpointFacts(
        "2.x" if second else "1.x", first.shape[0], first.shape[1], context.shape[1], linear, missing
    )


def require_facts(files: BaseFiles) -> CheckpointFacts:
    """Return the facts of a file; raises BaseModelError where it is no Stable Diffusion 1.x or 2.x checkpoint."""
    facts = read_facts(files.tensors(""))
    if facts is None:
        raise BaseModelError(f"{files.origin} is no Stable Diffusion 1.x or 2.x checkpoint.", why=files.describe())
    return facts


def guess_prediction(files: BaseFiles, facts: CheckpointFacts) -> tuple[Prediction, str]:
    """Return what the denoiser predicts and how that is known.

    Only newer files say it. 1.x is epsilon unless said; for 2.x the same rule is used as in ComfyUI: fine-tunes of the
    768-pixel v-prediction model keep a wide spread (> 0.09) in one bias.
    """
    told = files.metadata().get("modelspec.prediction_type", "").lower()
    tensors = files.tensors("")
    if told in ("v", "v_prediction") or "v_pred" in tensors:
        return "v_prediction", "the file says so"
    if told in ("epsilon", "eps"):
        return "epsilon", "the file says so"
    if facts.version == "1.x":
        return "epsilon", "usual for 1.x"
    if _V_SIGN in tensors and statistics.pstdev(read_values(files.path, _V_SIGN)) > 0.09:
        return "v_prediction", "guessed from one bias, as ComfyUI does"
    return "epsilon", "guessed from one bias, as ComfyUI does"


def scheduler_config(files: BaseFiles, prediction: Prediction) -> dict[str, Any]:
    """Return the noise schedule that all Stable Diffusion 1.x and 2.x models share."""
    zero_snr = "ztsnr" in files.tensors("")
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def load_unet(files: BaseFiles, facts: CheckpointFacts, dtype: torch.dtype) -> Any:
    """Build the UNet from the checkpoint's weights."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    width = facts.channels
    channels = (width, 2 * width, 4 * width, 4 * width)
    config = {
        "in_channels": facts.latent_channels,
        "out_channels": facts.latent_channels,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "cross_attention_dim": facts.context,
        # diffusers calls the number of heads so: 8 everywhere in 1.x, 64 channels a head in 2.x.
        "attention_head_dim": 8 if facts.version == "1.x" else tuple(max(1, count // 64) for count in channels),
        "use_linear_projection": facts.linear_projection,
    }
    weights = convert_ldm_unet_checkpoint(_read(files, UNET), config)
    return fill_module(files, "unet", UNet2DConditionModel, config, weights, dtype)


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Build the autoencoder from the checkpoint's weights."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights = _read(files, VAE)
    if not weights:
        raise missing_part(files, "vae")
    width = weights[VAE + "encoder.conv_in.weight"].shape[0]
    config = {
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": weights[VAE + "post_quant_conv.weight"].shape[0],
        "scaling_factor": 0.18215,
    }
    return fill_module(files, "vae", AutoencoderKL, config, convert_ldm_vae_checkpoint(weights, config), dtype)


def load_text_encoder(files: BaseFiles, facts: CheckpointFacts, dtype: torch.dtype) -> Any:
    """Build the CLIP (1.x) or OpenCLIP (2.x) text encoder from the checkpoint's weights."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    raw = _read(files, "cond_stage_model.")
    if not raw:
        raise missing_part(files, "text_encoder")
    if facts.version == "1.x":
        weights = convert_ldm_clip_checkpoint(raw)
    else:
        holder = type("Holder", (), {"config": CLIPTextConfig(hidden_size=facts.context)})
        weights = convert_open_clip_checkpoint(holder, raw)
    # transformers 5 has no `text_model.` level and no stored position ids; 2.x has a projection that nothing reads.
    weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if name not in _UNREAD}
    config = _text_config(weights, facts)
    return fill_module(
        files, "text_encoder", lambda **values: CLIPTextModel(CLIPTextConfig(**values)), config, weights, dtype
    )


_UNREAD = ("embeddings.position_ids", "text_projection.weight")


def _text_config(weights: Mapping[str, torch.Tensor], facts: CheckpointFacts) -> dict[str, Any]:
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu" if facts.version == "1.x" else "gelu",
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def load_clip_tokenizer(version: str) -> Any:
    """Load the CLIP tokenizer that checkpoints do not carry; raises BaseModelError with how to fetch it once.

    The same words everywhere, but 2.x was trained with another padding.
    """
    return load_tokenizer("!" if version == "2.x" else "")


def _read(files: BaseFiles, prefix: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    if builds_skeletons():
        import torch

        inside = {name: info for name, info in files.tensors("").items() if name.startswith(prefix)}
        return read_weights(FoundWeights(files.path, "", inside), torch.float32)
    with safe_open(files.path, framework="pt") as source:
        return {name: source.get_tensor(name) for name in source.keys() if name.startswith(prefix)}  # noqa: SIM118
