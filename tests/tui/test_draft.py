"""The draft: layers and origins, problems by page, and the file it survives in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.engine.advisor import Advice
from lorasmith.engine.errors import ConfigError, DatasetError
from lorasmith.tui.draft import Draft, from_json, load_draft
from lorasmith.tui.draft_file import DraftFile
from lorasmith.tui.fields import read_text, settings, write_text


def test_a_new_draft_is_the_demo_and_can_start() -> None:
    draft = Draft()
    resolved = draft.resolve()
    assert draft.problems() == []
    assert resolved.config.captions.trigger == "zqx"
    assert resolved.origins["captions.trigger"] == "demo preset"
    assert Path(resolved.config.dataset.folder).is_dir()


def test_another_base_leaves_the_demo_settings_behind() -> None:
    draft = Draft()
    draft.put("base.model", "owner/name")
    assert draft.value("dataset.folder") == ""
    assert {problem.key for problem in draft.problems()} == {"dataset.folder", "captions.trigger"}


def test_the_users_value_wins_over_advice_and_reset_brings_the_advice_back() -> None:
    advice = [Advice("adapter.rank", 32, "24 GB tier", "a paper", "preset sd15")]
    draft = Draft(answers={"base.model": "owner/name"})
    assert draft.value("adapter.rank", advice) == 32
    draft.put("adapter.rank", "4")
    assert draft.merged(advice)["adapter.rank"] == (4, "wizard")
    draft.reset("adapter.rank")
    assert draft.merged(advice)["adapter.rank"] == (32, "preset sd15")


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("adapter.rank", "abc", "not a whole number"),
        ("adapter.rank", "0", "at least 1"),
        ("optimizer.learning_rate", "fast", "not a number"),
        ("dataset.resolution", "500", "multiple of 64"),
        ("previews.seeds", "1 | x", "not a whole number"),
        ("run.name", "", "must not be empty"),
    ],
)
def test_a_value_that_is_not_allowed_is_kept_as_typed_and_explained(key: str, text: str, words: str) -> None:
    draft = Draft()
    before = draft.value(key)
    assert words in draft.put(key, text)
    assert draft.text(key) == text
    assert draft.value(key) == before
    assert [problem.key for problem in draft.problems()] == [key]


def test_contradicting_settings_are_told_with_their_field() -> None:
    draft = Draft()
    draft.put("optimizer.name", "prodigy")
    draft.put("captions.trigger", "a,b")
    problems = {problem.key: problem for problem in draft.problems()}
    assert set(problems) == {"optimizer.learning_rate", "captions.trigger"}
    assert problems["captions.trigger"].page == "trigger"
    with pytest.raises(ConfigError):
        draft.resolve()


def test_a_blank_trigger_is_one_problem() -> None:
    draft = Draft()
    draft.put("captions.trigger", "   ")
    assert [problem.key for problem in draft.problems()] == ["captions.trigger"]


def test_what_pages_found_wrong_is_listed_in_page_order() -> None:
    draft = Draft()
    draft.put("adapter.rank", "x")
    problems = draft.problems(failures={"dataset.folder": DatasetError("The folder is empty.", fix="Choose another.")})
    assert (problems[0].page, problems[0].message) == ("dataset", "The folder is empty. Choose another.")
    assert [p.page for p in problems] == ["dataset", "settings"]


def test_every_setting_survives_being_shown_and_read_back() -> None:
    for key, info in settings().items():
        if key not in ("base.model", "dataset.folder"):
            assert read_text(key, write_text(key, info.default)) == info.default, key


def test_a_draft_survives_its_file_with_invalid_values() -> None:
    draft = Draft(kept={"hub": "me/x"}, visited=["hardware", "settings"], page="settings")
    draft.put("adapter.rank", "12")
    draft.put("train.steps", "many")
    assert from_json(draft.to_json()) == draft


def test_a_value_that_a_newer_version_forbids_comes_back_as_typed_text() -> None:
    record = json.loads(Draft().to_json())
    record["answers"] |= {"adapter.rank": 5000, "no.such.setting": 1}
    draft = from_json(json.dumps(record))
    assert draft is not None
    assert draft.text("adapter.rank") == "5000"
    assert draft.problems()[0].key == "adapter.rank"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 1}', "null"])
def test_a_file_that_is_no_draft_is_no_offer(text: str, tmp_path: Path) -> None:
    path = tmp_path / "draft.json"
    path.write_text(text)
    assert load_draft(path) is None


def test_saving_replaces_the_file_whole_and_says_why_it_could_not(state_folder: Path) -> None:
    file = DraftFile()
    file.save(Draft().to_json())
    assert file.load() is not None
    assert [path.name for path in state_folder.iterdir()] == ["draft.json"]
    file.path = Path("/proc/nowhere/draft.json")
    file.save(Draft().to_json())
    assert file.problem


def test_edited_captions_count_for_the_pictures_that_they_were_written_for(tmp_path: Path) -> None:
    draft = Draft(answers={"base.model": "owner/name"})
    assert draft.overlay_path() is None
    draft.put("dataset.folder", str(tmp_path / "cats"))
    path = draft.overlay_path()
    assert path is not None
    assert path.parent.parent == tmp_path / "state"
    assert draft.value("dataset.overlay") == ""
    path.parent.mkdir(parents=True)
    path.touch()
    assert draft.merged()["dataset.overlay"] == (str(path), "edited captions")
    draft.put("dataset.folder", str(tmp_path / "dogs"))
    assert draft.value("dataset.overlay") == ""
    draft.put("dataset.folder", str(tmp_path / "dogs" / ".." / "cats"))
    assert draft.overlay_path() == path
    draft.put("dataset.overlay", "mine.jsonl")
    assert draft.overlay_path() == Path("mine.jsonl")
