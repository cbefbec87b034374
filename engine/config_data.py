"""The settings of a run that say what is trained on: the run itself, its base model, pictures and captions.

See `engine.config`, which puts all sections together.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]


class Section(BaseModel):
    """A table of the run file: unknown keys are refused, values are never converted from strings."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        """Refuse what neither a path nor a run file can hold: NUL, and names that are not UTF-8."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("must be text in UTF-8 without NUL characters")
        return value


class RunSettings(Section):
    """Where the run lives."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = "my-lora"
    """Name of the run and of the LoRA file."""
    output_folder: Annotated[str, Field(min_length=1)] = "runs"
    """Folder in which the run folder is made; relative to the current folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Every random choice of the run follows from this number."""
    on_finish: Annotated[str, Field(max_length=2000)] = ""
    """Command to start when the run has ended, such as `notify-send "LoRA ready"`; no shell. It finds the outcome in
    LORASMITH_OUTCOME, LORASMITH_RUN, LORASMITH_STEP, LORASMITH_MESSAGE and LORASMITH_LORA. Empty: none."""

    @field_validator("on_finish", mode="after")
    @classmethod
    def _check_command(cls, value: str) -> str:
        try:
            shlex.split(value)
        except ValueError as error:
            raise ValueError(f"is no command line ({str(error).lower()}): close every quote") from None
        return value


class BaseSettings(Section):
    """Which model the LoRA is trained for."""

    model: str = ""
    """A Hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`, a diffusers folder, one `.safetensors` file, or
    `demo` for the embedded base model."""
    family: str = "auto"
    """The base model family; `auto` recognises it from the files."""
    revision: str = "main"
    """Branch, tag or commit on the Hub."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the denoiser predicts; `auto` takes it from the model's own files."""
    vae: str = ""
    """A `.safetensors` file with the autoencoder, where base.model is one file without it, or to replace its own."""
    text_encoders: list[Annotated[str, Field(min_length=1)]] = []
    """`.safetensors` files with the text encoders that base.model lacks, in any order: their contents tell which."""
    training_adapter: str = "auto"
    """A LoRA that is active while training only, so that a distilled base can be trained: a file or Hub id; `auto`:
    the one that the base model needs, `off`: none."""


class DatasetSettings(Section):
    """The pictures."""

    folder: str = ""
    """Folder with the pictures and their captions, a ZIP archive of one, or a Kohya dataset file (.toml); it is only
    read, never written to. Sub-folders named `10_name` repeat their pictures 10 times an epoch."""
    more_folders: list[Annotated[str, Field(min_length=1)]] = []
    """Further datasets of the same run, each like dataset.folder."""
    weights: list[Annotated[float, Field(gt=0.0, le=100.0)]] = []
    """How often a picture of each dataset is used beside those of the others: dataset.folder first, then
    dataset.more_folders in order. Empty: all alike."""
    regularization_folder: str = ""
    """Folder with ordinary pictures of the same class, captioned without the trigger, that keep the LoRA from changing
    prompts without it. Empty: none."""
    overlay: str = ""
    """File with edited captions and left-out pictures (JSON lines), which count instead of the pictures' own caption
    files; lorasmith writes it. Empty: none."""
    resolution: Annotated[int, Field(ge=64, le=2048, multiple_of=64)] = 512
    """Training resolution in pixels: pictures are scaled to about this many pixels squared."""
    more_resolutions: list[Annotated[int, Field(ge=64, le=2048, multiple_of=64)]] = []
    """Train each picture at these resolutions as well; one that would enlarge it over 1.5 times is left out."""
    buckets: bool = True
    """Keep aspect ratios by sorting pictures into buckets; off: crop all pictures to squares."""
    bucket_step: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 64
    """Bucket sides are multiples of this many pixels."""
    crop: Literal["center", "random"] = "center"
    """What stays of a picture that does not fit its bucket: its middle, or another part each time; up to eight parts of
    each picture are encoded for that."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """How often each picture is seen in an epoch, on top of a folder's own repeats."""
    flip: bool = False
    """Also train on mirrored pictures; wrong for faces, text and anything with a left and a right."""
    missing_captions: Literal["ask", "trigger", "filename", "folder", "exclude"] = "ask"
    """What to do with pictures that have no caption: stop and ask, use the trigger alone, the file's name, the name in
    a folder such as `10_name`, or leave them out."""
    alpha_background: Literal["white", "gray", "black", "checker"] = "white"
    """What shows through transparent pictures; `checker` is a checkerboard drawn for each picture, so that no one
    background is learnt."""
    masks: Literal["files", "alpha", "off"] = "files"
    """Where masks come from that say which part of a picture is learnt (white: learn it): files (`NAME-masklabel.png`,
    or the same name in a folder `mask` or `masks`), these and the transparency of pictures, or nowhere."""


class CaptionSettings(Section):
    """What the text encoder reads."""

    trigger: str = ""
    """The word that calls the LoRA; put once and first in every caption. A rare word of letters works best."""
    shuffle: bool = False
    """Shuffle the comma-separated tags after the kept ones, anew each time."""
    keep_tokens: Annotated[int, Field(ge=0, le=100)] = 1
    """How many tags at the start stay in place when shuffling; the trigger always does."""
    dropout: Probability = 0.0
    """Share of captions replaced by the trigger alone, so that the trigger learns what captions leave out."""
    tag_dropout: Probability = 0.0
    """Share of comma-separated tags left out, anew each time; the kept ones and the trigger always stay."""
    prefix: Annotated[str, Field(max_length=1000)] = ""
    """Text before every caption, after the trigger; a space is put between, so end it with a comma for tags."""
    suffix: Annotated[str, Field(max_length=1000)] = ""
    """Text after every caption."""
    lines: Literal["join", "choose"] = "join"
    """A caption file of several lines: one caption, or one caption a line of which each use draws one."""
    wildcards: bool = False
    """Draw one of the choices in `{red|green|blue}` for each use."""
