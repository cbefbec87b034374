"""Edits of captions: what each does to a text, and that captions reach the user's own files safely or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset import caption_backup, caption_edits
from lorasmith.engine.dataset.caption_backup import MANIFEST, restore_captions
from lorasmith.engine.dataset.caption_edits import (
    Change,
    add_tag,
    as_edits,
    cp1252_to_utf8,
    each_line,
    preview_changes,
    put_trigger_first,
    remove_tag,
    rename_tag,
    replace_text,
    tag_counts,
    tidy,
    trigger_to_placeholder,
)
from lorasmith.engine.dataset.caption_writing import plan_writing, write_captions
from lorasmith.engine.dataset.captions import split_tags
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.overlay import Edit
from lorasmith.engine.errors import ConfigError, DatasetError, LorasmithError, StorageError
from lorasmith.engine.storage import cache_folder
from tests.tiny import tiny_pictures

tags = st.text("abcz 1é", min_size=1, max_size=6).map(lambda tag: " ".join(tag.split())).filter(bool)
texts = st.lists(tags | st.just(""), max_size=5).map(", ".join)


def item(relative: str, *captions: str, **facts: Any) -> ImageItem:
    return ImageItem(Path(relative), relative, relative, 64, 64, captions=captions, **facts)


def dataset_of(*items: ImageItem, folder: Path = Path("pictures")) -> Dataset:
    return Dataset(folder, items, (), len(items))


# Texts


@pytest.mark.parametrize(
    ("before", "first", "after"),
    [
        ("a cat", False, "a cat, red"),
        ("a cat", True, "red, a cat"),
        ("", False, "red"),
        ("a cat, ", False, "a cat, red"),
        ("a cat,  RED , dog", False, "a cat,  RED , dog"),
        ("a cat,  RED , dog", True, "red, a cat, dog"),
        ("Red, a cat", True, "Red, a cat"),
        ("red hair", False, "red hair, red"),
        ("over 1,000 cats", False, "over 1,000 cats, red"),
    ],
)
def test_a_tag_is_added_once(before: str, first: bool, after: str) -> None:
    assert add_tag(before, "red", first=first) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a cat, red, dog", "a cat, dog"),
        ("red, a cat", "a cat"),
        ("a cat,RED", "a cat"),
        ("red", ""),
        ("a cat,\n red,\n a dog", "a cat,\n a dog"),
        ("red hair, {blue, red, green|x}", "red hair, {blue, red, green|x}"),
        ("a  cat , no such tag", "a  cat , no such tag"),
    ],
)
def test_a_tag_is_removed_and_the_rest_stays_to_the_space(before: str, after: str) -> None:
    assert remove_tag(before, "red") == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a cat, red, dog", "a cat, crimson, dog"),
        ("Red,crimson , dog", "crimson, dog"),
        ("red, red", "crimson"),
        ("red hair", "red hair"),
    ],
)
def test_a_renamed_tag_stands_where_the_old_one_did_and_once(before: str, after: str) -> None:
    assert rename_tag(before, "red", "crimson") == after


@given(texts, tags, st.booleans())
def test_an_added_tag_is_there_and_adding_again_changes_nothing(text: str, tag: str, first: bool) -> None:
    once = add_tag(text, tag, first=first)
    found = [found.casefold() for found in split_tags(once)]
    assert tag.casefold() in found
    assert not first or found[0] == tag.casefold()
    assert add_tag(once, tag, first=first) == once
    assert set(found) == {other.casefold() for other in split_tags(text)} | {tag.casefold()}


@given(texts, tags, tags)
def test_removing_and_renaming_touch_no_other_tag(text: str, tag: str, new: str) -> None:
    others = [other for other in split_tags(text) if other.casefold() != tag.casefold()]
    assert split_tags(remove_tag(text, tag)) == others
    renamed = split_tags(rename_tag(text, tag, new))
    assert [other for other in renamed if other.casefold() not in (tag.casefold(), new.casefold())] == [
        other for other in others if other.casefold() != new.casefold()
    ]


@pytest.mark.parametrize("edit", [add_tag, remove_tag, lambda text, tag: rename_tag(text, tag, "x")])
def test_a_blank_tag_is_refused(edit: Callable[[str, str], str]) -> None:
    with pytest.raises(ConfigError, match="no tag"):
        edit("a cat", " , ")


def test_text_is_replaced_plainly_or_by_expression() -> None:
    assert replace_text("a.b.c", ".", "-") == "a-b-c"
    assert replace_text("a cat, a dog", r"a (\w+)", r"one \1", regex=True) == "one cat, one dog"


@pytest.mark.parametrize(("old", "new"), [("(", "x"), ("a", r"\9"), ("*", ""), ("a", r"\g<name>")])
def test_a_broken_expression_is_told_as_such(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match="no valid regular expression"):
        replace_text("a cat", old, new, regex=True)
    with pytest.raises(ConfigError, match="no text to replace"):
        replace_text("a cat", "", new)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  a  cat ,,dog,b\u200bird , ", "a cat, dog, bird"),
        ("\ufeffa\tcat\u00a0here\x07", "a cat here"),
        ("one\r\n\r\n two \u2028three", "one\ntwo\nthree"),
        ("over 1,000 cats,dogs", "over 1,000 cats, dogs"),
        ("half \ud83d a character", "half a character"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🎨, paint\u200der", "👩\u200d🎨, painter"),
        ("\u202egnp.exe", "gnp.exe"),
    ],
)
def test_tidying_removes_what_cannot_be_seen_and_keeps_what_can(before: str, after: str) -> None:
    assert tidy(before) == after


@given(st.text(max_size=40))
def test_tidying_twice_is_tidying_once_and_keeps_every_word(text: str) -> None:
    once = tidy(text)
    assert tidy(once) == once
    assert [c for c in once if c.isalnum()] == [c for c in text if c.isalnum()]


@given(st.text("aéüßñ€’“”–…日本я ", max_size=20))
def test_misread_text_is_put_right(text: str) -> None:
    misread = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in text.encode())
    assert cp1252_to_utf8(misread) == text


@pytest.mark.parametrize("text", ["“CAFÉ”", "É…", "ÀÉÎ", "a 20 € ticket", "“thé”", "garçon – “là”", "日本 я"])
def test_right_text_is_not_taken_for_misread_text(text: str) -> None:
    assert cp1252_to_utf8(text) == text


def test_the_trigger_is_put_first_or_made_a_placeholder() -> None:
    assert put_trigger_first("a ZQX cat, zqx", "zqx") == "zqx, a cat"
    assert trigger_to_placeholder("Zqx, a zqxy and a zqx", "zqx") == "[trigger], a zqxy and a [trigger]"
    assert put_trigger_first(trigger_to_placeholder("zqx, a cat", "zqx"), "new") == "new, a cat"


def test_lines_are_edited_each_by_itself_where_each_is_a_caption() -> None:
    assert each_line(lambda text: add_tag(text, "red"))("a cat\na dog") == "a cat, red\na dog, red"


# A dataset


def test_a_preview_shows_only_what_changes_and_leads_to_the_overlay() -> None:
    dataset = dataset_of(item("a.png", "a cat, red"), item("b.png", "red"), item("c.png"), item("d.png", "red", "cat"))
    changes = preview_changes(dataset, lambda text: remove_tag(text, "red"))
    assert changes == [
        Change("a.png", "a cat, red", "a cat", ("a cat",)),
        Change("b.png", "red", "", ("",)),
        Change("d.png", "red\ncat", "\ncat", ("", "cat")),
    ]
    assert as_edits(changes)["d.png"] == Edit(("", "cat"))
    (bare,) = preview_changes(dataset_of(item("c.png")), lambda text: add_tag(text, "red"))
    assert (bare.before, bare.after) == ("", "red")


def test_tags_are_counted_by_picture_under_their_usual_spelling() -> None:
    items = [item("a.png", "red, Cat, cat"), item("b.png", "cat,  red  hair"), item("c.png"), item("d.png", "RED hair")]
    assert tag_counts(items) == [("cat", 2), ("RED hair", 2), ("red", 1)]


# Writing to the user's files


@pytest.fixture
def pictures(tmp_path: Path) -> Dataset:
    """`00.png` with `00.txt`, `sub/01.jpg` with a Windows-1252 `01.CAPTION`, `02.png` without a caption."""
    folder = tmp_path / "pictures"
    tiny_pictures(folder, 3, captions=["a cat", None, None])
    (folder / "sub").mkdir()
    (folder / "01.png").rename(folder / "sub" / "01.png")
    (folder / "sub" / "01.CAPTION").write_bytes("caf\u00e9\n".encode("cp1252"))
    (folder / "00.txt").chmod(0o640)
    names = {"00.png": "00.txt", "sub/01.png": "sub/01.CAPTION", "02.png": ""}
    items = []
    for name, caption in names.items():
        source = {"caption_path": folder / caption, "caption_source": "sidecar"} if caption else {}
        items.append(replace(item(name, **source), path=folder / name))
    return dataset_of(*items, folder=folder)


EDITS = {"00.png": Edit(("a dog",)), "sub/01.png": Edit(("café",)), "02.png": Edit(("日本", "two\nlines"))}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            stat.S_IMODE(path.stat().st_mode),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_captions_are_written_beside_their_pictures_and_restored_to_the_byte(pictures: Dataset, tmp_path: Path) -> None:
    folder, backup = pictures.folder, tmp_path / "new" / "backup"
    before = contents(folder)
    done = write_captions(pictures, EDITS | {"gone.png": Edit(("x",))}, backup)
    assert (folder / "00.txt").read_text() == "a dog"
    assert stat.S_IMODE((folder / "00.txt").stat().st_mode) == 0o640
    assert (folder / "sub" / "01.CAPTION").read_bytes() == "café\n".encode()
    assert (folder / "02.txt").read_text(encoding="utf-8") == "日本\ntwo lines"
    assert {path.name for path in done.replaced} == {"00.txt", "01.CAPTION"}
    assert [path.name for path in done.created] == ["02.txt"]
    assert done.unknown == ("gone.png",)
    assert any("captions.lines" in note for note in done.notes)
    assert (backup / "originals" / "sub" / "01.CAPTION").read_bytes() == b"caf\xe9\n"
    restored = restore_captions(backup)
    assert contents(folder) == before
    assert [path.name for path in restored.removed] == ["02.txt"]
    again = restore_captions(backup)
    assert (again.restored, again.removed, again.kept) == ((), (), ())


def test_what_is_in_the_file_already_is_not_written_again(pictures: Dataset, tmp_path: Path) -> None:
    before = contents(pictures.folder)
    done = write_captions(pictures, {"00.png": Edit((" a cat",))}, tmp_path / "backup")
    assert done.unchanged == done.pictures == ("00.png",)
    assert contents(pictures.folder) == before
    assert not (tmp_path / "backup").exists()


def test_a_caption_of_a_list_gets_a_file_that_wins_and_this_is_said(pictures: Dataset, tmp_path: Path) -> None:
    listed = replace(pictures.items[2], caption_source="metadata", caption_path=pictures.folder / "metadata.jsonl")
    (pictures.folder / "metadata.jsonl").write_text("{}")
    done = write_captions(
        replace(pictures, items=(listed,)), {"02.png": Edit(("a dog",)), "00.png": Edit(exclude=True)}, tmp_path / "b"
    )
    assert done.created == (pictures.folder / "02.txt",)
    assert (pictures.folder / "metadata.jsonl").read_text() == "{}"
    assert "metadata.jsonl" in done.notes[0]
    assert "left out" in done.notes[1]


def test_the_file_in_use_is_written_whatever_its_extension_but_no_json(pictures: Dataset, tmp_path: Path) -> None:
    first, _, third = pictures.items
    (pictures.folder / "00.cap").write_text("a cat")
    (pictures.folder / "02.json").write_text('{"caption": "a cat"}')
    first = replace(first, caption_path=pictures.folder / "00.cap")
    third = replace(third, caption_path=pictures.folder / "02.json", caption_source="overlay")
    edits = {"00.png": Edit(("a dog",)), "02.png": Edit(("a dog",))}
    done = write_captions(replace(pictures, items=(first, third)), edits, tmp_path / "backup")
    assert (done.replaced, done.created) == ((pictures.folder / "00.cap",), (pictures.folder / "02.txt",))
    assert (pictures.folder / "00.txt").read_text() == "a cat"
    assert "02.json" in done.notes[0]
    restore_captions(tmp_path / "backup")
    assert (pictures.folder / "00.cap").read_text() == "a cat"


def test_files_that_were_edited_since_are_left_alone_unless_asked(pictures: Dataset, tmp_path: Path) -> None:
    write_captions(pictures, EDITS, tmp_path / "backup")
    for name in ("00.txt", "02.txt"):
        (pictures.folder / name).write_text("edited by hand")
    done = restore_captions(tmp_path / "backup")
    assert {path.name for path in done.kept} == {"00.txt", "02.txt"}
    assert (pictures.folder / "00.txt").read_text() == "edited by hand"
    restore_captions(tmp_path / "backup", overwrite=True)
    assert (pictures.folder / "00.txt").read_text() == "a cat"
    assert not (pictures.folder / "02.txt").exists()


def refused(dataset: Dataset, edits: dict[str, Edit], backup: Path, kind: type[LorasmithError] = DatasetError) -> str:
    """Write, expect a refusal and prove that nothing was written; return what was said."""
    before = contents(dataset.folder)
    with pytest.raises(kind) as caught:
        plan_writing(dataset, edits, backup)
    with pytest.raises(kind):
        write_captions(dataset, edits, backup)
    assert contents(dataset.folder) == before
    assert caught.value.fix
    return f"{caught.value.what} {caught.value.why}"


def test_a_place_inside_the_dataset_or_with_files_is_no_backup(pictures: Dataset, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pictures.folder)
    for inside in (pictures.folder, pictures.folder / "sub" / "b", tmp_path / "link" / "b"):
        assert "inside the dataset" in refused(pictures, EDITS, inside)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "earlier.txt").touch()
    assert "not empty" in refused(pictures, EDITS, tmp_path / "used")
    assert "not empty" in refused(pictures, EDITS, tmp_path / "used" / "earlier.txt")


def test_an_archive_is_never_written_to(pictures: Dataset, tmp_path: Path) -> None:
    unpacked = cache_folder() / "archives" / "abc"
    unpacked.parent.mkdir(parents=True)
    pictures.folder.rename(unpacked)
    items = tuple(replace(old, path=unpacked / old.relative) for old in pictures.items)
    assert "archive" in refused(replace(pictures, folder=unpacked, items=items), EDITS, tmp_path / "backup")


@pytest.mark.parametrize(
    ("caption", "why"), [("\ud800", "half of a character"), ("a\0b", "null character"), ("x" * 64_001, "64 kB")]
)
def test_a_caption_that_no_file_can_hold_is_refused(pictures: Dataset, tmp_path: Path, caption: str, why: str) -> None:
    assert why in refused(pictures, EDITS | {"02.png": Edit((caption,))}, tmp_path / "backup")


def test_a_linked_caption_file_is_refused(pictures: Dataset, tmp_path: Path) -> None:
    (tmp_path / "shared.txt").write_text("of all")
    (pictures.folder / "02.txt").symlink_to(tmp_path / "shared.txt")
    assert "link" in refused(pictures, EDITS, tmp_path / "backup")


def test_a_caption_file_of_two_pictures_is_refused_unless_both_get_the_same(pictures: Dataset, tmp_path: Path) -> None:
    twin = replace(item("00.jpg", "a cat"), path=pictures.folder / "00.jpg", caption_source="sidecar")
    twin = replace(twin, caption_path=pictures.folder / "00.txt")
    both = replace(pictures, items=(*pictures.items, twin))
    assert "both 00.png and 00.jpg" in refused(both, EDITS, tmp_path / "backup")
    assert "both 00.png and 00.jpg" in refused(both, EDITS | {"00.jpg": Edit(("other",))}, tmp_path / "backup")
    write_captions(both, {"00.png": Edit(("a dog",)), "00.jpg": Edit(("a dog",))}, tmp_path / "backup")
    assert (pictures.folder / "00.txt").read_text() == "a dog"
    restore_captions(tmp_path / "backup")
    assert (pictures.folder / "00.txt").read_text() == "a cat"


def test_a_read_only_place_is_refused_before_anything_is_written(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    for closed in (pictures.folder / "sub", pictures.folder / "00.txt"):
        # The tests may run as root, for whom nothing is read-only.
        monkeypatch.setattr("os.access", lambda path, mode, closed=closed: Path(path) != closed and allowed(path, mode))
        assert "read-only" in refused(pictures, EDITS, tmp_path / "backup")


def test_names_that_are_not_utf8_are_backed_up_and_restored(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    items = []
    for number, raw in enumerate((b"d\xe9", b"d\\xe9")):  # alike once they are made printable
        sub = Path(os.fsdecode(os.path.join(os.fsencode(folder), raw)))
        sub.mkdir()
        (sub / "a.txt").write_text(f"caption {number}")
        items.append(replace(item(f"d\\xe9/a{number}.png"), path=sub / "a.png"))
    before = contents(folder)
    write_captions(
        dataset_of(*items, folder=folder), {old.relative: Edit(("new",)) for old in items}, tmp_path / "backup"
    )
    assert contents(folder) != before
    restore_captions(tmp_path / "backup")
    assert contents(folder) == before


# Faults


class FailingDisk:
    """Lets `allowed` writing calls through; every later one that concerns a file below `root` fails with `code`."""

    CALLS = ("os.fsync", "os.replace", "os.chmod", "pathlib.Path.write_bytes", "pathlib.Path.mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, code: int) -> None:
        self.allowed, self.code, self.calls = allowed, code, 0
        monkeypatch.setattr(os, "fsync", self._counted(os.fsync))
        monkeypatch.setattr(Path, "replace", self._counted(Path.replace))
        monkeypatch.setattr(Path, "mkdir", self._counted(Path.mkdir))
        monkeypatch.setattr(Path, "write_bytes", self._counted(Path.write_bytes))
        monkeypatch.setattr(Path, "open", self._opening(Path.open))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self._count()
            return call(*args, **options)

        return counted

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "r" in mode:
                return call(path, mode, *args, **options)
            self._count()
            file = call(path, mode, *args, **options)
            raw = file.write

            class Writer(io.BufferedWriter):
                pass

            def write(data: bytes) -> int:
                try:
                    self._count()
                except OSError:
                    raw(data[: len(data) // 2])  # a full disk takes a part
                    raise
                return int(raw(data))

            wrapper = Writer(file.detach())
            wrapper.write = write  # type: ignore[method-assign]
            raw = super(Writer, wrapper).write
            return wrapper

        return opening

    def _count(self) -> None:
        self.calls += 1
        if self.calls > self.allowed:
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fails_at_any_write_leaves_whole_captions_that_can_be_restored(
    pictures: Dataset, tmp_path: Path, code: int
) -> None:
    folder = pictures.folder
    before = contents(folder)
    told = []
    for allowed in range(100):
        backup = tmp_path / f"backup-{allowed}"
        with pytest.MonkeyPatch.context() as patched:
            disk = FailingDisk(patched, allowed, code)
            try:
                write_captions(pictures, EDITS, backup)
                break
            except StorageError as error:
                told.append(error)
        after = contents(folder)
        assert not [name for name in after if name.endswith("tmp")]
        for name in ("00.txt", "sub/01.CAPTION"):
            assert (folder / name).read_bytes() in (b"a cat", b"caf\xe9\n", b"a dog", "café\n".encode())
        if (backup / MANIFEST).exists():
            restore_captions(backup)
        assert contents(folder) == before
    assert disk.calls == allowed > 15  # it failed once at each of the calls and then none was left
    assert any(error.what.startswith("The originals could not be copied") for error in told)
    stopped = [error for error in told if "for 1 of 3 pictures" in error.what]
    assert stopped
    assert all("Written: 00.png. Not written: sub/01.png, 02.png." in error.why for error in stopped)
    assert all("lorasmith caption restore" in error.fix for error in stopped)


def test_a_restore_that_is_interrupted_can_be_done_again(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(pictures.folder)
    write_captions(pictures, EDITS, tmp_path / "backup")
    with pytest.MonkeyPatch.context() as patched:
        FailingDisk(patched, 4, errno.ENOSPC)
        with pytest.raises(StorageError, match="disk is full"):
            restore_captions(tmp_path / "backup")
    (pictures.folder / ".00.txt.lorasmith-tmp").write_text("what a killed process leaves")
    restore_captions(tmp_path / "backup")
    assert contents(pictures.folder) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda backup: (backup / MANIFEST).unlink(),
        lambda backup: (backup / MANIFEST).write_text("{"),
        lambda backup: (backup / MANIFEST).write_text("[]"),
        lambda backup: (backup / MANIFEST).write_text('{"version": 2, "files": []}'),
        lambda backup: (backup / "originals" / "00.txt").unlink(),
        lambda backup: (backup / "originals" / "sub" / "01.CAPTION").write_text("other"),
    ],
)
def test_a_damaged_backup_restores_nothing(pictures: Dataset, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    backup = tmp_path / "backup"
    write_captions(pictures, EDITS, backup)
    damage(backup)
    before = contents(pictures.folder)
    with pytest.raises(StorageError, match="nothing was changed"):
        restore_captions(backup)
    assert contents(pictures.folder) == before


@pytest.mark.parametrize(("key", "value"), [("path", "a.txt"), ("original", "originals/../../x"), ("mode", "7")])
def test_a_manifest_that_leads_elsewhere_is_refused(pictures: Dataset, tmp_path: Path, key: str, value: str) -> None:
    backup = tmp_path / "backup"
    write_captions(pictures, EDITS, backup)
    record = json.loads((backup / MANIFEST).read_bytes())
    record["files"][0][key] = value
    (backup / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(StorageError, match="nothing was changed"):
        restore_captions(backup)


def test_a_file_keeps_its_owner_where_that_is_possible(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(caption_backup.os, "chown", lambda path, user, group: given.append((Path(path).name, user)))
    write_captions(pictures, EDITS, tmp_path / "backup")
    assert (".00.txt.lorasmith-tmp", (pictures.folder / "00.txt").stat().st_uid) in given


def test_an_expression_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_edits, "REGEX_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="too long"):
        replace_text("a" * 40 + "!", r"(a|aa|aaa)+$", "b", regex=True)
