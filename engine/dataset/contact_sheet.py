"""All pictures of a dataset on sheets, each with its name and what was found about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lorasmith.engine.dataset.findings import Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.preview_sheet import build_sheet

PICTURES_A_SHEET = 120
CELL_SIDE = 224
MAX_FOUND_BY_ONE = 0.5
"""A finding about more than this share of the pictures is left out of the labels: it tells none from the others."""


def write_contact_sheets(dataset: Dataset, findings: Sequence[Finding], target: Path) -> list[Path]:
    """Write all accepted pictures to `target`, and from the second sheet on to `target` with -2, -3 … in its name.

    Returns the written PNG files. Raises StorageError where one cannot be written, DatasetError where a picture changed.
    """
    labels = sheet_labels(dataset.items, findings)
    written = []
    for start in range(0, len(dataset.items), PICTURES_A_SHEET):
        items = dataset.items[start : start + PICTURES_A_SHEET]
        number = start // PICTURES_A_SHEET + 1
        path = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
        pixels = len(items) * CELL_SIDE * CELL_SIDE
        written.append(
            build_sheet([item.path for item in items], [labels[item.relative] for item in items], path, None, pixels)
        )
    return written


def sheet_labels(items: Sequence[ImageItem], findings: Sequence[Finding]) -> dict[str, str]:
    """Return the label of each picture by its `relative` path: the name, and after "!" the codes of what was found."""
    found: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        if len(finding.files) > MAX_FOUND_BY_ONE * len(items):
            continue
        for relative in finding.files:
            found[relative].append(finding.code)
    return {
        item.relative: item.relative + (f"  ! {', '.join(found[item.relative])}" if item.relative in found else "")
        for item in items
    }
