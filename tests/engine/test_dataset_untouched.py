"""A whole run, from scan to export, on a dataset with everything in it: nothing in the user's folders changes."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.engine.dataset.overlay import Edit, append_edits
from lorasmith.engine.events import DatasetReady, RunEnded, StepsDone
from tests.engine.running import run_training, tiny_config
from tests.tiny import tiny_pictures


def tree(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Every file and folder with its content, mode and time of change."""
    facts = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        facts[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns)
    return facts


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Folders of every kind, an archive, masks, lists of captions and files that cannot be used; nothing writable."""
    root = tmp_path / "mine"
    tiny_pictures(root / "main" / "2_cat", 3, sizes=((64, 64), (160, 96)), captions=["a cat, red", "{one|two} cats"])
    Image.new("L", (64, 64), 200).save(root / "main" / "2_cat" / "odd-masklabel.png")
    Image.new("RGBA", (80, 80), (9, 9, 200, 90)).save(root / "main" / "clear.png")
    (root / "main" / "clear.txt").write_bytes("caf\xe9".encode("cp1252"))
    (root / "main" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (root / "main" / "notes.md").write_text("mine")
    tiny_pictures(root / "more", 2, sizes=((64, 64),), captions=["a ball"])
    tiny_pictures(root / "regular", 2, sizes=((64, 64),), captions=["a dog"])
    tiny_pictures(root / "loose", 2, sizes=((96, 64),), captions=["a box"])
    with zipfile.ZipFile(root / "packed.zip", "w") as archive:
        for path in sorted((root / "loose").iterdir()):
            archive.write(path, path.name)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return root


def test_the_users_folders_are_the_same_after_a_whole_run(tiny_sd15: Path, tmp_path: Path, material: Path) -> None:
    overlay = tmp_path / "overlay.jsonl"
    append_edits(overlay, {"clear.png": Edit(("a clear thing",))})
    dataset = {
        "folder": str(material / "main"),
        "more_folders": [str(material / "more"), str(material / "packed.zip")],
        "weights": [1.0, 1.5, 1.0],
        "regularization_folder": str(material / "regular"),
        "overlay": str(overlay),
        "resolution": 64,
        "more_resolutions": [128],
        "crop": "random",
        "flip": True,
        "masks": "alpha",
        "missing_captions": "trigger",
    }
    config = tiny_config(
        tiny_sd15, tmp_path, dataset=dataset, train={"steps": 6}, previews={"every": 3}, captions={"wildcards": True}
    )
    before = tree(material)
    _, host = run_training(config)
    ended = host.events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.outcome == "finished"
    assert len([loss for event in host.of(StepsDone) for loss in event.losses]) == 6
    assert host.of(DatasetReady)[0].images == 3 + 1 + 2 + 2 + 2
    assert tree(material) == before
    if os.geteuid() != 0:
        assert not os.access(material / "main", os.W_OK)
