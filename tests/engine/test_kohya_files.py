"""Dataset files of Kohya's scripts: what they say is done, what is a setting of the run is told, nothing is ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.kohya_files import KohyaFile, read_kohya_file
from lorasmith.engine.errors import DatasetError
from tests.engine.datasets import by_name, captions, examine_here, mask, picture, reasons, scan


@pytest.fixture(autouse=True)
def _no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.engine.dataset.scan.examine_pictures", examine_here)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def read(path: Path, text: str, **settings: object) -> KohyaFile:
    return read_kohya_file(write(path / "cats.toml", text), DatasetSettings.model_validate(settings))


EXAMPLE = """
[general]
caption_extension = "txt"
num_repeats = 2
shuffle_caption = true

[[datasets]]
resolution = 512
batch_size = 4
num_repeats = 3

  [[datasets.subsets]]
  image_dir = 'cat'
  class_tokens = 'a sks cat'

  [[datasets.subsets]]
  image_dir = 'best'
  num_repeats = 10

[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ordinary'
  is_reg = true
"""


def test_the_nearest_value_counts(tmp_path: Path) -> None:
    subsets = read(tmp_path, EXAMPLE).subsets
    assert [(s.folder.name, s.repeats, s.regularization, s.caption_suffix) for s in subsets] == [
        ("cat", 3, False, ".txt"),
        ("best", 10, False, ".txt"),
        ("ordinary", 2, True, ".txt"),
    ]
    assert [subset.class_tokens for subset in subsets] == ["a sks cat", "", ""]
    assert subsets[1].where == "datasets 1, subset 2 of cats.toml"


def test_what_is_a_setting_of_the_run_is_told_where_it_differs(tmp_path: Path) -> None:
    notes = read(tmp_path, EXAMPLE).notes
    assert notes == (
        "cats.toml sets shuffle_caption = true: that is captions.shuffle here, and the file's value is not used",
        "cats.toml sets batch_size = 4: that is train.batch_size here, and the file's value is not used",
    )
    notes = read(tmp_path, EXAMPLE, resolution=1024).notes
    assert any("resolution = 512: that is dataset.resolution" in note for note in notes)
    assert not any(
        "resolution" in note for note in read(tmp_path, EXAMPLE, resolution=256, more_resolutions=[512]).notes
    )


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("flip_aug = true", {"flip": True}),
        ("random_crop = true", {"crop": "random"}),
        ("enable_bucket = false", {"buckets": False}),
        ("bucket_reso_steps = 32", {"bucket_step": 32}),
        ("resolution = [768, 768]", {"resolution": 768}),
        ("alpha_mask = true", {"masks": "alpha"}),
    ],
)
def test_settings_that_agree_need_no_note(tmp_path: Path, line: str, settings: dict[str, object]) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cat'\n{line}\n"
    key = line.split(" ")[0]
    assert [key in note for note in read(tmp_path, text).notes] == [True]
    assert read(tmp_path, text, **settings).notes == ()


@pytest.mark.parametrize("line", ["color_aug = true", "face_crop_aug_range = [1.0, 2.0]", "secondary_separator = ';;'"])
def test_what_lorasmith_has_no_like_of_is_told(tmp_path: Path, line: str) -> None:
    (note,) = read(tmp_path, f"[general]\n{line}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cat'").notes
    assert "lorasmith has no such setting" in note


def test_values_that_mean_nothing_need_no_note(tmp_path: Path) -> None:
    text = """
    [general]
    color_aug = false
    keep_tokens = 0
    caption_dropout_rate = 0.0
    caption_separator = ","
    cache_info = true
    bucket_no_upscale = true
    [[datasets]]
    [[datasets.subsets]]
    image_dir = 'cat'
    """
    assert read(tmp_path, text).notes == ()


SUBSET = "[[datasets]]\n[[datasets.subsets]]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{SUBSET}image_dir = 'a'\nnum_repeat = 3", "num_repeat in datasets 1, subset 1 of cats.toml is no key"),
        (f"[general]\nshufle = true\n{SUBSET}image_dir = 'a'", r"shufle in \[general\] is no key"),
        ("[[datasets]]\nimage_directory = 'a'", "no \\[\\[datasets.*subsets"),
        (f"{SUBSET}image_dir = 'a'\nnum_repeats = '3'", "num_repeats .* must be a whole number"),
        (f"{SUBSET}image_dir = 'a'\nnum_repeats = true", "num_repeats .* must be a whole number"),
        (f"{SUBSET}image_dir = 'a'\nnum_repeats = -1", "num_repeats .* must be 0 to"),
        (f"{SUBSET}image_dir = 3", "image_dir .* must be text"),
        (f"{SUBSET}is_reg = true", "image_dir is missing in datasets 1, subset 1"),
        (f"{SUBSET}image_dir = 'a'\nis_reg = 'yes'", "is_reg .* must be true or false"),
        (f"{SUBSET}image_dir = 'a'\nconditioning_data_dir = './a'", "the folder of the pictures itself"),
        ("", "no \\[\\[datasets"),
        ("datasets = 3", "datasets is no list"),
        ("[run]\nname = 'x'", r"no \[\[datasets"),
        (f"{SUBSET}image_dir = 'a'\n[train]\nx = 1", "train is neither"),
        ("x = = 3", "no TOML"),
        (f'{SUBSET}image_dir = "C:\\cats"', "single quotes"),
        (f"{SUBSET}image_dir = '~nobody-of-this-name/a'", "home folder"),
    ],
)
def test_mistakes_are_refused_with_their_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        read(tmp_path, text)
    assert "cats.toml" in caught.value.what
    assert caught.value.fix


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cats.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_kohya_file(tmp_path / "cats.toml", DatasetSettings())


def test_a_folder_named_twice_is_read_once_and_told(tmp_path: Path) -> None:
    twice = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = 'cat'\n" for side in (512, 768)
    )
    file = read(tmp_path, twice)
    assert len(file.subsets) == 1
    assert any("it is read once" in note and "more_resolutions" in note for note in file.notes)
    with pytest.raises(DatasetError, match="regularization folder in one place and not in another"):
        read(tmp_path, f"{twice}is_reg = true")


def test_a_scan_follows_the_file(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png", caption="a red cat")
    picture(tmp_path / "cat/b.png", color="blue")
    picture(tmp_path / "cat/deeper/c.png")
    picture(tmp_path / "best/10_x.png")
    (tmp_path / "best/10_x.caption").write_text("another extension")
    picture(tmp_path / "ordinary/r.png", color="green")
    dataset = scan(write(tmp_path / "cats.toml", EXAMPLE), repeats=2)
    assert [(item.relative, item.repeats, item.regularization, item.dataset) for item in dataset.items] == [
        ("best/10_x.png", 20, False, 0),
        ("cat/a.png", 6, False, 0),
        ("cat/b.png", 6, False, 0),
        ("ordinary/r.png", 4, True, 0),
    ]
    items = by_name(dataset)
    assert (items["cat/a.png"].caption, items["cat/a.png"].caption_source) == ("a red cat", "sidecar")
    assert (items["cat/b.png"].caption, items["cat/b.png"].caption_source) == ("a sks cat", "folder")
    assert items["cat/b.png"].class_name == "a sks cat"
    assert items["best/10_x.png"].caption is None
    assert reasons(dataset) == {
        "cat/deeper": "a sub-folder: the dataset file reads none",
        "best/10_x.caption": "cats.toml sets caption_extension = .txt",
    }
    assert dataset.found == len(dataset.items) + len(dataset.refused)
    assert any("shuffle_caption" in note for note in dataset.notes)


def test_a_folder_with_no_repeats_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png", caption="x")
    picture(tmp_path / "off/b.png", caption="x")
    text = f"{SUBSET}image_dir = 'cat'\n[[datasets.subsets]]\nimage_dir = 'off'\nnum_repeats = 0"
    assert reasons(scan(write(tmp_path / "cats.toml", text))) == {
        "off/b.png": "num_repeats = 0",
        "off/b.txt": "caption of a picture that is not used",
    }


def test_any_caption_extension_can_be_named(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png", caption="not this")
    (tmp_path / "cat/a.wd14").write_text("but this")
    text = f"{SUBSET}image_dir = '{tmp_path / 'cat'}'\ncaption_extension = '.WD14'"
    dataset = scan(write(tmp_path / "cats.toml", text))
    assert captions(dataset) == {"cat/a.png": ("but this",)}
    assert reasons(dataset) == {"cat/a.txt": "cats.toml sets caption_extension = .wd14"}


def test_a_metadata_file_counts_instead_of_files_beside_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png", caption="not this")
    picture(tmp_path / "cat/b.png", color="blue")
    records = {
        str(tmp_path / "cat/a.png"): {"caption": "a cat", "tags": "red"},
        "b": {"tags": "blue"},
        "gone": {"tags": "x"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(records))
    dataset = scan(write(tmp_path / "cats.toml", f"{SUBSET}image_dir = 'cat'\nmetadata_file = 'meta.json'"))
    assert captions(dataset) == {"cat/a.png": ("a cat, red",), "cat/b.png": ("blue",)}
    assert reasons(dataset) == {"cat/a.txt": "cats.toml takes the captions from meta.json"}
    assert dataset.notes == ("meta.json names pictures that are not there (1): gone",)
    assert dataset.found == 3


def test_the_conditioning_folder_holds_masks(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png", caption="x")
    mask(tmp_path / "cat/white/a.png")
    mask(tmp_path / "cat/white/lonely.png")
    dataset = scan(write(tmp_path / "cats.toml", f"{SUBSET}image_dir = 'cat'\nconditioning_data_dir = 'cat/white'"))
    assert [item.mask_path for item in dataset.items] == [tmp_path / "cat/white/a.png"]
    assert list(reasons(dataset)) == ["cat/white/lonely.png"]
    assert dataset.found == 2


@pytest.mark.parametrize(
    "line",
    [
        "image_dir = 'gone'",
        "image_dir = 'cat'\nconditioning_data_dir = 'gone'",
        "image_dir = 'cat'\nmetadata_file = 'gone'",
    ],
)
def test_paths_that_are_not_there_are_named_with_their_place(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "cat/a.png")
    with pytest.raises(DatasetError, match=r"gone of cats\.toml does not exist") as caught:
        scan(write(tmp_path / "cats.toml", f"{SUBSET}{line}"))
    assert "datasets 1, subset 1 of cats.toml" in caught.value.why


def test_a_metadata_file_without_captions_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png")
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"meta\.json has no captions"):
        scan(write(tmp_path / "cats.toml", f"{SUBSET}image_dir = 'cat'\nmetadata_file = 'meta.json'"))


def test_a_folder_without_pictures_is_told_and_only_regularization_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "cat/a.png")
    (tmp_path / "none").mkdir()
    both = f"{SUBSET}image_dir = 'cat'\n[[datasets.subsets]]\nimage_dir = 'none'"
    assert scan(write(tmp_path / "cats.toml", both)).notes == (
        f"{tmp_path / 'none'} has no usable picture (datasets 1, subset 2 of cats.toml)",
    )
    with pytest.raises(DatasetError, match="Every picture"):
        scan(write(tmp_path / "cats.toml", f"{SUBSET}image_dir = 'cat'\nis_reg = true"))


def test_a_dataset_file_can_be_a_further_dataset_and_a_regularization_one(tmp_path: Path) -> None:
    for name in ("main", "cat", "ordinary"):
        picture(tmp_path / name / "a.png", caption=name)
    write(tmp_path / "more.toml", f"{SUBSET}image_dir = 'cat'\nnum_repeats = 4")
    write(tmp_path / "reg.toml", f"{SUBSET}image_dir = 'ordinary'")
    dataset = scan(
        tmp_path / "main",
        more_folders=[str(tmp_path / "more.toml")],
        weights=[1.0, 0.5],
        regularization_folder=str(tmp_path / "reg.toml"),
    )
    assert [(i.relative, i.repeats, i.dataset, i.regularization) for i in dataset.items] == [
        ("a.png", 2, 0, False),
        ("cat/a.png", 4, 1, False),
        ("ordinary/a.png", 1, 2, True),
    ]
