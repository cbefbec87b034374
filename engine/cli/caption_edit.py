"""`lorasmith caption edit`, `tags`, `write` and `restore`: captions changed in bulk, beside the dataset or in it.

Edits go to the overlay, which counts instead of the pictures' own caption files. Only `write` touches those, with the
originals copied first, and `restore` brings them back.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.engine.cli.output import columns, say, say_json, visible
from lorasmith.engine.cli.progress import FileProgress
from lorasmith.engine.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from lorasmith.engine.dataset.caption_edits import Change
    from lorasmith.engine.dataset.items import Dataset

_SHOWN_CHANGES, _SHOWN_TAGS = 10, 50
_LINE_LENGTH = 74
_Edit = Callable[[str], str]

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder with the pictures, or a ZIP.")]
Overlay = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The file of edited captions; without it FOLDER.captions.jsonl in this folder."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking; needed where nobody can be asked.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def edit(
    folder: Folder,
    overlay: Overlay = None,
    add: Annotated[str | None, typer.Option(metavar="TAG", help="Add a tag at the end.")] = None,
    first: Annotated[bool, typer.Option("--first", help="With --add: at the start.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="TAG", help="Remove a tag.")] = None,
    rename: Annotated[tuple[str, str] | None, typer.Option(metavar="OLD NEW", help="Rename a tag.")] = None,
    replace_: Annotated[
        tuple[str, str] | None, typer.Option("--replace", metavar="OLD NEW", help="Replace a piece of text.")
    ] = None,
    regex: Annotated[bool, typer.Option("--regex", help="With --replace: OLD is a regular expression.")] = False,
    tidy: Annotated[
        bool, typer.Option("--tidy", help="Take out invisible characters, repeated spaces and empty tags.")
    ] = False,
    exclude: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Leave pictures out, such as 'bad/*'; their files stay.")
    ] = None,
    only: Annotated[str, typer.Option(metavar="GLOB", help="Edit only these pictures, such as '10_cat/*'.")] = "*",
    each_line: Annotated[
        bool, typer.Option("--each-line", help="Each line of a caption file is a caption of its own.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Change captions in bulk: shows before and after, then adds the changes to the overlay. FOLDER is only read."""
    from lorasmith.engine.dataset import caption_edits as edits
    from lorasmith.engine.dataset.overlay import Edit, append_edits, default_overlay, read_overlay

    if (first and add is None) or (regex and replace_ is None):
        raise typer.BadParameter("--first goes with --add, and --regex with --replace")
    given: list[tuple[bool, _Edit]] = [
        (add is not None, lambda text: edits.add_tag(text, add or "", first=first)),
        (remove is not None, lambda text: edits.remove_tag(text, remove or "")),
        (rename is not None, lambda text: edits.rename_tag(text, *(rename or ("", "")))),
        (replace_ is not None, lambda text: edits.replace_text(text, *(replace_ or ("", "")), regex=regex)),
        (tidy, edits.tidy),
    ]
    wanted = [change for is_given, change in given if is_given]
    if len(wanted) + (exclude is not None) != 1:
        raise typer.BadParameter("give one of --add, --remove, --rename, --replace, --tidy and --exclude")
    target = overlay or default_overlay(folder)
    dataset = _matching(_scan(folder, target), exclude or only)
    if exclude is not None:
        old = read_overlay(target)
        new = {item.relative: replace(old.get(item.relative, Edit()), exclude=True) for item in dataset.items}
        say(f"{_pictures(len(new))} would be left out:")
        _list([[relative] for relative in new], _SHOWN_CHANGES)
    else:
        change = edits.each_line(wanted[0]) if each_line else wanted[0]
        changes = edits.preview_changes(dataset, change)
        new = edits.as_edits(changes)
        _show_changes(changes, len(dataset.items))
    _require_outside(target, folder)
    if new and _agreed(f"Add this to {target}?", yes):
        append_edits(target, new)
        say(f"Written to {target}. It counts where dataset.overlay is set to that file.")


def tags(folder: Folder, overlay: Overlay = None, as_json: AsJson = False) -> None:
    """Show how many pictures have each comma-separated tag, the most frequent first."""
    from lorasmith.engine.dataset.caption_edits import tag_counts
    from lorasmith.engine.dataset.overlay import default_overlay

    dataset = _scan(folder, overlay or default_overlay(folder))
    counts = tag_counts(dataset.items)
    if as_json:
        say_json([{"tag": tag, "pictures": count} for tag, count in counts])
        return
    say(f"{len(counts):,} tags in the captions of {_pictures(len(dataset.items))}")
    _list([[f"{count:>6}", tag] for tag, count in counts], _SHOWN_TAGS, "--json lists all.")


def write(
    folder: Folder,
    backup: Annotated[
        Path, typer.Option(metavar="FOLDER", help="A new folder outside the dataset, for copies of the originals.")
    ],
    overlay: Overlay = None,
    yes: Yes = False,
) -> None:
    """Write the edited captions into the files beside the pictures; the originals are copied to the backup first."""
    from lorasmith.engine.dataset.caption_writing import plan_writing, write_captions
    from lorasmith.engine.dataset.overlay import append_edits, default_overlay, read_overlay

    source = overlay or default_overlay(folder)
    edits = read_overlay(source)
    if not edits:
        raise DatasetError(
            f"There are no edited captions in {source}.",
            fix="Give the file with --overlay, or edit captions first: lorasmith caption edit --help",
        )
    dataset = _scan(folder)
    files = plan_writing(dataset, edits, backup)
    new = sum(file.original is None for file in files)
    say(f"{len(files) - new} caption files in {folder} would be replaced where they differ, and {new} made.")
    say(f"The originals are copied to {backup} first.")
    if not files or not _agreed("Write them?", yes):
        return
    done = write_captions(dataset, edits, backup)
    same = len(done.unchanged)
    say(f"{len(done.replaced)} caption files replaced, {len(done.created)} made, {same} had their caption already.")
    for note in done.notes:
        say(note)
    _say_list(f"Not in {folder}, and so not written:", done.unknown)
    read = {item.relative: item.captions for item in _scan(folder).items}
    lost = [relative for relative in done.pictures if not _same(read.get(relative, ()), edits[relative].captions)]
    _say_list("Not read from the written files, but still from the overlay:", lost)
    # What is in the files need not be in the overlay: it would hide later changes of the files.
    append_edits(source, {name: replace(edits[name], captions=None) for name in done.pictures if name not in lost})
    if done.replaced or done.created:
        say(f"To put the originals back: lorasmith caption restore {backup}")


def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="The folder that caption write copied to.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also put back files that were changed since they were written.")
    ] = False,
) -> None:
    """Put back the caption files that `caption write` replaced, and remove those that it made."""
    from lorasmith.engine.dataset.caption_backup import restore_captions

    done = restore_captions(backup, overwrite=overwrite)
    say(f"{len(done.restored)} caption files put back, {len(done.removed)} removed.")
    _say_list("Changed since, and so left alone (--overwrite puts them back too):", done.kept)


def _scan(folder: Path, overlay: Path | None = None) -> Dataset:
    """Read the pictures with their captions; those of the overlay count where there is one."""
    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.scan import scan_dataset

    used = str(overlay) if overlay is not None and overlay.exists() else ""
    with FileProgress("reading pictures") as progress:
        return scan_dataset(DatasetSettings(folder=str(folder), overlay=used), progress.update)


def _require_outside(overlay: Path, folder: Path) -> None:
    if not overlay.exists() and overlay.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"The overlay {overlay} would be inside the dataset.",
            why="A dataset is only read; its own caption files are changed by lorasmith caption write alone.",
            fix="Choose a file outside of it.",
        )


def _matching(dataset: Dataset, pattern: str) -> Dataset:
    items = tuple(item for item in dataset.items if fnmatch.fnmatchcase(item.relative, pattern))
    if not items:
        raise ConfigError(
            f"No picture is named like {pattern}.",
            fix="Patterns are compared with the whole path inside the folder: '10_cat/*', '*.png', '*tree*'.",
        )
    return replace(dataset, items=items)


def _show_changes(changes: Sequence[Change], total: int) -> None:
    say(f"{len(changes)} of {_pictures(total)} would change" + (":" if changes else "."))
    for change in changes[:_SHOWN_CHANGES]:
        print(f"  {_inline(change.relative)}")
        before, after = _around_change(_inline(change.before), _inline(change.after))
        print(f"    - {before or '(no caption)'}")
        print(f"    + {after or '(empty)'}")
    if len(changes) > _SHOWN_CHANGES:
        say(f"  and {len(changes) - _SHOWN_CHANGES} more")


def _around_change(before: str, after: str) -> tuple[str, str]:
    """Return both texts from a little before where they begin to differ, cut to a line."""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((place for place, (old, new) in pairs if old != new), min(len(before), len(after)))
    start = 0 if max(len(before), len(after)) <= _LINE_LENGTH else max(0, same - _LINE_LENGTH // 3)
    parts = [("..." if start else "") + text[start:] for text in (before, after)]
    first, second = (part if len(part) <= _LINE_LENGTH else f"{part[: _LINE_LENGTH - 3]}..." for part in parts)
    return first, second


def _list(rows: Sequence[Sequence[object]], shown: int, rest: str = "") -> None:
    for line in columns([[_inline(cell) for cell in row] for row in rows[:shown]]):
        print(line)
    if len(rows) > shown:
        say(f"  and {len(rows) - shown:,} more. {rest}".rstrip())


def _say_list(title: str, names: Sequence[object]) -> None:
    if names:
        say(title)
        _list([[name] for name in names], _SHOWN_CHANGES)


def _same(read: Sequence[str], wanted: Sequence[str] | None) -> bool:
    """Say whether captions are those that were written, spaces and line breaks aside."""
    return " ".join(read).split() == " ".join(wanted or ()).split()


def _inline(value: object) -> str:
    return visible(str(value).replace("\r\n", "\n").replace("\n", "\\n"))


def _agreed(question: str, yes: bool) -> bool:
    """Ask at a terminal; elsewhere only `--yes` is an agreement, and without it nothing is done."""
    if yes:
        return True
    if sys.stdin.isatty() and sys.stdout.isatty():
        return typer.confirm(visible(question))
    say("Nothing was written. Add --yes to do it.")
    return False


def _pictures(count: int) -> str:
    return f"{count:,} picture{'' if count == 1 else 's'}"
