"""What a LoRA file is found to be, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.inspect_file import inspect_lora

TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def pair(name: str, down: str, up: str, inputs: int = 320, rank: int = 4) -> dict[str, torch.Tensor]:
    return {name + down: torch.ones(rank, inputs), name + up: torch.ones(320, rank)}


def kohya(name: str, inputs: int = 320, rank: int = 4, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    tensors = pair(name, ".lora_down.weight", ".lora_up.weight", inputs, rank)
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata)
    return path


def test_a_kohya_file_is_described(tmp_path: Path) -> None:
    half = {key: tensor.half() for key, tensor in (kohya(TO_K, 768) | kohya(TO_Q, rank=8) | kohya(TEXT)).items()}
    metadata: dict[str, Any] = {"ss_output_name": "knight", "modelspec.trigger_phrase": "zqx"}
    report = inspect_lora(write(tmp_path / "knight.safetensors", half, **metadata))
    assert (report.layout, report.kind, report.precision) == ("kohya", "LoRA", "fp16")
    assert (report.base, report.base_source) == ("Stable Diffusion 1.x", "by its shapes")
    assert report.components == {"denoiser": 2, "text_encoder": 1}
    assert report.ranks == {"4": 2, "8": 1}
    assert report.alphas == {"2": 3}
    assert (report.keys, report.trigger, report.title) == (9, "zqx", "knight")
    assert report.parameters == 4 * (768 + 320) + 8 * 640 + 4 * 640
    assert report.warnings == ()
    assert report.norms is None
    assert json.loads(json.dumps(report.to_json()))["ranks"] == {"4": 2, "8": 1}
    assert ("trigger", "zqx") in report.rows()


@pytest.mark.parametrize(("width", "base"), [(1024, "Stable Diffusion 2.x"), (2048, "SDXL")])
def test_the_base_is_told_by_the_width_of_the_text_embedding(tmp_path: Path, width: int, base: str) -> None:
    assert inspect_lora(write(tmp_path / "x.safetensors", kohya(TO_K, width))).base == base


def test_shapes_win_over_what_the_header_says(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", kohya(TO_K, 768), ss_base_model_version="sdxl_base_v1-0")
    assert inspect_lora(path).base == "Stable Diffusion 1.x"
    path = write(tmp_path / "y.safetensors", kohya(TO_Q), ss_base_model_version="sdxl_base_v1-0")
    assert inspect_lora(path).base == "SDXL"


def test_a_diffusers_file_is_described(tmp_path: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    path = write(tmp_path / "x.safetensors", pair(name, ".lora_A.weight", ".lora_B.weight"))
    report = inspect_lora(path)
    assert (report.layout, report.base, report.alphas) == ("diffusers", "FLUX", {"none (strength 1)": 1})
    assert report.warnings == ()


def test_convolutions_make_it_a_locon(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 320, 3, 3),
        f"{name}.lora_up.weight": torch.ones(320, 2, 1, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    assert inspect_lora(write(tmp_path / "x.safetensors", tensors)).kind == "LoCon"


def test_a_missing_alpha_is_a_warning(tmp_path: Path) -> None:
    none = inspect_lora(write(tmp_path / "x.safetensors", kohya(TO_K, 768, alpha=None)))
    assert any("no .alpha tensors" in warning for warning in none.warnings)
    some = inspect_lora(write(tmp_path / "y.safetensors", kohya(TO_K, 768, alpha=None) | kohya(TO_Q)))
    assert any("1 of 2 modules have no alpha" in warning for warning in some.warnings)


def test_an_alpha_that_only_diffusers_reads_is_a_warning(tmp_path: Path) -> None:
    tensors = pair("unet.a.to_q", ".lora_A.weight", ".lora_B.weight")
    header = json.dumps({"unet.r": 4, "unet.lora_alpha": 1})
    report = inspect_lora(write(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=header))
    assert any("only in the header" in warning for warning in report.warnings)


def test_mixed_layouts_odd_strengths_and_left_over_keys_are_warnings(tmp_path: Path) -> None:
    tensors = kohya(TO_K, 768, alpha=400.0) | pair("unet.a.to_q", ".lora_A.weight", ".lora_B.weight")
    tensors["lora_unet_lonely.lora_down.weight"] = torch.ones(4, 4)
    report = inspect_lora(write(tmp_path / "x.safetensors", tensors))
    assert report.layout == "mixed"
    text = " ".join(report.warnings)
    assert "mixes key layouts" in text
    assert "unusual strength" in text
    assert "1 keys belong to no complete module, e.g. lora_unet_lonely" in text


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    tensors = {f"{TO_Q}.hada_w{part}": torch.ones(4, 4) for part in ("1_a", "1_b", "2_a", "2_b")}
    tensors[f"{TO_Q}.alpha"] = torch.tensor(1.0)
    report = inspect_lora(write(tmp_path / "x.safetensors", tensors))
    assert (report.layout, report.kind) == ("LyCORIS", "LoHa")


def test_norms_are_those_of_the_changes_and_find_broken_modules(tmp_path: Path) -> None:
    tensors = kohya(TO_K, 768) | kohya(TO_Q) | kohya(TEXT)
    tensors[f"{TO_Q}.lora_up.weight"].zero_()
    tensors[f"{TEXT}.lora_up.weight"][0, 0] = float("nan")
    report = inspect_lora(write(tmp_path / "x.safetensors", tensors), with_norms=True)
    assert report.norms is not None
    assert report.norms[TO_K] == pytest.approx(0.5 * 4 * (768 * 320) ** 0.5)
    assert report.norms[TO_Q] == 0
    text = " ".join(report.warnings)
    assert "1 modules hold NaN" in text
    assert "1 of 3 modules change nothing" in text


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no LoRA file"):
        inspect_lora(write(tmp_path / "base.safetensors", {"conv_in.weight": torch.ones(2, 2)}))
    (tmp_path / "x.safetensors").write_bytes(b"not it")
    with pytest.raises(BaseModelError):
        inspect_lora(tmp_path / "x.safetensors")


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "ü x.safetensors", {k: v.bfloat16() for k, v in kohya(TO_K, 768).items()})
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path;"
        "from lorasmith.engine.inspect_file import inspect_lora;"
        "report = inspect_lora(Path(sys.argv[1])); print(report.precision, report.alphas)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "bf16 {'2': 1}"
