"""Promise 4: a damaged newest checkpoint is named, the previous one is used, and nothing is deleted or changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.checkpoints import load_checkpoint, newest_checkpoint
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError, StorageError
from lorasmith.engine.resume import find_checkpoint
from tests.faults.checkpoint_scenarios import everything_in, require_whole, save_step
from tests.faults.fault_server import Fault, FaultServer

Record = Callable[[int, str, str], None]
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NOBODY = 65534


@dataclass(frozen=True)
class Harm:
    """One way to damage the checkpoint of step 2; `told` is what the reason must say."""

    name: str
    do: Callable[[Path], object]
    told: str


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest))


def forget_a_file(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files={name: facts for name, facts in files.items() if name != "optimizer.safetensors"})


def replace_with_link(file: Path) -> None:
    shutil.move(file, file.parent.parent / f"elsewhere-{file.name}")
    file.symlink_to(file.parent.parent / f"elsewhere-{file.name}")


def replace_with(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def swap_with_older(file: Path) -> None:
    shutil.copy(file.parent.parent / "step-00000001" / file.name, file)


def append(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"more")


def truncations(name: str, size: int, step: int) -> Iterator[Harm]:
    for percent in range(0, 100, step):
        length = size * percent // 100
        reason = name if name == "manifest.json" else f"{name} has {length} of {size} bytes"
        yield Harm(f"{name} cut at {percent} %", lambda path, n=length: os.truncate(path / name, n), reason)


def flips(name: str, size: int, number: int) -> Iterator[Harm]:
    for index in range(number):
        bit = index * (8 * size - 1) // max(1, number - 1)
        # A bit of the number of the format makes it the manifest of another format.
        told = "" if name == "manifest.json" else f"{name} is not what was written"
        yield Harm(f"bit {bit} of {name} flipped", lambda path, b=bit: flip(path / name, b), told)


def replacements(name: str) -> Iterator[Harm]:
    yield Harm(f"{name} missing", lambda path: (path / name).unlink(), f"{name} is missing")
    yield Harm(f"{name} a folder", lambda path: replace_with(path / name, Path.mkdir), f"{name} is a folder")
    yield Harm(f"{name} a link", lambda path: replace_with_link(path / name), f"{name} is a link")
    yield Harm(f"{name} a pipe", lambda path: replace_with(path / name, os.mkfifo), f"{name} is a device or pipe")
    yield Harm(f"{name} of another step", lambda path: swap_with_older(path / name), "")
    yield Harm(f"{name} too long", lambda path: append(path / name), name)
    zeros = b"\0" * 60
    yield Harm(f"{name} zeros", lambda path: (path / name).write_bytes(zeros), name)


MANIFESTS = (
    Harm("manifest forgets a file", forget_a_file, "manifest.json is not what was written"),
    Harm("manifest of a newer format", lambda path: edit_manifest(path, version=99), "another version of lorasmith"),
    Harm("manifest of an older format", lambda path: edit_manifest(path, version=1), "another version of lorasmith"),
    Harm("manifest of another step", lambda path: edit_manifest(path, step=3), "manifest.json is not what was written"),
    Harm("manifest without files", lambda path: edit_manifest(path, files={}), "manifest.json is not what was written"),
    Harm("manifest of files in a list", lambda path: edit_manifest(path, files=[1]), "manifest.json is unreadable"),
    Harm("manifest a list", lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is unreadable"),
    Harm("manifest not JSON", lambda path: (path / "manifest.json").write_text("{'a'"), "manifest.json is unreadable"),
    Harm("manifest deep", lambda path: (path / "manifest.json").write_text("[" * 99999), "manifest.json is unreadable"),
    Harm("manifest infinite", lambda path: edit_manifest(path, version=float("inf")), "another version of lorasmith"),
    Harm(
        "manifest not text", lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is unread"
    ),
)


def empty_it(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


FOLDERS = (
    Harm("empty folder", empty_it, "manifest.json is missing"),
    Harm("a file", lambda path: (shutil.rmtree(path), path.write_text("x")), "it is no folder"),
    Harm("a link into nowhere", lambda path: (shutil.rmtree(path), path.symlink_to("nowhere")), "No such file"),
    Harm(
        "under another step", lambda path: path.rename(path.with_name("step-00000005")), "of step 2 under another name"
    ),
    Harm(
        "a copy of another step",
        lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("step-00000001"), path)),
        "of step 1 under another name",
    ),
)


def harms(sizes: dict[str, int], campaign: bool) -> list[Harm]:
    found: list[Harm] = [*MANIFESTS, *FOLDERS]
    for name, size in sizes.items():
        found += truncations(name, size, 1 if campaign else 10)
        found += flips(name, size, 100 if campaign else 30)
        found += replacements(name)
    return found


def look(folder: Path) -> tuple[int | None, list[tuple[str, str]]]:
    """Return the step of the newest checkpoint, every byte of which is right, and what was told on the way."""
    told: list[tuple[str, str]] = []
    found = newest_checkpoint(folder, lambda path, reason: told.append((path.name, reason)))
    if found is not None:
        require_whole(found)
    return (found.step if found else None), told


def test_every_damage_is_named_and_the_previous_checkpoint_used(
    quick_folder: Path, campaign: bool, record: Record
) -> None:
    template = quick_folder / "template"
    for step in (1, 2):
        save_step(template, step)
    sizes = {name: (template / "step-00000002" / name).stat().st_size for name in FILES}
    plan = harms(sizes, campaign)
    wrong = []
    for harm in plan:
        folder = quick_folder / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        harm.do(folder / "step-00000002")
        before = everything_in(folder)
        step, told = look(folder)
        named = len(told) == 1 and told[0][0] in ("step-00000002", "step-00000005") and harm.told in told[0][1]
        if step != 1 or not named or everything_in(folder) != before:
            wrong.append((harm.name, step, told))
    assert wrong == []
    assert len(plan) >= (800 if campaign else 200)
    record(4, "damages of the newest checkpoint", f"{len(plan)} of {len(plan)} named, the previous one used")


def test_another_file_beside_the_checkpoint_s_own_is_no_damage(tmp_path: Path) -> None:
    path = save_step(tmp_path, 2)
    (path / ".DS_Store").write_bytes(b"x")
    (path / "notes.txt").write_text("my best run")
    found = newest_checkpoint(tmp_path, lambda path, reason: pytest.fail(reason))
    assert found is not None
    with pytest.raises(CheckpointError, match=r"holds no notes\.safetensors"):
        found.tensors("notes")


def test_a_checkpoint_that_lies_behind_a_linked_folder_is_used(tmp_path: Path) -> None:
    save_step(tmp_path / "other disk", 2)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "other disk")
    found = newest_checkpoint(tmp_path / "checkpoints", lambda path, reason: pytest.fail(reason))
    assert found is not None


def test_nothing_begins_anew_where_the_disk_with_the_checkpoints_is_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "other disk")
    with pytest.raises(StorageError, match="Cannot read"):
        find_checkpoint(tmp_path / "checkpoints", RunConfig(), lambda text: None)


def test_where_every_checkpoint_is_damaged_each_is_named_with_its_reason(tmp_path: Path) -> None:
    for step in (1, 2):
        os.truncate(save_step(tmp_path, step) / "state.json", 5)
    before = everything_in(tmp_path)
    with pytest.raises(CheckpointError, match="Every checkpoint") as caught:
        find_checkpoint(tmp_path, RunConfig(), lambda text: None)
    assert "step-00000001" in caught.value.why
    assert "step-00000002" in caught.value.why
    assert "state.json has 5 of" in caught.value.why
    assert everything_in(tmp_path) == before


def test_a_damaged_checkpoint_that_is_asked_for_by_its_step_is_refused_with_the_reason(tmp_path: Path) -> None:
    (save_step(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        load_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        load_checkpoint(tmp_path, 3)


def find_as_nobody(fault: Fault, folder: str) -> dict[str, Any]:
    """Look for the newest checkpoint as a user who is not root, and save the step that cannot be read again."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    path = Path(folder)
    step, told = look(path)
    saved = save_step(path, 2)
    return {"step": step, "told": [f"{name}: {reason}" for name, reason in told], "again": saved.name}


def hide_file(path: Path) -> None:
    (path / "adapter.safetensors").chmod(0)


def hide_folder(path: Path) -> None:
    path.chmod(0)


def give_to_root(path: Path) -> None:
    """As after a run that was started with sudo once."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for part in (path, *path.iterdir()):
        os.chown(part, 0, 0)
        part.chmod(0o700 if part.is_dir() else 0o600)


@pytest.mark.parametrize("harm", [hide_file, hide_folder, give_to_root])
def test_a_checkpoint_that_this_user_may_not_read_is_named_so_and_kept(
    harm: Callable[[Path], None], faults: FaultServer, quick_folder: Path, record: Record
) -> None:
    quick_folder.chmod(0o755)
    folder = quick_folder / "checkpoints"
    for step in (1, 2):
        save_step(folder, step)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    harm(folder / "step-00000002")
    outcome = faults.run(find_as_nobody, str(folder))
    assert outcome.error == "", outcome.trace
    assert outcome.value["step"] == 1
    (told,) = outcome.value["told"]
    assert told.startswith("step-00000002: ")
    assert "cannot be read (Permission denied" in told
    assert ("belongs to root" in told) == (harm is give_to_root)
    # Saved again under its name, it is moved aside, whole as it is, and not called damaged.
    (aside,) = [path for path in folder.iterdir() if path.name.startswith("step-00000002.unreadable-")]
    if os.geteuid() == 0:
        assert len(list(aside.iterdir())) == len(FILES)
    assert outcome.value["again"] == "step-00000002"
    record(4, f"as another user: {harm.__name__.replace('_', ' ')}", "named, the previous one used, nothing lost")
