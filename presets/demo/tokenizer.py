"""The demo base's CLIP tokenizer, made by rule so that two runs make the same file.

Every letter and digit is a token, with and without the end-of-word mark, and every word of the vocabulary is merged
into one token. Training a byte-pair encoding on so few words is not deterministic with the tokenizers library.
"""

from __future__ import annotations

import itertools
import string
from typing import TYPE_CHECKING

from lorasmith.presets.demo.scenes import vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 32
_END = "</w>"
_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of the standard class whose words are those of `scenes.vocabulary()`."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    symbols = [*characters, *(character + _END for character in characters)]
    merges = _merges(vocabulary())
    tokens = [*symbols, *("".join(pair) for pair in merges), _START_TOKEN, _END_TOKEN]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
        unk_token=_END_TOKEN,
        bos_token=_START_TOKEN,
        eos_token=_END_TOKEN,
        pad_token=_END_TOKEN,
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that turn each word into one token, earlier merges first."""
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _apply(merges, [*word[:-1], word[-1] + _END])
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _apply(merges, [*word[:-1], word[-1] + _END])
    return merges


def _apply(merges: list[tuple[str, str]], parts: list[str]) -> list[str]:
    rank = {pair: index for index, pair in enumerate(merges)}
    while True:
        pairs = [(rank[pair], index) for index, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
        if not pairs:
            return parts
        index = min(pairs)[1]
        parts = [*parts[:index], parts[index] + parts[index + 1], *parts[index + 2 :]]
