"""Parameters of which every test run takes a sample, and a campaign all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """Return `values` for `parametrize`; those that are not in `sample` are for `make faults` only."""
    return [value if value in sample else _for_campaigns(value) for value in values]


def _for_campaigns(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.campaign)
