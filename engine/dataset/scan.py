"""Finding the pictures and captions of a dataset; every file is accounted for, and nothing is ever written there.

Settings → `roots` (which folders) → `folders` (which files) → `layouts` (what each is) → `workers` (every picture and
mask is decoded completely, so that a damaged one is known before training) → `caption_sources` → the user's own edits.
Which caption wins is told in `caption_sources`, which mask in `layouts`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.caption_lists import listing
from lorasmith.engine.dataset.caption_sources import ListedCaptions, find_captions, read_lists, unused_captions
from lorasmith.engine.dataset.folders import list_files, printable
from lorasmith.engine.dataset.items import Dataset, ImageItem, PictureFacts, Progress, Refusal
from lorasmith.engine.dataset.layouts import Candidate, Layout, sort_files
from lorasmith.engine.dataset.masks import find_mask, unused_masks
from lorasmith.engine.dataset.missing_captions import listed, missing_captions, require_captions
from lorasmith.engine.dataset.overlay import Edit, read_overlay
from lorasmith.engine.dataset.roots import Root, open_roots, require_roots
from lorasmith.engine.dataset.workers import examine_pictures
from lorasmith.engine.errors import DatasetError

__all__ = ["missing_captions", "require_captions", "require_folders", "scan_dataset"]

LEFT_OUT = "left out by you"
Facts = Mapping[Path, PictureFacts | str]


@dataclass
class _Scan:
    """What is known so far; `refused` is by dataset, `found` counts files that are not in use for a picture."""

    settings: DatasetSettings
    edits: Mapping[str, Edit]
    layouts: list[tuple[Root, Layout]] = field(default_factory=list)
    items: list[ImageItem] = field(default_factory=list)
    refused: defaultdict[int, list[Refusal]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    found: int = 0
    system: int = 0


def scan_dataset(settings: DatasetSettings, on_progress: Progress | None = None) -> Dataset:
    """Read all datasets of the settings with the user's edits; `on_progress(done, total)` counts decoded files.

    Raises DatasetError where one is missing, cannot be read, or holds no usable picture.
    """
    roots, notes = require_roots(settings)
    scan = _Scan(settings, _read_edits(settings), notes=notes)
    roots = open_roots(roots)
    for root in roots:
        scan.layouts.append((root, _list_root(scan, root, roots)))
    facts = _examine(scan, on_progress)
    for root, layout in scan.layouts:
        _accept(scan, root, layout, facts)
    _note_lost_edits(scan)
    items = sorted(scan.items, key=lambda item: (item.regularization, item.relative))
    _require_pictures(scan, roots)
    refused = sorted(chain.from_iterable(scan.refused.values()), key=lambda refusal: refusal.relative)
    return Dataset(roots[0].given, tuple(items), tuple(refused), scan.found, scan.system, tuple(scan.notes))


def require_folders(settings: DatasetSettings) -> list[Path]:
    """Return the folders, and the archives, that would be read; nothing is unpacked or decoded.

    Raises DatasetError naming the setting where one is not given, does not exist or cannot be a dataset, where two are
    the same folder, and where the edited captions do not exist or cannot be read.
    """
    roots, _ = require_roots(settings)
    if settings.overlay and not os.path.exists(_overlay(settings)):
        raise DatasetError(
            f"The edited captions {settings.overlay} do not exist.",
            fix="Correct dataset.overlay, or remove it to use the captions of the dataset.",
        )
    _read_edits(settings)
    return [root.folder for root in roots]


def _overlay(settings: DatasetSettings) -> Path:
    try:
        return Path(settings.overlay).expanduser()
    except RuntimeError:
        raise DatasetError(
            f"The edited captions {settings.overlay} cannot be read.",
            why="That home folder is unknown.",
            fix="Correct dataset.overlay.",
        ) from None


def _read_edits(settings: DatasetSettings) -> dict[str, Edit]:
    return read_overlay(_overlay(settings)) if settings.overlay else {}


def _list_root(scan: _Scan, root: Root, roots: Sequence[Root]) -> Layout:
    """Return what the files of a root are, and count them."""
    mask_folder = root.subset.masks if root.subset else None
    apart = [other.folder for other in roots if other is not root]
    apart += [other.subset.masks for other in roots if other.subset and other.subset.masks]
    walked = list_files(root.folder, apart, root.prefix, recursive=root.subset is None)
    masks = []
    if mask_folder is not None:
        inside = list_files(mask_folder, [], f"{root.prefix}{printable(mask_folder.name)}/", recursive=False)
        masks = inside.files
        walked.refused += inside.refused
        walked.system += inside.system
    overlay = scan.settings.overlay
    # Edits that lie in the dataset are no caption list of it.
    own = _overlay(scan.settings).resolve() if overlay else Path()
    files = [file for file in walked.files if file[0].name != own.name or file[0].resolve() != own]
    layout = sort_files(root, files, masks)
    refused = scan.refused[root.dataset]
    refused += [Refusal(root.prefix + entry.relative, entry.reason) for entry in root.refused]
    refused += walked.refused + layout.refused
    scan.found += len(files) + len(masks) + len(walked.refused) + len(root.refused)
    scan.system += walked.system
    return layout


def _examine(scan: _Scan, on_progress: Progress | None) -> Facts:
    """Decode all pictures that the user did not leave out, and the masks that belong to one."""
    masks_off = scan.settings.masks == "off"
    paths: dict[Path, None] = {}
    for _, layout in scan.layouts:
        for candidate in layout.candidates:
            if not _left_out(scan, candidate) and candidate.repeats > 0:
                paths[candidate.path] = None
                paths.update(dict.fromkeys(() if masks_off else candidate.masks))
    return dict(zip(paths, examine_pictures(list(paths), on_progress), strict=True))


def _left_out(scan: _Scan, candidate: Candidate) -> bool:
    edit = scan.edits.get(candidate.relative)
    return edit is not None and edit.exclude


def _accept(scan: _Scan, root: Root, layout: Layout, facts: Facts) -> None:
    """Turn the candidates of a root into accepted pictures and refusals; refuse what belongs to no accepted one."""
    captions = read_lists(root, layout)
    scan.notes += captions.notes
    refused = scan.refused[root.dataset]
    accepted: dict[Path, ImageItem] = {}
    for candidate in layout.candidates:
        result = _judge(scan, candidate, captions, facts)
        if isinstance(result, ImageItem):
            accepted[candidate.path] = result
            scan.items.append(result)
        else:
            refused.append(result)
    if root.subset is not None and not accepted:
        scan.notes.append(f"{root.subset.folder} has no usable picture ({root.subset.where})")
    used = {item.caption_path for item in accepted.values() if item.caption_path is not None}
    used |= {item.mask_path for item in accepted.values() if item.mask_path is not None}
    refused += unused_captions(layout, captions, accepted, used)
    refused += unused_masks(layout, scan.settings, accepted, facts)
    scan.found -= len(used & {path for path, _ in layout.sidecars + layout.lists + layout.masks})


def _judge(scan: _Scan, candidate: Candidate, captions: ListedCaptions, facts: Facts) -> ImageItem | Refusal:
    if _left_out(scan, candidate):
        return Refusal(candidate.relative, LEFT_OUT)
    if candidate.repeats == 0:
        asked = "num_repeats = 0" if candidate.root.subset else "its folder's name asks for 0 repeats"
        return Refusal(candidate.relative, asked)
    known = facts[candidate.path]
    if isinstance(known, str):
        return Refusal(candidate.relative, known)
    found = find_captions(candidate, captions)
    mask = find_mask(candidate, known, scan.settings, facts)
    item = ImageItem(
        path=candidate.path,
        relative=candidate.relative,
        sha256=known.sha256,
        width=known.width,
        height=known.height,
        repeats=candidate.repeats,
        captions=found.texts,
        caption_path=found.path,
        caption_source=found.source,
        regularization=candidate.root.regularization,
        notes=(*_name_notes(candidate), *known.notes, *mask.notes, *found.notes),
        transparent=known.transparent,
        format=known.format,
        measures=known.measures,
        mask_path=mask.path,
        mask_sha256=mask.sha256,
        mask_share=mask.share,
        dataset=candidate.root.dataset,
        class_name=candidate.class_name,
    )
    edit = scan.edits.get(candidate.relative)
    if edit is None or edit.captions is None:
        return item
    return replace(item, captions=edit.captions, caption_source="overlay")


def _name_notes(candidate: Candidate) -> tuple[str, ...]:
    name = candidate.path.name
    return () if printable(name) == name else ("its name is not UTF-8: the odd bytes are shown as codes",)


def _note_lost_edits(scan: _Scan) -> None:
    if scan.settings.overlay and not os.path.exists(_overlay(scan.settings)):
        scan.notes.append(f"dataset.overlay: {scan.settings.overlay} does not exist, so nothing is edited")
    known = {candidate.relative for _, layout in scan.layouts for candidate in layout.candidates}
    lost = sorted(scan.edits.keys() - known)
    if lost:
        name = Path(scan.settings.overlay).name
        scan.notes.append(f"{name} edits pictures that are not there ({len(lost)}): {listing(lost)}")


def _require_pictures(scan: _Scan, roots: Sequence[Root]) -> None:
    """Raise DatasetError where a dataset of the settings gives no picture, or all are regularization pictures."""
    used = {item.dataset for item in scan.items}
    for root in roots:
        if root.dataset in used:
            continue
        refused = scan.refused[root.dataset]
        if not refused:
            raise DatasetError(
                f"The folder {root.given} is empty.",
                fix=f"Put pictures into it, or set {root.key} to another folder.",
            )
        left_out = any(refusal.reason == LEFT_OUT for refusal in refused)
        raise DatasetError(
            f"There is no usable picture in {root.given}.",
            why=listed([f"{refusal.relative}: {refusal.reason}" for refusal in refused]) + ".",
            fix="Take some of the pictures in again."
            if left_out
            else "Use PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF files.",
        )
    if all(item.regularization for item in scan.items):
        raise DatasetError(
            f"Every picture of {roots[0].given} is a regularization picture.",
            why="There is nothing to learn from.",
            fix="Remove is_reg where it stands for pictures that are to be learnt.",
        )
