"""What loading a base model shares between families: quiet libraries, strict parts from local files, schedulers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles


_skeletons: ContextVar[bool] = ContextVar("skeletons", default=False)


@contextlib.contextmanager
def skeletons() -> Iterator[None]:
    """Let base models be loaded without their weights inside: every part is built on the meta device.

    Layers, shapes and number formats are those of the loaded model. Only configurations and headers are read, and no
    tokenizers, so that `module.load(files, identity, torch.device("meta"), dtype)` takes seconds for any size and works
    for files that have no weights.
    """
    token = _skeletons.set(True)
    try:
        yield
    finally:
        _skeletons.reset(token)


def builds_skeletons() -> bool:
    """Tell whether parts are built without their weights now; see `skeletons`."""
    return _skeletons.get()


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
    if not has_part(files, part):
        raise missing_part(files, part)
    if builds_skeletons():
        return _skeleton(files, part, kind, dtype, config)
    dtype_name = "dtype" if _of_transformers(kind) else "torch_dtype"
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
        raise _unloadable(files, part, error) from error
    require_complete(files, part, report)
    return freeze(module)


def has_part(files: BaseFiles, part: str) -> bool:
    """Tell whether a diffusers folder has weights for a part; for a skeleton a configuration is enough."""
    return bool(files.weight_files(part) or (builds_skeletons() and files.config(part)))


def read_config(files: BaseFiles, part: str, kind: Any) -> Any:
    """Return the configuration of a part of a diffusers folder as transformers' class `kind`."""
    if builds_skeletons():
        return kind.from_dict(files.config(part))
    return kind.from_pretrained(files.path / part, local_files_only=True)


def without_weights(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Return a module that was built without weights as loading would leave it: on the meta device, as `dtype`.

    Frozen and in eval mode. The libraries keep what they name `_keep_in_fp32_modules` in 32 bits: diffusers always,
    transformers beside fp16 alone.
    """
    import torch

    kept = list(getattr(module, "_keep_in_fp32_modules", None) or ())
    if _of_transformers(type(module)) and dtype != torch.float16:
        kept = []
    for name, tensor in module.to("meta").state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in kept for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)
    if _of_transformers(type(module)):
        module.tie_weights()  # type: ignore[operator]  # or an embedding under two names would be two
    return freeze(module)


def _skeleton(files: BaseFiles, part: str, kind: Any, dtype: torch.dtype, config: Any) -> Any:
    import torch
    from accelerate import init_empty_weights

    try:
        # Both: what a model makes of numpy's arrays is not made on the meta device.
        with init_empty_weights(), torch.device("meta"):
            if _of_transformers(kind):
                module = kind(config or read_config(files, part, kind.config_class))
            else:
                module = kind.from_config(config or files.config(part))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _unloadable(files, part, error) from error
    return without_weights(module, dtype)


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _unloadable(files: BaseFiles, part: str, error: BaseException) -> BaseModelError:
    return BaseModelError(
        f"Cannot load the {part} of {files.origin}.", why=first_line(error), fix="Download the base model again."
    )


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
