"""A run is found by what a person types, renamed and deleted without a moment at which it is half there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.engine.errors import ConfigError
from lorasmith.engine.run_actions import resolve_run


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
