"""All pictures of a dataset on sheets, each with its name and what was found about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lorasmith.engine.dataset.findings import Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem, Progress
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.preview_sheet import Cell, draw_sheet, drawable, png_bytes, scaled
from lorasmith.engine.storage import atomic_write

PICTURES_A_SHEET = 120
CELL_SIDE = 224
COMPRESSION = 1
"""zlib's fastest level: the usual one took most of the time for files that are a tenth smaller."""
MAX_FOUND_BY_ONE = 0.5
"""A finding about more than this share of the pictures is left out of the labels: it tells none from the others."""
_LINE_LETTERS, _CODE_LINES = 32, 3


def write_contact_sheets(
    dataset: Dataset, findings: Sequence[Finding], target: Path, on_progress: Progress | None = None
) -> list[Path]:
    """Write all accepted pictures to `target`, and from the second sheet on to `target` with -2, -3 … in its name.

    Pictures that belong together (duplicates) stand side by side. One that changed or went away since the scan leaves
    an empty place with the reason. One sheet is in memory at a time. Returns the written PNG files, none without
    pictures; raises StorageError where one cannot be written.
    """
    items, codes = sheet_order(dataset.items, findings), found_codes(dataset.items, findings)
    written: list[Path] = []
    for start in range(0, len(items), PICTURES_A_SHEET):
        cells: list[Cell] = []
        for item in items[start : start + PICTURES_A_SHEET]:
            cells.append(_cell(item, codes[item.relative]))
            if on_progress is not None:
                on_progress(start + len(cells), len(items))
        path = target if not written else target.with_stem(f"{target.stem}-{len(written) + 1}")
        atomic_write(path, png_bytes(draw_sheet(cells), {}, COMPRESSION))
        written.append(path)
    return written


def sheet_order(items: Sequence[ImageItem], findings: Sequence[Finding]) -> list[ImageItem]:
    """Return the pictures in the dataset's order, but after the first of a group the others of that group.

    A group that is most of the dataset, such as one of two classes, changes nothing.
    """
    by_name = {item.relative: item for item in items}
    groups: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        for group in finding.groups:
            if len(group) > MAX_FOUND_BY_ONE * len(items):
                continue
            for relative in group:
                groups[relative].extend(group)
    placed: dict[str, ImageItem] = {}
    for item in items:
        for relative in (item.relative, *groups[item.relative]):
            if relative in by_name:
                placed.setdefault(relative, by_name[relative])
    return list(placed.values())


def found_codes(items: Sequence[ImageItem], findings: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
    """Return the codes of what was found about each picture by its `relative` path, the gravest first."""
    found: dict[str, dict[str, None]] = {item.relative: {} for item in items}
    for finding in findings:
        if len(finding.files) > MAX_FOUND_BY_ONE * len(items):
            continue
        for relative in finding.files:
            found.setdefault(relative, {})[finding.code] = None
    return {relative: tuple(codes) for relative, codes in found.items()}


def _cell(item: ImageItem, codes: Sequence[str]) -> Cell:
    from lorasmith.engine.dataset.images import read_picture

    lines = (_end_of(item.relative), *_code_lines(codes))
    try:
        picture = read_picture(item.path, longest=CELL_SIDE)
    except DatasetError as error:
        return Cell(None, lines, f"Not shown: {error.why or error.what}")
    if picture.sha256 != item.sha256:
        return Cell(None, lines, "Not shown: the file changed since it was read.")
    return Cell(scaled(picture.image, CELL_SIDE), lines)


def _end_of(relative: str) -> str:
    """Return a path that fits under a picture; its end tells more than its start."""
    name = drawable(relative)
    return name if len(name) <= _LINE_LETTERS else f"...{name[3 - _LINE_LETTERS :]}"


def _code_lines(codes: Sequence[str]) -> list[str]:
    """Return the codes in a few lines; where they are more, the last line counts the rest."""
    lines: list[list[str]] = []
    for code in codes:
        if lines and len(", ".join([*lines[-1], code])) <= _LINE_LETTERS:
            lines[-1].append(code)
        else:
            lines.append([code])
    rest = sum(len(line) for line in lines[_CODE_LINES:])
    texts = [", ".join(line) for line in lines[:_CODE_LINES]]
    return [f"! {text}" + (f" +{rest}" if rest and text is texts[-1] else "") for text in texts]
