"""A frozen LoRA that is active while training only, so that a distilled base model can be trained.

A distilled model draws in a few steps because it was taught to; training it as if it were not undoes that. Its
training adapter undoes it beforehand: the run learns its LoRA beside the adapter, and the LoRA is used without it. So
it works in training and validation, not in previews, and is never part of the export. No weight of the base is changed:
each layer's result gets the adapter's added, which quantized layers allow too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from lorasmith.engine.errors import BaseModelError, CheckpointError, HubError
from lorasmith.engine.export.changes import AnyChange, Change, frozen_layer
from lorasmith.engine.export.layouts import layer_of
from lorasmith.engine.lora_files import read_lora
from lorasmith.engine.sources import hub_file, is_hub_id

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lorasmith.engine.config import BaseSettings
    from lorasmith.engine.families import BaseIdentity, Family

SETTING = "base.training_adapter"
_CHUNK = 1 << 20


@dataclass
class TrainingAdapter:
    """An attached training adapter: how many layers it changes, and what tells it from another."""

    layers: int
    fingerprint: str
    label: str
    enabled: bool = True
    _handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    def set_enabled(self, enabled: bool) -> None:
        """Switch it on, or off to have exactly the distilled base."""
        self.enabled = enabled

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Work without it inside."""
        before = self.enabled
        self.set_enabled(False)
        try:
            yield
        finally:
            self.set_enabled(before)

    def remove(self) -> None:
        """Take it off the base model for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def resolve_training_adapter(
    settings: BaseSettings, identity: BaseIdentity, on_progress: Callable[[str, int, int], None] | None = None
) -> Path | None:
    """Return the file of the training adapter, downloaded where it is on the Hub; None where there is none.

    `auto` is the one that the base model names, if any. Raises BaseModelError where a file does not exist, and HubError
    where the Hub does not give it.
    """
    wanted = settings.training_adapter.strip()
    if wanted == "auto":
        wanted = str(identity.details.get("training_adapter", ""))
    if wanted in ("", "off"):
        return None
    path = Path(wanted).expanduser()
    if path.is_file():
        return path
    try:
        return _download(wanted, on_progress)
    except HubError as error:
        raise HubError(
            f"{identity.label} is trained with {wanted}, which could not be downloaded.",
            why=error.what,
            fix=f"{error.fix} Or set {SETTING} to off, to train without it.".strip(),
        ) from error


def _download(wanted: str, on_progress: Callable[[str, int, int], None] | None) -> Path:
    from lorasmith.engine.hub import download_file, download_files

    named = hub_file(wanted)
    if named is not None:
        return download_file(*named, "main", SETTING, on_progress)
    if not is_hub_id(wanted):
        raise BaseModelError(
            f"{SETTING}: there is no file {wanted}.", fix="Give a .safetensors file or a Hub id, auto or off."
        )

    def only_one(names: list[str]) -> list[str]:
        files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        if len(files) == 1:
            return files
        raise BaseModelError(
            f"{SETTING}: {wanted} has {len(files)} .safetensors files.",
            why=f"They are {', '.join(files)}." if files else "",
            fix="Write which one after the id, as owner/name/file.safetensors.",
        )

    def is_there(folder: Path) -> bool:
        return len(list(folder.glob("*.safetensors"))) == 1

    folder = download_files(wanted, "main", only_one, is_there, on_progress, SETTING)
    return next(folder.glob("*.safetensors"))


def attach_training_adapter(family: Family, path: Path, strength: float = 1.0) -> TrainingAdapter:
    """Put the LoRA at `path` beside the frozen layers of the base model, before or after the run's own adapter.

    Raises BaseModelError where it is no LoRA, or one for another base model.
    """
    changes = read_lora(path).changes(family)
    adapter = TrainingAdapter(len(changes), fingerprint(path, strength), path.name)
    for (component, layer_path), change in changes.items():
        layer: Any = frozen_layer(layer_of(family, component, layer_path))
        adapter._handles.append(_beside(adapter, layer, change, strength, family))
    return adapter


def fingerprint(path: Path, strength: float = 1.0) -> str:
    """Return the SHA-256 of the file and the strength that it works at."""
    digest = hashlib.sha256(f"{strength:g}:".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_same(adapter: TrainingAdapter | None, saved: str, step: int) -> None:
    """Raise CheckpointError where a checkpoint was trained with another training adapter, `saved`, or without one."""
    own = adapter.fingerprint if adapter else ""
    if own == saved:
        return
    before, now = (
        ("with another" if saved else "without one"),
        (f"it is {adapter.label}" if adapter else "there is none"),
    )
    raise CheckpointError(
        f"The run cannot be resumed at step {step}: its training adapter has changed.",
        why=f"The checkpoint was trained {before}, and now {now}.",
        fix=f"Set {SETTING} as it was, or start a new run.",
    )


def _beside(
    adapter: TrainingAdapter, layer: Any, change: AnyChange, strength: float, family: Family
) -> RemovableHandle:
    """Add the change's own result to the layer's. Buffers, so that they move wherever the layer moves."""
    place: dict[str, Any] = {"device": family.device, "dtype": family.dtype}
    if isinstance(change, Change):
        up = change.up.float() * (change.scale * strength)
        layer.register_buffer("training_down", change.down.to(**place), persistent=False)
        layer.register_buffer("training_up", up.to(**place), persistent=False)
    else:
        layer.register_buffer("training_down", (change.weight.float() * strength).to(**place), persistent=False)

    def add(module: Any, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        if not adapter.enabled:
            return result
        added = _apply(module, inputs[0].to(module.training_down.dtype), module.training_down)
        if hasattr(module, "training_up"):
            up = module.training_up
            added = functional.conv2d(added, up) if added.dim() == 4 and up.dim() == 4 else functional.linear(added, up)
        return result + added.to(result.dtype)

    handle: RemovableHandle = layer.register_forward_hook(add)
    return handle


def _apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a matrix or kernel (k, in, …) as the layer applies its own weight."""
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, weight.flatten(1))


@contextlib.contextmanager
def without(adapter: TrainingAdapter | None) -> Iterator[None]:
    """Work without the training adapter inside, if there is one."""
    with adapter.switched_off() if adapter else contextlib.nullcontext():
        yield
