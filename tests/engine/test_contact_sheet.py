"""Contact sheets: every picture is there, groups stand together, nothing about one picture costs the others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine import preview_sheet
from lorasmith.engine.dataset import contact_sheet
from lorasmith.engine.dataset.contact_sheet import MAX_FOUND_BY_ONE, found_codes, sheet_order, write_contact_sheets
from lorasmith.engine.dataset.findings import Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.errors import StorageError

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
SIDE = 192
ACROSS = SIDE + preview_sheet.GAP


def finding(code: str, files: tuple[str, ...] = (), groups: tuple[tuple[str, ...], ...] = ()) -> Finding:
    return Finding(code, "warning", f"{code}.", "why", "fix", files, groups)


def colored(folder: Path, names: tuple[str, ...] = tuple(COLORS)) -> Dataset:
    items = []
    for name in names:
        path = folder / f"{name}.png"
        Image.new("RGB", (64, 64), COLORS[name]).save(path)
        items.append(ImageItem(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 64, 64))
    return Dataset(folder, tuple(items), (), len(items))


def cells(path: Path, row_height: int) -> list[object]:
    """The colors in the middle of the cells, row by row."""
    with Image.open(path) as sheet:
        return [
            sheet.getpixel((x + SIDE // 2, y + SIDE // 2))
            for y in range(preview_sheet.GAP, sheet.height - SIDE, row_height)
            for x in range(preview_sheet.GAP, sheet.width - SIDE, ACROSS)
        ]


ONE_LINE = SIDE + preview_sheet.CAPTION_HEIGHT + preview_sheet.GAP
TWO_LINES = ONE_LINE + preview_sheet.LINE_HEIGHT


def test_duplicates_stand_side_by_side(tmp_path: Path) -> None:
    dataset = colored(tmp_path)
    same = finding("near-duplicates", ("red.png", "yellow.png"), (("red.png", "yellow.png"),))
    (sheet,) = write_contact_sheets(dataset, [same], tmp_path / "sheet.png")
    assert cells(sheet, TWO_LINES) == [COLORS[name] for name in ("red", "yellow", "lime", "blue")]
    with Image.open(sheet) as picture:
        label = picture.crop((0, preview_sheet.GAP + SIDE + 17, SIDE, preview_sheet.GAP + SIDE + 32))
        assert any(red > green + 100 for _, (red, green, _) in label.convert("RGB").getcolors(10_000) or [])


def test_a_class_of_most_pictures_pulls_no_duplicates_apart(tmp_path: Path) -> None:
    dataset = colored(tmp_path)
    names = [item.relative for item in dataset.items]
    classes = finding("class-imbalance", (names[0],), (tuple(names[:1]), tuple(names[1:])))
    same = finding("near-duplicates", (names[1], names[3]), ((names[1], names[3]),))
    order = [item.relative for item in sheet_order(dataset.items, [classes, same])]
    assert order == [names[0], names[1], names[3], names[2]]


def test_a_picture_that_changed_or_went_away_leaves_an_empty_place(tmp_path: Path) -> None:
    dataset = colored(tmp_path)
    (tmp_path / "red.png").unlink()
    (tmp_path / "lime.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64), "black").save(tmp_path / "blue.png")
    (sheet,) = write_contact_sheets(dataset, [], tmp_path / "sheet.png")
    white = (255, 255, 255)
    assert cells(sheet, ONE_LINE) == [white, white, white, COLORS["yellow"]]
    with Image.open(sheet) as picture:
        reason = picture.crop((preview_sheet.GAP + 6, preview_sheet.GAP + 6, SIDE - 6, 60)).convert("L")
        assert reason.getextrema()[0] < 150  # something dark was written


def test_many_pictures_go_on_several_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "PICTURES_A_SHEET", 2)
    progress: list[tuple[int, int]] = []
    dataset = colored(tmp_path, ("red", "lime", "blue"))
    target = tmp_path / "out" / "sheet.png"
    target.parent.mkdir()
    written = write_contact_sheets(dataset, [], target, lambda done, total: progress.append((done, total)))
    assert [path.name for path in written] == ["sheet.png", "sheet-2.png"]
    assert cells(written[1], ONE_LINE) == [COLORS["blue"]]
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"sheet\.png"):
        write_contact_sheets(colored(tmp_path), [], tmp_path / "none" / "sheet.png")
    assert write_contact_sheets(Dataset(tmp_path, (), (), 0), [], tmp_path / "sheet.png") == []


names = st.integers(0, 9).map(lambda number: f"{number}.png")
groups = st.lists(st.lists(names, min_size=2, max_size=4, unique=True).map(tuple), max_size=4).map(tuple)


@given(st.sets(names).map(sorted), groups)
def test_each_picture_is_placed_once_whatever_the_groups_are(
    present: list[str], groups: tuple[tuple[str, ...], ...]
) -> None:
    items = [ImageItem(Path(name), name, "", 1, 1) for name in present]
    ordered = [item.relative for item in sheet_order(items, [finding("exact-duplicates", groups=groups)])]
    assert sorted(ordered) == present
    # A group that is most of the dataset changes nothing.
    if len(groups) == 1 and len(groups[0]) <= MAX_FOUND_BY_ONE * len(items):
        places = [ordered.index(name) for name in groups[0] if name in present]
        assert not places or max(places) - min(places) == len(places) - 1


def test_what_holds_of_most_pictures_is_in_no_label() -> None:
    items = [ImageItem(Path(name), name, "", 1, 1) for name in "abcd"]
    codes = found_codes(
        items, [finding("blur", ("a", "gone")), finding("small", tuple("abc")), finding("dark", ("a",))]
    )
    assert codes["a"] == ("blur", "dark")
    assert codes["b"] == codes["d"] == ()
