"""Trigger words: what a tokenizer makes of them, and which other LoRAs answer to them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.dataset.trained_triggers import find_other_triggers
from lorasmith.engine.dataset.triggers import Word, check_trigger, read_word
from lorasmith.engine.run_file import Layer, resolve_config, to_toml

from .checked import LetterTokenizer, config

TOKENIZER = LetterTokenizer("dog", "woman")


def write_lora(path: Path, **metadata: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "a.lora_down.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def write_run(folder: Path, trigger: str, name: str = "cat", data: str = "/data/cats", finished: bool = True) -> None:
    folder.mkdir(parents=True)
    values = {"run": {"name": name}, "captions": {"trigger": trigger}, "dataset": {"folder": data}}
    (folder / "run.toml").write_text(to_toml(resolve_config([Layer("test", values)])))
    if finished:
        write_lora(folder / "export" / f"{name}.safetensors", **{"modelspec.trigger_phrase": trigger})


@pytest.mark.parametrize(
    ("trigger", "code"),
    [
        ("dog", "trigger-known-word"),
        ("zqé", "trigger-unknown-characters"),
        ("zq7", "trigger-digits"),
        ("zqxwvk", "trigger-long"),
        ("zq", "trigger-short"),
        ("zqx woman", "trigger-several-words"),
        ("zq(x)", "trigger-prompt-syntax"),
    ],
)
def test_each_doubt_has_its_finding(trigger: str, code: str) -> None:
    said = {finding.code: finding for finding in check_trigger(trigger, [TOKENIZER])}
    assert code in said
    assert said[code].title.endswith(".")
    assert said[code].why
    assert said[code].fix


@pytest.mark.parametrize("trigger", ["zqx", "ohwx", " zqx ", ""])
def test_rare_words_are_left_alone(trigger: str) -> None:
    assert check_trigger(trigger, [TOKENIZER]) == []


def test_without_a_base_only_the_letters_are_judged() -> None:
    assert check_trigger("dog") == []
    assert [finding.code for finding in check_trigger("x1")] == ["trigger-digits", "trigger-short"]


def test_any_of_several_tokenizers_counts() -> None:
    assert [finding.code for finding in check_trigger("dog", [LetterTokenizer(), TOKENIZER])] == ["trigger-known-word"]


def test_a_word_is_read_as_the_tokenizer_splits_it() -> None:
    assert read_word(TOKENIZER, "dog") == Word(("dog",))
    assert read_word(TOKENIZER, "zé") == Word(("z", "<unk>"), unknown=True)


def test_a_short_word_of_another_script_is_no_abbreviation() -> None:
    assert check_trigger("猫") == []


@pytest.mark.parametrize(
    ("other", "codes"),
    [
        ("zqx", ["trigger-taken"]),
        ("ZQX ", ["trigger-taken"]),
        ("zqxy", ["trigger-overlap"]),
        ("my zqx cat", ["trigger-overlap"]),
        ("qx", []),
        ("ohwx", []),
    ],
)
def test_other_loras_of_the_same_or_a_close_trigger_are_named(other: str, codes: list[str]) -> None:
    said = check_trigger("zqx", [TOKENIZER], {other: "old-cat"})
    assert [finding.code for finding in said] == codes
    assert all("old-cat" in finding.title for finding in said)


def test_a_free_rare_word_is_offered_instead() -> None:
    [said] = check_trigger("dog", [TOKENIZER])
    assert said.action is not None
    assert said.action.settings == {"captions.trigger": "zqx"}
    [said] = check_trigger("dog", [LetterTokenizer("dog", "zqx", "vqzk")], {"xjqw": "a"})
    assert said.action is not None
    assert said.action.settings == {"captions.trigger": "qwzv"}


def test_triggers_are_read_from_finished_runs_and_from_files(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "cat-1", "zqx")
    write_run(tmp_path / "runs" / "dog-1", "vqzk", "dog", finished=False)
    write_lora(tmp_path / "loras" / "style" / "a.safetensors", ss_trigger_words="ohwx, sks")
    write_lora(tmp_path / "loras" / "b.safetensors", trigger_words='["one", "two"]')
    write_lora(tmp_path / "loras" / "c.safetensors", **{"modelspec.trigger_phrase": "ZQX"})
    write_lora(tmp_path / "loras" / "d.safetensors", format="pt")
    assert find_other_triggers(tmp_path / "runs", tmp_path / "loras") == {
        "zqx": "cat-1",
        "one": "b.safetensors",
        "two": "b.safetensors",
        "ohwx": "style/a.safetensors",
        "sks": "style/a.safetensors",
    }


def test_tries_at_the_same_lora_are_no_other_loras(tmp_path: Path) -> None:
    write_run(tmp_path / "cat-1", "zqx", "cat", "/data/a")
    write_run(tmp_path / "feline-1", "zqxa", "feline", "/data/cats")
    write_run(tmp_path / "dog-1", "ohwx", "dog", "/data/dogs")
    write_lora(tmp_path / "shared.safetensors", ss_output_name="cat", trigger_words="zqx")
    own = config(run__name="cat", dataset__folder="/data/cats")
    assert find_other_triggers(tmp_path, own=own) == {"ohwx": "dog-1"}
    assert set(find_other_triggers(tmp_path)) == {"zqx", "zqxa", "ohwx"}


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 500) + b"{")
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    broken: dict[str, Any] = {"cat-1": "not [toml", "cat-2": "captions = 3", "cat-3": "captions = { trigger = 3 }"}
    for name, text in broken.items():
        write_run(tmp_path / name, "zqx")
        (tmp_path / name / "run.toml").write_text(text)
    write_lora(tmp_path / "good.safetensors", trigger_words="ohwx")
    assert find_other_triggers(tmp_path, tmp_path / "missing") == {"ohwx": "good.safetensors"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", trigger_words="ohwx")
    assert find_other_triggers(tmp_path) == {"ohwx": "a.safetensors"}
    write_lora(tmp_path / "a.safetensors", trigger_words="zqx, sks")
    assert set(find_other_triggers(tmp_path)) == {"zqx", "sks"}
