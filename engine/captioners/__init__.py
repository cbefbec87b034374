"""Captioners: the narrow protocol, and how captioners are found and loaded.

A captioner is one module in this package with `SPEC`, `Settings` and `load` (`CaptionerModule`). Modules here are
imported without torch and onnxruntime, so that the wizard can list them; whatever needs those is imported inside the
functions. No code of a model repository is ever run: weights are ONNX graphs or safetensors of classes in transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pydantic import ValidationError

from lorasmith.engine.config import Section
from lorasmith.engine.errors import CaptionerError, ConfigError
from lorasmith.engine.families import License

if TYPE_CHECKING:
    from PIL import Image

OnProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all) while a model is downloaded."""


@dataclass(frozen=True)
class CaptionerSpec:
    """Facts of a captioner that are readable without loading it.

    `kind` is what it writes. `default_model` is a Hub id and `revision` the commit that was looked at; `bytes` is what
    is downloaded of it, about. `files` are the names that its folder must hold (`a|b`: one of the two); with
    `safetensors` also weights in that format. `package` is an import name that not every installation has, and `extra`
    what brings it. `cpu_precision` is the number format on the CPU. `good_for` is one sentence to choose by.
    """

    name: str
    label: str
    kind: Literal["tags", "prose"]
    default_model: str
    revision: str
    bytes: int
    license: License
    files: tuple[str, ...]
    good_for: str
    safetensors: bool = True
    package: str = ""
    extra: str = ""
    cpu_precision: Literal["fp32", "bf16"] = "fp32"
    sources: tuple[str, ...] = ()


class Captioner(Protocol):
    """A loaded captioner; `where` says for people what it computes on, e.g. "CPU, fp32"."""

    spec: CaptionerSpec
    where: str

    def caption(self, image: Image.Image) -> str:
        """Return the caption of an upright RGB picture, always the same for the same picture; "" if it finds none."""
        ...

    def close(self) -> None:
        """Let the model's memory go; the captioner cannot be used any more."""
        ...


class CaptionerModule(Protocol):
    """What each module of this package has; `Settings` are its typed and bounded options."""

    SPEC: CaptionerSpec
    Settings: type[Section]

    def load(self, folder: Path, settings: Any, device: str) -> Captioner:
        """Load the model in `folder` onto `device` (`cpu` or `cuda`).

        Raises CaptionerError naming the file that is missing, damaged or of another model, and HardwareError where
        memory does not suffice.
        """
        ...


@cache
def captioners() -> dict[str, CaptionerModule]:
    """Return every captioner module of this package by name."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    modules = [cast(CaptionerModule, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {module.SPEC.name: module for module in modules if hasattr(module, "SPEC")}


def find_captioner(name: str) -> CaptionerModule:
    """Return the captioner of that name; raises ConfigError that lists the known ones."""
    if name not in captioners():
        raise ConfigError(f"There is no captioner {name}.", fix=f"Choose one of {', '.join(sorted(captioners()))}.")
    return captioners()[name]


def read_settings(name: str, values: Mapping[str, Any]) -> Any:
    """Return a captioner's settings with `values`; raises ConfigError naming each that is unknown or not allowed."""
    module = find_captioner(name)
    known = module.Settings.model_fields
    for key in values:
        if key not in known:
            raise ConfigError(f"The captioner {name} has no setting {key}.", fix=f"It has {', '.join(known)}.")
    try:
        return module.Settings.model_validate(dict(values))
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        problem = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        raise ConfigError(f"{key} = {str(item['input'])[:80]}: {problem}.", why=_help_of(known, key)) from None


def load_captioner(
    name: str,
    model: str = "",
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Captioner:
    """Find a captioner's model, download what is not there yet, and load it.

    `model` is a folder or a Hub id; "" is the captioner's own default. `device` is as in `train.device`.
    Raises ConfigError for the name or a setting, CaptionerError and HubError for the model, and HardwareError.
    """
    from lorasmith.engine.captioners._files import locate_model
    from lorasmith.engine.hardware import resolve_device

    module = find_captioner(name)
    checked = read_settings(name, settings or {})
    require_package(module.SPEC)
    chosen = resolve_device(device)
    folder = locate_model(module.SPEC, model, on_progress)
    return module.load(folder, checked, chosen)


def require_package(spec: CaptionerSpec) -> None:
    """Raise CaptionerError with the one line that installs it, where a package that the captioner needs is missing."""
    if spec.package and importlib.util.find_spec(spec.package) is None:
        raise CaptionerError(
            f"{spec.label} needs the package {spec.package}, which is not installed.",
            fix=f"Install it: pip install 'lorasmith[{spec.extra}]'",
        )


def _help_of(fields: Mapping[str, Any], key: str) -> str:
    field = fields.get(key.partition(".")[0])
    return " ".join((field.description or "").split()) if field is not None else ""
