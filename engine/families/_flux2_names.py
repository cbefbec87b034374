"""FLUX.2's layers under the original names of Black Forest Labs, where to_q, to_k and to_v are one `qkv`."""

from __future__ import annotations

from lorasmith.engine.families import FusedName

_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}


def original_name(module: str) -> str | FusedName:
    """Return the original name of a layer of diffusers' transformer; others, without weights, keep their own."""
    begin, _, rest = module.partition(".")
    block, _, layer = rest.partition(".")
    if begin == "transformer_blocks":
        for fused, rows in _FUSED.items():
            if layer in rows:
                return FusedName(f"double_blocks.{block}.{fused}", tuple(f"{begin}.{block}.{row}" for row in rows))
        return f"double_blocks.{block}.{_DOUBLE.get(layer, layer)}".rstrip(".")
    if begin == "single_transformer_blocks":
        return f"single_blocks.{block}.{_SINGLE.get(layer, layer)}".rstrip(".")
    return _OUTSIDE.get(module, module)
