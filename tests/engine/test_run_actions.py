"""A run is found by what a person types, renamed and deleted without a moment at which it is half there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lorasmith.engine import run_actions
from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.engine.errors import ConfigError, RunLockedError, StorageError
from lorasmith.engine.events import PreviewReady
from lorasmith.engine.journal import Follower, Journal, replay
from lorasmith.engine.run_actions import delete_run, measure_run, rename_run, resolve_run
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run, open_run
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_queue import RunQueue
from lorasmith.engine.run_summary import list_runs
from lorasmith.engine.storage import storage_error


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("cat-20260101-101010", "cat-20260102-101010", "dog-20260101-101010", "dog-20260101-101010-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.toml").write_text('[run]\nname = "x"\n')
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path / "runs"


def test_a_run_is_found_by_its_folder(runs: Path) -> None:
    assert resolve_run(str(runs / "cat-20260101-101010")).path == runs / "cat-20260101-101010"


def test_a_run_is_found_by_its_name_even_where_another_begins_with_it(runs: Path) -> None:
    assert resolve_run("dog-20260101-101010", runs).path == runs / "dog-20260101-101010"


def test_a_run_is_found_by_a_unique_beginning(runs: Path) -> None:
    assert resolve_run("cat-20260102", runs).path == runs / "cat-20260102-101010"


def test_an_ambiguous_beginning_names_the_candidates(runs: Path) -> None:
    with pytest.raises(ConfigError, match="may mean 2 runs") as caught:
        resolve_run("cat", runs)
    assert "cat-20260101-101010, cat-20260102-101010" in caught.value.why


def test_an_unknown_name_names_what_is_there(runs: Path) -> None:
    with pytest.raises(ConfigError, match="begins so") as caught:
        resolve_run("no-run", runs)
    assert "dog-20260101-101010-2" in caught.value.why


@pytest.mark.parametrize("text", ["", "elsewhere/cat", "/nowhere"])
def test_a_folder_that_is_no_run_is_said_so(runs: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        resolve_run(text, runs)


def test_an_absent_output_folder_has_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begins so") as caught:
        resolve_run("cat", tmp_path / "absent")
    assert caught.value.why == "There is no run in that folder."


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with edited captions and a file in each folder."""
    edits = tmp_path / "edits.jsonl"
    append_edits(edits, {"a.png": Edit(("a cat",))})
    values = {
        "run": {"name": "cat", "output_folder": str(tmp_path / "runs")},
        "captions": {"trigger": "zqx"},
        "dataset": {"overlay": str(edits)},
    }
    made = create_run(resolve_config([Layer("test", values)]))
    for folder, size in ((made.checkpoints, 300), (made.previews, 20), (made.export, 1)):
        (folder / "file").write_bytes(b"x" * size)
    return made


def test_a_run_is_measured_by_what_it_holds_and_links_are_not_followed(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "huge").write_bytes(b"x" * 10_000)
    (run.previews / "link").symlink_to(tmp_path / "elsewhere")
    (run.previews / "file-link").symlink_to(tmp_path / "elsewhere" / "huge")
    sizes = measure_run(run)
    assert (sizes.checkpoints, sizes.previews, sizes.export) == (300, 20, 1)
    assert sizes.other == run.run_file.stat().st_size + run.overlay.stat().st_size
    assert "checkpoints 300 bytes, previews 20 bytes, LoRA files 1 bytes" in sizes.describe()


def test_renaming_keeps_the_time_and_takes_the_edited_captions_along(run: RunFolder) -> None:
    when = run.name.removeprefix("cat")
    renamed = rename_run(run, " my dog ")
    assert renamed.name == f"my-dog{when}"
    assert not run.path.exists()
    config = renamed.load_config().config
    assert (config.run.name, config.dataset.overlay) == ("my dog", str(renamed.overlay))
    assert read_overlay(Path(config.dataset.overlay)) == {"a.png": Edit(("a cat",))}


def test_a_name_that_is_taken_or_empty_is_refused_and_nothing_changes(run: RunFolder) -> None:
    other = run.path.with_name(run.name.replace("cat", "dog"))
    other.mkdir()
    before = run.run_file.read_bytes()
    for name in ("dog", "", "   ", "my/dog"):
        with pytest.raises(ConfigError):
            rename_run(run, name)
    assert run.run_file.read_bytes() == before


def test_a_renaming_that_the_disk_refuses_halfway_is_taken_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise storage_error(path, len(data), OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(run_actions, "atomic_write", full)
    with pytest.raises(StorageError, match="Cannot rename") as caught:
        rename_run(run, "dog")
    assert "disk is full" in caught.value.why
    assert run.load_config().config.dataset.overlay == str(run.overlay)


def test_a_run_folder_that_was_moved_by_hand_finds_its_edited_captions(run: RunFolder, tmp_path: Path) -> None:
    moved = run.path.rename(tmp_path / "moved")
    assert open_run(moved).load_config().config.dataset.overlay == str(moved / "overlay.jsonl")


def test_a_renamed_run_keeps_its_place_in_the_queue(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    queue = RunQueue()
    queue.add(run)
    renamed = rename_run(run, "dog")
    assert [entry.folder for entry in queue.entries()] == [renamed]
    queue.file.write_text("no queue")
    with pytest.raises(StorageError, match=r"queue\.json is damaged"):
        rename_run(renamed, "cat")
    assert renamed.run_file.exists()
    assert renamed.load_config().config.run.name == "dog"


def test_a_renamed_runs_journal_names_files_where_they_are_now(run: RunFolder) -> None:
    path = run.previews / "step-00000001_p0_s1.png"
    journal = Journal(run.journal)
    journal.append(PreviewReady(step=1, prompt="x", seed=1, path=str(path), line=""))
    journal.append(PreviewReady(step=1, prompt="x", seed=1, path="/elsewhere/picture.png", line=""))
    journal.close()
    renamed = rename_run(run, "dog")
    found = [event.path for event in replay(renamed.journal) if isinstance(event, PreviewReady)]
    assert found == [str(renamed.previews / path.name), "/elsewhere/picture.png"]
    followed = [event.path for event in Follower(renamed.journal).poll() if isinstance(event, PreviewReady)]
    assert followed == found


def test_neither_is_done_to_a_run_that_is_worked_on(run: RunFolder) -> None:
    lock = RunLock(run)
    try:
        for action in (lambda: rename_run(run, "dog"), lambda: delete_run(run)):
            with pytest.raises(RunLockedError, match="Another process trains"):
                action()
    finally:
        lock.release()
    assert run.load_config()


def test_a_deletion_follows_no_link(run: RunFolder, tmp_path: Path) -> None:
    outside = tmp_path / "pictures"
    outside.mkdir()
    (outside / "a.png").write_bytes(b"x")
    (run.previews / "link").symlink_to(outside)
    (run.path / "file-link").symlink_to(outside / "a.png")
    delete_run(run)
    assert (outside / "a.png").read_bytes() == b"x"
    assert list(run.path.parent.iterdir()) == []


def test_a_run_folder_that_is_a_link_is_not_deleted(run: RunFolder, tmp_path: Path) -> None:
    link = tmp_path / "runs" / "link"
    link.symlink_to(run.path)
    with pytest.raises(ConfigError, match="is a link to"):
        delete_run(RunFolder(link))
    assert run.run_file.is_file()


def test_what_a_killed_deletion_left_is_no_run_and_goes_with_the_next(run: RunFolder) -> None:
    left = run.path.with_name(".removing-old-abc")
    left.mkdir()
    (left / "run.toml").write_bytes(run.run_file.read_bytes())
    assert [summary.run.path for summary in list_runs(run.path.parent)] == [run.path]
    with pytest.raises(ConfigError):
        resolve_run(".removing", run.path.parent)
    delete_run(run)
    assert list(run.path.parent.iterdir()) == []
