"""The settings of a run that say how it trains: optimizer, schedule, objective and loop.

See `engine.config`, which puts all sections together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorasmith.engine.config_data import Count, Probability, Rate, Section


class OptimizerSettings(Section):
    """How weights are updated."""

    name: Literal[
        "adamw",
        "adamw8bit",
        "paged_adamw",
        "paged_adamw8bit",
        "adamw_schedulefree",
        "adafactor",
        "lion",
        "lion8bit",
        "paged_lion8bit",
        "prodigy",
        "prodigy_schedulefree",
        "dadaptation",
        "came",
        "ademamix",
        "ademamix8bit",
    ] = "adamw"
    """`prodigy` and `dadaptation` find their own learning rate (set learning_rate to 1); the `schedulefree` ones need
    no schedule. The `8bit` ones keep their state in a quarter, that of weights with under 4096 numbers whole; the
    `paged` ones spill that of weights with 100,000 and more, which a LoRA of small rank does not have."""
    learning_rate: Rate = 1e-4
    """Step size at the top of the schedule."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """How strongly weights are pulled to zero."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0, le=64.0)] = 1.0
    """LoRA+: learning rate of the up matrices over that of the down ones (Hayou et al., arXiv:2402.12354); 1: off."""
    text_encoder_lora_plus_ratio: Annotated[float, Field(ge=0.0, le=64.0)] = 0.0
    """The same for text encoders; 0: as lora_plus_ratio."""
    max_grad_norm: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Gradients longer than this are shortened to it; 0: never."""
    fused_backward: bool = False
    """Update each weight as soon as its gradient is there. Saves nothing (measured) unless the LoRA is larger than the
    memory of the pictures' own way through the network. A step is left out for its loss alone, and running out of
    memory in a later step ends the run at its last checkpoint."""


class ScheduleSettings(Section):
    """How the learning rate changes over the run."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "rex", "wsd", "inverse_sqrt"] = (
        "constant"
    )
    """Shape after the warm-up; `wsd` stays at the top and falls at the end, `rex` falls late, `inverse_sqrt` falls to
    half within four warm-ups."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps over which the learning rate rises from zero."""
    restarts: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of cosine periods (`cosine_restarts` only)."""
    power: Annotated[float, Field(gt=0.0, le=10.0)] = 2.0
    """Exponent of the fall (`polynomial` only)."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps over which the rate falls (`wsd` only)."""
    start_step: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Step after which the shape, warm-up included, begins; until then the rate is full. `lorasmith runs extend` sets
    it to plan the rest of a run anew."""


class ObjectiveSettings(Section):
    """What the denoiser learns from each noisy picture."""

    min_timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Least noise that is trained, of 1000: details."""
    max_timestep: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Most noise that is trained, of 1000: composition."""
    timestep_sampling: Literal["auto", "uniform", "sigmoid", "logit_normal", "mode", "shift", "resolution_shift"] = (
        "auto"
    )
    """Which noise levels are trained how often (flow models only); `auto`: the base model's usual one. `sigmoid` favors
    the middle; `shift` moves that towards more noise, `resolution_shift` the more the larger the pictures are."""
    timestep_bias: Literal["balanced", "content", "style"] = "balanced"
    """Train high noise more often (`content`) or low noise (`style`)."""
    logit_mean: Annotated[float, Field(ge=-5.0, le=5.0)] = 0.0
    """Middle of `logit_normal`: above 0 more noise."""
    logit_std: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    """Width of `logit_normal`, `sigmoid`, `shift` and `resolution_shift`: more reaches the least and the most noise
    more often; 1.7 is nearly even."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.75)] = 1.29
    """Weight of the middle in `mode` (Esser et al., arXiv:2403.03206)."""
    shift: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Moves `shift` sampling towards more noise, 1 not at all; 0: the base model's own."""
    guidance: Annotated[float, Field(ge=0.0, le=30.0)] = 1.0
    """What base models with built-in guidance (FLUX dev) are told while training; 1 keeps them as guidable."""
    min_snr_gamma: Annotated[float, Field(ge=0.0, le=50.0)] = 0.0
    """Min-SNR weighting (Hang et al., arXiv:2303.09556), usually 5; 0: off. Like the next six settings not for flow
    models."""
    debiased: bool = False
    """Debiased estimation weighting (Yu et al., arXiv:2310.08442)."""
    p2_gamma: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """P2 weighting (Choi et al., arXiv:2204.00227), usually 1; 0: off."""
    zero_terminal_snr: bool = False
    """End the noise schedule in pure noise (Lin et al., arXiv:2305.08891), for v-prediction models; a model that says
    so itself needs no setting."""
    noise_offset: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Adds a constant to each channel's noise so that very dark and bright pictures are learnt, usually 0.03 to 0.1; 0:
    off."""
    multires_iterations: Annotated[int, Field(ge=0, le=10)] = 0
    """Adds noise of this many coarser sizes, for the same; 0: off."""
    multires_discount: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Strength of each coarser size over the one before."""
    ip_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Input perturbation (Ning et al., arXiv:2301.11706), usually 0.1; 0: off."""
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """`huber` and `smooth_l1` count large errors less, for datasets with bad pictures; `smooth_l1` counts small ones
    more than `l2` does."""
    huber_c: Annotated[float, Field(gt=0.0, le=10.0)] = 0.1
    """Error above which `huber` and `smooth_l1` grow linearly."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that limit changes with the noise."""
    prior_weight: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Weight of regularization pictures in the loss."""
    unmasked_weight: Probability = 0.1
    """Weight of what a picture's mask leaves out in the loss; 0: it is not learnt at all."""
    preserve: Literal["off", "class", "blank"] = "off"
    """Keep what the base model draws for the same prompt with preserve_class in the trigger's place (`class`), or for
    an empty prompt (`blank`). Steps take two and a half times as long; their memory hardly grows."""
    preserve_class: Annotated[str, Field(max_length=200)] = ""
    """What the trigger is one of, such as `woman` (`class` only)."""
    preserve_weight: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Weight of the preservation in the loss."""


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


class ValidationSettings(Section):
    """The loss on pictures that are not trained, with the same noise each time: it tells learning from memorizing."""

    every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps between validations; 0: none, and every picture is trained."""
    share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Share of the pictures that is held out, drawn by the seed; at least one."""
    max_pictures: Annotated[int, Field(ge=1, le=1000)] = 16
    """At most this many pictures are held out."""
    levels: Annotated[int, Field(ge=1, le=20)] = 5
    """At how many noise levels each picture is measured; the chart shows each level."""
