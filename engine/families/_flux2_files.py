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
from lorasmith.engine.families import _encoder_mistral as mistral
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families._flux2_parts import PREFIXES, config_of, find_vae, matches
from lorasmith.engine.families._loading import missing_part
from lorasmith.engine.families._weights import FoundWeights, find_weights, stored_precision

if TYPE_CHECKING:
    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

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


def find_encoder(files: BaseFiles, kind: Kind) -> FoundWeights | None:
    """Return where the text encoder of a single-file base is, of the size that the transformer reads; torch-free."""
    if kind.line == "dev":
        return mistral.find(files, kind.text_width)
    return qwen.find(files, kind.text_width)


def require_encoder(files: BaseFiles, kind: Kind) -> FoundWeights:
    """Return where the text encoder is; raises BaseModelError naming the file that this FLUX.2 reads."""
    found = find_encoder(files, kind)
    if found is None:
        raise missing(files, "text_encoder", encoder_name(kind))
    return found


def missing(files: BaseFiles, part: str, example: str) -> BaseModelError:
    """Return the error for a part that a single-file base lacks, with the setting that takes it."""
    if files.kind == "folder" and not files.encoder_files:
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
