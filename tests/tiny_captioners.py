"""Tiny random captioners of the real classes, built from configurations, so that every test runs offline.

What they say is nonsense; what counts is that every file, loader, processor, chat template and generation is the real
one. The WD tagger is a small ONNX graph with the input and output of the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TAG_LINES = (
    "9999999,general,9,10",
    "9999998,sensitive,9,5",
    "470575,1girl,0,4225150",
    "212816,solo,0,3515897",
    "13197,long_hair,0,2982517",
    "383282,^_^,0,1000",
    "15425,blue_eyes,0,900",
    "566835,hatsune_miku,4,90000",
    "566836,ganyu_(genshin_impact),4,8000",
)
IMAGE_SIDE = 28


def build_wd14(folder: Path, side: int = 448, tags: Sequence[str] = TAG_LINES) -> Path:
    """Write a graph (N, side, side, 3) BGR 0..255 → (N, tags) probabilities, and its `selected_tags.csv`.

    Each probability is a sigmoid of random weights times the mean blue, green and red of the picture.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(7).normal(0, 6, (3, len(tags))).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "full"], ["shares"]),
        helper.make_node("MatMul", ["shares", "weights"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
        numpy_helper.from_array(np.array(255, dtype=np.float32), "full"),
        numpy_helper.from_array(weights, "weights"),
    ]
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch_size", side, side, 3])
    answer = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch_size", len(tags)])
    graph = helper.make_graph(nodes, "tiny-wd", [picture], [answer], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *tags]) + "\n", encoding="utf-8")
    return folder


def build_florence2(folder: Path) -> Path:
    """Write a Florence-2 with a DaViT of four narrow stages and a BART of two layers."""
    import torch
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    tokenizer = _word_tokenizer(bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "<image>"})
    vision = Florence2VisionConfig(
        depths=(1, 1, 1, 1),
        embed_dim=(8, 8, 16, 16),
        num_heads=(2, 2, 2, 2),
        num_groups=(2, 2, 2, 2),
        window_size=4,
        projection_dim=16,
        drop_path_rate=0.0,
        initializer_range=0.5,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=256,
        init_std=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    side = 64
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, crop_size={"height": side, "width": side}
    )
    images.image_seq_length = (side // 32) ** 2 + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = Florence2Config(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            image_token_id=tokenizer.image_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
        )
        model = Florence2ForConditionalGeneration(config).eval()
    return _save(folder, model, Florence2Processor(images, tokenizer))


def build_blip(folder: Path) -> Path:
    """Write a BLIP with a vision transformer and a text decoder of two layers each."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = _bert_tokenizer()
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "encoder_hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "is_decoder": True,
            "initializer_range": 0.5,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIDE,
            "patch_size": 14,
            "initializer_range": 0.5,
        },
        projection_dim=16,
        image_text_hidden_size=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = BlipForConditionalGeneration(config).eval()
    images = BlipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return _save(folder, model, BlipProcessor(images, tokenizer))


JOY_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}"
    "{% if message['role'] == 'user' %}{{ '<|reserved_special_token_69|>' }}{% endif %}"
    "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)


def build_joycaption(folder: Path, template: str = JOY_TEMPLATE) -> Path:
    """Write a LLaVA of a SigLIP tower and a Llama, with a chat template that puts the picture into the question."""
    import torch
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image_token = "<|reserved_special_token_69|>"
    tokenizer = _word_tokenizer(
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        extra=("<|start_header_id|>", "<|end_header_id|>", image_token),
        add_bos=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=14,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=(IMAGE_SIDE // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlavaForConditionalGeneration(config).eval()
    # As in the real files: sampling unless something else is asked.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    images = SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token=image_token,
    )
    return _save(folder, model, processor)


TINY_CAPTIONERS: dict[str, Callable[[Path], Path]] = {
    "wd14": build_wd14,
    "florence2": build_florence2,
    "blip": build_blip,
    "joycaption": build_joycaption,
}
"""One builder a captioner, by name: the contract tests run over these."""

# fmt: off
_WORDS = (
    "a", "the", "of", "in", "on", "with", "cat", "dog", "girl", "boy", "house", "tree", "red", "blue", "green", "small",
    "large", "old", "young", "photo", "painting", "picture", "image", "shows", "sitting", "standing", "what", "does",
    "describe", "detail", "is", "shown", "paragraph", "write", "for", "this", "you", "are", "helpful", "captioner",
)
# fmt: on


def _word_tokenizer(
    *,
    bos: str,
    eos: str,
    pad: str,
    extra: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
    add_bos: bool = False,
) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [bos, pad, eos, "<unk>", *extra, *(named or {}).values()]
    vocabulary = {word: number for number, word in enumerate([*special, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        extra_special_tokens=dict(named) if named else list(extra),
    )


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: number for number, word in enumerate([*special, *_WORDS])}
    return BertTokenizerFast(vocab=vocabulary, additional_special_tokens=["[DEC]"])


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
