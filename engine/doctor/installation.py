"""Python and the packages that lorasmith depends on, without importing them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Final

from lorasmith.engine.doctor.check import Check, Choice, reinstall
from lorasmith.engine.doctor.choices import DISABLED_BY
from lorasmith.engine.doctor.torch_builds import TORCH_PIN

MINIMUM_PYTHON: Final = (3, 11)
DISABLED_WITHOUT: Final[Mapping[str, tuple[Choice, ...]]] = {
    "bitsandbytes": (*DISABLED_BY["bitsandbytes"], *DISABLED_BY["nf4"]),
}
"""Packages without which only some choices are missing."""


def check_python() -> Check:
    """Python is 3.11 or newer."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MINIMUM_PYTHON:
        fix = "python3.11 -m venv ~/lorasmith && ~/lorasmith/bin/pip install lorasmith"
        return Check("python", "fail", f"Python {version}; 3.11 or newer is needed", fix, "Nothing can be trained.")
    return Check("python", "pass", f"Python {version}")


def check_packages() -> Check:
    """Every package that lorasmith depends on is there in a version that it was tested with."""
    wrong, fixes = _wrong_packages()
    if not wrong:
        return Check("packages", "pass", "all at tested versions")
    detail, fix = "; ".join(wrong.values()), reinstall(*fixes)
    if set(wrong) <= set(DISABLED_WITHOUT):
        disables = tuple(choice for name in wrong for choice in DISABLED_WITHOUT[name])
        meaning = "What needs it cannot be chosen; everything else works."
        return Check("packages", "fail", detail, fix, meaning, disables=disables, optional=True)
    return Check("packages", "fail", detail, fix, "Trainings may fail in ways that nobody has seen.")


def _wrong_packages() -> tuple[dict[str, str], list[str]]:
    """Return by name what is wrong with each package that is missing or of another version, and what to install."""
    from packaging.requirements import Requirement

    wrong, fixes = {}, []
    for line in importlib.metadata.requires("lorasmith") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, requirement.specifier
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong[name] = f"{name} is missing"
        else:
            if wanted.contains(version, prereleases=True):
                continue
            wrong[name] = f"{name} {version} is installed, {wanted} is needed"
        fixes.append(f"torch=={TORCH_PIN}" if name == "torch" else f"{name}{wanted}")
    return wrong, fixes
