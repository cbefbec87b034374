"""The plan says what the run will do, agrees with what is then built, and says so where it cannot know."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import plan as plan_module
from lorasmith.engine.dataset import cache_size
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.items import Dataset
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.families import BaseIdentity, families, identify_base
from lorasmith.engine.memory import GIB, of_run
from lorasmith.engine.memory.calibration import Calibration
from lorasmith.engine.memory.simulated import step_key, store_step_memory
from lorasmith.engine.plan import Plan, build_plan
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.engine.sources import BaseFiles, TensorInfo, locate_base
from tests.memory_sample import small_unet
from tests.tiny import tiny_pictures


def resolved(tmp_path: Path, **sections: Any) -> ResolvedConfig:
    own = {"run": {"output_folder": str(tmp_path / "runs")}, "dataset": {"resolution": 64}}
    return resolve_config([Layer("test", own), Layer("more", sections)])


def located(folder: Path) -> tuple[BaseFiles, BaseIdentity]:
    files = locate_base(str(folder))
    return files, identify_base(files)[1]


def plan_for(folder: Path, tmp_path: Path, **sections: Any) -> Plan:
    files, identity = located(folder)
    return build_plan(resolved(tmp_path, **sections), identity, None, files)


def pictures(tmp_path: Path) -> tuple[dict[str, Any], Dataset]:
    tiny_pictures(tmp_path / "data" / "3_a", 3, sizes=[(64, 64), (64, 64), (128, 32)])
    tiny_pictures(tmp_path / "reg", 2)
    (tmp_path / "data" / "broken.png").write_bytes(b"nothing")
    settings = {
        "folder": str(tmp_path / "data"),
        "regularization_folder": str(tmp_path / "reg"),
        "bucket_step": 32,
        "repeats": 2,
    }
    return settings, scan_dataset(resolved(tmp_path, dataset=settings).config.dataset)


def test_steps_epochs_and_buckets_follow_from_the_pictures(tmp_path: Path) -> None:
    settings, dataset = pictures(tmp_path)
    train = {"steps": 30, "batch_size": 4, "gradient_accumulation": 2}
    plan = build_plan(resolved(tmp_path, dataset=settings, train=train), None, dataset)
    assert (plan.pictures, plan.regularization, plan.refused) == (3, 2, 1)
    # 2 square pictures x 6 + 2 regularization x 2 = 16 in one bucket, 6 of the wide one in another.
    assert {(row.pictures, row.uses, row.batches) for row in plan.buckets} == {(4, 16, 4), (1, 6, 2)}
    assert (plan.uses_per_epoch, plan.batches_per_epoch, plan.steps_per_epoch, plan.epochs) == (22, 6, 3.0, 10.0)
    assert plan.views_per_picture == 60.0


def test_the_batches_are_those_that_the_loader_makes(tmp_path: Path) -> None:
    from lorasmith.engine.dataset.epochs import epoch_batches

    settings, dataset = pictures(tmp_path)
    layers = resolved(tmp_path, dataset=settings, train={"batch_size": 5})
    buckets = plan_buckets(dataset.items, layers.config.dataset)
    assert build_plan(layers, None, dataset).batches_per_epoch == len(epoch_batches(buckets, 5, seed=1, epoch=0))


def test_fractional_repeats_mirrors_and_resolutions_are_counted(tmp_path: Path) -> None:
    settings, dataset = pictures(tmp_path)
    settings |= {"flip": True, "resolution": 128, "more_resolutions": [64], "repeats": 1}
    items = tuple(dataclasses.replace(item, repeats=1.5) for item in dataset.items)
    plan = build_plan(resolved(tmp_path, dataset=settings), None, dataclasses.replace(dataset, items=items))
    # 4 squares are left out of 128, which would double them; the wide one (128x32) is enlarged 1.6 times by it.
    assert {row.size: row.pictures for row in plan.buckets} == {"64x64": 4, "128x32": 1}
    assert plan.left_out_resolutions == 5
    assert plan.uses_per_epoch is not None
    assert 10 < plan.uses_per_epoch < 20
    assert plan.num_latents == 10
    assert "5 left out of a resolution that would enlarge them too much" in dict(plan.rows())["buckets"]


def test_pictures_that_are_enlarged_much_are_a_warning(tmp_path: Path) -> None:
    settings, dataset = pictures(tmp_path)
    plan = build_plan(resolved(tmp_path, dataset=settings | {"resolution": 128}), None, dataset)
    assert plan.enlarged == 5
    assert any("5 pictures are enlarged more than 1.5 times" in warning for warning in plan.warnings)
    assert not build_plan(resolved(tmp_path, dataset=settings), None, dataset).enlarged


def test_random_crops_are_planned_with_the_seed_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, dataset = pictures(tmp_path)
    seeds = []

    def spy(*arguments: Any) -> Any:
        seeds.append(arguments[3])
        return plan_buckets(*arguments)

    monkeypatch.setattr(plan_module, "plan_buckets", spy)
    build_plan(resolved(tmp_path, dataset=settings, run={"seed": 9}), None, dataset)
    assert seeds == [9]


def test_captions_that_are_too_many_to_encode_ahead_are_said_to_come_as_they_come(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, dataset = pictures(tmp_path)
    files, identity = located(tiny_sd15)

    def cache_row(**captions: Any) -> str:
        layers = resolved(tmp_path, dataset=settings, captions={"trigger": "zqx", **captions})
        return dict(build_plan(layers, identity, dataset, files).rows())["cache"]

    assert "5 encoded pictures, 5 captions" in cache_row()
    many = cache_row(shuffle=True, keep_tokens=0, prefix="{a|b}", wildcards=True)
    assert "captions;" in many
    monkeypatch.setattr(cache_size, "MAX_PROMPT_BYTES", 10_000)
    assert "captions encoded as they come" in cache_row()


def test_a_cache_larger_than_its_disk_is_a_warning(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, dataset = pictures(tmp_path)
    files, identity = located(tiny_sd15)
    monkeypatch.setattr(plan_module.storage, "free_bytes", lambda path: 1000)
    plan = build_plan(resolved(tmp_path, dataset=settings), identity, dataset, files)
    assert any("disk of the cache" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"rank": 4, "targets": "attention-mlp"},
        {"kind": "locon", "rank": 4, "conv_rank": 2, "targets": "attention-mlp"},
        {"rank": 3, "text_encoder": True},
    ],
)
@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sd15_v"])
def test_the_planned_lora_has_the_size_of_the_built_one(
    base: str, tmp_path: Path, adapter: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    import torch

    from lorasmith.engine.adapters import attach_adapter
    from lorasmith.engine.export import export_lora

    folder = request.getfixturevalue(base)
    files, identity = located(folder)
    layers = resolved(tmp_path, adapter=adapter, export={"layouts": ["kohya", "diffusers"]})
    plan = build_plan(layers, identity, None, files)
    family = identify_base(files)[0].load(files, identity, torch.device("cpu"), torch.float32)
    built = attach_adapter(family, layers.config.adapter, seed=1)
    assert (plan.adapter_modules, plan.adapter_parameters) == (len(built.modules), built.num_parameters())
    with torch.no_grad():
        for module in built.modules:
            module.up.fill_(0.01)
    results = export_lora(family, built, layers.config, tmp_path / "export", "x", {}, 1)
    assert plan.export_bytes == pytest.approx(sum(result.bytes for result in results), rel=0.25)


def test_disk_need_counts_checkpoints_previews_and_free_space(tmp_path: Path, tiny_sd15: Path) -> None:
    plan = plan_for(
        tiny_sd15,
        tmp_path,
        train={"steps": 1000},
        checkpoints={"every": 400, "keep": 9},
        previews={"every": 250, "prompts": ["a", "b", "c"], "seeds": [1, 2]},
    )
    assert plan.num_checkpoints == 3
    assert plan.num_previews == 4 * 3 * 2
    assert plan.checkpoint_bytes is not None
    assert plan.disk_needed_bytes is not None
    assert plan.disk_needed_bytes > 3 * plan.checkpoint_bytes
    assert plan.disk_free_bytes > 0
    assert not (tmp_path / "runs").exists()  # planning writes nothing


def test_a_disk_too_small_is_a_warning(tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.storage, "free_bytes", lambda path: 1000)
    assert any("free space" in warning for warning in plan_for(tiny_sd15, tmp_path).warnings)


def test_weights_are_counted_from_headers_by_part(tmp_path: Path, tiny_sd15: Path) -> None:
    plan = plan_for(tiny_sd15, tmp_path)
    size = (tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert plan.weights_bytes["unet"] == pytest.approx(size, rel=0.1)
    assert set(plan.weights_bytes) == {"unet", "vae", "text_encoder"}


class OriginalLayout(BaseFiles):
    """One file in the original layout, with an autoencoder that has an attention of its own."""

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
        names = [f"{block}.attn1.to_q", f"{block}.attn1.to_out.0", "model.diffusion_model.input_blocks.0.0"]
        return {f"{name}.weight": TensorInfo("F16", (320, 320)) for name in [*names, "first_stage_model.to_q"]}


def test_a_single_file_is_planned_as_far_as_its_names_tell(tmp_path: Path, tiny_sd15: Path) -> None:
    _, identity = located(tiny_sd15)
    files = OriginalLayout("single_file", tmp_path / "base.safetensors", "x")
    plan = build_plan(resolved(tmp_path, adapter={"rank": 2}), identity, None, files)
    assert (plan.adapter_modules, plan.adapter_parameters) == (2, 2 * 2 * 640)
    assert plan.weights_bytes == {"base.safetensors": 4 * 320 * 320 * 2}
    assert build_plan(resolved(tmp_path, adapter={"kind": "locon"}), identity, None, files).adapter_modules is None


def test_memory_is_not_forecast_for_a_base_that_nobody_counted(tmp_path: Path, tiny_sd15: Path) -> None:
    plan = plan_for(tiny_sd15, tmp_path)
    assert plan.memory_gib is None
    assert "not forecast" in plan.memory_note


class FullSize(BaseFiles):
    """Headers as large as the real Stable Diffusion 1.5."""

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        if part != "unet":
            return {}
        attention = {f"a.{n}.attn1.to_q.weight": TensorInfo("F16", (640, 640)) for n in range(128)}
        rest = 859_520_964 - 128 * 640 * 640
        return attention | {"rest.weight": TensorInfo("F16", (rest,))}

    def config(self, part: str) -> dict[str, Any]:
        return {"unet": ["diffusers", "UNet2DConditionModel"]}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory of Stable Diffusion 1.5 be known: that of a sample, with its number of weights."""
    sample = small_unet()
    denoiser = dataclasses.replace(sample.denoiser, packed=800_000_000, plain=59_520_964)
    monkeypatch.setattr(of_run, "find_memory", lambda *_: dataclasses.replace(sample, denoiser=denoiser))


def full_size(tmp_path: Path, tiny_sd15: Path, **sections: Any) -> Plan:
    _, identity = located(tiny_sd15)
    layers = resolved(tmp_path, **({"dataset": {"resolution": 512}} | sections))
    return build_plan(layers, identity, None, FullSize("folder", tiny_sd15, "x"))


@pytest.mark.usefixtures("counted")
def test_memory_is_forecast_and_told_part_by_part(tmp_path: Path, tiny_sd15: Path) -> None:
    plan = full_size(tmp_path, tiny_sd15)
    assert plan.forecast is not None
    parameters = plan.adapter_parameters
    assert parameters is not None
    assert plan.forecast.step.of("weights") == pytest.approx(859_520_964 * 2 / GIB)
    assert plan.forecast.step.of("adapter") == pytest.approx(parameters * 4 / GIB)
    assert plan.forecast.step.of("activations") == pytest.approx((300 + 100 + 7_000 * 0.262144) / 1024)
    assert plan.memory_gib == round(plan.forecast.peak.total, 2)
    rows = dict(plan.rows())
    assert f"about {plan.memory_gib:.1f} GiB" in rows["GPU memory"]
    assert "weights 1.6" in rows["GPU memory"]
    assert "derived from the model's own graph" in rows["by stage"]
    assert "image encode" in rows["by stage"]
    assert "program" in rows["main memory"]
    assert json.loads(json.dumps(plan.to_json()))["forecast"]["stages"]["step"]["weights"] == pytest.approx(1.601)


@pytest.mark.usefixtures("counted")
def test_memory_follows_the_settings_or_says_why_it_cannot(tmp_path: Path, tiny_sd15: Path) -> None:
    def step(**sections: Any) -> float:
        found = full_size(tmp_path, tiny_sd15, **sections).forecast
        assert found is not None
        return found.step.without_slack

    plain = step()
    four = step(train={"batch_size": 4})
    assert four - plain == pytest.approx(3 * (100 + 7_000 * 0.262144) / 1024)
    assert step(train={"precision": "fp32"}) > plain + 859_520_964 * 2 / GIB
    unknown = full_size(tmp_path, tiny_sd15, adapter={"kind": "locon"})
    assert unknown.forecast is None
    assert "not counted" in unknown.memory_note
    assert "plan --measure" in unknown.memory_note


@pytest.mark.usefixtures("counted")
def test_what_was_measured_on_the_card_corrects_the_plan(tmp_path: Path, tiny_sd15: Path) -> None:
    plain = full_size(tmp_path, tiny_sd15).forecast
    _, identity = located(tiny_sd15)
    layers = resolved(tmp_path, dataset={"resolution": 512})
    files = FullSize("folder", tiny_sd15, "x")
    plan = build_plan(layers, identity, None, files, Calibration(memory=1.1, runs=1))
    assert plain is not None
    assert plan.forecast is not None
    assert plan.forecast.step.total == pytest.approx(plain.step.without_slack * 1.1)
    assert plan.memory_note == "calibrated on this card, 1 run"


def test_a_training_adapter_in_a_file_is_counted(tmp_path: Path, tiny_sd15: Path, counted: None) -> None:
    plain = full_size(tmp_path, tiny_sd15).forecast
    (tmp_path / "beside.safetensors").write_bytes(b"0" * 1_000_000)
    found = full_size(tmp_path, tiny_sd15, base={"training_adapter": str(tmp_path / "beside.safetensors")}).forecast
    assert plain is not None
    assert found is not None
    assert found.step.without_slack - plain.step.without_slack == pytest.approx(1_000_000 / GIB)


def test_without_base_and_pictures_the_plan_says_what_it_does_not_know(tmp_path: Path) -> None:
    plan = build_plan(resolved(tmp_path))
    assert plan.epochs is None
    assert plan.disk_needed_bytes is None
    rows = dict(plan.rows())
    assert rows["base model"] == "not chosen"
    assert "once the base model" in rows["LoRA"]
    assert "once the base model" in rows["GPU memory"]
    assert json.loads(json.dumps(plan.to_json()))["epochs"] is None


def test_too_few_or_too_many_steps_and_thin_batches_are_warnings(tmp_path: Path) -> None:
    settings, dataset = pictures(tmp_path)

    def warnings(**train: int) -> str:
        return " ".join(build_plan(resolved(tmp_path, dataset=settings, train=train), None, dataset).warnings)

    assert "less than one epoch" in warnings(steps=2)
    assert "overfit" in warnings(steps=10_000)
    assert "smaller than train.batch_size" in warnings(steps=50, batch_size=8)


def test_torch_is_not_needed(tmp_path: Path, tiny_sd15: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from lorasmith.engine.plan import build_plan;"
        "from lorasmith.engine.run_file import Layer, resolve_config; from lorasmith.engine.sources import locate_base;"
        "from lorasmith.engine.families import identify_base; files = locate_base(sys.argv[1]);"
        "print(build_plan(resolve_config([]), identify_base(files)[1], None, files).adapter_modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tiny_sd15)], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 0


def test_held_out_pictures_are_not_counted_as_trained(tmp_path: Path) -> None:
    settings, dataset = pictures(tmp_path)
    plan = build_plan(resolved(tmp_path, dataset=settings, validation={"every": 10}), None, dataset)
    assert plan.pictures == 2


def test_a_setting_without_meaning_for_the_base_is_a_warning(tiny_sd15: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_sd15, tmp_path, objective={"timestep_sampling": "sigmoid"})
    assert any(warning.startswith("objective.timestep_sampling has no meaning") for warning in plan.warnings)


def test_the_plan_tells_the_scale_and_which_programs_load_the_file() -> None:
    resolved = resolve_config([Layer("test", {"adapter": {"rank": 16, "alpha": 4.0}, "export": {"layouts": ["auto"]}})])
    module = families()["sd15"]
    identity = BaseIdentity("sd15", "x", "1.x", "epsilon", 512, 1, "fp16")
    plan = build_plan(resolved, identity)
    assert plan.effective_scale == 0.25
    layout = module.SPEC.layouts[0]
    assert plan.loads_in == {layout: module.SPEC.readers[layout]}
    assert (f"{layout} file", f"loads in {', '.join(module.SPEC.readers[layout])}") in plan.rows()
    assert build_plan(resolved).loads_in == {}


@pytest.mark.usefixtures("counted")
def test_an_adapter_that_was_simulated_here_is_forecast(tmp_path: Path, tiny_sd15: Path) -> None:
    adapter = {"kind": "locon", "rank": 4}
    layers = resolved(tmp_path, dataset={"resolution": 512}, adapter=adapter)
    files = FullSize("folder", tiny_sd15, "x")
    spec = families()["sd15"].SPEC
    known = of_run.Known(spec, files, 512 * 512)
    assert of_run.lacks_only_counting(layers.config, known)
    step = dataclasses.replace(small_unet().steps["attention"], per_rank=1000)
    store_step_memory(step_key("sd15", files, layers.config), step)
    assert not of_run.lacks_only_counting(layers.config, known)
    found, basis = of_run.forecast_run(layers.config, known)
    assert found is not None
    assert found.step.of("adapter") == pytest.approx(4 * 1000 * 4 / GIB)
    assert "simulated" in basis
    # Simulated in fp32, a step needs no factor for it.
    in_fp32 = resolved(tmp_path, dataset={"resolution": 512}, adapter=adapter, train={"precision": "fp32"}).config
    store_step_memory(step_key("sd15", files, in_fp32), step)
    found_fp32, _ = of_run.forecast_run(in_fp32, known)
    assert found_fp32 is not None
    assert found_fp32.step.of("activations") == pytest.approx(found.step.of("activations"))
