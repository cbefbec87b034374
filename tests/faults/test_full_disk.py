"""A disk that refuses: training goes on or pauses with words, and goes on by itself once the disk takes it again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import checkpoints, finishing, saving
from lorasmith.engine.commands import Command
from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import (
    CheckpointPruned,
    CheckpointSaved,
    Event,
    ExportDone,
    Logged,
    Paused,
    Resumed,
    RunEnded,
    StepsDone,
)
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.storage import storage_error
from tests.engine.running import RecordingHost, new_run, run_training, texts, tiny_config


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(saving, "SECONDS_BEFORE_NEXT_TRY", 0.0)


class FullDisk:
    """A disk that refuses the tries in `refusing` (the first is 0), however each came about."""

    def __init__(self, refusing: range | set[int], code: int = errno.ENOSPC) -> None:
        self.refusing, self.code, self.tries = refusing, code, 0
        self.steps: list[int] = []

    def asked(self, path: Path) -> None:
        number, self.tries = self.tries, self.tries + 1
        if number in self.refusing:
            raise storage_error(path, 123_456, OSError(self.code, os.strerror(self.code)))

    def save(self, folder: Path, step: int, tensors: Any, state: Any) -> Path:
        self.steps.append(step)
        self.asked(folder / f"step-{step:08d}")
        return checkpoints.save_checkpoint(folder, step, tensors, state)


def stop_when_paused() -> RecordingHost:
    host = RecordingHost()

    def stop(event: Event) -> None:
        if isinstance(event, Paused):
            host.waiting.append(Command.STOP)

    host.on_event = stop
    return host


def run_with(
    disk: FullDisk, base: Path, tmp_path: Path, patch: pytest.MonkeyPatch, host: RecordingHost | None = None
) -> tuple[RunFolder, RecordingHost]:
    patch.setattr(saving, "save_checkpoint", disk.save)
    config = tiny_config(base, tmp_path, train={"steps": 8, "log_every": 1}, checkpoints={"every": 2, "keep": 9})
    return run_training(config, host)


def test_an_error_that_a_second_try_cures_is_not_even_told(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = run_with(FullDisk({0, 2}, errno.EIO), tiny_sd15, tmp_path, monkeypatch)
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 4, 6, 8]
    assert not host.of(Paused)
    assert not [event for event in host.of(Logged) if event.severity == "error"]


def test_without_any_checkpoint_training_pauses_and_goes_on_once_there_is_space(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(range(6))
    _, host = run_with(disk, tiny_sd15, tmp_path, monkeypatch)
    assert disk.steps == [2] * 7 + [4, 6, 8]
    assert [event.step for event in host.of(Paused)] == [2]
    assert [event.step for event in host.of(Resumed)] == [2]
    reason = host.of(Paused)[0].reason
    assert str(tmp_path) in reason
    assert "step-00000002 (123456 bytes needed, " in reason
    assert " bytes free)" in reason
    assert len(host.losses()) == 8
    assert host.of(RunEnded)[0].outcome == "finished"


def test_one_refused_save_does_not_stop_training_while_an_older_checkpoint_is_there(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk({1, 2})
    _, host = run_with(disk, tiny_sd15, tmp_path, monkeypatch)
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 6, 8]
    assert not host.of(Paused)
    told = texts([event for event in host.of(Logged) if event.severity == "error"])
    assert "No checkpoint at step 4: The disk is full" in told
    assert "The newest checkpoint is that of step 2." in told


def test_a_second_refused_save_in_a_row_pauses(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(range(1, 8))
    _, host = run_with(disk, tiny_sd15, tmp_path, monkeypatch)
    assert [event.step for event in host.of(Paused)] == [6]
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 6, 8]


def test_a_refused_save_is_tried_again_while_training_goes_on(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "BACKGROUND_SECONDS", 0.0)
    _, host = run_with(FullDisk({1, 2}), tiny_sd15, tmp_path, monkeypatch)
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 5, 6, 8]


@pytest.mark.parametrize("command", [Command.RESUME, Command.SAVE_NOW])
def test_the_user_can_ask_for_the_next_try_and_hears_of_its_refusal(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(saving, "WAIT_SECONDS", 600.0)
    host = RecordingHost()
    host.on_event = lambda event: host.waiting.append(command) if isinstance(event, Paused) else None
    _, host = run_with(FullDisk(range(3)), tiny_sd15, tmp_path, monkeypatch, host)
    assert [event.step for event in host.of(Paused)] == [2, 2]
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 4, 6, 8]


def test_a_stop_while_waiting_names_the_newest_checkpoint_and_what_is_lost(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = stop_when_paused()
    with pytest.raises(StorageError) as caught:
        run_with(FullDisk(range(1, 10**6)), tiny_sd15, tmp_path, monkeypatch, host)
    assert caught.value.what == "Stopped at step 6 without a checkpoint of it; the steps since step 2 are lost."
    assert "123456 bytes needed" in caught.value.why
    assert "The newest checkpoint is that of step 2. Resuming starts from there." in caught.value.fix
    assert caught.value.exit_code == 7


def test_a_stop_without_any_checkpoint_says_so(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="they are all lost"):
        run_with(FullDisk(range(10**6)), tiny_sd15, tmp_path, monkeypatch, stop_when_paused())


def test_a_stop_that_finds_the_disk_free_again_loses_nothing(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "WAIT_SECONDS", 600.0)
    run, host = run_with(FullDisk(range(2)), tiny_sd15, tmp_path, monkeypatch, stop_when_paused())
    assert host.of(RunEnded)[0].outcome == "stopped"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000002"]


def test_the_users_own_pause_is_kept_while_the_disk_refuses(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save asked for during a pause only says that it failed: nothing runs, so nothing can be lost."""
    host = RecordingHost({3: [Command.PAUSE]})

    def answer(event: Event) -> None:
        if isinstance(event, Paused):
            host.waiting.extend([Command.SAVE_NOW, Command.RESUME])

    host.on_event = answer
    _, host = run_with(FullDisk({1, 2}), tiny_sd15, tmp_path, monkeypatch, host)
    assert [(event.step, event.reason) for event in host.of(Paused)] == [(3, "")]
    assert "No checkpoint at step 3" in texts(host.of(Logged))
    assert host.of(RunEnded)[0].outcome == "finished"


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(folder: Path, keep: int) -> list[Path]:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saving, "prune_checkpoints", refuses)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, checkpoints={"every": 2, "keep": 1}))
    assert host.of(RunEnded)[0].outcome == "finished"
    assert "Old checkpoints could not be removed" in texts(host.of(Logged))
    assert not host.of(CheckpointPruned)


class RefusedExport:
    """An export that the disk refuses in its first `tries` tries."""

    def __init__(self, tries: int) -> None:
        self.left, self.export = tries, finishing.export_lora

    def __call__(self, family: Any, adapter: Any, config: Any, folder: Path, *rest: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            raise storage_error(folder / "tiny.safetensors", 99, OSError(errno.ENOSPC, "No space left on device"))
        return self.export(family, adapter, config, folder, *rest)


def test_a_finished_training_waits_for_space_for_its_lora(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "export_lora", RefusedExport(3))
    run, host = run_training(tiny_config(tiny_sd15, tmp_path))
    assert "tiny.safetensors (99 bytes needed" in host.of(Paused)[0].reason
    assert len(host.of(ExportDone)) == 1
    assert host.of(RunEnded)[0].outcome == "finished"
    assert [path.name for path in run.export.iterdir()] == ["tiny.safetensors"]


def test_a_stop_while_the_lora_waits_for_space_leaves_a_run_whose_resume_writes_it(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run, host = new_run(config), stop_when_paused()
    with monkeypatch.context() as patched:
        patched.setattr(finishing, "export_lora", RefusedExport(10**6))
        with pytest.raises(StorageError) as caught:
            run_training(config, host, run)
    assert "of 4 steps is done and saved, but its LoRA file could not be written" in caught.value.what
    assert "nothing is trained again" in caught.value.fix
    assert not list(run.export.iterdir())
    _, again = run_training(config, RecordingHost(), run)
    assert again.of(RunEnded)[0].outcome == "finished"
    assert not again.of(StepsDone)
    assert [path.name for path in run.export.iterdir()] == ["tiny.safetensors"]


def test_the_lora_is_written_even_while_the_last_checkpoint_is_refused(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "save_checkpoint", FullDisk(range(10**6)).save)
    host = stop_when_paused()
    with pytest.raises(StorageError, match="LoRA of 4 steps is written, but the checkpoint"):
        run_training(tiny_config(tiny_sd15, tmp_path), host)
    assert len(host.of(ExportDone)) == 1
    assert not host.of(RunEnded)


def test_a_disk_that_takes_neither_says_what_a_resume_will_do(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "save_checkpoint", FullDisk(range(10**6)).save)
    monkeypatch.setattr(finishing, "export_lora", RefusedExport(10**6))
    with pytest.raises(StorageError, match="neither its checkpoint nor its LoRA file") as caught:
        run_training(tiny_config(tiny_sd15, tmp_path), stop_when_paused())
    assert "trains the steps since its newest checkpoint again" in caught.value.fix


def test_what_a_killed_process_left_half_written_is_gone_after_the_next_start(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run = new_run(config)
    for path in (
        run.path / ".run.toml.0a1b.tmp",
        run.previews / ".step-00000001_p0_s1.png.0a1b.tmp",
        run.export / ".proving-0a1b.safetensors",
        run.checkpoints / ".saving-step-00000002-0a1b" / "adapter.safetensors",
        run.path / ".write-test-0a1b",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    run_training(config, run=run)
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]


def test_the_sizes_of_all_parts_are_told_before_the_first_step(tiny_sd15: Path, tmp_path: Path) -> None:
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, previews={"every": 2}))
    before = host.events[: next(i for i, event in enumerate(host.events) if isinstance(event, StepsDone))]
    told = texts([event for event in before if isinstance(event, Logged)])
    assert "On the disk, at most " in told
    for part in ("2 checkpoints ", "4 previews and their sheet ", "1 LoRA file ", "journal and log ", " are free."):
        assert part in told


def test_a_cache_that_the_disk_refuses_is_told_and_training_goes_on(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "latents").write_text("a file where a folder belongs")
    monkeypatch.setenv("LORASMITH_CACHE", str(cache))
    _, host = run_training(tiny_config(tiny_sd15, tmp_path))
    assert f"The cache cannot be written ({cache / 'latents'}: " in texts(host.of(Logged))
    assert host.of(RunEnded)[0].outcome == "finished"
