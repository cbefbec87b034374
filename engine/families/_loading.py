"""What loading a base model shares between families: quiet libraries, strict parts from local files, schedulers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles


def quiet_libraries() -> None:
    """Keep diffusers, transformers and bitsandbytes from writing warnings and bars to the terminal."""
    # diffusers warns of layers that its own models use.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    # bitsandbytes complains at its first import on a machine without a GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load_part(files: BaseFiles, part: str, kind: Any, dtype: torch.dtype, config: Any = None) -> Any:
    """Load one part of a diffusers folder as class `kind`, frozen and in eval mode, from local safetensors only.

    `config` may replace the part's own, e.g. to load the first layers of a language model only.
    Raises BaseModelError where the part is missing, damaged, or lacks weights: the libraries would only log a line and
    go on with random ones.
    """
    if not files.weight_files(part):
        raise missing_part(files, part)
    dtype_name = "dtype" if kind.__module__.startswith("transformers.") else "torch_dtype"
    try:
        module, report = kind.from_pretrained(
            files.path / part,
            local_files_only=True,
            use_safetensors=True,
            variant=files.variant(part),
            output_loading_info=True,
            **{dtype_name: dtype},
            **({"config": config} if config is not None else {}),
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise BaseModelError(
            f"Cannot load the {part} of {files.origin}.", why=first_line(error), fix="Download the base model again."
        ) from error
    require_complete(files, part, report)
    return freeze(module)


def require_complete(files: BaseFiles, part: str, report: Mapping[str, Any]) -> None:
    """Raise BaseModelError where a library's loading report names missing weights or weights of another shape."""
    missing = [str(key) for key in report.get("missing_keys", ()) if not str(key).endswith("position_ids")]
    wrong = [str(key) for key in report.get("mismatched_keys", ())]
    if missing or wrong:
        raise BaseModelError(
            f"The {part} of {files.origin} does not fit its configuration.",
            why=f"{len(missing)} weights are missing and {len(wrong)} differ in shape, e.g. {(missing + wrong)[0]}.",
            fix="Download the base model again.",
        )


def missing_part(files: BaseFiles, part: str) -> BaseModelError:
    """Return the error for a base model that lacks a part."""
    return BaseModelError(f"{files.origin} has no {part}.", fix="Choose a complete base model.")


def freeze(module: Any) -> Any:
    """Return the module in eval mode with no parameter to be trained."""
    return module.requires_grad_(False).eval()


def build_scheduler(config: Mapping[str, Any]) -> Any:
    """Build the scheduler class that `config` names (DDIM where it names none) as an own instance for one drawing.

    Never shared with training: drawing rewrites a scheduler's tables.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    return (kind or diffusers.DDIMScheduler).from_config(dict(config))


def load_transformer_lora(pipeline: Any, path: Path, transformer: torch.nn.Module) -> None:
    """Load a LoRA file into a transformer as `load_lora_weights` of diffusers' class `pipeline` does."""
    state, metadata = pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    pipeline.load_lora_into_transformer(state, transformer=transformer, metadata=metadata, low_cpu_mem_usage=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 300 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
