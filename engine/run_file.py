"""Reading, merging and writing the settings of a run: TOML files, `--set key=value`, layers and their origins."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tomlkit.exceptions import TOMLKitError

from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
Values = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """Settings from one place: `origin` is shown to the user, e.g. "preset sd15" or "run.toml"."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration and, for each dotted key, where its value came from ("default" where nothing set it)."""

    config: RunConfig
    origins: dict[str, str]


def setting_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting as (dotted key, pydantic field)."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from setting_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def resolve_config(layers: Sequence[Layer]) -> ResolvedConfig:
    """Merge `layers`, later over earlier, and check the result.

    Raises ConfigError that names the key, the value, what is allowed and where the value came from.
    """
    merged: Values = {}
    origins = {key: "default" for key, _ in setting_fields()}
    for layer in layers:
        flat = dict(_flatten(layer.values))
        _refuse_unknown([*flat, *_empty_sections(layer.values)], layer.origin)
        for key, value in flat.items():
            origins[key] = layer.origin
            _put(merged, key, value)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, origins) from None
    return ResolvedConfig(config, origins)


def load_run_file(path: Path) -> Layer:
    """Read a TOML run file; raises ConfigError where it is missing, too large or no TOML."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"Cannot read the run file {path}.", why=str(error), fix="Check the path.") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} is larger than 1 MB.", why="A run file is a page of settings.", fix="Check the path."
        )
    try:
        values = tomlkit.parse(raw.decode("utf-8-sig")).unwrap()
    except (TOMLKitError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} is not valid TOML.", why=str(error), fix="Correct that line.") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML.", why="It is nested too deeply.", fix="Check the path.") from None
    return Layer(path.name, values)


def parse_assignments(assignments: Sequence[str], origin: str = "--set") -> Layer:
    """Turn `key=value` strings into a layer; a value is read as TOML, or as plain text for text settings."""
    values: Values = {}
    texts = {key for key, info in setting_fields() if _is_text(info.annotation)}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"Cannot read --set {assignment}.", fix="Write it as key=value, e.g. train.steps=500.")
        _put(values, key, text if key in texts else _parse_value(key, text))
    return Layer(origin, values)


def check_setting(key: str, value: Any) -> str:
    """Return what is wrong with one setting by itself, in words, or "" where the value is allowed."""
    section, _, name = key.rpartition(".")
    model: BaseModel = getattr(RunConfig(), section)
    try:
        type(model).__pydantic_validator__.validate_assignment(model, name, value)
    except ValidationError as error:
        return _allowed(error.errors()[0])
    return ""


def to_toml(resolved: ResolvedConfig) -> str:
    """Return the whole configuration as TOML; each value has its help as a comment, and its origin if not a default."""
    document = tomlkit.document()
    document.add(tomlkit.comment("A lorasmith run. Train it with: lorasmith train THIS_FILE"))
    document.add("version", tomlkit.item(resolved.config.version))
    for name in RunConfig.model_fields:
        section = getattr(resolved.config, name)
        if not isinstance(section, BaseModel):
            continue
        table = tomlkit.table()
        for key, field in type(section).model_fields.items():
            origin = resolved.origins.get(f"{name}.{key}", "default")
            table.add(tomlkit.comment(" ".join((field.description or "").split())))
            item = tomlkit.item(getattr(section, key))
            if origin != "default":
                item.comment(f"from {_one_line(origin)}")
            table.add(key, item)
        document.add(tomlkit.nl())
        document.add(name, table)
    return tomlkit.dumps(document)


def update_toml(text: str, changes: Mapping[str, Any]) -> str:
    """Return the TOML `text` with dotted `changes` made and every comment and blank line kept."""
    document = tomlkit.parse(text)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        table: Any = document
        for part in section.split(".") if section else []:
            table = table.setdefault(part, tomlkit.table())
        table[name] = value
    return tomlkit.dumps(document)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings as {dotted key: value}."""
    return dict(_flatten(values))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _put(values: Values, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{section} is both a section and a setting.", fix="Write each setting as section.name=value."
            )
        values = inner
    values[name] = value


def _parse_value(key: str, text: str) -> Any:
    try:
        return tomlkit.value(text.strip()).unwrap()
    except (TOMLKitError, ValueError, RecursionError):
        return text


def _is_text(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return all(isinstance(value, str) for value in typing.get_args(annotation))
    if origin in (typing.Annotated, typing.Union, types.UnionType):
        return _is_text(typing.get_args(annotation)[0])
    return annotation is str


def _empty_sections(values: Mapping[str, Any]) -> list[str]:
    """Return the tables without settings that are no section: flattening would lose them without a word."""
    return [name for name, value in values.items() if value == {} and name not in RunConfig.model_fields]


def _one_line(text: str) -> str:
    """Return text that a TOML comment can hold: line breaks and control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _refuse_unknown(keys: Sequence[str], origin: str) -> None:
    known = [key for key, _ in setting_fields()]
    sections = {key.split(".")[0] for key in known if "." in key}
    for key in keys:
        if key in known:
            continue
        if key in sections:
            raise ConfigError(f"{key} ({origin}) is a section, not a setting.", fix=f"Write [{key}] and its settings.")
        raise ConfigError(f"Unknown setting {key} ({origin}).", fix=_nearest_key(key, known))


def _nearest_key(key: str, known: Sequence[str]) -> str:
    by_name: dict[str, str] = {candidate.rpartition(".")[2]: candidate for candidate in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)
    ]
    return f"Did you mean {near[0]}?" if near else "Run `lorasmith plan` to see every setting."


def _explain(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if not key:
            problems.extend(str(item["ctx"]["error"]).splitlines() if "ctx" in item else [item["msg"]])
            continue
        setting = next((known for known in origins if key == known or key.startswith(known + ".")), key)
        origin = origins.get(setting, "")
        problems.append(f"{key} = {_shown(item['input'])}{f' ({origin})' if origin else ''}: {_allowed(item)}")
    first, *rest = problems
    return ConfigError(first + ("" if first.endswith(".") else "."), why=" ".join(f"{line}." for line in rest))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _allowed(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    words = {
        "bool_type": "must be true or false, without quotes",
        "int_type": "must be a whole number, without quotes",
        "float_type": "must be a number, without quotes",
        "string_type": "must be text in quotes",
        "list_type": "must be a list, e.g. [1, 2]",
        "literal_error": f"must be one of {context.get('expected')}",
        "greater_than": f"must be more than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be less than {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "multiple_of": f"must be a multiple of {context.get('multiple_of')}",
        "string_too_short": "must not be empty",
        "too_short": "must not be empty",
        "value_error": str(context.get("error")),
        "string_too_long": f"must have at most {context.get('max_length')} characters",
    }
    return words.get(kind, str(item["msg"]))
