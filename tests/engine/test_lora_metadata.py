"""What a LoRA file tells about itself, and what it never tells."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lorasmith.engine.config import CaptionSettings, RunConfig
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.families import BaseIdentity, families, identify_base
from lorasmith.engine.lora_metadata import (
    MAX_TAG_BYTES,
    DatasetFacts,
    architecture,
    build_metadata,
    dataset_facts,
    safe_label,
    with_hashes,
)
from lorasmith.engine.sources import locate_base
from tests.tiny import tiny_pictures


def identity(variant: str = "1.x", prediction: Any = "epsilon", **details: Any) -> BaseIdentity:
    names = {"architecture": "stable-diffusion-v1", "ss_base_model_version": "sd_v1", "ss_v2": False} | details
    return BaseIdentity("sd15", "label", variant, prediction, 512, 1, "fp16", details=names)


def make_config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"captions": {"trigger": "zqx"}} | sections)


def test_the_keys_that_a1111_forge_and_civitai_read_are_there() -> None:
    config = make_config(
        run={"name": "knight", "seed": 5},
        base={"model": "someone/some-model"},
        adapter={"rank": 8, "alpha": 4.0},
        objective={"min_snr_gamma": 5.0},
        train={"steps": 100, "gradient_accumulation": 2, "batch_size": 3},
    )
    facts = DatasetFacts(20, 4, {"10_knight": (10, 2)}, {}, {"10_knight": {"zqx": 2}}, {"512x768": 2}, 7)
    metadata = build_metadata(config, identity(), facts, step=100, epoch=29, started=1.5, finished=2.5)
    assert {
        "ss_output_name": "knight",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "some-model",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_args": "{}",
        "ss_resolution": "(512, 512)",
        "ss_num_train_images": "20",
        "ss_num_reg_images": "4",
        "ss_num_batches_per_epoch": "7",
        "ss_num_epochs": "29",
        "ss_steps": "100",
        "ss_learning_rate": "0.0001",
        "ss_lr_scheduler": "constant",
        "ss_batch_size_per_device": "3",
        "ss_gradient_accumulation_steps": "2",
        "ss_seed": "5",
        "ss_clip_skip": "None",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "None",
        "ss_training_started_at": "1.5",
        "ss_training_finished_at": "2.5",
    }.items() <= metadata.items()
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_knight": {"zqx": 2}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_knight": {"n_repeats": 10, "img_count": 2}}
    assert json.loads(metadata["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [512, 768], "count": 2}}}
    assert all(isinstance(value, str) for value in metadata.values())


def test_what_was_learnt_from_noise_is_told_by_kind_of_base_model() -> None:
    chosen = {"loss": "huber", "multires_iterations": 6, "ip_noise": 0.1, "min_timestep": 100}
    discrete = build_metadata(make_config(objective=chosen), identity(), DatasetFacts())
    assert {
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.1",
        "ss_ip_noise_gamma": "0.1",
        "ss_multires_noise_iterations": "6",
        "ss_multires_noise_discount": "0.3",
        "ss_debiased_estimation": "False",
        "modelspec.timestep_range": "100,1000",
    }.items() <= discrete.items()
    assert "ss_timestep_sampling" not in discrete
    spec = next(module.SPEC for module in families().values() if module.SPEC.objective == "flow")
    told = BaseIdentity(spec.name, "label", "", "velocity", 1024, 1, "bf16", details={"architecture": "x"})
    flow = build_metadata(make_config(objective={"shift": 2.5}), told, DatasetFacts())
    assert flow["ss_timestep_sampling"] == spec.timestep_sampling
    assert flow["ss_discrete_flow_shift"] == "2.5"
    assert flow["ss_guidance_scale"] == "1.0"
    assert flow["ss_huber_c"] == "None"
    assert not {"ss_min_snr_gamma", "ss_noise_offset", "modelspec.timestep_range"} & set(flow)


def test_modelspec_has_its_required_keys_and_the_trigger() -> None:
    config = make_config(run={"name": "knight"}, dataset={"resolution": 768})
    metadata = build_metadata(config, identity(prediction="v_prediction"), DatasetFacts(), finished=86400.0)
    spec = {key: value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert spec == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "knight",
        "modelspec.resolution": "768x768",
        "modelspec.date": "1970-01-02T00:00:00",
        "modelspec.trigger_phrase": "zqx",
        "modelspec.prediction_type": "v",
    }


def test_the_base_names_come_from_the_family(tiny_sd15: Path) -> None:
    _, found = identify_base(locate_base(str(tiny_sd15)))
    assert architecture(found) == "stable-diffusion-v1/lora"
    assert build_metadata(make_config(), found, DatasetFacts())["ss_base_model_version"] == "sd_v1"


def test_locon_and_lora_plus_are_written_as_kohyas_network_arguments() -> None:
    config = make_config(
        adapter={"kind": "locon", "conv_rank": 4, "conv_alpha": 2.0}, optimizer={"lora_plus_ratio": 16.0}
    )
    arguments = json.loads(build_metadata(config, identity(), DatasetFacts())["ss_network_args"])
    assert arguments == {"conv_dim": "4", "conv_alpha": "2.0", "loraplus_lr_ratio": "16.0"}


def test_no_path_and_no_token_of_this_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "someone"
    token = "hf_" + "a1B2" * 8
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", token)
    folder, extra = home / "private" / "pictures", home / "private" / "regular"
    tiny_pictures(folder / "10_knight", 3, captions=["zqx, a knight, armor", f"a knight, {token}"])
    tiny_pictures(folder, 1)
    tiny_pictures(extra / "1_man", 2, captions=["a man"])
    config = make_config(
        run={"name": "knight", "output_folder": str(home / "runs")},
        base={"model": str(home / "models" / "secret base.safetensors")},
        dataset={"folder": str(folder), "regularization_folder": str(extra), "resolution": 64},
    )
    dataset = scan_dataset(config.dataset)
    plan = plan_buckets(dataset.items, config.dataset)
    facts = dataset_facts(dataset, config.captions, plan.counts(), plan.batches_per_epoch(1))
    metadata = build_metadata(config, identity(), facts)
    text = json.dumps(metadata)
    assert str(home) not in text
    assert str(tmp_path) not in text
    assert "private" not in text
    assert token not in text
    assert metadata["ss_sd_model_name"] == "secret base.safetensors"
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "10_knight": {"n_repeats": 10, "img_count": 3},
        "pictures": {"n_repeats": 1, "img_count": 1},
    }
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_man": {"n_repeats": 1, "img_count": 2}}
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags["10_knight"]["zqx"] == 3
    assert tags["10_knight"]["a knight"] == 3
    assert "zqx" not in tags["1_man"]
    assert metadata["ss_num_train_images"] == "31"
    assert metadata["ss_num_reg_images"] == "2"


def test_a_tag_counts_once_for_a_picture_and_fractional_repeats_add_up(tmp_path: Path) -> None:
    (tmp_path / "cats.zip").touch()
    item = ImageItem(Path("a"), "a.png", "0", 64, 64, 1.5, ("red, round", "red, square"), class_name="cat")
    items = (item, replace(item, relative="b.png"), replace(item, relative="reg/r.png", regularization=True))
    dataset = Dataset(tmp_path / "cats.zip", items, (), 3)
    facts = dataset_facts(dataset, CaptionSettings(trigger="zqx"), {}, 3)
    assert facts.tags["cats"] == {"zqx": 2, "red": 2, "round": 2, "square": 2}
    assert facts.folders == {"cats": (2, 2)}
    assert (facts.images, facts.regularization) == (3, 2)
    assert facts.regularization_folders == {"reg": (2, 1)}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("/home/me/base.safetensors", "base.safetensors"),
        (r"C:\Users\me\base.safetensors", "base.safetensors"),
        ("owner/model", "model"),
        ("demo", "demo"),
        ("", ""),
    ],
)
def test_a_label_is_the_last_part_of_a_path_or_id(text: str, label: str) -> None:
    assert safe_label(text) == label


def test_tags_are_cut_so_that_comfyui_still_shows_the_header() -> None:
    many = {"d": {f"tag number {index} " + "x" * 300: index for index in range(5000)}}
    metadata = build_metadata(make_config(), identity(), DatasetFacts(tags=many))
    kept = json.loads(metadata["ss_tag_frequency"])["d"]
    assert len(metadata["ss_tag_frequency"]) <= MAX_TAG_BYTES
    assert f"tag number 4999 {'x' * 300}" in kept  # the most frequent stay


def test_the_model_hash_is_over_the_weights_alone() -> None:
    tensors = {"a": torch.arange(6.0)}
    plain, labeled = save(tensors, metadata={"format": "pt"}), save(tensors, metadata={"title": "another"})
    hashes = with_hashes({}, plain)
    assert hashes["sshs_model_hash"] == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()
    assert hashes == with_hashes({}, labeled)
    assert hashes["modelspec.hash_sha256"] == "0x" + hashes["sshs_model_hash"]
    assert len(hashes["sshs_legacy_hash"]) == 8


@pytest.mark.parametrize(
    ("adapter", "module", "told"),
    [
        ({"kind": "lokr", "lokr_factor": 8}, "lycoris.kohya", {"algo": "lokr", "factor": "8"}),
        ({"kind": "loha", "convolutions": True}, "lycoris.kohya", {"algo": "loha", "conv_dim": "8"}),
        ({"kind": "dora"}, "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
        ({"kind": "oft"}, "lycoris.kohya", {"algo": "diag-oft", "constraint": "0"}),
        ({"kind": "boft", "convolutions": True}, "lycoris.kohya", {"algo": "boft", "conv_dim": "32"}),
        ({"rslora": True}, "networks.lora", {"rs_lora": "True"}),
    ],
)
def test_other_kinds_are_told_in_the_words_of_those_who_made_them(
    adapter: dict[str, Any], module: str, told: dict[str, str]
) -> None:
    metadata = build_metadata(make_config(adapter=adapter), identity(), DatasetFacts())
    assert metadata["ss_network_module"] == module
    assert told.items() <= json.loads(metadata["ss_network_args"]).items()
