"""Every layout that people have: captions, masks, several datasets, archives, and the user's own edits."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.overlay import Edit, append_edits
from lorasmith.engine.dataset.scan import missing_captions, require_captions, require_folders
from lorasmith.engine.errors import DatasetError
from tests.engine.datasets import by_name, captions, examine_here, mask, picture, reasons, scan


@pytest.fixture(autouse=True)
def _no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.engine.dataset.scan.examine_pictures", examine_here)


# ---- captions


def test_a_kohya_folder_gives_repeats_and_class_name(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog/deep/a.png", caption="x")
    picture(tmp_path / "b.png", caption="x")
    items = by_name(scan(tmp_path))
    assert (items["10_sks dog/deep/a.png"].repeats, items["10_sks dog/deep/a.png"].class_name) == (10, "sks dog")
    assert (items["b.png"].repeats, items["b.png"].class_name) == (1, "")


def test_choosing_the_numbered_folder_itself_is_noted(tmp_path: Path) -> None:
    picture(tmp_path / "10_cat/a.png", caption="x")
    dataset = scan(tmp_path / "10_cat")
    assert dataset.items[0].repeats == 1
    assert "its 10 repeats do not count" in dataset.notes[0]


def test_json_beside_a_picture_is_a_caption_and_other_json_is_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"caption": "a dog"}')
    picture(tmp_path / "b.png", color="blue")
    (tmp_path / "b.json").write_text('{"tags": ["dog"]}')
    (tmp_path / "settings.json").write_text("{}")
    dataset = scan(tmp_path)
    assert captions(dataset) == {"a.png": ("a dog",), "b.png": ()}
    assert reasons(dataset) == {
        "b.json": 'not used as a caption: it has no text under "caption"',
        "settings.json": "neither a picture nor the caption of one with the same name",
    }


def test_captions_named_after_the_whole_file_name_are_found(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.png.txt").write_text("a dog")
    assert captions(scan(tmp_path)) == {"a.png": ("a dog",)}


def test_the_file_beside_the_picture_wins_then_json_lines_then_csv(tmp_path: Path) -> None:
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "white")):
        picture(tmp_path / f"{name}.png", color=color)
    (tmp_path / "a.txt").write_text("beside")
    lines = [{"file_name": f"{name}.png", "text": f"jsonl {name}"} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "captions.csv").write_text("file,caption\na.png,beside\nb.png,csv b\nc.png,csv c\n")
    dataset = scan(tmp_path)
    items = by_name(dataset)
    assert captions(dataset) == {"a.png": ("beside",), "b.png": ("jsonl b",), "c.png": ("csv c",), "d.png": ()}
    assert [items[f"{name}.png"].caption_source for name in "abcd"] == ["sidecar", "metadata", "metadata", "none"]
    assert items["a.png"].notes == ("has another caption in metadata.jsonl, which is not used",)
    assert items["b.png"].notes == ("has another caption in captions.csv, which is not used",)
    assert items["c.png"].caption_path == tmp_path / "captions.csv"
    assert dataset.refused == ()
    assert dataset.found == 4


def test_a_list_that_loses_everywhere_is_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="beside")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "jsonl"}')
    (tmp_path / "other.csv").write_text("file,caption\ngone.png,x\n")
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    dataset = scan(tmp_path)
    assert reasons(dataset) == {
        "metadata.jsonl": "caption list, not used: its pictures have captions elsewhere, which count first",
        "other.csv": "caption list of pictures that are not there",
        "table.csv": "no caption list: its first line names no columns such as file_name and caption",
    }
    assert dataset.notes == ("other.csv names pictures that are not there (1): gone.png",)
    assert dataset.found == 4


def test_a_list_whose_pictures_are_refused_is_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    (tmp_path / "bad.png").write_text("x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bad.png", "text": "x"}')
    assert reasons(scan(tmp_path))["metadata.jsonl"] == "caption list of pictures that are refused"


@pytest.mark.parametrize(
    "name", ["train/a.png", "./train/a.png", "train\\a.png", "train/a", "a.png", "x/../train/a.png"]
)
def test_lists_may_name_pictures_in_many_ways(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "train/a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert captions(scan(tmp_path)) == {"train/a.png": ("x",)}


def test_a_bare_name_that_several_pictures_have_fits_none(tmp_path: Path) -> None:
    picture(tmp_path / "x/a.png")
    picture(tmp_path / "y/a.png", color="blue")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    dataset = scan(tmp_path)
    assert captions(dataset) == {"x/a.png": (), "y/a.png": ()}
    assert dataset.notes == ("metadata.jsonl names pictures that are not there (1): a.png",)


def test_several_captions_of_one_picture_come_from_rows_and_lists(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", color="blue")
    (tmp_path / "captions.csv").write_text("image|caption\na.png|one\na.png|two\n./a.png|three\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": ["x", "y"]}')
    assert captions(scan(tmp_path)) == {"a.png": ("one", "two", "three"), "b.png": ("x", "y")}


def test_the_nearest_list_counts(tmp_path: Path) -> None:
    picture(tmp_path / "train/a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/a.png", "text": "far"}')
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "near"}')
    dataset = scan(tmp_path)
    assert captions(dataset) == {"train/a.png": ("near",)}
    assert list(reasons(dataset)) == ["metadata.jsonl"]


# ---- masks


def test_masks_are_found_beside_below_and_in_a_tree_of_their_own(tmp_path: Path) -> None:
    for name, color in (
        ("a", "red"),
        ("b", "blue"),
        ("10_cat/c", "green"),
        ("images/d", "white"),
        ("images/10_x/e", "gray"),
    ):
        picture(tmp_path / f"{name}.png", color=color, caption="x")
    places = {
        "a.png": "a-masklabel.png",
        "b.png": "mask/b.jpg",
        "10_cat/c.png": "masks/10_cat/c.png",
        "images/d.png": "Masks/d.png",
        "images/10_x/e.png": "masks/10_x/e.png",
    }
    for place in places.values():
        mask(tmp_path / place)
    dataset = scan(tmp_path)
    assert {i.relative: i.mask_path and i.mask_path.relative_to(tmp_path).as_posix() for i in dataset.items} == places
    assert all(len(item.mask_sha256) == 64 and item.mask_share == 1.0 for item in dataset.items)
    assert dataset.refused == ()
    assert dataset.found == 5


def test_masks_that_are_not_used_are_listed_and_never_trained_as_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    (tmp_path / "bad.png").write_text("x")
    for name in ("a-masklabel.png", "mask/a.png", "b-masklabel.png", "bad-masklabel.png"):
        mask(tmp_path / name)
    picture(tmp_path / "a-condlabel.png")
    dataset = scan(tmp_path)
    found = reasons(dataset)
    assert by_name(dataset)["a.png"].mask_path == tmp_path / "a-masklabel.png"
    assert found["mask/a.png"] == "mask, not used: a-masklabel.png is"
    assert found["b-masklabel.png"].startswith("mask without a picture of the same name")
    assert found["bad-masklabel.png"] == "mask of a picture that is not used"
    assert "conditioning picture of OneTrainer" in found["a-condlabel.png"]
    assert dataset.found == len(dataset.items) + len(dataset.refused) == 6


def test_with_masks_off_mask_files_are_no_pictures_either(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    mask(tmp_path / "a-masklabel.png")
    mask(tmp_path / "masks/b.png")
    dataset = scan(tmp_path, masks="off")
    assert dataset.items[0].mask_path is None
    assert set(reasons(dataset).values()) == {"mask, and dataset.masks is off"}
    assert [item.relative for item in dataset.items] == ["a.png"]


def test_a_damaged_mask_is_told_and_the_next_one_is_used(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    picture(tmp_path / "b.png", color="blue", caption="x")
    for name in ("a-masklabel.png", "b-masklabel.png"):
        (tmp_path / name).write_text("x")
    mask(tmp_path / "masks/b.png")
    dataset = scan(tmp_path)
    items = by_name(dataset)
    assert items["a.png"].mask_path is None
    assert items["a.png"].notes[0].startswith("mask a-masklabel.png cannot be used: ")
    assert items["b.png"].mask_path == tmp_path / "masks/b.png"
    assert reasons(dataset)["a-masklabel.png"].startswith("mask that cannot be used: ")


def test_a_mask_of_another_shape_is_noted_and_one_of_another_size_is_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (40, 20), caption="x")
    mask(tmp_path / "a-masklabel.png", (20, 20))
    picture(tmp_path / "b.png", (40, 20), color="blue", caption="x")
    mask(tmp_path / "b-masklabel.png", (80, 40))
    items = by_name(scan(tmp_path))
    assert items["a.png"].notes == ("mask a-masklabel.png has another shape (20x20): stretched to the picture",)
    assert items["b.png"].notes == ()


def test_a_mask_beside_several_folders_with_the_same_name_belongs_to_none(tmp_path: Path) -> None:
    picture(tmp_path / "x/a.png", caption="x")
    picture(tmp_path / "y/a.png", color="blue", caption="x")
    mask(tmp_path / "masks/a.png")
    dataset = scan(tmp_path)
    assert [item.mask_path for item in dataset.items] == [None, None]
    assert "pictures in several folders" in reasons(dataset)["masks/a.png"]


@pytest.mark.parametrize(
    ("masks", "words"), [("files", "laid on gray"), ("alpha", "laid on gray and used as its mask")]
)
def test_what_happens_to_transparency_is_noted(tmp_path: Path, masks: str, words: str) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "a.png")
    item = scan(tmp_path, masks=masks, alpha_background="gray").items[0]
    assert item.transparent
    assert item.notes == ("partly transparent", f"what is transparent is {words}")


# ---- several datasets


def test_weights_multiply_repeats_and_the_smallest_counts_as_one(tmp_path: Path) -> None:
    for name, color in (("one", "red"), ("two", "blue"), ("three", "green")):
        picture(tmp_path / name / "5_x/a.png", color=color, caption="x")
    more = [str(tmp_path / "two"), str(tmp_path / "three")]
    dataset = scan(tmp_path / "one", more_folders=more, weights=[2.0, 3.0, 8.0], repeats=2)
    assert [(item.relative, item.repeats, item.dataset) for item in dataset.items] == [
        ("5_x/a.png", 10, 0),
        ("three/5_x/a.png", 40, 2),
        ("two/5_x/a.png", 15, 1),
    ]
    assert all(item.repeats == 10 for item in scan(tmp_path / "one", more_folders=more, repeats=2).items)


def test_relative_names_are_unique_where_folders_share_one(tmp_path: Path) -> None:
    places = ["main/cats/a.png", "x/cats/a.png", "y/cats/a.png", "z/main/a.png"]
    for place, color in zip(places, ("red", "blue", "green", "white"), strict=True):
        picture(tmp_path / place, color=color, caption="x")
    more = [str(tmp_path / place) for place in ("x/cats", "y/cats", "z/main")]
    dataset = scan(tmp_path / "main", more_folders=more)
    assert sorted(by_name(dataset)) == ["cats-2/a.png", "cats-3/a.png", "cats/a.png", "main/a.png"]


def test_a_further_dataset_inside_the_first_is_read_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    picture(tmp_path / "cats/b.png", color="blue", caption="x")
    dataset = scan(tmp_path, more_folders=[str(tmp_path / "cats")], weights=[1.0, 2.0])
    assert [(item.relative, item.repeats) for item in dataset.items] == [("a.png", 1), ("cats/b.png", 2)]
    assert dataset.found == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"more_folders": ["DATA/gone"]}, "Check dataset.more_folders\\[0\\]"),
        ({"more_folders": ["DATA/other", "DATA/file"]}, "Set dataset.more_folders\\[1\\]"),
        (
            {"more_folders": ["DATA/other", "DATA/other/."]},
            "more_folders\\[0\\] and dataset.more_folders\\[1\\] are the same",
        ),
        ({"more_folders": ["DATA/main"]}, "dataset.folder and dataset.more_folders\\[0\\] are the same"),
        ({"more_folders": [" "]}, "Set dataset.more_folders\\[0\\]"),
        ({"more_folders": ["~nobody-of-this-name/x"]}, "Check dataset.more_folders\\[0\\]"),
        ({"more_folders": ["x" * 5000]}, "Check dataset.more_folders\\[0\\]"),
        ({"regularization_folder": "DATA/gone"}, "Check dataset.regularization_folder"),
        ({"overlay": "DATA/broken.jsonl"}, "dataset.overlay"),
    ],
)
def test_bad_paths_are_refused_by_the_name_of_their_setting(
    tmp_path: Path, values: dict[str, str | list[str]], words: str
) -> None:
    picture(tmp_path / "main/a.png", caption="x")
    picture(tmp_path / "other/b.png", caption="x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken.jsonl").write_text("[]\n")
    placed = json.loads(json.dumps(values).replace("DATA", str(tmp_path)))
    with pytest.raises(DatasetError, match=words):
        require_folders(DatasetSettings.model_validate({"folder": str(tmp_path / "main"), **placed}))


def test_a_dataset_without_a_usable_picture_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "main/a.png", caption="x")
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match="other is empty") as caught:
        scan(tmp_path / "main", more_folders=[str(tmp_path / "other")])
    assert "dataset.more_folders[0]" in caught.value.fix


def test_an_empty_dataset_is_not_told_with_the_reasons_of_another(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    picture(tmp_path / "other/a.png", caption="x")
    (tmp_path / "other/note.md").write_text("x")
    with pytest.raises(DatasetError, match="main is empty") as caught:
        scan(tmp_path / "main", more_folders=[str(tmp_path / "other")])
    assert "note.md" not in str(caught.value)


# ---- archives


def pack(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def test_an_archive_is_a_dataset_like_its_folder(tmp_path: Path) -> None:
    picture(tmp_path / "data/10_cat/a.png", caption="a cat")
    picture(tmp_path / "data/b.png", color="blue")
    (tmp_path / "data/note.md").write_text("x")
    archive = pack(tmp_path / "data", tmp_path / "cats.zip")
    folder, packed = scan(tmp_path / "data"), scan(archive)
    assert captions(packed) == captions(folder)
    assert reasons(packed) == reasons(folder)
    assert [item.repeats for item in packed.items] == [item.repeats for item in folder.items]
    assert packed.folder == archive
    assert not any(item.path.is_relative_to(tmp_path / "data") for item in packed.items)


def test_archives_can_be_further_and_regularization_datasets(tmp_path: Path) -> None:
    for name, color in (("main", "red"), ("more", "blue"), ("reg", "green")):
        picture(tmp_path / name / "a.png", color=color, caption="x")
    archives = {name: str(pack(tmp_path / name, tmp_path / f"{name}.zip")) for name in ("more", "reg")}
    dataset = scan(tmp_path / "main", more_folders=[archives["more"]], regularization_folder=archives["reg"])
    assert [(item.relative, item.regularization) for item in dataset.items] == [
        ("a.png", False),
        ("more/a.png", False),
        ("reg/a.png", True),
    ]


def test_entries_that_the_archive_refuses_are_counted_and_named(tmp_path: Path) -> None:
    picture(tmp_path / "data/a.png", caption="x")
    archive = pack(tmp_path / "data", tmp_path / "cats.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../out.png", b"x")
    dataset = scan(tmp_path / "data", more_folders=[str(archive)])
    outside = [refusal.relative for refusal in dataset.refused]
    assert len(outside) == 1
    assert outside[0].startswith("cats/")
    assert dataset.found == len(dataset.items) + len(dataset.refused) == 3


# ---- the user's edits


def test_edited_captions_and_left_out_pictures_count(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "white")):
        picture(data / f"{name}.png", color=color, caption=f"old {name}")
    mask(data / "b-masklabel.png")
    overlay = tmp_path / "edits.jsonl"
    edits = {"a.png": Edit(("new",)), "b.png": Edit(exclude=True), "c.png": Edit(()), "gone.png": Edit(("x",))}
    append_edits(overlay, edits)
    dataset = scan(data, overlay=str(overlay))
    assert captions(dataset) == {"a.png": ("new",), "c.png": (), "d.png": ("old d",)}
    items = by_name(dataset)
    assert (items["a.png"].caption_source, items["d.png"].caption_source) == ("overlay", "sidecar")
    assert items["a.png"].caption_path == data / "a.txt"
    assert [item.relative for item in missing_captions(dataset)] == ["c.png"]
    assert reasons(dataset) == {
        "b.png": "left out by you",
        "b.txt": "caption of a picture that is not used",
        "b-masklabel.png": "mask of a picture that is not used",
    }
    assert dataset.notes == ("edits.jsonl edits pictures that are not there (1): gone.png",)
    assert dataset.found == 6


def test_edits_inside_the_dataset_are_no_caption_list(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="old")
    append_edits(tmp_path / "edits.jsonl", {"a.png": Edit(("new",))})
    dataset = scan(tmp_path, overlay=str(tmp_path / "edits.jsonl"))
    assert captions(dataset) == {"a.png": ("new",)}
    assert dataset.found == 1
    assert dataset.items[0].notes == ()


def test_leaving_out_every_picture_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    overlay = tmp_path / "edits.jsonl"
    append_edits(overlay, {"a.png": Edit(exclude=True)})
    with pytest.raises(DatasetError, match="left out by you") as caught:
        scan(tmp_path, overlay=str(overlay))
    assert caught.value.fix == "Take some of the pictures in again."


def test_edits_that_do_not_exist_are_noted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    assert scan(tmp_path, overlay="gone.jsonl").notes == (
        "dataset.overlay: gone.jsonl does not exist, so nothing is edited",
    )


# ---- captions made of names


def choose(folder: Path, choice: str, **values: object) -> dict[str, tuple[str, ...]]:
    options = DatasetSettings.model_validate({"folder": str(folder), "missing_captions": choice, **values})
    dataset = require_captions(scan(folder, **values), options)
    assert all(item.caption_source in ("sidecar", choice) for item in dataset.items)
    return captions(dataset)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_circle.png", "red circle"),
        ("red_circle_012.png", "red circle"),
        ("red-circle-12.png", "red circle"),
        ("a dog on grass (3).png", "a dog on grass"),
        ("a well-known dog.png", "a well-known dog"),
        ("sunset01.png", "sunset"),
        ("cat - Copy.png", "cat"),
        ("1girl, red hair.png", "1girl, red hair"),
        ("kröte__2__.png", "kröte"),
    ],
)
def test_file_names_become_captions(tmp_path: Path, name: str, caption: str) -> None:
    picture(tmp_path / name)
    assert choose(tmp_path, "filename") == {name: (caption,)}


@pytest.mark.parametrize("name", ["0001.png", "IMG_2041.png", "DSC00012.png", "(1).png", "image.png", "a1.png"])
def test_file_names_without_words_are_refused_by_name(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "red_circle.png")
    picture(tmp_path / name, color="blue")
    with pytest.raises(
        DatasetError, match="1 of 2 pictures without a caption have a file name that holds no words"
    ) as caught:
        choose(tmp_path, "filename")
    assert caught.value.why == f"{name}."


def test_folder_names_become_captions(tmp_path: Path) -> None:
    picture(tmp_path / "data/10_red_dog/deep/a.png")
    picture(tmp_path / "data/blue cat/b.png", color="blue")
    picture(tmp_path / "data/c.png", color="green")
    picture(tmp_path / "data/d.png", color="white", caption="its own")
    picture(tmp_path / "green_frog/e.png", color="gray")
    assert choose(tmp_path / "data", "folder", more_folders=[str(tmp_path / "green_frog")]) == {
        "10_red_dog/deep/a.png": ("red dog",),
        "blue cat/b.png": ("blue cat",),
        "c.png": ("data",),
        "d.png": ("its own",),
        "green_frog/e.png": ("green frog",),
    }


def test_a_folder_name_without_words_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "10_/a.png")
    with pytest.raises(DatasetError, match="lie in a folder whose name holds no words"):
        choose(tmp_path, "folder")


# ---- everything at once

folders = st.sampled_from(["", "10_x/", "deep/er/", "masks/", "deep/mask/", ".hidden/", "__MACOSX/"])
stems = st.sampled_from(["a", "b", "c.d", "ü", "a-masklabel", "a-condlabel", "metadata", "a.png"])
endings = st.sampled_from([".png", ".jpg", ".txt", ".TXT", ".caption", ".json", ".jsonl", ".csv", ".md", "", ".zip"])
contents = st.sampled_from([
    b"", b"a dog", b"\xff\xfe\0", b"PICTURE", b"PICTURE", b"PICTURE",
    b'{"file_name": "a.png", "text": "x", "caption": "y"}',
    b"file,caption\na.png,x\ndeep/er/b.png,y\n",
])  # fmt: skip
trees = st.dictionaries(st.tuples(folders, stems, endings), contents, min_size=1, max_size=14)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=trees,
    more=trees,
    masks=st.sampled_from(["files", "alpha", "off"]),
    left_out=st.sampled_from(["a.png", "deep/er/a.png", "more/a.png", "none"]),
)
def test_accepted_and_refused_together_are_the_files_found(
    files: dict[tuple[str, str, str], bytes],
    more: dict[tuple[str, str, str], bytes],
    masks: str,
    left_out: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = tmp_path_factory.mktemp("data")
    for root, tree in ((base / "main", files), (base / "more", more)):
        pixels = picture(root / "always.png").read_bytes()
        for (folder, stem, ending), content in tree.items():
            path = root / f"{folder}{stem}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pixels if content == b"PICTURE" else content)
    append_edits(base / "edits.jsonl", {left_out: Edit(exclude=True)})
    dataset = scan(base / "main", more_folders=[str(base / "more")], overlay=str(base / "edits.jsonl"), masks=masks)
    visible = set()
    for root, prefix in ((base / "main", ""), (base / "more", "more/")):
        for path in root.rglob("*"):
            if path.is_file() and not {".hidden", "__MACOSX"} & set(path.relative_to(root).parts):
                visible.add((path, prefix + path.relative_to(root).as_posix()))
    used = {item.caption_path for item in dataset.items} | {item.mask_path for item in dataset.items}
    accepted, refused = [item.relative for item in dataset.items], [refusal.relative for refusal in dataset.refused]
    assert sorted(accepted + refused) == sorted(relative for path, relative in visible if path not in used)
    assert dataset.found == len(accepted) + len(refused)
    assert all(refusal.reason for refusal in dataset.refused)
    assert left_out not in accepted
