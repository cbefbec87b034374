"""What is refused before a run folder is made."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import doctor
from lorasmith.engine.cli import main
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import (
    BaseModelError,
    ConfigError,
    DatasetError,
    HardwareError,
    LorasmithError,
    StorageError,
)
from lorasmith.engine.preflight import require_ready, require_usable
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
        values[name] = values.get(name, {}) | section
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


# Choices that do not work here


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that were made; those named in `failing` fail."""
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    names: list[str] = []

    def run_trials(asked: list[str], device: str = "auto") -> Iterator[doctor.Check]:
        names.extend(asked)
        for name in asked:
            status: doctor.Status = "fail" if name in failing else "pass"
            yield doctor.trials.explained(doctor.Check(name, status, "as the test says"))

    monkeypatch.setattr(doctor.trials, "run_trials", run_trials)
    failing.clear()
    return names


failing: set[str] = set()


def test_a_run_that_needs_nothing_doubtful_is_not_held_up(tmp_path: Path, tried: list[str]) -> None:
    require_usable(config(tmp_path))
    assert tried == []


def test_an_optimizer_is_tried_once_for_an_installation(tmp_path: Path, tried: list[str]) -> None:
    settings = config(tmp_path, optimizer={"name": "adamw8bit"}, memory={"quantize": "nf4"})
    require_usable(settings)
    assert tried == ["bitsandbytes", "nf4"]
    require_usable(settings)
    assert tried == ["bitsandbytes", "nf4"], "known to work"


def test_a_broken_optimizer_is_refused_with_the_doctors_fix_until_it_works(tmp_path: Path, tried: list[str]) -> None:
    failing.add("bitsandbytes")
    settings = config(tmp_path, optimizer={"name": "adamw8bit"})
    for _ in range(2):
        with pytest.raises(HardwareError, match=r"optimizer\.name = adamw8bit cannot be used") as caught:
            require_usable(settings)
        assert caught.value.why == "bitsandbytes: as the test says"
        assert "-m pip install --force-reinstall --no-deps 'bitsandbytes" in caught.value.fix
    assert tried == ["bitsandbytes"] * 2, "what is known to fail is tried again, since it may have been mended"
    require_usable(config(tmp_path, optimizer={"name": "adamw"}))
    failing.clear()
    require_usable(settings)
    assert [check.status for check in doctor.remembered_checks()] == ["pass"]


def test_what_cannot_be_used_together_is_refused_together_alone(tmp_path: Path, tried: list[str]) -> None:
    failing.add("fp8 product")
    require_usable(config(tmp_path, memory={"quantize": "fp8"}))
    with pytest.raises(HardwareError) as caught:
        require_usable(config(tmp_path, memory={"quantize": "fp8", "quantized_matmul": True}))
    assert caught.value.what == (
        "memory.quantize = fp8 and memory.quantized_matmul = true cannot be used on this machine."
    )
    require_usable(config(tmp_path, memory={"quantize": "int8", "quantized_matmul": True}))


def test_a_card_that_was_found_broken_is_tried_before_each_run_but_not_for_the_cpu(
    tmp_path: Path, tried: list[str]
) -> None:
    failing.add("cuda")
    doctor.remember([doctor.trials.explained(doctor.Check("cuda", "fail", "no code for sm_120"))])
    with pytest.raises(HardwareError, match="cuda: as the test says"):
        require_usable(config(tmp_path))
    require_usable(config(tmp_path, train={"device": "cpu"}))
    failing.clear()
    require_usable(config(tmp_path))
    assert tried == ["cuda", "cuda"]


def test_lorasmith_train_refuses_before_a_run_folder_is_made(
    tmp_path: Path, tried: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.add("bitsandbytes")
    output = tmp_path / "runs"
    values = {"run.output_folder": output, "base.model": tmp_path / "base", "dataset.folder": tmp_path / "pictures"}
    config(tmp_path)
    sets = [f"--set={key}={value}" for key, value in (values | {"captions.trigger": "zqx"}).items()]
    run_file = tmp_path / "run.toml"
    run_file.write_text('version = 1\n[optimizer]\nname = "lion8bit"\n')
    assert main(["train", str(run_file), *sets]) == HardwareError.exit_code
    told = capsys.readouterr().err
    assert "Error: optimizer.name = lion8bit cannot be used on this machine." in told
    assert "Fix: Choose another value, or: " in told
    assert not output.exists()
