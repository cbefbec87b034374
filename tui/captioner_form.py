"""The captioners as a form sees them: facts in words, options with their controls, and which pictures are captioned."""

from __future__ import annotations

import importlib.util
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ConfigError
from lorasmith.tui.fields import SEPARATOR, bounds_in, kind_of_type, read_as, write_as

if TYPE_CHECKING:
    from lorasmith.engine.captioners import Captioner, CaptionerModule, CaptionerSpec
    from lorasmith.engine.dataset.items import ImageItem

Load = Callable[[str, str, Mapping[str, Any], Callable[[str, int, int], None]], "Captioner"]
"""Loads a captioner by name, model and settings, telling a download's file name, bytes done and bytes in all."""
WANTED = ("without a caption", "and those a model wrote", "and those of my files")
"""Which pictures are captioned, from the fewest to the most; what a person edited here is never replaced."""
ABOUT_WANTED = (
    "Captions that are there stay.",
    "What a model wrote is written anew; yours stay.",
    "Your files stay as they are; these captions count instead. What you edited here stays.",
)
STYLES = {"tags": "tags", "prose": "sentences"}


@dataclass(frozen=True)
class Option:
    """One option of a captioner: its name, the words that are allowed (none: any text), what it means, its default."""

    key: str
    label: str
    about: str
    choices: tuple[str, ...]
    default: str


def load_captioner(
    name: str, model: str, settings: Mapping[str, Any], tell: Callable[[str, int, int], None]
) -> Captioner:
    """Load a captioner on the best device, one heavy import at a time; raises LorasmithError."""
    from lorasmith.engine import captioners
    from lorasmith.tui.findings import HEAVY_IMPORTS

    module = captioners.find_captioner(name)
    captioners.require_package(module.SPEC)
    with HEAVY_IMPORTS:
        _import_heavy(module.SPEC)
    return captioners.load_captioner(name, model, settings, on_progress=tell)


def _import_heavy(spec: CaptionerSpec) -> None:
    # Each module's own imports come later, when the packages are there and a second thread does no harm.
    for name in (spec.package, "torch", "transformers") if spec.safetensors else (spec.package, "torch"):
        if name and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    torch = sys.modules.get("torch")
    if torch is not None:  # counts for this thread; one core stays with the screen
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def order_captioners(modules: Mapping[str, CaptionerModule], style: str) -> list[CaptionerModule]:
    """Return the captioners, those that write what the base reads first, small downloads before large ones."""
    return sorted(modules.values(), key=lambda module: (module.SPEC.kind != style, module.SPEC.bytes))


def facts_of(spec: CaptionerSpec, style: str, base: str) -> list[tuple[str, str]]:
    """Return what to know before choosing a captioner, as lines with a role each; `style` is what the base reads."""
    kind = STYLES[spec.kind]
    if not style:
        fit = (f"· Writes {kind}. Which of both fits is known when the base model is.", "dim")
    elif style == spec.kind:
        fit = (f"✓ Writes {kind}, which {base} was trained on.", "good")
    else:
        fit = (f"! Writes {kind}; {base} was trained on {STYLES[style]}, so these fit it less.", "high")
    license_line = f"{size_of(spec.bytes)} download · {spec.license.name}: {spec.license.consequence}"
    lines = [fit, (f"  {spec.good_for}", ""), (f"  {license_line}", "dim")]
    if spec.package and importlib.util.find_spec(spec.package) is None:
        lines.append((f"✗ Needs {spec.package}. Install it: pip install 'lorasmith[{spec.extra}]'", "critical"))
    return lines


def size_of(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def options_of(module: CaptionerModule) -> list[Option]:
    """Return a captioner's options in their order."""
    found = []
    for key, info in module.Settings.model_fields.items():
        default = info.get_default(call_default_factory=True)
        kind = kind_of_type(info.annotation)
        choices: tuple[str, ...] = ("off", "on") if kind == "switch" else ()
        if kind == "choice":
            choices = tuple(str(value) for value in typing.get_args(info.annotation))
        about = " ".join((info.description or "").split())
        bounds = bounds_in(info.metadata)
        shown = _write_pairs(default) if isinstance(default, dict) else write_as(kind, default)
        about = f"{about} ({bounds})" if bounds else about
        found.append(Option(key, key.replace("_", " ").capitalize(), about, choices, shown))
    return found


def read_options(module: CaptionerModule, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the options that `texts` mean, checked; raises ConfigError naming the one that is not allowed."""
    from lorasmith.engine.captioners import read_settings

    values: dict[str, Any] = {}
    for key, text in texts.items():
        info = module.Settings.model_fields[key]
        try:
            if isinstance(info.get_default(call_default_factory=True), dict):
                values[key] = _read_pairs(text)
            else:
                values[key] = read_as(kind_of_type(info.annotation), text)
        except ValueError as error:
            raise ConfigError(f"{key.replace('_', ' ').capitalize()}: {error}") from None
    read_settings(module.SPEC.name, values)
    return values


def items_for(items: Sequence[ImageItem], wanted: str) -> tuple[list[ImageItem], bool]:
    """Return the pictures to hand to the captioner, and whether captions of models are made anew."""
    from lorasmith.engine.dataset.captioning import without_own_captions

    if wanted == WANTED[2]:
        return without_own_captions(items), True
    return list(items), wanted == WANTED[1]


def _write_pairs(pairs: Mapping[str, str]) -> str:
    return f" {SEPARATOR} ".join(f"{old} = {new}" for old, new in pairs.items())


def _read_pairs(text: str) -> dict[str, str]:
    pairs = {}
    for entry in filter(None, (part.strip() for part in text.split(SEPARATOR))):
        old, sign, new = entry.partition("=")
        if not sign or not old.strip():
            raise ValueError(f"“{entry}” is no pair; write it like grey = gray, several with {SEPARATOR} between them.")
        pairs[old.strip()] = new.strip()
    return pairs
