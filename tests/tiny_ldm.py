"""A tiny Stable Diffusion checkpoint in the original (LDM) single-file layout, with the folder that it equals.

The key names are written out here once more, from the original code's side, so that the tests do not check the
converter against itself. Four levels and two layers each as in the real model; only widths are small.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

WIDTH = 32


def build_tiny_checkpoint(folder: Path, version: str = "1.x") -> tuple[Path, Path]:
    """Write the same random model as a diffusers folder and as one file; returns (folder, file)."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.tiny import TinyBuild, _scheduler, _tokenizer

    tokenizer = _tokenizer()
    widths = (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH)
    second = version == "2.x"
    hidden = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=widths,
            cross_attention_dim=hidden,
            attention_head_dim=tuple(max(1, width // 64) for width in widths) if second else 8,
            use_linear_projection=second,
        )
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=tokenizer.model_max_length,
                hidden_act="gelu" if second else "quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    tokenizer.pad_token = "!" if second else tokenizer.eos_token
    scheduler: DDIMScheduler = _scheduler(TinyBuild())
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "folder")
    weights = {f"model.diffusion_model.{_unet_name(k)}": v for k, v in unet.state_dict().items()}
    weights |= {f"first_stage_model.{_vae_name(k)}": _vae_value(k, v) for k, v in vae.state_dict().items()}
    weights |= _open_clip(text_encoder.state_dict()) if second else _clip(text_encoder.state_dict())
    weights["model_ema.decay"] = torch.tensor(0.9999)
    path = folder / "checkpoint.safetensors"
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, path)
    return folder / "folder", path


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    for pattern, block in (
        (r"down_blocks\.(\d)\.resnets\.(\d)\.", lambda i, j: f"input_blocks.{3 * i + j + 1}.0."),
        (r"down_blocks\.(\d)\.attentions\.(\d)\.", lambda i, j: f"input_blocks.{3 * i + j + 1}.1."),
        (r"down_blocks\.(\d)\.downsamplers\.(\d)\.conv", lambda i, _: f"input_blocks.{3 * i + 3}.0.op"),
        (r"mid_block\.(resnets)\.(\d)\.", lambda _, j: f"middle_block.{2 * j}."),
        (r"mid_block\.(attentions)\.(\d)\.", lambda _, __: "middle_block.1."),
        (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda i, j: f"output_blocks.{3 * i + j}.0."),
        (r"up_blocks\.(\d)\.attentions\.(\d)\.", lambda i, j: f"output_blocks.{3 * i + j}.1."),
        (
            r"up_blocks\.(\d)\.upsamplers\.(\d)\.conv",
            lambda i, _: f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.conv",
        ),
    ):
        match = re.match(pattern, name)
        if match:
            first, second = match.groups()
            rest = name[match.end() :]
            rest = re.sub(r"^\w+", lambda m: _RESNET.get(m[0], m[0]), rest)
            return block(int(first) if first.isdigit() else 0, int(second)) + rest
    raise KeyError(name)


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in _ATTENTION.items():
            name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _vae_value(name: str, value: Any) -> Any:
    # The original attention layers are 1x1 convolutions.
    return value[:, :, None, None] if ".attentions." in name and value.ndim == 2 else value


def _clip(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    names = {name.removeprefix("text_model."): value for name, value in state.items()}
    weights = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in names.items()}
    length = names["embeddings.position_embedding.weight"].shape[0]
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return weights


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    names = {name.removeprefix("text_model."): value for name, value in state.items()}
    weights = {
        "positional_embedding": names["embeddings.position_embedding.weight"],
        "token_embedding.weight": names["embeddings.token_embedding.weight"],
        "ln_final.weight": names["final_layer_norm.weight"],
        "ln_final.bias": names["final_layer_norm.bias"],
        "text_projection": torch.eye(names["final_layer_norm.weight"].shape[0]),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(2):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [names[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            weights[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in _OPEN_CLIP.items():
                weights[f"{new}{theirs}.{kind}"] = names[f"{old}{ours}.{kind}"]
    return {f"cond_stage_model.model.{name}": value for name, value in weights.items()}
