"""The whole run as typed, bounded, documented settings: the one place where a setting is declared.

A field's type, bounds, default and `description` are what the wizard's form, `--set key=value`, the commented TOML
file and the error messages are made of. Strict: "False" is not a boolean and 3.0 is not a whole number.
Values come in layers (defaults < preset < tier < goal < run file < --set or form); `engine.run_file` reads, merges and
writes them and knows every value's origin.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CONFIG_VERSION: Final = 1

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


class AdapterSettings(Section):
    """The LoRA itself."""

    kind: Literal["lora", "locon"] = "lora"
    """`lora` adapts linear layers; `locon` also convolutions, for textures and styles."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Size of the LoRA: more can hold more and overfits sooner."""
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 16.0
    """Strength: the change is scaled by alpha / rank."""
    conv_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of the convolution layers (`locon` only)."""
    conv_alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 8.0
    """Alpha of the convolution layers (`locon` only)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of LoRA inputs dropped in training."""
    targets: Literal["attention", "attention-mlp"] = "attention"
    """Which layers are adapted: attention only, or attention and the feed-forward layers."""
    text_encoder: bool = False
    """Train the text encoder too; costs memory, since prompts cannot be cached."""
    text_encoder_learning_rate: Rate = 5e-5
    """Learning rate of the text encoder's LoRA."""


class OptimizerSettings(Section):
    """How weights are updated."""

    name: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"] = "adamw"
    """`adamw8bit` saves memory; `prodigy` finds its own learning rate (set learning_rate to 1)."""
    learning_rate: Rate = 1e-4
    """Step size at the top of the schedule."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """How strongly weights are pulled to zero."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0, le=64.0)] = 1.0
    """LoRA+: learning rate of the up matrices over that of the down ones (Hayou et al., arXiv:2402.12354); 1: off."""
    max_grad_norm: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Gradients longer than this are shortened to it; 0: never."""


class ScheduleSettings(Section):
    """How the learning rate changes over the run."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps over which the learning rate rises from zero."""
    restarts: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of cosine periods (`cosine_restarts` only)."""
    start_step: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Step after which the shape, warm-up included, begins; until then the rate is full. `lorasmith runs extend` sets
    it to plan the rest of a run anew."""


class ObjectiveSettings(Section):
    """What the denoiser learns from each noisy picture."""

    min_snr_gamma: Annotated[float, Field(ge=0.0, le=50.0)] = 0.0
    """Min-SNR weighting (Hang et al., arXiv:2303.09556), usually 5; 0: off."""
    noise_offset: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Adds a constant to each channel's noise so that very dark and bright pictures are learnt; 0: off."""
    prior_weight: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Weight of regularization pictures in the loss."""
    unmasked_weight: Probability = 0.1
    """Weight of what a picture's mask leaves out in the loss; 0: it is not learnt at all."""


class TrainSettings(Section):
    """The loop."""

    steps: Count = 1000
    """Optimizer steps in the whole run."""
    batch_size: Annotated[int, Field(ge=1, le=256)] = 1
    """Pictures in memory at once."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    """Batches added up before each optimizer step: the same effect as a larger batch, without its memory."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice; about a third slower."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen weights and the computation; the LoRA itself is always kept in fp32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or a GPU's UUID as `lorasmith doctor` lists it."""
    log_every: Annotated[int, Field(ge=1, le=1000)] = 10
    """Steps between two readings of the loss; reading waits for the GPU, so not every step."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Keep a running average of the LoRA's weights, which previews and the exported file then use; 0.99 averages over
    about the last 100 steps. Checkpoints hold both. 0: off."""
    loader_workers: Annotated[int, Field(ge=0, le=16)] = 0
    """Threads that prepare batches ahead; 0: each batch is made when it is needed. The result is the same. Pictures are
    encoded beforehand and a batch of them takes under a thousandth of a second, so expect no gain."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits each time; slower."""
    not_finite: Literal["skip", "stop"] = "skip"
    """A step whose loss or gradient is no number: leave it out, and give up at the third within twenty steps (`skip`),
    or give up at once (`stop`). The last good state is restored and saved either way."""


class CheckpointSettings(Section):
    """Saves from which a run resumes exactly."""

    every: Annotated[int, Field(ge=0, le=1_000_000)] = 250
    """Steps between checkpoints; 0: only at the end or on request."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many of the newest checkpoints stay."""


class PreviewSettings(Section):
    """Pictures drawn during training."""

    every: Annotated[int, Field(ge=0, le=1_000_000)] = 250
    """Steps between previews; 0: none. Always after a checkpoint was saved."""
    prompts: list[Annotated[str, Field(max_length=2000)]] = []
    """What to draw; `[trigger]` stands for the trigger word. Empty: the trigger with the first caption, and that
    caption without it."""
    negative_prompt: str = ""
    """What not to draw."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=64)] = [1]
    """Each prompt is drawn once for each seed; the same seeds each time make pictures comparable."""
    steps: Annotated[int, Field(ge=1, le=200)] = 20
    """Denoising steps of each picture."""
    guidance: Annotated[float, Field(ge=0.0, le=30.0)] = 7.0
    """How strictly the prompt is followed (classifier-free guidance)."""
    side: Annotated[int, Field(ge=0, le=2048, multiple_of=8)] = 0
    """Side of the square pictures in pixels; 0: the training resolution."""


class ExportSettings(Section):
    """The shareable file."""

    layouts: Annotated[list[Literal["kohya", "diffusers"]], Field(min_length=1)] = ["kohya"]
    """`kohya` loads in ComfyUI, A1111, Forge and diffusers; `diffusers` in diffusers only."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the file."""


class RunConfig(Section):
    """One training run."""

    version: Literal[1] = CONFIG_VERSION
    """Version of this file's format."""
    run: RunSettings = RunSettings()
    base: BaseSettings = BaseSettings()
    dataset: DatasetSettings = DatasetSettings()
    captions: CaptionSettings = CaptionSettings()
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    previews: PreviewSettings = PreviewSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _check_combinations(self) -> RunConfig:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def contradictions(config: RunConfig) -> list[str]:
    """Return one sentence, with its fix, for each pair of settings that cannot both hold."""
    problems = []
    prodigy = config.optimizer.name == "prodigy"
    if prodigy and config.optimizer.learning_rate != 1.0:
        problems.append(
            "optimizer.learning_rate must be 1.0 with optimizer.name = prodigy, which finds the rate itself"
        )
    if prodigy and config.optimizer.lora_plus_ratio != 1.0:
        problems.append("optimizer.lora_plus_ratio must be 1.0 with prodigy, which needs one rate for all weights")
    if not _is_file_name(config.run.name):
        problems.append(
            "run.name must be usable as a file name: no slashes or control characters, not blank, no . or .."
        )
    weights, folders = len(config.dataset.weights), 1 + len(config.dataset.more_folders)
    if weights not in (0, folders):
        problems.append(
            f"dataset.weights has {weights} numbers for {folders} datasets; give one for each, dataset.folder first"
        )
    problems += _schedule_problems(config)
    if config.captions.trigger and not config.captions.trigger.strip():
        problems.append("captions.trigger is blank; give a word such as zqx, or remove the setting")
    if "," in config.captions.trigger:
        problems.append("captions.trigger must not contain a comma, since commas separate tags")
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    start, warmup, steps = config.schedule.start_step, config.schedule.warmup_steps, config.train.steps
    if start >= steps:
        return [f"schedule.start_step ({start}) must be smaller than train.steps ({steps}): the schedule never begins"]
    if warmup < steps - start:
        return []
    if not start:
        return ["schedule.warmup_steps must be smaller than train.steps, or the full rate is never reached"]
    return [
        f"schedule.warmup_steps ({warmup}) must be smaller than the {steps - start} steps after schedule.start_step, "
        "or the full rate is never reached"
    ]


def _is_file_name(name: str) -> bool:
    return name.strip() not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")
