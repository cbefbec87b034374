"""Finding base models: paths, damaged files, and a Hub that answers in every bad way (the real client, a fake Hub)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.config import BaseSettings
from lorasmith.engine.errors import BaseModelError, HubError, LorasmithError
from lorasmith.engine.hub import describe_download, list_download
from lorasmith.engine.sources import BaseFiles, TensorInfo, locate_base, locate_configured, read_header
from tests.engine.fake_hub import COMMIT, REPO, Answer, FakeHub

TOKEN = "hf_secretsecretsecretsecret"


def _safetensors(path: Path, data: bytes = bytes(24), **changes: Any) -> Path:
    header = {
        "__metadata__": {"a": "b"},
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes},
    }
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


# ------------------------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize(
    ("card", "license_name"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- art\n---\n# A model\n", "apache-2.0"),
        ("\ufeff---\r\ntags: [x]\r\nlicense: 'mit'  # see below\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: stability-community\nlicense_link: x\n---\n", "stability-community"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: []\n---\nlicense: gpl\n", ""),
        ("license: gpl\n", ""),
        ("---\nlicense: never closed\n", ""),
        ("", ""),
    ],
)
def test_the_license_is_what_the_model_card_says(card: str, license_name: str, tmp_path: Path) -> None:
    files = BaseFiles("folder", tmp_path, "x")
    assert files.license() == ""
    (tmp_path / "README.md").write_bytes(card.encode())
    assert files.license() == license_name


def test_a_model_card_that_is_no_text_names_no_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(bytes(range(256)))
    assert BaseFiles("folder", tmp_path, "x").license() == ""


def test_a_header_gives_names_shapes_and_metadata(tmp_path: Path) -> None:
    tensors, metadata = read_header(_safetensors(tmp_path / "a.safetensors"))
    assert tensors == {"weight": TensorInfo("F32", (2, 3))}
    assert metadata == {"a": "b"}


def test_a_truncated_file_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    raw = json.dumps({"w": {"dtype": "F16", "shape": [3_450_000_000], "data_offsets": [0, 6_900_000_000]}}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(3_100_000_000)
    with pytest.raises(BaseModelError, match=r"big\.safetensors is truncated: it is 3\.1 of 6\.9 GB"):
        locate_base(str(path))


@pytest.mark.parametrize("size", [0, 4, 8, 20, -1])
def test_a_file_cut_anywhere_is_an_error_that_names_it(size: int, tmp_path: Path) -> None:
    path = _safetensors(tmp_path / "cut.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(BaseModelError, match=r"cut\.safetensors is"):
        locate_base(str(path))


def test_one_missing_byte_is_told_in_bytes(tmp_path: Path) -> None:
    path = _safetensors(tmp_path / "cut.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match=f"it is {size - 1} of {size} bytes"):
        locate_base(str(path))


def test_a_file_with_a_tail_is_damaged(tmp_path: Path) -> None:
    path = _safetensors(tmp_path / "long.safetensors", bytes(25))
    with pytest.raises(BaseModelError, match="longer than its header says"):
        read_header(path)


@pytest.mark.parametrize(
    "raw", [b"{" + b"[" * 5000, b'{"w": 3}', b'{"w": {"dtype": "F32"}}', b'{"w": {"data_offsets": "ab"}}', b"{nonsense"]
)
def test_a_damaged_header_is_an_error_and_no_crash(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(BaseModelError, match=r"header of bad\.safetensors is damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.ckpt", b"PK\x03\x04archive", "a pickle"),
        ("model.ckpt", b"\x80\x02old pickle", "a pickle"),
        ("model.pt", b"who knows what", "a pickle"),
        ("renamed.safetensors", b"PK\x03\x04" + bytes(60), "a pickle"),
        ("model.gguf", b"GGUF" + bytes(60), "a quantized GGUF file"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("login.safetensors", b"<!DOCTYPE html><html>sign in</html>", "a web page"),
        ("empty.safetensors", b"", "empty"),
        ("notes.txt", b"hello", "no safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_called_what_it_is(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BaseModelError, match=f"{name} is {words}") as caught:
        locate_base(str(tmp_path / name))
    assert caught.value.fix


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(BaseModelError, match="can run code"):
        locate_base(str(tmp_path / "evil.ckpt"))
    assert not marker.exists()


def test_a_folder_with_pickled_weights_only_is_refused_by_the_part(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(BaseModelError, match=r"unet only as a pickle, diffusion_pytorch_model\.bin"):
        locate_base(str(tmp_path)).tensors("unet")


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "gone.safetensors"), "models/gone.safetensors", "just-a-word", "../x", "a/b/c"):
        with pytest.raises(BaseModelError, match="There is no file or folder") as caught:
            locate_base(name)
        assert not isinstance(caught.value, HubError)


def test_no_base_model_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(BaseModelError, match=r"Set base\.model"):
        locate_base("  ")


def test_non_ascii_paths_work(tmp_path: Path) -> None:
    folder = tmp_path / "模型 ünïcødé"
    folder.mkdir()
    path = _safetensors(folder / "modèle.safetensors")
    files = locate_base(str(path))
    assert files.kind == "single_file"
    assert files.tensors("")["weight"].shape == (2, 3)


def test_the_demo_base_is_found_or_its_absence_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lorasmith.presets

    monkeypatch.setattr(lorasmith.presets, "__path__", [str(tmp_path)])
    with pytest.raises(BaseModelError, match="embedded demo base is not part of this installation"):
        locate_base("demo")
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "demo" / "base" / "model_index.json").write_text("{}")
    assert locate_base("demo") == BaseFiles("folder", tmp_path / "demo" / "base", "demo")


def test_a_folder_without_model_index_is_described_by_what_it_holds(tmp_path: Path) -> None:
    assert "only nothing" in locate_base(str(tmp_path)).describe()
    _safetensors(tmp_path / "merge.safetensors")
    assert "its file merge.safetensors may be meant" in locate_base(str(tmp_path)).describe()


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_configuration_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(BaseModelError, match=r"Cannot read .*model_index\.json"):
        locate_base(str(tmp_path)).config("")


# ------------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_changes_with_one_bit_in_the_middle_of_the_weights(tmp_path: Path) -> None:
    files = _part(tmp_path, bytes(24))
    before = files.fingerprint("vae")
    assert files.fingerprint("vae") == before
    path = _safetensors(tmp_path / "vae" / "model.safetensors", bytes(11) + b"\1" + bytes(12))
    os.utime(path, ns=(1, 1))
    assert files.fingerprint("vae") != before


def test_the_fingerprint_does_not_depend_on_where_the_model_lies(tmp_path: Path) -> None:
    first, second = _part(tmp_path / "a", bytes(24)), _part(tmp_path / "b", bytes(24))
    assert first.fingerprint("vae") == second.fingerprint("vae")
    (tmp_path / "b" / "vae" / "config.json").write_text('{"scaling_factor": 2}')
    assert first.fingerprint("vae") != second.fingerprint("vae")


def test_a_large_file_is_hashed_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _part(tmp_path, bytes(24))
    before = files.fingerprint("vae")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert files.fingerprint("vae") == before


def test_a_damaged_memory_of_hashes_is_ignored(tmp_path: Path) -> None:
    files = _part(tmp_path / "base", bytes(24))
    before = files.fingerprint("vae")
    memory = list((Path(os.environ["LORASMITH_CACHE"]) / "hashes").iterdir())
    assert memory
    for path in memory:
        path.write_bytes(b"\xff torn")
    assert files.fingerprint("vae") == before


def _part(folder: Path, data: bytes) -> BaseFiles:
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    _safetensors(folder / "vae" / "model.safetensors", data)
    (folder / "vae" / "config.json").write_text("{}")
    return BaseFiles("folder", folder, "here")


# -------------------------------------------------------------------------------------------------------------- Hub

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"plain",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"other",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "tokenizer/tokenizer.json": b"{ }",
    "safety_checker/model.safetensors": b"unwanted",
    "README.md": b"---\nlicense: mit\n---\n",
    "unet/README.md": b"unwanted",
    "v1-5-pruned.safetensors": b"unwanted too",
}
NEEDED = {
    "README.md",
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "tokenizer/tokenizer.json",
}


@pytest.fixture
def hub(hub: FakeHub) -> FakeHub:
    hub.files = dict(FILES)
    return hub


def _refusal(status: int, code: str = "", message: str = "") -> Answer:
    import httpx2

    headers = {key: value for key, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}
    return lambda request: httpx2.Response(status, headers=headers, request=request)


def test_only_the_needed_files_are_downloaded_and_progress_counts_their_bytes(hub: FakeHub) -> None:
    seen: list[tuple[str, int, int]] = []
    files = locate_base(REPO, on_progress=lambda name, done, total: seen.append((name, done, total)))
    assert set(hub.fetched) == NEEDED
    assert files.kind == "folder"
    assert files.origin == REPO
    assert files.license() == "mit"
    assert files.path.name == COMMIT
    assert (files.path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == b"plain"
    total = sum(len(FILES[name]) for name in NEEDED)
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_the_fp16_variant_is_taken_where_there_are_no_plain_weights(hub: FakeHub) -> None:
    del hub.files["unet/diffusion_pytorch_model.safetensors"]
    files = locate_base(REPO)
    assert files.variant("unet") == "fp16"
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" not in hub.fetched


def test_a_repository_with_pickles_only_is_refused_before_the_download(hub: FakeHub) -> None:
    hub.files = {name: data for name, data in FILES.items() if not name.startswith("unet/") or name.endswith(".bin")}
    with pytest.raises(BaseModelError, match="has its unet only as a pickle"):
        locate_base(REPO)
    assert hub.fetched == ["model_index.json"]


def test_a_repository_with_a_single_file_only_says_how_to_use_it(hub: FakeHub) -> None:
    hub.files = {"v1-5-pruned.safetensors": b"x"}
    with pytest.raises(BaseModelError, match="has no model_index") as caught:
        locate_base(REPO)
    assert "v1-5-pruned.safetensors" in caught.value.why


def test_one_file_of_a_repository_is_downloaded_at_one_commit(hub: FakeHub, tmp_path: Path) -> None:
    data = _safetensors(tmp_path / "x.safetensors").read_bytes()
    hub.files = {"split/flux.safetensors": data, "other.safetensors": b"y", "README.md": b"z"}
    files = locate_base(f"{REPO}/split/flux.safetensors")
    assert hub.fetched == ["split/flux.safetensors"]
    assert files.kind == "single_file"
    assert files.path.name == "flux.safetensors"
    assert files.path.parents[1].name == COMMIT
    hub.override = _unreachable
    assert locate_base(f"{REPO}/split/flux.safetensors").path == files.path


def test_a_file_that_a_repository_lacks_is_told_with_what_it_has(hub: FakeHub) -> None:
    hub.files = {"one.safetensors": b"y", "README.md": b"z"}
    with pytest.raises(BaseModelError, match=f"{REPO} has no file two.safetensors") as caught:
        locate_base(f"{REPO}/two.safetensors")
    assert "one.safetensors" in caught.value.why
    assert not hub.fetched


def test_a_relative_path_with_a_typing_error_is_not_asked_of_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=r"There is no file or folder models/sd/typo\.safetensors"):
        locate_base("models/sd/typo.safetensors")


def test_parts_given_apart_may_lie_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    data = _safetensors(tmp_path / "x.safetensors").read_bytes()
    hub.files = {"vae/ae.safetensors": data, "clip_l.safetensors": data}
    settings = BaseSettings(
        model=str(tmp_path / "x.safetensors"),
        vae=f"{REPO}/vae/ae.safetensors",
        text_encoders=[f"{REPO}/clip_l.safetensors"],
    )
    files = locate_configured(settings)
    assert files.vae_file is not None
    assert files.vae_file.read_bytes() == data
    assert len(files.encoder_files) == 1
    with pytest.raises(BaseModelError, match=r"There is no file /nowhere/ae.safetensors") as caught:
        locate_configured(settings.model_copy(update={"vae": "/nowhere/ae.safetensors"}))
    assert "base.vae" in caught.value.fix


def test_the_parts_are_listed_with_their_sizes_before_any_is_downloaded(hub: FakeHub) -> None:
    parts = list_download(REPO)
    assert {part.name for part in parts} == {"unet", "tokenizer", "model card and index"}
    assert [part.bytes for part in parts] == sorted((part.bytes for part in parts), reverse=True)
    assert sum(part.bytes for part in parts) == sum(len(FILES[name]) for name in NEEDED)
    assert hub.fetched == ["model_index.json"]
    assert "unet" in describe_download(parts)
    locate_base(REPO)
    assert describe_download(list_download(REPO)) == ""


def test_a_repository_of_a_modular_pipeline_is_in_the_diffusers_layout_too(hub: FakeHub) -> None:
    hub.files["modular_model_index.json"] = hub.files.pop("model_index.json")
    files = locate_base(REPO)
    assert set(hub.fetched) == (NEEDED - {"model_index.json"}) | {"modular_model_index.json"}
    hub.override = _unreachable
    assert locate_base(REPO).path == files.path


def test_cached_files_are_not_downloaded_again(hub: FakeHub) -> None:
    locate_base(REPO)
    hub.fetched.clear()
    locate_base(REPO)
    assert hub.fetched == []


def _unreachable(request: Any) -> Any:
    import httpx2

    raise httpx2.ConnectError("no route to host", request=request)


@pytest.mark.parametrize("revision", ["main", COMMIT])
@pytest.mark.parametrize("way", ["no network", "HF_HUB_OFFLINE"])
def test_a_cached_model_works_without_a_network(
    way: str, revision: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    online = locate_base(REPO, revision)
    hub.override = _unreachable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "HF_HUB_OFFLINE")
    assert locate_base(REPO, revision) == online


def test_a_half_downloaded_model_is_not_taken_for_a_cached_one(hub: FakeHub) -> None:
    folder = locate_base(REPO).path
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    hub.override = _unreachable
    with pytest.raises(HubError, match="not complete in the cache"):
        locate_base(REPO)


CASES: dict[str, tuple[Answer, bool, bool]] = {
    "unknown id": (_refusal(404, "RepoNotFound"), False, False),
    "unknown id with token": (_refusal(404, "RepoNotFound"), True, False),
    "unknown revision": (_refusal(404, "RevisionNotFound"), False, False),
    "gated, no token": (_refusal(401, "GatedRepo"), False, True),
    "gated, token without access": (_refusal(403, "GatedRepo"), True, True),
    "invalid token": (_refusal(401, "", "Invalid credentials in Authorization header"), True, False),
    "token without permission": (_refusal(403, "", "Forbidden"), True, True),
    "server error": (_refusal(500), False, False),
    "offline": (_unreachable, False, False),
}


def _failure(case: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> LorasmithError:
    answer, has_token, on_files_only = CASES[case]
    if has_token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.override, hub.refuse_files = (None, answer) if on_files_only else (answer, None)
    with pytest.raises(HubError) as caught:
        locate_base(REPO, "some-revision")
    return caught.value


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown id", "no Hub token is set"),
        ("unknown id with token", "your token may not read it"),
        ("unknown revision", "has no revision some-revision"),
        ("gated, no token", "is gated, and no Hub token is set"),
        ("gated, token without access", "your Hub token has no access"),
        ("invalid token", "does not accept your token"),
        ("token without permission", "Your Hub token may not read"),
        ("server error", "answered with an error 500"),
        ("offline", "cannot be reached"),
    ],
)
def test_each_way_that_the_hub_can_fail_has_a_message_of_its_own(
    case: str, words: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda _seconds: None)
    error = _failure(case, hub, monkeypatch)
    assert words in str(error)
    assert error.fix
    assert TOKEN not in str(error)


def test_no_two_failures_of_the_hub_read_the_same(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda _seconds: None)
    messages = [str(_failure(case, hub, monkeypatch)) for case in CASES]
    assert len(set(messages)) == len(CASES)


def test_a_license_page_is_named_where_a_license_must_be_accepted(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"https://huggingface.co/{REPO}" in _failure("gated, no token", hub, monkeypatch).fix


def test_locating_a_file_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = _safetensors(tmp_path / "a.safetensors", struct.pack("<6f", *range(6)))
    code = """
import sys
from lorasmith.engine.sources import locate_base
locate_base(sys.argv[1])
print("torch" in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
