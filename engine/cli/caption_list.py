"""`lorasmith caption list`: which captioners there are, what they cost, and their settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.output import columns, say, say_json
from lorasmith.engine.cli.progress import size

if TYPE_CHECKING:
    from lorasmith.engine.captioners import CaptionerModule


def list_captioners(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this captioner's settings.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the captioners with what they write, how large their models are, and their licenses."""
    from lorasmith.engine.captioners import captioners, find_captioner

    modules = {name: find_captioner(name)} if name else captioners()
    if as_json:
        say_json([_facts(module) for module in modules.values()])
        return
    rows = [["NAME", "MODEL", "WRITES", "DOWNLOAD", "LICENSE"]]
    for module in modules.values():
        spec = module.SPEC
        rows.append([spec.name, spec.label, spec.kind, size(spec.bytes), spec.license.name])
    for line in columns(rows, indent=""):
        print(line)
    for module in modules.values():
        say(f"{module.SPEC.name}: {module.SPEC.good_for}")
    if name:
        say(f"License: {modules[name].SPEC.license.consequence} {modules[name].SPEC.license.url}")
        say("Settings:")
        for key, default, text in _settings_of(modules[name]):
            say(f"  --set {key}={default}")
            say(f"      {text}")


def _settings_of(module: CaptionerModule) -> Iterator[tuple[str, str, str]]:
    for key, field in module.Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        yield key, shown, " ".join((field.description or "").split())


def _facts(module: CaptionerModule) -> dict[str, Any]:
    spec = module.SPEC
    return {
        "name": spec.name,
        "label": spec.label,
        "kind": spec.kind,
        "model": spec.default_model,
        "revision": spec.revision,
        "bytes": spec.bytes,
        "license": {"name": spec.license.name, "url": spec.license.url, "consequence": spec.license.consequence},
        "good_for": spec.good_for,
        "needs": spec.package,
        "settings": {key: {"default": default, "help": text} for key, default, text in _settings_of(module)},
    }
