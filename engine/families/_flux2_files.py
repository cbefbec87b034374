"""FLUX.2's files: which variant they are, from headers and configurations alone, and its networks from single files.

Single files are those of Black Forest Labs and ComfyUI: the transformer alone in the original names, where to_q, to_k
and to_v are one `qkv`, in 16 bits or fp8; autoencoder and text encoder in files of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_mistral as mistral
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families._loading import missing_part
from lorasmith.engine.families._weights import (
    FoundWeights,
    fill_module,
    find_weights,
    part_paths,
    read_weights,
    stored_precision,
)

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
TOKENS = 512
"""Every prompt is padded to this length."""
READ_LAYERS = {"dev": (10, 20, 30), "klein": (9, 18, 27)}
"""Which hidden states of the text encoder make up a prompt's embeddings, side by side."""
NON_COMMERCIAL, APACHE = "FLUX Non-Commercial License", "Apache 2.0"
DISTILLED_WARNING = (
    "This is a distilled klein, made for 4 steps. Train on FLUX.2 klein base of the same size and use the LoRA on this "
    "one: trained on itself it loses what makes 4 steps enough."
)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
"""The scheduler configuration that FLUX.2's repositories share; the shift itself follows from size and steps."""
_SIDE = 1024
_ORIGINAL = ("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1.weight", "txt_in.weight")
_DIFFUSERS = (
    "double_stream_modulation_img.linear.weight",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    "context_embedder.weight",
)
_PIPELINES = {"Flux2Pipeline": "dev", "Flux2KleinPipeline": "klein"}
_SIZES = {3072: "4B", 4096: "9B"}
_BASE = re.compile(r"(^|[^a-z])base([^a-z]|$)", re.IGNORECASE)
# The pipelines' own defaults and the model cards: base 50 steps at 4, distilled 4 steps at 1; the card of dev calls 28
# steps a good trade-off.
_DRAWING = {"dev": (28, 4.0), "base": (50, 4.0), "distilled": (4, 1.0)}


@dataclass(frozen=True)
class Kind:
    """Which FLUX.2 it is: `line` is dev or klein, `size` klein's (4B, 9B, "" another), `told_by` how that is known."""

    line: str
    size: str
    distilled: bool
    told_by: str
    text_width: int
    """Numbers in a hidden state of the text encoder: a third of a token's embedding."""

    @property
    def variant(self) -> str:
        """The variant's short name, e.g. `klein-base-4b`."""
        if self.line == "dev":
            return "dev"
        return "-".join(["klein", *([] if self.distilled else ["base"]), *([self.size.lower()] if self.size else [])])

    @property
    def words(self) -> str:
        """What the user calls it, with a guess called so."""
        if self.line == "dev":
            return "FLUX.2 dev"
        which = "distilled" if self.distilled else "base"
        return f"FLUX.2 klein {self.size or 'small, custom'} {which}" + (f" ({self.told_by})" if self.told_by else "")


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of FLUX.2's transformer, in the original or diffusers' names."""
    return any(all(name in tensors for name in names) for names in (_ORIGINAL, _DIFFUSERS))


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None where its pipeline is another."""
    kind = _kind_of_folder(files)
    if kind is None:
        return None
    missing = [part for part in ("transformer", "vae", "text_encoder") if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    side = files.config("vae").get("sample_size") or _SIDE
    tensors = files.tensors("transformer")
    return _identity(files, kind, tensors, int(side[0] if isinstance(side, list) else side), tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: the transformer alone, or all parts in one."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    kind = kind_of(files, found)
    missing = [] if find_vae(files) else ["vae"]
    missing += [] if find_encoder(files, kind) else ["text_encoder"]
    return _identity(files, kind, found.tensors, _SIDE, tuple(missing))


def kind_of_files(files: BaseFiles) -> Kind:
    """Return which FLUX.2 the files are; raises BaseModelError where they are none."""
    if files.kind == "folder":
        kind = _kind_of_folder(files)
    else:
        found = find_weights([files.path], PREFIXES, matches)
        kind = kind_of(files, found) if found else None
    if kind is None:
        raise BaseModelError(f"{files.origin} holds no FLUX.2 transformer.", why=files.describe())
    return kind


def kind_of(files: BaseFiles, found: FoundWeights) -> Kind:
    """Return which FLUX.2 a transformer's file is; base and distilled klein differ in nothing but their name."""
    config = config_of(found.tensors)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = config["joint_attention_dim"] // 3
    if config["guidance_embeds"]:
        return Kind("dev", "", False, "", text)
    metadata = files.metadata()
    named = " ".join([files.path.stem, *(metadata.get(f"modelspec.{key}", "") for key in ("title", "architecture"))])
    base = _BASE.search(named.replace("_", "-")) is not None
    told_by = "guessed from its name" if base else "guessed: its name does not say base"
    return Kind("klein", _SIZES.get(width, ""), not base, told_by, text)


def find_vae(files: BaseFiles) -> FoundWeights | None:
    """Return where the autoencoder of a single-file base is: FLUX.2's has batch-norm statistics; torch-free."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return autoencoder.matches(tensors) and "bn.running_mean" in tensors

    return find_weights(part_paths(files), autoencoder.PREFIXES, fits)


def find_encoder(files: BaseFiles, kind: Kind) -> FoundWeights | None:
    """Return where the text encoder of a single-file base is, of the size that the transformer reads; torch-free."""
    reader = mistral if kind.line == "dev" else qwen
    return reader.find(files, kind.text_width)


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

    kind_of_files(files)
    found = find_weights([files.path], PREFIXES, matches)
    assert found is not None
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
        raise missing(files, "vae", "flux2-vae.safetensors")
    weights = {_plain(name): value for name, value in read_weights(found, dtype).items()}
    weights.setdefault("bn.num_batches_tracked", torch.tensor(0))
    config = autoencoder.config_of({_plain(name): info for name, info in found.tensors.items()})
    config |= {"decoder_block_out_channels": _decoder_widths(found.tensors, config["block_out_channels"])}
    if "encoder.down.0.block.0.conv1.weight" in weights:
        statistics = {name: value for name, value in weights.items() if name.startswith("bn.")}
        weights = convert_ldm_vae_checkpoint(weights, config) | statistics
    return fill_module(files, "vae", AutoencoderKLFlux2, config, weights, dtype)


def missing(files: BaseFiles, part: str, example: str) -> BaseModelError:
    """Return the error for a part that a single-file base lacks, with the setting that takes it."""
    if files.kind == "folder":
        return missing_part(files, part)
    settings = [name for name, of in (("base.vae", "vae"), ("base.text_encoders", "text_encoder")) if of in part]
    return BaseModelError(f"{files.origin} has no {part}.", fix=f"Set {' and '.join(settings)}, e.g. to {example}.")


def encoder_name(kind: Kind) -> str:
    """Return the name of the text encoder's file that ComfyUI's users have."""
    return {"dev": "mistral_3_small_flux2_bf16", "9B": "qwen_3_8b"}.get(
        "dev" if kind.line == "dev" else kind.size, "qwen_3_4b"
    ) + ".safetensors"


def examples(files: BaseFiles, parts: tuple[str, ...]) -> str:
    """Return the names of files that people have for the parts that a single-file base lacks."""
    names = {"vae": "flux2-vae.safetensors", "text_encoder": encoder_name(kind_of_files(files))}
    return " and ".join(names[part] for part in parts if part in names)


def _kind_of_folder(files: BaseFiles) -> Kind | None:
    index, config = files.config(""), files.config("transformer")
    line = _PIPELINES.get(str(index.get("_class_name")))
    if line is None:
        return None
    width = int(config.get("num_attention_heads", 48)) * int(config.get("attention_head_dim", 128))
    distilled = line == "klein" and bool(index.get("is_distilled", False))
    size = _SIZES.get(width, "") if line == "klein" else ""
    return Kind(line, size, distilled, "", int(config.get("joint_attention_dim", 15360)) // 3)


def _identity(
    files: BaseFiles, kind: Kind, tensors: Mapping[str, TensorInfo], side: int, parts_missing: tuple[str, ...]
) -> BaseIdentity:
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    which = "dev" if kind.line == "dev" else "distilled" if kind.distilled else "base"
    steps, guidance = _DRAWING[which]
    details: dict[str, Any] = {
        "license": files.license() or (APACHE if kind.size == "4B" else NON_COMMERCIAL),
        "prompt_numbers": TOKENS * 3 * kind.text_width,
        "draw_steps": steps,
        "draw_guidance": guidance,
        "architecture": f"flux-2-{kind.variant}",
        "ss_base_model_version": "flux2_" + kind.variant.replace("-", "_"),
        "implementation": "https://github.com/black-forest-labs/flux2",
    }
    if which == "distilled":
        details["warning"] = DISTILLED_WARNING
    label = f"{kind.words}, {precision}, {count}"
    return BaseIdentity("flux2", label, kind.variant, "velocity", side, parameters, precision, parts_missing, details)


def _decoder_widths(tensors: Mapping[str, TensorInfo], encoder: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the widths of a decoder that is smaller than its encoder, as in the small decoder for FLUX.2."""
    last = tensors["decoder.conv_out.weight"].shape[1]
    return None if last == encoder[0] else tuple(width * last // encoder[0] for width in encoder)


def _plain(name: str) -> str:
    return name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv.")


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})
