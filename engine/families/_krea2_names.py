"""The layers of Krea 2's transformer in diffusers' names and in those of Krea's own code, which ComfyUI has too."""

from __future__ import annotations

import re

OUTSIDE = {
    "img_in": "first",
    "final_layer.linear": "last.linear",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}
"""Linear layers outside the blocks."""
_IN_BLOCKS = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
_BLOCK = re.compile(r"(?P<block>(?:transformer_blocks|text_fusion\.\w+_blocks)\.\d+)\.(?P<inside>.+)")


def original_name(module: str) -> str:
    """Return the name in Krea's own code of the module that diffusers calls `module`."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return OUTSIDE.get(module, module)
    block = match["block"].replace("transformer_blocks", "blocks").replace("text_fusion", "txtfusion")
    return f"{block}.{_IN_BLOCKS.get(match['inside'], match['inside'])}"
