"""The full-size base models that memory is derived of: their configurations without their weights.

They stand in the presets, `[memory.NAME.configs.PART]` in `presets/FAMILY.toml`: what differs from the defaults of the
part's class, as the Hub repository that `hub` names has it. `model_index` is the index of the pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorasmith.engine.advisor import read_preset
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import BaseIdentity, Family, families
from lorasmith.engine.families._loading import skeletons
from lorasmith.engine.safetensors_header import TensorInfo
from lorasmith.engine.sources import BaseFiles

INDEX = "model_index"


@dataclass(frozen=True)
class ReferenceFiles(BaseFiles):
    """A base model in the diffusers layout of which only the configurations are there; for `skeletons`."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part, and the pipeline's index for ""."""
        return dict(self.configs.get(part or INDEX, {}))

    def weight_files(self, part: str) -> list[Path]:
        """Return no files: there are no weights."""
        return []

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        """Return no tensors: there are no weights."""
        return {}


def reference_names(family: str) -> tuple[str, ...]:
    """Return the names of a family's full-size models, as its preset has them in order."""
    return tuple(read_preset(family).get("memory", {}))


def reference_files(family: str, name: str) -> ReferenceFiles:
    """Return the configurations of a full-size model; raises ConfigError where the preset has no model of that name."""
    tables = read_preset(family).get("memory", {})
    if name not in tables:
        raise ConfigError(
            f"presets/{family}.toml has no model {name}.",
            fix=f"Choose one of {', '.join(tables) or 'another family'}, or add [memory.{name}.configs.…] to the file.",
        )
    return from_table(name, tables[name])


def from_table(name: str, table: Mapping[str, Any]) -> ReferenceFiles:
    """Return the configurations in a `[memory.NAME]` table."""
    origin = str(table.get("hub") or name)
    return ReferenceFiles("folder", Path("reference") / origin, origin, configs=table["configs"])


def reference_identity(family: str, files: ReferenceFiles) -> BaseIdentity:
    """Return what a full-size model is; raises ConfigError where its configurations are not those of the family."""
    identity = families()[family].identify(files)
    if identity is None:
        raise ConfigError(
            f"The configurations of {files.origin} are not those of {family}.",
            fix=f"Check [memory.….configs] in presets/{family}.toml.",
        )
    return dataclasses.replace(identity, parts_missing=())


def load_reference(family: str, files: ReferenceFiles, dtype: torch.dtype = torch.bfloat16) -> Family:
    """Return a full-size model on the meta device, in `dtype`; takes a second or a few."""
    identity = reference_identity(family, files)
    with skeletons():
        loaded = families()[family].load(files, identity, torch.device("meta"), dtype)
    parameters = sum(weight.numel() for weight in loaded.denoiser.parameters())
    loaded.identity = dataclasses.replace(identity, parameters=parameters)
    return loaded
