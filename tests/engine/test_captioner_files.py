"""Where a captioner's model comes from: a folder, a Hub (the real client, a fake Hub), or the cache offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.captioners import find_captioner
from lorasmith.engine.captioners._files import locate_model, require_files
from lorasmith.engine.errors import CaptionerError, HubError, StorageError
from tests.engine.fake_hub import COMMIT, REPO, FakeHub

WD14, BLIP = find_captioner("wd14").SPEC, find_captioner("blip").SPEC


def weights(name: str = "a") -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


BLIP_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "preprocessor_config.json": b"{  }",
    "vocab.txt": b"a",
    "model.safetensors": weights(),
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"other",
    "modeling_blip.py": b"code",
    "onnx/model.onnx": b"other",
    "README.md": b"card",
}
NEEDED = {"config.json", "tokenizer.json", "preprocessor_config.json", "vocab.txt", "model.safetensors"}
WD14_FILES = {"model.onnx": b"graph", "selected_tags.csv": b"tags", "model.safetensors": b"x", "model.msgpack": b"x"}


def unreachable(request: Any) -> Any:
    import httpx2

    raise httpx2.ConnectError("no route to host", request=request)


def test_a_tagger_needs_its_graph_and_its_tags_alone(hub: FakeHub) -> None:
    hub.files = dict(WD14_FILES)
    seen: list[tuple[str, int, int]] = []
    folder = locate_model(WD14, REPO, lambda *step: seen.append(step))
    assert set(hub.fetched) == {"model.onnx", "selected_tags.csv"}
    assert folder.name == COMMIT
    assert seen[-1][1:] == (9, 9)


def test_a_model_of_transformers_needs_texts_and_safetensors_and_neither_code_nor_pickles(hub: FakeHub) -> None:
    hub.files = dict(BLIP_FILES)
    locate_model(BLIP, REPO)
    assert set(hub.fetched) == NEEDED


def test_without_a_model_the_captioner_asks_for_the_commit_that_was_looked_at(hub: FakeHub) -> None:
    asked: list[str] = []

    def record(request: Any) -> Any:
        asked.append(request.url.path)
        return unreachable(request)

    hub.override = record
    with pytest.raises(HubError, match="SmilingWolf/wd-swinv2-tagger-v3 is not complete in the cache") as caught:
        locate_model(WD14)
    assert asked[0] == f"/api/models/{WD14.default_model}/revision/{WD14.revision}"
    assert "the captioner's model" in caught.value.fix


@pytest.mark.parametrize("way", ["no network", "HF_HUB_OFFLINE"])
def test_a_downloaded_model_works_without_a_network(way: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    hub.files = dict(BLIP_FILES)
    online = locate_model(BLIP, REPO)
    hub.override = unreachable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "HF_HUB_OFFLINE")
    assert locate_model(BLIP, REPO) == online


def test_a_half_downloaded_model_is_not_taken_for_a_cached_one(hub: FakeHub) -> None:
    hub.files = dict(BLIP_FILES)
    (locate_model(BLIP, REPO) / "model.safetensors").unlink()
    hub.override = unreachable
    with pytest.raises(HubError, match="not complete in the cache"):
        locate_model(BLIP, REPO)


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("tokenizer.json", r"someone/model has no tokenizer\.json, which BLIP needs"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json or processor_config\.json"),
        ("model.safetensors", r"has its weights only as a pickle, pytorch_model\.bin"),
    ],
)
def test_a_repository_that_lacks_something_is_refused_before_the_download(
    without: str, words: str, hub: FakeHub
) -> None:
    hub.files = {name: data for name, data in BLIP_FILES.items() if name != without}
    with pytest.raises(Exception, match=words) as caught:
        locate_model(BLIP, REPO)
    assert getattr(caught.value, "exit_code", 0) == 4
    assert hub.fetched == []


def test_a_disk_without_room_is_told_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.engine import hub as downloads

    hub.files = dict(BLIP_FILES)
    needed = sum(len(BLIP_FILES[name]) for name in BLIP_FILES if name in NEEDED)
    monkeypatch.setattr(downloads, "free_bytes", lambda path: needed - 1)
    with pytest.raises(StorageError, match=r"no room for someone/model: .* are needed") as caught:
        locate_model(BLIP, REPO)
    assert "HF_HOME" in caught.value.fix
    assert hub.fetched == []
    monkeypatch.setattr(downloads, "free_bytes", lambda path: needed)
    locate_model(BLIP, REPO)
    monkeypatch.setattr(downloads, "free_bytes", lambda path: 0)
    locate_model(BLIP, REPO)  # what is there needs no room


def test_a_disk_that_fills_up_meanwhile_is_told_in_words(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*args: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.files = dict(BLIP_FILES)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(StorageError, match="no room for someone/model"):
        locate_model(BLIP, REPO)


def test_all_parts_of_weights_that_are_split_must_be_there(tmp_path: Path) -> None:
    for name, data in BLIP_FILES.items():
        if "/" not in name and name not in ("model.safetensors", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(data)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / names[0]).write_bytes(weights("a"))
    with pytest.raises(CaptionerError, match=r"has no model-00002-of-00002\.safetensors"):
        require_files(BLIP, tmp_path)
    (tmp_path / names[1]).write_bytes(weights("b")[:-1])
    with pytest.raises(CaptionerError, match=r"model-00002-of-00002\.safetensors is damaged"):
        require_files(BLIP, tmp_path)
    (tmp_path / names[1]).write_bytes(weights("b"))
    require_files(BLIP, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CaptionerError, match=r"model\.safetensors\.index\.json cannot be read"):
        require_files(BLIP, tmp_path)


def test_the_path_of_the_graph_itself_means_its_folder(tmp_path: Path) -> None:
    for name, data in WD14_FILES.items():
        (tmp_path / name).write_bytes(data)
    assert locate_model(WD14, str(tmp_path / "model.onnx")) == tmp_path.resolve()
