"""Which program loads which adapter of which base model in which layout, known before the training. Torch-free.

A family says which programs load a plain LoRA from each of its layouts (`FamilySpec.readers`). What other kinds lose
there follows from the programs' own code, named at each rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.engine.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from lorasmith.engine.config import AdapterSettings, BaseSettings, ExportSettings, RunConfig
    from lorasmith.engine.families import BaseIdentity, FamilySpec

PROGRAMS = ("ComfyUI", "A1111", "Forge", "diffusers")
LABELS = {
    "lora": "LoRA",
    "locon": "LoCon",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "boft": "BOFT",
}
_NO_NAMES = "it has no rule for these names"
_OWN_LENGTHS = "it does not know lora_magnitude_vector, diffusers' own name for DoRA's lengths"
_NO_ROTATIONS = "it has no rule for oft_blocks"
_LOSSES: dict[tuple[str, str], dict[str, str]] = {
    # diffusers loaders/lora_pipeline.py filters dora_scale with a warning for all transformers, so that a plain LoRA
    # stays; for UNets lora_conversion_utils.py takes it for peft's length, which it is not: ComfyUI divides it by the
    # length of the unchanged row. A1111 extensions-builtin/Lora/network.py measures columns; peft trains rows.
    ("dora", "dora_scale"): {
        "diffusers": "it drops the key dora_scale or takes it for another number; it loads DoRA from its own layout",
        "A1111": "it measures the lengths of a DoRA by column, and these are by row",
    },
    # comfy/ has no lora_magnitude_vector, and A1111 and Forge have none either.
    ("dora", "lora_magnitude_vector"): dict.fromkeys(("ComfyUI", "A1111", "Forge"), _OWN_LENGTHS),
    # diffusers 0.42.1: "Invalid LoRA checkpoint", but for LoKr of some base models, whose families say so.
    ("loha", ""): {"diffusers": "it loads LoRA and DoRA only"},
    ("lokr", ""): {"diffusers": "it loads LoKr of a few base models only, and of this one not"},
    # comfy/weight_adapter/oft.py and boft.py (from ComfyUI 0.3.31 on) and extensions-builtin/Lora/network_oft.py of
    # A1111 (from 1.9 on) turn outputs by `oft_blocks`. packages_3rdparty/comfyui_lora_collection/lora.py of Forge has
    # no rule for them, and the network_oft.py that it has beside that is not called.
    ("oft", ""): {"Forge": _NO_ROTATIONS, "diffusers": "it loads LoRA and DoRA only"},
    ("boft", ""): {"Forge": _NO_ROTATIONS, "diffusers": "it loads LoRA and DoRA only"},
}


def chosen_layouts(settings: ExportSettings, spec: FamilySpec) -> list[str]:
    """Return the key layouts to write, each once; `auto` is the one that most programs load for the family."""
    return list(dict.fromkeys(spec.layouts[0] if name == "auto" else name for name in settings.layouts))


def loads_kind(spec: FamilySpec, kind: str, layout: str) -> tuple[str, ...]:
    """Return the programs that load an adapter of `kind` from a file in `layout`."""
    if not _can_hold(spec, kind, layout):
        return ()
    stated = spec.readers.get(f"{layout}/{kind}")
    if stated is not None:
        return stated
    lost = _losses(kind, layout)
    return tuple(program for program in spec.readers.get(layout, ()) if program not in lost)


def loads_in(spec: FamilySpec, adapter: AdapterSettings, layout: str) -> tuple[str, ...]:
    """Return the programs that load this run's adapter from a file in `layout`; () where none does."""
    return loads_kind(spec, adapter.kind, layout)


def why_not(spec: FamilySpec, adapter: AdapterSettings, layout: str, program: str = "") -> str:
    """Return why `program` does not load the adapter from a file in `layout`; "" where it does.

    Without `program`, of the first that loads a LoRA from there but not this adapter.
    """
    programs, usual = loads_in(spec, adapter, layout), spec.readers.get(layout, ())
    program = program or next((name for name in usual if name not in programs), "")
    if not program or program in programs:
        return ""
    if not _can_hold(spec, adapter.kind, layout):
        return f"it stores layers fused with others, which {_named(adapter.kind)} cannot be"
    return _losses(adapter.kind, layout).get(program, _NO_NAMES) if program in usual else _NO_NAMES


def compatibility_problems(config: RunConfig, spec: FamilySpec, identity: BaseIdentity | None = None) -> list[str]:
    """Return what the user should know before the training: a sentence each, with its fix.

    What no training can start with comes first; see `require_compatible`.
    """
    errors = layout_errors(config, spec)
    layouts = [
        layout
        for layout in chosen_layouts(config.export, spec)
        if layout in spec.layouts and _can_hold(spec, config.adapter.kind, layout)
    ]
    found = [words for layout in layouts if (words := _loss_words(config.adapter, spec, layout, layouts))]
    if identity is not None:
        notes = (missing_training_adapter(config.base, identity), str(identity.details.get("warning", "")))
        found += [words for words in notes if words]
    return errors + found


def require_compatible(config: RunConfig, spec: FamilySpec) -> None:
    """Refuse layouts that the base model's LoRA cannot be written in; raises ConfigError."""
    if errors := layout_errors(config, spec):
        what, _, fix = errors[0].partition(". ")
        raise ConfigError(f"{what}.", fix=fix)


def layout_errors(config: RunConfig, spec: FamilySpec) -> list[str]:
    """Return one sentence and its fix for each chosen layout that cannot be written."""
    found = []
    for layout in chosen_layouts(config.export, spec):
        if layout not in spec.layouts:
            found.append(
                f"export.layouts: {spec.label} has no {layout} layout. Choose of {', '.join(spec.layouts)}, or auto."
            )
        elif not _can_hold(spec, config.adapter.kind, layout):
            found.append(
                f"export.layouts: the {layout} layout stores layers of {spec.label} fused with others, which "
                f"{_named(config.adapter.kind)} cannot be. {_instead(spec, config.adapter.kind)}."
            )
        elif config.adapter.text_encoder and (component := _nameless_encoder(spec, layout)):
            others = [other for other in spec.layouts if not _nameless_encoder(spec, other)]
            fix = f"Set export.layouts to {' or '.join(others)}" if others else "Set adapter.text_encoder = false"
            found.append(
                f"export.layouts: the {layout} layout has no names for the {component} that is trained. {fix}."
            )
    return found


def missing_training_adapter(base: BaseSettings, identity: BaseIdentity) -> str:
    """Return the warning that a distilled base model is trained without the LoRA that it needs; "" where it is not."""
    needed = identity.details.get("training_adapter", "")
    if not needed or base.training_adapter != "off":
        return ""
    return (
        f"{identity.label} is distilled, and base.training_adapter is off: training undoes the distillation, "
        f"and pictures turn soft. Set it to auto, which is {needed}."
    )


def _named(kind: str) -> str:
    return f"{'an' if kind == 'oft' else 'a'} {LABELS[kind]}"


def _losses(kind: str, layout: str) -> dict[str, str]:
    if kind == "dora":
        return _LOSSES["dora", "lora_magnitude_vector" if layout == "diffusers" else "dora_scale"]
    return _LOSSES.get((kind, ""), {})


def _loss_words(adapter: AdapterSettings, spec: FamilySpec, layout: str, chosen: list[str]) -> str:
    """Return which programs do not load this kind from `layout`, though they load a LoRA, and what to do."""
    label, programs = _named(adapter.kind), loads_in(spec, adapter, layout)
    lost = [program for program in spec.readers.get(layout, ()) if program not in programs]
    if not lost:
        return ""
    why = why_not(spec, adapter, layout, lost[0])
    if not programs:
        fix = _instead(spec, adapter.kind)
        return f"No program that lorasmith knows loads {label} from the {layout} layout: {why}. {fix}."
    elsewhere = [
        other for other in spec.layouts if other not in chosen and set(lost) & set(loads_in(spec, adapter, other))
    ]
    fix = f"add {elsewhere[0]} to export.layouts" if elsewhere else "choose adapter.kind = lora where you need it there"
    what = f"{label[0].upper()}{label[1:]} in the {layout} layout"
    who = f"is loaded by {' and '.join(programs)}, not by {' and '.join(lost)}"
    return f"{what} {who}: {why}. If you use {' or '.join(lost)}, {fix}."


def _can_hold(spec: FamilySpec, kind: str, layout: str) -> bool:
    """Only products can be put together exactly where a layout stores several layers as one."""
    return kind in ("lora", "locon") or layout not in spec.fused_layouts


def _instead(spec: FamilySpec, kind: str) -> str:
    """Say what to set where a layout cannot hold an adapter of `kind`."""
    others = [layout for layout in spec.layouts if loads_kind(spec, kind, layout)]
    return f"Set export.layouts to {' or '.join(others)}" if others else "Choose adapter.kind = lora"


def _nameless_encoder(spec: FamilySpec, layout: str) -> str:
    """Return a trainable text encoder that `layout` has no names for, or ""."""
    from lorasmith.engine.families import families

    module = families().get(spec.name)
    if module is None:
        return ""
    for component in spec.trainable_text_encoders:
        try:
            module.export_name(layout, component, (spec.text_encoder_targets or ("",))[0])
        except ExportError:
            return component
    return ""
