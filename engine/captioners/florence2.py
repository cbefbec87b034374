"""Florence-2 (Xiao et al., arXiv:2311.06242): descriptions of three lengths, chosen by a task token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.engine.captioners import CaptionerSpec
from lorasmith.engine.config import Section
from lorasmith.engine.families import License

if TYPE_CHECKING:
    from PIL import Image

    from lorasmith.engine.captioners._transformers import Writer

SPEC = CaptionerSpec(
    name="florence2",
    label="Florence-2",
    kind="prose",
    default_model="florence-community/Florence-2-large",
    revision="4271c66b88cdbc05735372ec13b2360108de5317",
    bytes=1_560_000_000,
    license=License(
        name="MIT",
        url="https://huggingface.co/florence-community/Florence-2-large",
        consequence="Free to use, also commercially.",
    ),
    files=("config.json", "tokenizer.json", "preprocessor_config.json|processor_config.json"),
    good_for="Sentences about photographs and art; small enough for most GPUs, slow but possible on a CPU.",
    sources=(
        "https://huggingface.co/docs/transformers/model_doc/florence2",
        "https://huggingface.co/florence-community/Florence-2-large",
    ),
)
_TASKS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}
_OPENING = re.compile(
    r"(?:the|this) (?:image|picture|photo(?:graph)?|illustration|painting) "
    r"(?:shows|depicts|is of|features|is a (?:photo(?:graph)?|picture|image|portrait) of)\s+"
    r"|in (?:the|this) (?:image|picture|photo(?:graph)?),? (?:we can see|there (?:is|are))\s+",
    re.IGNORECASE,
)


class Settings(Section):
    """How much is written."""

    length: Literal["short", "detailed", "long"] = "long"
    """One short sentence, one or two detailed ones, or a paragraph."""
    cut_opening: bool = True
    """Leave out openings such as "The image shows", which would become part of every caption."""
    beams: Annotated[int, Field(ge=1, le=8)] = 3
    """How many wordings are followed at once: more is slower and a little better."""
    max_tokens: Annotated[int, Field(ge=8, le=1024)] = 256
    """Longest caption in tokens."""


def load(folder: Path, settings: Settings, device: str) -> Florence2:
    """Load the model and its processor (`CaptionerModule.load`)."""
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    from lorasmith.engine.captioners._transformers import ModelClasses, Writer

    classes = ModelClasses(Florence2ForConditionalGeneration, Florence2Processor, "florence2")
    return Florence2(Writer(folder, SPEC, classes, device), settings)


class Florence2:
    """A loaded Florence-2 (`Captioner`)."""

    spec = SPEC

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self.where = writer.where
        self._writer, self._settings = writer, settings

    def caption(self, image: Image.Image) -> str:
        """Return the description of a picture (`Captioner.caption`)."""
        settings = self._settings
        inputs = self._writer.prepare(images=image, text=_TASKS[settings.length])
        tokens = self._writer.write(inputs, num_beams=settings.beams, max_new_tokens=settings.max_tokens)
        text = self._writer.decode(tokens)
        return cut_opening(text) if settings.cut_opening else text

    def close(self) -> None:
        """Drop the model from memory."""
        self._writer.close()


def cut_opening(text: str) -> str:
    """Return a description without an opening such as "The image shows", unless nothing would be left."""
    rest = _OPENING.sub("", text, count=1) if _OPENING.match(text) else text
    return rest[:1].upper() + rest[1:] if rest.strip(" .") else text
