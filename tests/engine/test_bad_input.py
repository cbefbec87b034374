"""Bad input through the command line: each ends with its own exit code and a sentence that helps, before any harm."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.cli import main
from tests.engine.cli_runs import TinyRun, copy_base, make_tiny_run

REPO = "someone/some-model"


@pytest.fixture
def tiny(tiny_sd15: Path, tmp_path: Path) -> TinyRun:
    return make_tiny_run(tmp_path / "work", tiny_sd15, steps=2)


class Ended:
    """What a refused training printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.error: dict[str, Any] = json.loads(out)["error"]
        self.text = " ".join(str(self.error[part]) for part in ("what", "why", "fix"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail; nothing may be trained and no traceback shown."""

    def run(arguments: list[str], code: int) -> Ended:
        assert main([*arguments, "--json"]) == code, capsys.readouterr()
        captured = capsys.readouterr()
        ended = Ended(code, captured.out, captured.err)
        assert "Traceback" not in captured.err
        assert "step 1" not in captured.err
        assert ended.error["exit_code"] == code
        assert ended.error["what"].endswith((".", "!"))
        return ended

    return run


def no_lora(tiny: TinyRun) -> bool:
    return not list(tiny.root.rglob("*.safetensors"))


def safetensors_header(path: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write a valid safetensors file of F16 zeros with these names and shapes."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


# Pictures and captions


def test_an_empty_folder(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "empty").mkdir()
    ended = refused(tiny.args(f"dataset.folder={tmp_path / 'empty'}"), 5)
    assert str(tmp_path / "empty") in ended.text
    assert "empty" in ended.error["what"] or "no " in ended.error["what"].lower()


def test_a_missing_folder(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    assert str(tmp_path / "none") in refused(tiny.args(f"dataset.folder={tmp_path / 'none'}"), 5).text


def test_no_readable_picture(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "b.txt").write_text("only words")
    ended = refused(tiny.args(f"dataset.folder={folder}"), 5)
    assert "a.png" in ended.text


def test_missing_captions_ask_with_the_three_ways_on(tiny: TinyRun, refused: Any) -> None:
    (tiny.pictures / "01.txt").unlink()
    ended = refused(tiny.args(), 5)
    assert "01.png" in ended.text
    for way in (".txt", "trigger", "exclude"):
        assert way in ended.error["fix"]


@pytest.mark.parametrize(("choice", "pictures"), [("trigger", 3), ("exclude", 2)])
def test_missing_captions_can_be_the_trigger_or_left_out(
    tiny: TinyRun, choice: str, pictures: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny.pictures / "01.txt").unlink()
    assert main(tiny.args(f"dataset.missing_captions={choice}")) == 0
    assert f"  {pictures} pictures, 0 of regularization, {3 - pictures} refused" in capsys.readouterr().out


@pytest.mark.parametrize("trigger", ["", "   ", "a, b"])
def test_a_trigger_that_is_no_word(tiny: TinyRun, trigger: str, refused: Any) -> None:
    ended = refused(tiny.args(f"captions.trigger={trigger}"), 3)
    assert "trigger" in ended.error["what"]


# Base models


def test_no_base_model_and_a_path_that_is_nothing(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    assert "base.model" in refused(tiny.args("base.model="), 4).error["fix"]
    missing = tmp_path / "none.safetensors"
    assert str(missing) in refused(tiny.args(f"base.model={missing}"), 4).error["what"]


def test_a_truncated_part_of_a_folder(tiny: TinyRun, tiny_sd15: Path, tmp_path: Path, refused: Any) -> None:
    base = copy_base(tiny_sd15, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    ended = refused(tiny.args(f"base.model={base}"), 4)
    assert weights.name in ended.text
    assert " of " in ended.text


def test_a_truncated_single_file(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    path = safetensors_header(tmp_path / "half.safetensors", {"model.diffusion_model.x": (1000, 1000)})
    with path.open("r+b") as file:
        file.truncate(1_200_000)
    ended = refused(tiny.args(f"base.model={path}"), 4)
    assert "1.2 of 2.0 MB" in ended.text


def test_another_family_is_named(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    path = safetensors_header(
        tmp_path / "sdxl.safetensors",
        {
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        },
    )
    ended = refused(tiny.args(f"base.model={path}"), 4)
    assert "sdxl.safetensors" in ended.text
    assert "no base model that lorasmith knows" in ended.error["what"] or "XL" in ended.text


def test_a_lora_is_no_base_model(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    path = safetensors_header(
        tmp_path / "lora.safetensors",
        {
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320),
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (320, 4),
            "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": (1,),
        },
    )
    assert "LoRA" in refused(tiny.args(f"base.model={path}"), 4).text


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_unopened(tiny: TinyRun, tmp_path: Path, name: str, refused: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in refused(tiny.args(f"base.model={tmp_path / name}"), 4).text
    assert not (tmp_path / "ran").exists()


def hub_failure(kind: str, status: int) -> Exception:
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))
    failure: Exception = getattr(errors, kind)("refused", response=response)
    return failure


def test_each_refusal_of_the_hub_reads_differently(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    arguments = tiny.args(f"base.model={REPO}")
    said = {"offline": refused(arguments, 4).error["what"]}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    cases = {
        "unknown": ("RepositoryNotFoundError", 404, None),
        "gated, no token": ("GatedRepoError", 401, None),
        "gated, bad token": ("GatedRepoError", 403, "hf_abcdefghijklmnop"),
    }
    for case, (kind, status, token) in cases.items():

        def fail(*_: object, kind: str = kind, status: int = status, **__: object) -> None:
            raise hub_failure(kind, status)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        ended = refused(arguments, 4)
        assert REPO in ended.text
        assert "hf_abc" not in ended.out + ended.err
        said[case] = ended.error["what"]
    assert len(set(said.values())) == 4, said
    assert "cannot be reached" in said["offline"]
    assert "gated" in said["gated, no token"]


# Places to write


def test_an_output_folder_that_cannot_be_written(tiny: TinyRun, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = refused(tiny.args(f"run.output_folder={tmp_path / 'file' / 'runs'}"), 7)
    assert str(tmp_path / "file" / "runs") in ended.error["what"]
    assert "run.output_folder" in ended.error["fix"]


def test_too_little_space_is_said_before_the_first_step(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr("lorasmith.engine.disk_plan.free_bytes", lambda path: 100_000)
    ended = refused(tiny.args(), 7)
    assert "Not enough disk space" in ended.error["what"]
    assert "97.7 KiB are free" in ended.error["what"]
    assert no_lora(tiny)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.args("train.steps=3", "checkpoints.every=1")
    assert main(arguments) == 0
    (folder,) = tiny.output.iterdir()
    weights = folder / "checkpoints" / "step-00000003" / "adapter.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert main([*arguments, "--resume", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert "step-00000003 is not used: adapter.safetensors is not what was written" in captured.err
    assert "resumed at step 2" in captured.err
    assert json.loads(captured.out)["step"] == 3


def test_damaged_checkpoints_alone_stop_a_resume(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny.args()) == 0
    (folder,) = tiny.output.iterdir()
    (folder / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 7
    assert "damaged" in capsys.readouterr().err
    assert main(["export", str(folder)]) == 7
    captured = capsys.readouterr()
    assert "manifest.json is missing" in captured.err
    assert "no intact checkpoint" in captured.err


# Settings


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepz=5", "Did you mean train.steps?"),
        ("train.steps=many", "train.steps = 'many' (--set): must be a whole number"),
        ("adapter.rank=0", "adapter.rank = 0 (--set): must be at least 1"),
        ("dataset.flip='False'", "dataset.flip = 'False' (--set): must be true or false"),
        ("optimizer.name=prodigy", "optimizer.learning_rate must be 1.0"),
        ("schedule.warmup_steps=2", "schedule.warmup_steps must be smaller than train.steps"),
        ("run.name=../up", "run.name"),
        ("nonsense", "key=value"),
    ],
)
def test_unknown_and_contradictory_settings(tiny: TinyRun, setting: str, said: str, refused: Any) -> None:
    assert said in refused(tiny.args(setting), 3).text
    assert not tiny.output.exists()


# Names in any script


def test_a_whole_run_in_a_folder_of_many_scripts(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "ünï côdé 日本"
    monkeypatch.setenv("LORASMITH_CACHE", str(root / "cache"))
    tiny = make_tiny_run(root, copy_base(tiny_sd15, root / "bäse"), steps=2, name="größe 日本")
    shutil.move(tiny.pictures / "00.png", tiny.pictures / "ça 猫.png")
    (tiny.pictures / "ça 猫.txt").write_text("ein großer roter kreis, 猫", encoding="utf-8")
    (tiny.pictures / "00.txt").unlink()
    before = digest(tiny.pictures)
    assert main([*tiny.args("previews.every=1", "train.steps=2"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    lora = Path(summary["exports"][0]["path"])
    assert lora.name == "größe 日本.safetensors"
    assert len(list((Path(summary["run_folder"]) / "previews").glob("step-*.png"))) == 4
    assert main(["inspect", str(lora), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trigger"] == "zqx"
    assert main(["check", str(tiny.pictures), "--trigger", "zqx"]) == 0
    assert "ça 猫.png" in capsys.readouterr().out
    assert digest(tiny.pictures) == before


def test_the_pictures_folder_is_never_written_to(tiny: TinyRun) -> None:
    before = digest(tiny.pictures)
    tiny.pictures.chmod(0o555)
    assert main(tiny.args()) == 0
    tiny.pictures.chmod(0o755)
    assert digest(tiny.pictures) == before


def digest(folder: Path) -> dict[str, str]:
    """Return name → hash and times of everything in `folder`."""
    return {
        path.name: f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.iterdir())
    }
