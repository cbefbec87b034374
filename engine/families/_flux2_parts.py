"""FLUX.2's networks from single files, and diffusers' way to draw with its transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
_ORIGINAL = ("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1.weight", "txt_in.weight")
_DIFFUSERS = (
    "double_stream_modulation_img.linear.weight",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    "context_embedder.weight",
)


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of FLUX.2's transformer, in the original or diffusers' names."""
    return any(all(name in tensors for name in names) for names in (_ORIGINAL, _DIFFUSERS))


def find_vae(files: BaseFiles) -> FoundWeights | None:
    """Return where the autoencoder of a single-file base is: FLUX.2's has batch-norm statistics; torch-free."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return autoencoder.matches(tensors) and "bn.running_mean" in tensors

    return find_weights(part_paths(files), autoencoder.PREFIXES, fits)


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its weights; torch-free."""
    original = _ORIGINAL[0] in tensors
    names = (
        ("img_in", "txt_in", "time_in.in_layer", "double_blocks.", "single_blocks.", "0.img_mlp.2", "guidance_in.")
        if original
        else (
            *("x_embedder", "context_embedder", "time_guidance_embed.timestep_embedder.linear_1"),
            *("transformer_blocks.", "single_transformer_blocks.", "0.ff.linear_out"),
            "time_guidance_embed.guidance_embedder.",
        )
    )
    image, text, time, double, single, feed_forward, guidance = names
    width, channels = tensors[f"{image}.weight"].shape
    norms = (f"{single}0.norm.query_norm.scale", f"{single}0.norm.query_norm.weight", f"{single}0.attn.norm_q.weight")
    head = next(tensors[name].shape[0] for name in norms if name in tensors)
    return {
        "in_channels": channels,
        "num_layers": _count(tensors, double),
        "num_single_layers": _count(tensors, single),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensors[f"{text}.weight"].shape[1],
        "timestep_guidance_channels": tensors[f"{time}.weight"].shape[1],
        "mlp_ratio": tensors[f"{double}{feed_forward}.weight"].shape[1] / width,
        # Four axes (picture, row, column, place in the prompt) of equal width: 32 of 128.
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": any(name.startswith(guidance) for name in tensors),
    }


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Build the transformer from one file in main memory as `dtype`."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no FLUX.2 transformer.", why=files.describe())
    if any(name.endswith(".weight_scale_2") for name in found.tensors):
        raise BaseModelError(
            f"{files.origin} is stored in 4 bits (NVFP4), which cannot be trained on.",
            fix="Take the bf16 or fp8 version of the file.",
        )
    weights = read_weights(found, dtype)
    if _ORIGINAL[0] in weights:
        weights = convert_flux2_transformer_checkpoint_to_diffusers(weights)
    return fill_module(files, "transformer", Flux2Transformer2DModel, config_of(found.tensors), weights, dtype)


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Build the autoencoder from a single file in main memory as `dtype`."""
    import torch
    from diffusers import AutoencoderKLFlux2
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    found = find_vae(files)
    if found is None:
        raise loading.missing_part(files, "vae")
    weights = {_plain(name): value for name, value in read_weights(found, dtype).items()}
    weights.setdefault("bn.num_batches_tracked", torch.tensor(0))
    config = autoencoder.config_of({_plain(name): info for name, info in found.tensors.items()})
    decoder = _decoder_widths(found.tensors, config["block_out_channels"])
    groups = math.gcd(config["norm_num_groups"], *(decoder or ()))
    config |= {"decoder_block_out_channels": decoder, "norm_num_groups": groups}
    if "encoder.down.0.block.0.conv1.weight" in weights:
        statistics = {name: value for name, value in weights.items() if name.startswith("bn.")}
        weights = convert_ldm_vae_checkpoint(weights, config) | statistics
    return fill_module(files, "vae", AutoencoderKLFlux2, config, weights, dtype)


def draw_pipeline(transformer: Any, noise_schedule: Mapping[str, Any], dev: bool, distilled: bool) -> Any:
    """Return diffusers' pipeline around the transformer alone, which hands out normalized, unpatched latents."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    kind: Any = Flux2Pipeline if dev else Flux2KleinPipeline
    pipeline = kind(
        scheduler=loading.build_scheduler(noise_schedule),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        **({} if dev else {"is_distilled": distilled}),
    )
    # The pipeline undoes the batch norm before it hands latents out; these statistics leave them as they are.
    pipeline.vae = _unchanged(transformer.config.in_channels)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (1, 128, 1, 1) of the autoencoder's latents."""
    import torch

    norm = vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(norm.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)


def _unchanged(channels: int) -> Any:
    """Return what the pipeline reads of an autoencoder, with mean 0 and standard deviation 1."""
    import torch

    norm = SimpleNamespace(running_mean=torch.zeros(channels), running_var=torch.ones(channels))
    return SimpleNamespace(bn=norm, config=SimpleNamespace(batch_norm_eps=0.0))


def _decoder_widths(tensors: Mapping[str, TensorInfo], encoder: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the widths of a decoder that is smaller than its encoder, as in the small decoder for FLUX.2."""
    last = tensors["decoder.conv_out.weight"].shape[1]
    return None if last == encoder[0] else tuple(width * last // encoder[0] for width in encoder)


def _plain(name: str) -> str:
    return name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv.")


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})
