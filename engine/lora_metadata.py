"""What a LoRA file says about itself: the `ss_*` keys that A1111, Forge and Civitai read, and modelspec 1.0.1.

Nothing that could not be shown to strangers: folders by name only, no paths, no tokens, no captions but their tags.
Sources: kohya-ss/sd-scripts train_network.py and library/sai_model_spec.py, A1111 ui_edit_user_metadata.py. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePath, PureWindowsPath
from typing import TYPE_CHECKING

from lorasmith.engine.adapter_combinations import ROTATIONS
from lorasmith.engine.families import families

if TYPE_CHECKING:
    from lorasmith.engine.config import AdapterSettings, CaptionSettings, ObjectiveSettings, RunConfig
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.engine.families import BaseIdentity, FamilySpec

MAX_TAG_BYTES = 300_000
"""ComfyUI refuses to show headers over 1 MiB."""
MAX_TAGS_PER_FOLDER = 2000
_LEGACY_FROM, _LEGACY_SIZE = 0x100000, 0x10000
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")


@dataclass(frozen=True)
class DatasetFacts:
    """What a file may tell about its pictures: counts, tags and buckets by folder name."""

    images: int = 0
    regularization: int = 0
    folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Folder name to (repeats, pictures), regularization pictures left out."""
    regularization_folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder name to tag to count."""
    buckets: Mapping[str, int] = field(default_factory=dict)
    batches_per_epoch: int = 0


def dataset_facts(
    dataset: Dataset, captions: CaptionSettings, buckets: Mapping[str, int], batches_per_epoch: int
) -> DatasetFacts:
    """Collect the facts of a scanned dataset; `buckets` as {"512x768": pictures}.

    `images` and `regularization` count a picture once for each repeat, as other trainers do.
    """
    from lorasmith.engine.dataset.captions import compose, split_tags

    folders: dict[bool, dict[str, tuple[int, int]]] = {False: {}, True: {}}
    totals = {False: 0.0, True: 0.0}
    tags: dict[str, Counter[str]] = {}
    for item in dataset.items:
        name = safe_label(PurePath(item.relative).parent.name or _dataset_name(dataset)) or "dataset"
        known = folders[item.regularization]
        known[name] = (round(item.repeats), known.get(name, (0, 0))[1] + 1)
        totals[item.regularization] += item.repeats
        prompts = [compose(caption, captions.trigger, item.regularization) for caption in item.captions or (None,)]
        # A tag counts once for each picture, however many captions of it have the tag.
        tags.setdefault(name, Counter()).update({tag for prompt in prompts for tag in split_tags(prompt)})
    return DatasetFacts(
        round(totals[False]), round(totals[True]), folders[False], folders[True], tags, dict(buckets), batches_per_epoch
    )


def _dataset_name(dataset: Dataset) -> str:
    """Return the name of the dataset's folder, or that of its archive or Kohya file without the extension."""
    return dataset.folder.stem if dataset.folder.is_file() else dataset.folder.resolve().name


def build_metadata(
    config: RunConfig,
    identity: BaseIdentity,
    facts: DatasetFacts,
    *,
    step: int = 0,
    epoch: int = 0,
    started: float = 0.0,
    finished: float = 0.0,
) -> dict[str, str]:
    """Return the header of a LoRA file; times are seconds since the epoch, 0 where unknown.

    Values are strings, "None" where a setting is off, as Kohya's scripts write them. What depends on the file itself
    (hashes, `ss_output_name`) is added by the export.
    """
    metadata = (
        _network_keys(config)
        | _training_keys(config, identity)
        | _objective_keys(config.objective, families()[identity.family].SPEC)
        | _dataset_keys(config, facts)
        | _model_spec(config, identity, finished or datetime.now(UTC).timestamp())
    )
    metadata |= {"ss_steps": str(step), "ss_epoch": str(epoch), "ss_output_name": safe_label(config.run.name)}
    if started:
        metadata["ss_training_started_at"] = str(started)
    if finished:
        metadata["ss_training_finished_at"] = str(finished)
    return metadata


def with_hashes(metadata: Mapping[str, str], file: bytes) -> dict[str, str]:
    """Return `metadata` with the hashes that programs show a LoRA under; `file` is the file with no such metadata.

    `sshs_model_hash` is over the bytes after the header, so that later edits of the metadata leave it as it is.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    content = hashlib.sha256(file[start:]).hexdigest()
    legacy = hashlib.sha256(file[_LEGACY_FROM : _LEGACY_FROM + _LEGACY_SIZE]).hexdigest()[:8]
    return dict(metadata) | {
        "sshs_model_hash": content,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{content}",
    }


def architecture(identity: BaseIdentity) -> str:
    """Return the modelspec id of a LoRA for this base, e.g. `stable-diffusion-v1/lora`.

    A family states its own in `identity.details["architecture"]`.
    """
    return f"{identity.details.get('architecture', identity.family)}/lora"


def safe_label(text: str) -> str:
    """Return the last part of a path or id, so that a value tells where nothing lies; secrets are blotted out."""
    name = PureWindowsPath(text).name if "\\" in text else PurePath(text).name
    return _TOKEN.sub("[removed]", name or text)


def _network_keys(config: RunConfig) -> dict[str, str]:
    adapter = config.adapter
    module, arguments = _network_module(adapter)
    rotates = adapter.kind in ROTATIONS
    if adapter.kind == "locon" or adapter.convolutions:
        conv_size = adapter.block_size if rotates else adapter.conv_rank
        arguments |= {"conv_dim": str(conv_size), "conv_alpha": str(adapter.conv_alpha)}
    if adapter.rslora:
        arguments["rs_lora"] = "True"
    if config.optimizer.lora_plus_ratio != 1.0:
        arguments["loraplus_lr_ratio"] = str(config.optimizer.lora_plus_ratio)
    return {
        "ss_network_module": module,
        # LyCORIS calls the size of the blocks so too.
        "ss_network_dim": str(adapter.block_size if rotates else adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_network_dropout": _or_none(adapter.dropout),
        "ss_network_args": json.dumps(arguments),
    }


def _network_module(adapter: AdapterSettings) -> tuple[str, dict[str, str]]:
    """Return the code that trains such an adapter elsewhere, and what it is told: Kohya's or LyCORIS'."""
    if adapter.kind in ("lora", "locon"):
        return "networks.lora", {}
    if adapter.kind in ROTATIONS:
        return "lycoris.kohya", {"algo": "diag-oft" if adapter.kind == "oft" else "boft", "constraint": "0"}
    if adapter.kind == "dora":
        return "lycoris.kohya", {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    arguments = {"algo": str(adapter.kind)}
    if adapter.kind == "lokr":
        arguments |= {"factor": str(adapter.lokr_factor or -1), "full_matrix": str(adapter.lokr_full)}
    return "lycoris.kohya", arguments


def _training_keys(config: RunConfig, identity: BaseIdentity) -> dict[str, str]:
    train, optimizer = config.train, config.optimizer
    text_rate = config.adapter.text_encoder_learning_rate if config.adapter.text_encoder else None
    return {
        "ss_base_model_version": str(identity.details.get("ss_base_model_version", identity.variant)),
        "ss_v2": str(bool(identity.details.get("ss_v2", False))),
        "ss_sd_model_name": safe_label(config.base.model),
        "ss_learning_rate": str(optimizer.learning_rate),
        "ss_unet_lr": str(optimizer.learning_rate),
        "ss_text_encoder_lr": str(text_rate),
        "ss_optimizer": f"{optimizer.name}(weight_decay={optimizer.weight_decay})",
        "ss_lr_scheduler": config.schedule.name,
        "ss_lr_warmup_steps": str(config.schedule.warmup_steps),
        "ss_max_train_steps": str(train.steps),
        "ss_batch_size_per_device": str(train.batch_size),
        "ss_total_batch_size": str(train.batch_size * train.gradient_accumulation),
        "ss_gradient_accumulation_steps": str(train.gradient_accumulation),
        "ss_gradient_checkpointing": str(train.gradient_checkpointing),
        "ss_mixed_precision": {"fp32": "no", "auto": "None"}.get(train.precision, train.precision),
        "ss_max_grad_norm": str(optimizer.max_grad_norm),
        "ss_seed": str(config.run.seed),
        "ss_clip_skip": "None",
        "ss_caption_dropout_rate": str(config.captions.dropout),
        "ss_cache_latents": "True",
    }


def _objective_keys(settings: ObjectiveSettings, spec: FamilySpec) -> dict[str, str]:
    """Return what was learnt from noise; flow models have other keys, as sd-scripts' flux_train_network.py has them."""
    robust = settings.loss != "l2"
    keys = {
        "ss_prior_loss_weight": str(settings.prior_weight),
        "ss_ip_noise_gamma": _or_none(settings.ip_noise),
        "ss_loss_type": settings.loss,
        "ss_huber_schedule": settings.huber_schedule if robust else "None",
        "ss_huber_c": str(settings.huber_c) if robust else "None",
    }
    if (settings.min_timestep, settings.max_timestep) != (0, 1000):
        keys["modelspec.timestep_range"] = f"{settings.min_timestep},{settings.max_timestep}"
    if spec.objective == "flow":
        auto = settings.timestep_sampling == "auto"
        return keys | {
            "ss_timestep_sampling": spec.timestep_sampling if auto else settings.timestep_sampling,
            "ss_discrete_flow_shift": str(settings.shift or spec.shift),
            "ss_sigmoid_scale": str(settings.logit_std),
            "ss_logit_mean": str(settings.logit_mean),
            "ss_logit_std": str(settings.logit_std),
            "ss_mode_scale": str(settings.mode_scale),
            "ss_guidance_scale": str(settings.guidance),
        }
    return keys | {
        "ss_min_snr_gamma": _or_none(settings.min_snr_gamma),
        "ss_debiased_estimation": str(settings.debiased),
        "ss_zero_terminal_snr": str(settings.zero_terminal_snr),
        "ss_noise_offset": _or_none(settings.noise_offset),
        "ss_multires_noise_iterations": _or_none(settings.multires_iterations),
        "ss_multires_noise_discount": str(settings.multires_discount) if settings.multires_iterations else "None",
    }


def _dataset_keys(config: RunConfig, facts: DatasetFacts) -> dict[str, str]:
    settings, captions = config.dataset, config.captions
    buckets = {
        str(index): {"resolution": [int(side) for side in name.split("x")], "count": count}
        for index, (name, count) in enumerate(facts.buckets.items())
    }
    batches = facts.batches_per_epoch
    micro_batches = config.train.steps * config.train.gradient_accumulation
    return {
        "ss_num_train_images": str(facts.images),
        "ss_num_reg_images": str(facts.regularization),
        "ss_num_batches_per_epoch": str(batches),
        "ss_num_epochs": str(-(-micro_batches // batches) if batches else 0),
        "ss_dataset_dirs": _directories(facts.folders),
        "ss_reg_dataset_dirs": _directories(facts.regularization_folders),
        "ss_tag_frequency": _tag_frequency(facts.tags),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
        "ss_resolution": f"({settings.resolution}, {settings.resolution})",
        "ss_enable_bucket": str(settings.buckets),
        "ss_flip_aug": str(settings.flip),
        "ss_shuffle_caption": str(captions.shuffle),
        "ss_keep_tokens": str(captions.keep_tokens),
    }


def _directories(folders: Mapping[str, tuple[int, int]]) -> str:
    return json.dumps({name: {"n_repeats": repeats, "img_count": count} for name, (repeats, count) in folders.items()})


def _tag_frequency(tags: Mapping[str, Mapping[str, int]]) -> str:
    limit = MAX_TAGS_PER_FOLDER
    while True:
        kept = {
            _TOKEN.sub("[removed]", name): {
                _TOKEN.sub("[removed]", tag): count
                for tag, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]
            }
            for name, counts in tags.items()
        }
        text = json.dumps(kept)
        if len(text) <= MAX_TAG_BYTES or limit == 0:
            return text
        limit //= 2


def _model_spec(config: RunConfig, identity: BaseIdentity, moment: float) -> dict[str, str]:
    side = config.dataset.resolution
    # The two predictions that modelspec knows; others are left out rather than misnamed.
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(identity.prediction)
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture(identity),
        "implementation": str(identity.details.get("implementation", "diffusers")),
        "title": safe_label(config.run.name),
        "resolution": f"{side}x{side}",
        "date": datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "trigger_phrase": config.captions.trigger.strip(),
        "prediction_type": prediction,
    }
    return {f"modelspec.{key}": value for key, value in spec.items() if value}


def _or_none(value: float) -> str:
    return str(value) if value else "None"
