"""What a run will write is told part by part, before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import disk_plan
from lorasmith.engine.config import RunConfig
from lorasmith.engine.disk_plan import existing_checkpoints, plan_disk, require_room, reserved_beside_cache
from lorasmith.engine.errors import StorageError
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.storage import checkpoint_bytes

ONE = checkpoint_bytes(1_000_000, "adamw")


def settings(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "captions": {"trigger": "zqx"},
        "train": {"steps": 1000},
        "checkpoints": {"every": 100, "keep": 3},
        "previews": {"every": 250, "prompts": ["a", "b"], "seeds": [1, 2], "side": 512},
    }
    return resolve_config([Layer("test", values | sections)]).config


def test_kept_checkpoints_and_the_one_being_written_are_counted() -> None:
    plan = plan_disk(settings(), 1_000_000)
    assert (plan.num_checkpoints, plan.checkpoints) == (4, 4 * ONE)


def test_a_short_run_counts_the_saves_that_it_can_make() -> None:
    plan = plan_disk(settings(checkpoints={"every": 0, "keep": 50}), 1_000_000)
    assert plan.num_checkpoints == 2  # at the end, and one that the user asks for


def test_previews_are_counted_with_their_sheet() -> None:
    plan = plan_disk(settings(), 0)
    assert plan.num_previews == 4 * 4
    assert plan.previews == 2 * 16 * 512 * 512 * disk_plan.PNG_BYTES_PER_PIXEL


def test_each_layout_is_a_file() -> None:
    plan = plan_disk(settings(export={"layouts": ["kohya", "diffusers"], "precision": "fp32"}), 1_000_000)
    assert (plan.num_exports, plan.export) == (2, 2 * 5_000_000)


def test_a_resumed_run_needs_only_what_its_last_steps_write() -> None:
    whole = plan_disk(settings(), 1_000_000)
    late = plan_disk(settings(), 1_000_000, done_steps=900, existing=(ONE, ONE, ONE))
    assert late.num_checkpoints == 1
    assert late.num_previews == 4
    assert late.total < whole.total / 2


def test_a_finished_run_that_lacks_its_lora_needs_space_for_that_alone() -> None:
    plan = plan_disk(settings(), 1_000_000, done_steps=1000, existing=(ONE,))
    assert plan.checkpoints == 0
    assert plan.export == 3_000_000


def test_too_little_room_is_told_with_the_size_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_plan, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(StorageError, match=r"about [\d.]+ MiB are needed, 1.0 MiB are free") as caught:
        require_room(tmp_path, plan_disk(settings(), 1_000_000))
    assert "4 checkpoints 49.6 MiB, 16 previews and their sheet 16.0 MiB, 1 LoRA file 2.9 MiB" in caught.value.why


def test_existing_checkpoints_are_measured_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "step-00000100").mkdir()
    (tmp_path / "step-00000100" / "state.json").write_bytes(b"x" * 70)
    (tmp_path / "other").mkdir()
    assert existing_checkpoints(tmp_path) == (70,)
    assert existing_checkpoints(tmp_path / "absent") == ()


def test_a_cache_on_the_same_disk_leaves_the_runs_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_disk(settings(), 1_000_000)
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    assert reserved_beside_cache(tmp_path, plan) == plan.total
    monkeypatch.setenv("LORASMITH_CACHE", "/proc/none")
    assert reserved_beside_cache(tmp_path, plan) == 0
