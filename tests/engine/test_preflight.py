"""What is refused before a run folder is made."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.cli import main
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import BaseModelError, ConfigError, DatasetError, LorasmithError, StorageError
from lorasmith.engine.preflight import require_ready
from lorasmith.engine.run_file import Layer, resolve_config


def config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return settings that a run can start with, and `sections` on top."""
    for name in ("pictures", "base"):
        (folder / name).mkdir(exist_ok=True)
    values: dict[str, dict[str, Any]] = {
        "run": {"output_folder": str(folder / "new" / "runs")},
        "base": {"model": str(folder / "base")},
        "dataset": {"folder": str(folder / "pictures")},
        "captions": {"trigger": "zqx"},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return resolve_config([Layer("test", values)]).config


def test_what_can_start_passes_and_nothing_is_written(tmp_path: Path) -> None:
    require_ready(config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "pictures"]


def test_a_model_on_the_hub_passes_unasked(tmp_path: Path) -> None:
    require_ready(config(tmp_path, base={"model": "nobody/knows-this"}))


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"captions": {"trigger": ""}}, ConfigError, "captions.trigger is empty"),
        ({"dataset": {"folder": ""}}, DatasetError, "No dataset folder"),
        ({"dataset": {"folder": "/nowhere/at all"}}, DatasetError, "/nowhere/at all does not exist"),
        ({"dataset": {"regularization_folder": "/nowhere"}}, DatasetError, "dataset.regularization_folder"),
        ({"dataset": {"more_folders": ["/nowhere"]}}, DatasetError, r"dataset\.more_folders\[0\]"),
        ({"dataset": {"folder": __file__}}, DatasetError, "is not a folder"),
        ({"dataset": {"overlay": "/nowhere.jsonl"}}, DatasetError, r"/nowhere\.jsonl do not exist"),
        ({"base": {"model": " "}}, BaseModelError, "No base model"),
        ({"base": {"model": "./none.safetensors"}}, BaseModelError, "none.safetensors"),
        ({"run": {"output_folder": "/dev/null/runs"}}, StorageError, "/dev/null is not a folder"),
    ],
)
def test_what_cannot_start_is_refused_with_a_way_out(
    sections: dict[str, Any], kind: type[LorasmithError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words) as caught:
        require_ready(config(tmp_path, **sections))
    assert caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="may not be written to"):
        require_ready(config(tmp_path, run={"output_folder": str(closed / "runs")}))


def test_an_archive_and_a_kohya_file_pass(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as file:
        file.writestr("a.txt", "x")
    (tmp_path / "cats.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'")
    require_ready(config(tmp_path, dataset={"more_folders": [str(tmp_path / "cats.zip")]}))
    require_ready(config(tmp_path, dataset={"folder": str(tmp_path / "cats.toml")}))


def test_an_output_folder_inside_the_dataset_is_refused(tmp_path: Path) -> None:
    for output in (tmp_path / "pictures", tmp_path / "pictures" / "runs"):
        with pytest.raises(StorageError, match="lies inside the dataset"):
            require_ready(config(tmp_path, run={"output_folder": str(output)}))


def test_train_with_an_empty_trigger_leaves_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path)
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f"[run]\noutput_folder = '{settings.run.output_folder}'\n[base]\nmodel = '{settings.base.model}'\n"
        f"[dataset]\nfolder = '{settings.dataset.folder}'\n"
    )
    assert main(["train", str(run_file)]) == ConfigError.exit_code
    assert "captions.trigger is empty" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
