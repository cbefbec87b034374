"""What captioners of transformers share: loading from local safetensors, writing text, and freeing the memory."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.captioners import CaptionerSpec
from lorasmith.engine.captioners._files import read_json, read_tensors
from lorasmith.engine.errors import CaptionerError, HardwareError

if TYPE_CHECKING:
    import torch

_AGAIN = "Download the model again, or choose another one."
_GIB = 1 << 30
# What libraries raise on a model's damaged or foreign files; RuntimeError also when shapes do not fit.
_FILE_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError)


@dataclass(frozen=True)
class ModelClasses:
    """The classes of transformers that load a captioner, and the `model_type` in the configuration that fits them."""

    model: Any
    processor: Any
    model_type: str


class Writer:
    """A loaded model that writes text about pictures; `where` says for people what it computes on."""

    def __init__(self, folder: Path, spec: CaptionerSpec, classes: ModelClasses, device: str) -> None:
        """Load from `folder` onto `device`; raises as `CaptionerModule.load`."""
        from lorasmith.engine.compute import choose_compute
        from lorasmith.engine.config import TrainSettings

        _quiet_library()
        _require_type(folder, spec, classes.model_type)
        precision = spec.cpu_precision if device == "cpu" else "auto"
        compute = choose_compute(TrainSettings(device=device, precision=precision))
        self.spec, self.where = spec, compute.label
        self._device, self._dtype = compute.device, compute.dtype
        _require_memory(folder, spec, compute.device, compute.dtype)
        self.processor: Any = _load_processor(folder, spec, classes.processor)
        self.model: Any = self._load_model(folder, classes.model)

    def prepare(self, **parts: Any) -> Any:
        """Return the processor's tensors for `images` and `text` on the model's device, numbers in its format."""
        self._require_open()
        return self.processor(**parts, return_tensors="pt").to(self._device, self._dtype)

    def write(self, inputs: Mapping[str, Any], *, temperature: float = 0.0, **options: Any) -> list[int]:
        """Return the token numbers that the model writes, greedily or with beams, or drawn where `temperature` > 0.

        Draws depend on the picture alone, so that the same picture always gets the same text.
        """
        import torch

        from lorasmith.engine.compute import engine_threads

        self._require_open()
        # Models bring sampling settings of their own, which must not come in by the back door.
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            drawn = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "top_k": None}
        devices = [self._device] if self._device.type != "cpu" else []
        try:
            with engine_threads(), torch.random.fork_rng(devices=devices), torch.inference_mode():
                torch.manual_seed(_seed_of(inputs["pixel_values"]))
                tokens: list[int] = self.model.generate(**inputs, **drawn, **options)[0].tolist()
        except torch.OutOfMemoryError:
            raise HardwareError(
                "The GPU has not enough memory for this picture.",
                fix="Close other programs on it, or use --device cpu.",
            ) from None
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token numbers without the special ones."""
        self._require_open()
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return " ".join(text.split())

    def close(self) -> None:
        """Drop model and processor from memory."""
        self.model = self.processor = None
        gc.collect()
        if self._device.type != "cpu":
            import torch

            torch.cuda.empty_cache()

    def _load_model(self, folder: Path, kind: Any) -> Any:
        import torch

        try:
            model, report = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=self._dtype
            )
            _require_complete(folder, report)
            return model.to(self._device).requires_grad_(False).eval()
        except (torch.OutOfMemoryError, MemoryError):
            raise HardwareError(
                f"There is not enough memory to load {self.spec.label}.",
                fix="Close other programs, or use --device cpu.",
            ) from None
        except _FILE_ERRORS as error:
            raise CaptionerError(
                f"The model in {folder} cannot be loaded.", why=first_line(error), fix=_AGAIN
            ) from error

    def _require_open(self) -> None:
        if self.model is None:
            raise CaptionerError("The captioner is no longer in memory.", why="It was closed.")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 300 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _quiet_library() -> None:
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _require_type(folder: Path, spec: CaptionerSpec, model_type: str) -> None:
    config = read_json(folder / "config.json")
    found = str(config.get("model_type", "nothing"))
    if found != model_type:
        raise CaptionerError(
            f"{folder} holds no {spec.label}.",
            why=f"Its config.json says it is a model of type {found}, not {model_type}.",
            fix=f"Choose {spec.default_model}, or a like one.",
        )
    if "auto_map" in config:
        raise CaptionerError(
            f"The model in {folder} needs program code of its own.",
            why="Code from a model repository could do anything on this machine, so lorasmith never runs it.",
            fix=f"Choose {spec.default_model}, which needs none.",
        )


def _require_memory(folder: Path, spec: CaptionerSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before a load that would make the machine swap for minutes, or fail half way."""
    import torch

    from lorasmith.engine.hardware import read_memory

    numbers = 0
    for tensor in read_tensors(spec, folder).values():
        count = 1
        for size in tensor.shape:
            count *= size
        numbers += count
    needed = numbers * dtype.itemsize / _GIB
    free = read_memory().available_gib if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] / _GIB
    if needed > free:
        raise HardwareError(
            f"{spec.label} takes {needed:.1f} GiB, and {free:.1f} GiB of {_memory_name(device)} are free.",
            fix="Close other programs, or choose a smaller captioner: lorasmith caption list",
        )


def _memory_name(device: torch.device) -> str:
    return "this machine's memory" if device.type == "cpu" else "the GPU's memory"


def _load_processor(folder: Path, spec: CaptionerSpec, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except _FILE_ERRORS as error:
        raise CaptionerError(
            f"The tokenizer or picture settings of {spec.label} in {folder} cannot be loaded.",
            why=first_line(error),
            fix=_AGAIN,
        ) from error


def _require_complete(folder: Path, report: Mapping[str, Any]) -> None:
    missing = [str(key) for key in report.get("missing_keys", ()) if not str(key).endswith("position_ids")]
    wrong = [str(key) for key in report.get("mismatched_keys", ())]
    if missing or wrong:
        raise CaptionerError(
            f"The weights in {folder} do not fit its config.json.",
            why=f"{len(missing)} weights are missing and {len(wrong)} differ in shape, e.g. {(missing + wrong)[0]}.",
            fix=_AGAIN,
        )


def _seed_of(pixels: torch.Tensor) -> int:
    import torch

    data = pixels.detach().to("cpu", torch.float32).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little")
