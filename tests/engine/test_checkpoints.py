from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.engine import checkpoints
from lorasmith.engine.checkpoints import damage, newest_checkpoint, prune_checkpoints, save_checkpoint
from lorasmith.engine.errors import StorageError

TENSORS = {
    "adapter": {"a.lora_A.weight": torch.arange(6.0).view(2, 3)},
    "optimizer": {"s": torch.ones(2, dtype=torch.uint8)},
}


def no_damage(path: Path, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), -0.0, 1e-45])
    rest = {"rate": 0.1 + 0.2, "none": None, "text": "名前"}
    save_checkpoint(tmp_path, 7, {"adapter": {"x": odd}, "optimizer": {}}, rest)
    found = newest_checkpoint(tmp_path, no_damage)
    assert found is not None
    assert (found.step, found.state) == (7, rest)
    assert torch.equal(found.tensors("adapter")["x"].view(torch.int32), odd.view(torch.int32))


def test_a_checkpoint_holds_no_pickle_and_is_private(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, TENSORS, {})
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert (path / "adapter.safetensors").stat().st_mode & 0o777 == 0o600


def test_newest_is_by_step_and_not_by_date(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 200, TENSORS, {})
    save_checkpoint(tmp_path, 99, TENSORS, {})
    found = newest_checkpoint(tmp_path, no_damage)
    assert found is not None
    assert found.step == 200


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter.safetensors").write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 10)


def lose_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\0" * 50)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_a_byte, "SHA-256 differs"),
        (cut_short, "has 10 of"),
        (lose_a_file, "state.json is missing"),
        (lose_the_manifest, "manifest.json is missing"),
        (empty_the_manifest, "unreadable"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_is_used(tmp_path: Path, harm, reason: str) -> None:
    save_checkpoint(tmp_path, 10, TENSORS, {})
    harm(save_checkpoint(tmp_path, 20, TENSORS, {}))
    told: list[tuple[str, str]] = []
    found = newest_checkpoint(tmp_path, lambda path, why: told.append((path.name, why)))
    assert found is not None
    assert found.step == 10
    assert [name for name, _ in told] == ["step-00000020"]
    assert reason in told[0][1]


def test_saving_over_a_damaged_checkpoint_moves_it_aside_and_never_deletes_it(tmp_path: Path) -> None:
    flip_a_byte(save_checkpoint(tmp_path, 20, TENSORS, {}))
    path = save_checkpoint(tmp_path, 20, TENSORS, {})
    assert damage(path) is None
    assert len([p for p in tmp_path.iterdir() if ".damaged-" in p.name]) == 1


def test_pruning_keeps_the_newest_verified_ones_and_touches_no_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, TENSORS, {})
    cut_short(tmp_path / "step-00000004")
    removed = prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in removed] == ["step-00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 3, 4)]


def test_a_full_disk_leaves_nothing_behind_and_the_older_checkpoint_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "fsync_file", full)
    with pytest.raises(StorageError, match=r"disk is full.*step-00000002.*bytes needed, \d+ bytes free"):
        save_checkpoint(tmp_path, 2, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_checkpoint(tmp_path, no_damage) is not None


def test_a_disk_that_changes_bytes_is_found_out_before_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write({key: value + 1 for key, value in tensors.items()}, path)

    monkeypatch.setattr("safetensors.torch.save_file", wrong)
    with pytest.raises(StorageError, match="step-00000003") as caught:
        save_checkpoint(tmp_path, 3, TENSORS, {})
    assert "reads back differently" in caught.value.why
    assert list(tmp_path.iterdir()) == []


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from lorasmith.engine.checkpoints import prune_checkpoints, save_checkpoint
torch.set_num_threads(1)
for step in range(1, 100000):
    value = torch.full((200_000,), float(step))
    save_checkpoint(Path(sys.argv[1]), step, {"adapter": {"x": value}}, {"step": step})
    print(step, flush=True)
    prune_checkpoints(Path(sys.argv[1]), 2)
"""


def test_kill_9_at_any_moment_leaves_a_checkpoint_that_is_what_was_written(tmp_path: Path) -> None:
    """Each kill hits somewhere in write, sync, rename or prune; everything acknowledged must be found again."""
    child = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    for _ in range(25):
        # The folder is looked at as a kill would leave it: while the process is stopped in the middle of its work.
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.005)
        found = newest_checkpoint(tmp_path, no_damage)
        assert found is not None
        assert torch.equal(found.tensors("adapter")["x"], torch.full((200_000,), float(found.step)))
        child.send_signal(signal.SIGCONT)
        time.sleep(0.017)
    child.kill()
    acknowledged = max(int(line) for line in child.stdout.read().split())
    child.wait()
    child.stdout.close()
    found = newest_checkpoint(tmp_path, no_damage)
    assert found is not None
    assert found.step >= acknowledged
    save_checkpoint(tmp_path, 10**6, TENSORS, {})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, TENSORS, {})
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter.safetensors", "optimizer.safetensors", "state.json"}
