"""BLIP (Li et al., arXiv:2201.12086): one short sentence about a picture, which may go on from given words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lorasmith.engine.captioners import CaptionerSpec
from lorasmith.engine.config import Section
from lorasmith.engine.families import License

if TYPE_CHECKING:
    from PIL import Image

    from lorasmith.engine.captioners._transformers import Writer

SPEC = CaptionerSpec(
    name="blip",
    label="BLIP",
    kind="prose",
    default_model="Salesforce/blip-image-captioning-large",
    revision="353689b859fcf0523410b1806dace5fb46ecdf41",
    bytes=1_880_000_000,
    license=License(
        name="BSD 3-Clause",
        url="https://huggingface.co/Salesforce/blip-image-captioning-large",
        consequence="Free to use, also commercially.",
    ),
    files=("config.json", "tokenizer.json", "preprocessor_config.json|processor_config.json"),
    good_for="One short sentence a photograph; needs little memory.",
    sources=(
        "https://huggingface.co/Salesforce/blip-image-captioning-large",
        "https://huggingface.co/docs/transformers/model_doc/blip",
    ),
)
# A non-word that the large model is known to begin with.
_NOISE = re.compile(r"\baraf\w*\s+", re.IGNORECASE)


class Settings(Section):
    """How the sentence is written."""

    prompt: Annotated[str, Field(max_length=300)] = ""
    """Words that every caption begins with, e.g. `a photograph of`; the model goes on from them. Empty: none."""
    beams: Annotated[int, Field(ge=1, le=8)] = 3
    """How many wordings are followed at once: more is slower and a little better."""
    max_tokens: Annotated[int, Field(ge=4, le=200)] = 60
    """Longest caption in tokens, without the prompt."""


def load(folder: Path, settings: Settings, device: str) -> Blip:
    """Load the model and its processor (`CaptionerModule.load`)."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    from lorasmith.engine.captioners._transformers import ModelClasses, Writer

    classes = ModelClasses(BlipForConditionalGeneration, BlipProcessor, "blip")
    return Blip(Writer(folder, SPEC, classes, device), settings)


class Blip:
    """A loaded BLIP (`Captioner`)."""

    spec = SPEC

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self.where = writer.where
        self._writer, self._settings = writer, settings

    def caption(self, image: Image.Image) -> str:
        """Return a sentence about a picture (`Captioner.caption`)."""
        prompt = self._settings.prompt.strip()
        parts = {"images": image, "text": prompt} if prompt else {"images": image}
        tokens = self._writer.write(
            self._writer.prepare(**parts), num_beams=self._settings.beams, max_new_tokens=self._settings.max_tokens
        )
        return _NOISE.sub("", self._writer.decode(tokens))

    def close(self) -> None:
        """Drop the model from memory."""
        self._writer.close()
