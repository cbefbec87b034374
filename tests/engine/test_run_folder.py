"""A new run folder keeps what the run needs to be the same again: full paths, and its own copy of the edits."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.resume import changed_settings
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.engine.run_folder import create_run, open_run


def settings(**dataset: object) -> ResolvedConfig:
    return resolve_config([Layer("test", {"run": {"output_folder": "runs"}, "dataset": dataset})])


def test_every_dataset_path_is_stored_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = create_run(settings(folder="a", more_folders=["b.zip", "/c.toml"], regularization_folder="r"))
    dataset = open_run(run.path).load_config().config.dataset
    assert dataset.folder == str(tmp_path / "a")
    assert dataset.more_folders == [str(tmp_path / "b.zip"), "/c.toml"]
    assert dataset.regularization_folder == str(tmp_path / "r")
    assert dataset.overlay == ""
    assert not run.overlay.exists()


def test_later_edits_do_not_change_a_run_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edits = {"a.png": Edit(("a dog", "a hound"), by="wd14"), "b.png": Edit(exclude=True)}
    append_edits(Path("edits.jsonl"), {"a.png": Edit(("older",))})
    append_edits(Path("edits.jsonl"), edits)
    run = create_run(settings(folder="a", overlay="edits.jsonl"))
    append_edits(Path("edits.jsonl"), {"a.png": Edit(("later",))})
    stored = Path(open_run(run.path).load_config().config.dataset.overlay)
    assert stored == run.overlay
    assert read_overlay(stored) == edits


def test_edits_that_do_not_exist_yet_leave_an_empty_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = create_run(settings(folder="a", overlay="edits.jsonl"))
    assert run.overlay.read_bytes() == b""


def test_edits_that_cannot_be_read_make_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("edits.jsonl").write_text("[]\n")
    with pytest.raises(DatasetError, match=r"edits\.jsonl"):
        create_run(settings(folder="a", overlay="edits.jsonl"))


def test_moved_datasets_and_edits_do_not_forbid_to_resume() -> None:
    old = settings(folder="a", more_folders=["b"], overlay="x.jsonl").config.model_dump()
    new = settings(folder="c", more_folders=["d"], overlay="y.jsonl").config.model_dump()
    assert changed_settings(old, new) == []
    assert changed_settings(old, settings(masks="off").config.model_dump()) == ["dataset.masks (files → off)"]
