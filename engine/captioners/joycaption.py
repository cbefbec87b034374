"""JoyCaption beta one (fancyfeast): long descriptions by a LLaVA model of SigLIP and Llama 3.1, asked in a chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.engine.captioners import CaptionerSpec
from lorasmith.engine.config import Section
from lorasmith.engine.errors import CaptionerError
from lorasmith.engine.families import License

if TYPE_CHECKING:
    from PIL import Image

    from lorasmith.engine.captioners._transformers import Writer

SPEC = CaptionerSpec(
    name="joycaption",
    label="JoyCaption beta one",
    kind="prose",
    default_model="fancyfeast/llama-joycaption-beta-one-hf-llava",
    revision="ebf414ea497a020da0f82df3913e5b6cb8e9663a",
    bytes=17_000_000_000,
    license=License(
        name="Llama 3.1 Community License",
        url="https://www.llama.com/llama3_1/license/",
        consequence="Commercial use is allowed below 700 million monthly users; the use policy of Llama applies.",
    ),
    files=("config.json", "tokenizer.json", "preprocessor_config.json|processor_config.json"),
    good_for="The most exact descriptions, of any kind of picture; needs a GPU with about 18 GB.",
    cpu_precision="bf16",
    sources=(
        "https://github.com/fpgaminer/joycaption",
        "https://huggingface.co/fancyfeast/llama-joycaption-beta-one-hf-llava",
    ),
)
# The model was trained on exactly these questions (its README); {length} is empty, or a length and a space.
_SYSTEM = "You are a helpful image captioner."
_QUESTIONS = {
    "descriptive": "Write a {length}detailed description for this image.",
    "casual": "Write a {length}descriptive caption for this image in a casual tone.",
    "image-prompt": "Output a {length}stable diffusion prompt that is indistinguishable from a real stable "
    "diffusion prompt.",
    "tags": "Write a {length}list of Booru-like tags for this image.",
}


class Settings(Section):
    """What is asked."""

    style: Literal["descriptive", "casual", "image-prompt", "tags"] = "descriptive"
    """A formal or casual description, what somebody would type to make such a picture, or a list of tags."""
    length: Literal["any", "very short", "short", "medium-length", "long"] = "any"
    """How long the caption should be."""
    prompt: Annotated[str, Field(max_length=2000)] = ""
    """An own question instead of style and length. Empty: none."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """0 takes the most probable word each time; 0.6 varies the wording. The same picture always gets the same text."""
    max_tokens: Annotated[int, Field(ge=16, le=1024)] = 300
    """Longest caption in tokens."""


def load(folder: Path, settings: Settings, device: str) -> JoyCaption:
    """Load the model and its processor (`CaptionerModule.load`)."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from lorasmith.engine.captioners._transformers import ModelClasses, Writer

    classes = ModelClasses(LlavaForConditionalGeneration, LlavaProcessor, "llava")
    return JoyCaption(Writer(folder, SPEC, classes, device), settings)


def question(settings: Settings) -> str:
    """Return what the model is asked."""
    length = "" if settings.length == "any" else f"{settings.length} "
    return settings.prompt.strip() or _QUESTIONS[settings.style].format(length=length)


class JoyCaption:
    """A loaded JoyCaption (`Captioner`)."""

    spec = SPEC

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self.where = writer.where
        self._writer, self._settings = writer, settings
        self._chat = _chat_text(writer, question(settings))

    def caption(self, image: Image.Image) -> str:
        """Return the description of a picture (`Captioner.caption`)."""
        settings = self._settings
        # The chat text begins with the start token; a tokenizer that adds a second one makes the answers worse.
        inputs = self._writer.prepare(images=[image], text=[self._chat], add_special_tokens=False)
        tokens = self._writer.write(inputs, temperature=settings.temperature, max_new_tokens=settings.max_tokens)
        return self._writer.decode(tokens[inputs["input_ids"].shape[1] :])

    def close(self) -> None:
        """Drop the model from memory."""
        self._writer.close()


def _chat_text(writer: Writer, asked: str) -> str:
    """Return the conversation in the model's own format, which ends where its answer begins."""
    processor = writer.processor
    chat = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]
    try:
        text: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except (ValueError, TypeError, KeyError) as error:
        raise CaptionerError(
            "The model has no usable chat template.", why=f"{error}.", fix=f"Choose {SPEC.default_model}."
        ) from None
    if text.count(processor.image_token) != 1:
        raise CaptionerError(
            "The model's chat template has no place for a picture.",
            why=f"{processor.image_token} should be in it once.",
            fix=f"Choose {SPEC.default_model}.",
        )
    return text
