"""What every base model family must do; one body over all of them, each on its tiny real model."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.dataset.cache_size import numbers_of_prompt
from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import (
    DrawSettings,
    Family,
    FamilyModule,
    FusedName,
    PictureRequest,
    Placement,
    families,
    identify_base,
)
from lorasmith.engine.sources import BaseFiles
from tests.tiny import TINY_BUILDERS, TINY_SIDE

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Let the collections in here look at what is made in here: a full one over every library takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=sorted(families()))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def module(name: str) -> FamilyModule:
    return families()[name]


@pytest.fixture(scope="module")
def files(name: str, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    assert name in TINY_BUILDERS, f"tests/tiny.py has no builder for {name}"
    folder = TINY_BUILDERS[name](tmp_path_factory.mktemp("family") / name)
    return BaseFiles("folder", folder, str(folder))


@pytest.fixture(scope="module")
def family(files: BaseFiles) -> Family:
    return _load(files)


def _load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


def _pixels(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.rand(3, TINY_SIDE, TINY_SIDE, generator=_generator(seed)) * 2 - 1 for seed in seeds])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _requests(family: Family, *seeds: int) -> list[PictureRequest]:
    positive, negative = family.encode_prompts(["a red circle", ""])
    return [PictureRequest(positive, negative, seed) for seed in seeds]


def test_the_sizes_in_the_spec_are_those_of_what_is_encoded(family: Family) -> None:
    spec, (latents,) = family.spec, family.encode_images(_pixels(1))
    side = TINY_SIDE // spec.latent_downscale
    assert latents.shape == (spec.latent_channels, side, side)
    short, longest = family.encode_prompts(["a red circle", "a red circle " * 500])
    most = numbers_of_prompt(spec, family.identity)
    # Where a prompt keeps its natural length, the size in the spec is that of the longest one.
    assert sum(tensor.numel() for tensor in short.values()) <= most
    assert 0.9 * most <= sum(tensor.numel() for tensor in longest.values()) <= 1.1 * most


def _times(family: Family, *levels: int) -> torch.Tensor:
    """Timesteps as the family's objective gives them."""
    return torch.tensor(levels, dtype=torch.long if family.spec.objective == "ddpm" else torch.float32)


SETTINGS = DrawSettings(steps=3, guidance=3.0, height=TINY_SIDE, width=TINY_SIDE)


def test_a_family_is_found_under_its_own_name_with_complete_facts(name: str, module: FamilyModule) -> None:
    spec = module.SPEC
    assert spec.name == name
    assert {"attention", "attention-mlp"} <= set(spec.targets)
    assert set(spec.targets["attention"]) < set(spec.targets["attention-mlp"])
    assert spec.layouts
    assert spec.hub_ids
    assert spec.license.url.startswith("https://")
    assert spec.license.consequence.endswith(".")
    assert spec.default_resolution % 64 == 0


def test_recognizing_a_base_model_imports_no_torch(name: str, files: BaseFiles) -> None:
    code = """
import json, sys
from lorasmith.engine.families import identify_base
from lorasmith.engine.sources import locate_base
module, identity = identify_base(locate_base(sys.argv[1]))
heavy = {"torch", "diffusers", "transformers", "peft"} & set(sys.modules)
print(json.dumps([identity.family, identity.native_resolution, sorted(heavy)]))
"""
    command = [sys.executable, "-c", code, str(files.path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == [name, TINY_SIDE, []]


def test_the_label_tells_prediction_precision_and_size(files: BaseFiles) -> None:
    _, identity = identify_base(files)
    assert "fp32" in identity.label
    assert identity.parameters > 10_000
    assert identity.parts_missing == ()


def test_asking_for_another_family_than_the_files_are_is_an_error(files: BaseFiles) -> None:
    with pytest.raises(BaseModelError, match="Unknown family flat-earth"):
        identify_base(files, wanted="flat-earth")


def test_a_lora_is_no_base_model_and_is_called_by_its_name(module: FamilyModule, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "mine.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}, path)
    lora = BaseFiles("single_file", path, "mine.safetensors")
    assert module.identify(lora) is None
    with pytest.raises(BaseModelError, match="looks like a LoRA, not a base model"):
        identify_base(lora)


def test_a_folder_without_weights_is_recognized_and_refused_by_the_missing_part(
    module: FamilyModule, files: BaseFiles, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(files.path, tmp_path / "base")
    next((tmp_path / "base" / "vae").glob("*.safetensors")).unlink()
    broken = BaseFiles("folder", tmp_path / "base", "base")
    identity = module.identify(broken)
    assert identity is not None
    assert identity.parts_missing == ("vae",)
    with pytest.raises(BaseModelError, match="has no vae"):
        module.load(broken, identity, CPU, torch.float32)


def test_everything_is_loaded_frozen_and_in_eval_mode_in_the_asked_format(files: BaseFiles) -> None:
    family = _load(files, torch.bfloat16)
    modules = [family.denoiser, *family.text_encoders.values()]
    assert family.dtype == torch.bfloat16
    for part in modules:
        assert not part.training
        # Some classes compute a few layers in 32 bits, and say which.
        exact = set(getattr(part, "_keep_in_fp32_modules", None) or ())
        for path, parameter in part.named_parameters():
            allowed = {torch.bfloat16, torch.float32} if exact & set(path.split(".")) else {torch.bfloat16}
            assert parameter.dtype in allowed, path
            assert not parameter.requires_grad
    latents = family.encode_images(_pixels(1))
    assert latents.dtype == torch.bfloat16
    (conditioning,) = family.encode_prompts(["a red circle"])
    prediction = family.predict(latents, _times(family, 500), family.collate([conditioning]))
    assert torch.isfinite(prediction).all()


def test_latents_are_the_same_each_time_and_do_not_depend_on_the_batch(family: Family) -> None:
    both = family.encode_images(_pixels(1, 2))
    assert both.ndim == 4
    assert TINY_SIDE % both.shape[-1] == 0
    torch.testing.assert_close(both[1:], family.encode_images(_pixels(2)))
    assert not torch.equal(both[0], both[1])


def test_prompts_are_encoded_without_a_batch_dimension_and_independently(family: Family) -> None:
    red, blue = family.encode_prompts(["a red circle", "a blue square"])
    (alone,) = family.encode_prompts(["a blue square"])
    batch = family.collate([red, blue])
    for key, value in alone.items():
        torch.testing.assert_close(blue[key], value)
        assert batch[key].shape[0] == 2
    assert any(not torch.equal(red[key], blue[key]) for key in red)


def test_a_blank_prompt_has_the_shapes_of_an_encoded_one(family: Family) -> None:
    (encoded,) = family.encode_prompts(["a red circle"])
    blank = family.blank_prompt(len(encoded["prompt_embeds"]))
    shapes = [{key: (value.shape, value.dtype) for key, value in item.items()} for item in (encoded, blank)]
    assert shapes[0] == shapes[1]


def test_a_prompt_beyond_the_token_limit_is_cut_and_not_an_error(family: Family) -> None:
    long, longer, short = family.encode_prompts(["red " * 600, "red " * 900, "red"])
    assert {key: value.shape for key, value in long.items()} == {key: value.shape for key, value in longer.items()}
    assert sum(value.numel() for value in short.values()) <= sum(value.numel() for value in long.values())


def test_gradients_reach_the_text_encoders(files: BaseFiles) -> None:
    family = _load(files)
    for component in family.spec.trainable_text_encoders:
        encoder = family.text_encoders[component]
        parameter = next(p for name, p in encoder.named_parameters() if name.endswith("q_proj.weight"))
        parameter.requires_grad_(True)
        (conditioning,) = family.encode_prompts(["a red circle"])
        sum(value.square().sum() for value in conditioning.values() if value.requires_grad).backward()
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_the_prediction_has_the_shape_of_the_latents_and_reads_its_own_row_only(family: Family) -> None:
    latents = family.encode_images(_pixels(1, 2))
    conditionings = family.encode_prompts(["a red circle", "a blue square"])
    timesteps = _times(family, 10, 900)
    both = family.predict(latents, timesteps, family.collate(conditionings))
    alone = family.predict(latents[1:], timesteps[1:], family.collate(conditionings[1:]))
    assert both.shape == latents.shape
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_prediction_depends_on_noise_time_and_prompt(family: Family) -> None:
    latents = family.encode_images(_pixels(1))
    red, blue = (family.collate([item]) for item in family.encode_prompts(["a red circle", "a blue square"]))
    early, late = _times(family, 10), _times(family, 900)
    reference = family.predict(latents, early, red)
    assert torch.equal(family.predict(latents, early, red), reference)
    for other in (
        family.predict(latents + 1, early, red),
        family.predict(latents, late, red),
        family.predict(latents, early, blue),
    ):
        assert (other - reference).abs().max() > 1e-4


def test_pictures_follow_their_seed_and_not_the_batch(family: Family) -> None:
    first, second = family.draw(_requests(family, 1, 2), SETTINGS)
    (again,) = family.draw(_requests(family, 2), SETTINGS)
    assert first.size == (TINY_SIDE, TINY_SIDE)
    assert first.tobytes() != second.tobytes()
    difference = torch.tensor(list(second.tobytes())) - torch.tensor(list(again.tobytes()))
    assert difference.abs().max() <= 1


def test_each_denoising_step_is_reported_and_what_the_callback_raises_ends_the_drawing(family: Family) -> None:
    seen: list[int] = []
    family.draw(_requests(family, 1), SETTINGS, seen.append)
    assert seen == [1, 2, 3]

    def stop(_step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        family.draw(_requests(family, 1), SETTINGS, stop)


def test_drawing_knows_no_dropout_and_leaves_the_training_state_and_the_noise_schedule_as_they_were(
    files: BaseFiles,
) -> None:
    family = _load(files)
    (before,) = family.draw(_requests(family, 1), SETTINGS)
    schedule = dict(family.noise_schedule)
    dropouts = [part for part in family.denoiser.modules() if isinstance(part, torch.nn.Dropout)]
    for part in dropouts:
        part.p, part.training = 0.9, True
    (after,) = family.draw(_requests(family, 1), SETTINGS)
    assert after.tobytes() == before.tobytes()
    assert all(part.training for part in dropouts)
    assert not family.denoiser.training
    assert dict(family.noise_schedule) == schedule


def test_released_encoders_are_really_gone_and_pictures_stay_the_same(files: BaseFiles) -> None:
    family = _load(files)
    requests = _requests(family, 5)
    (before,) = family.draw(requests, SETTINGS)
    encoders = [weakref.ref(encoder) for encoder in family.text_encoders.values()]
    autoencoders = [weakref.ref(value) for value in vars(family).values() if _is_autoencoder(value)]
    assert autoencoders
    family.release_encoders()
    gc.collect()
    assert family.text_encoders == {}
    assert [reference() for reference in encoders + autoencoders] == [None] * len(encoders + autoencoders)
    with pytest.raises(BaseModelError, match="no longer in memory"):
        family.encode_prompts(["a red circle"])
    with pytest.raises(BaseModelError, match="no longer in memory"):
        family.encode_images(_pixels(1))
    (after,) = family.draw(requests, SETTINGS)
    assert after.tobytes() == before.tobytes()
    assert not any(_is_autoencoder(value) for value in vars(family).values())


def test_a_trained_text_encoder_stays_when_the_autoencoder_goes(files: BaseFiles) -> None:
    family = _load(files)
    family.release_encoders(keep_text=True)
    assert family.encode_prompts(["a red circle"])
    assert not any(_is_autoencoder(value) for value in vars(family).values())


def test_parts_loaded_apart_give_the_very_same_results(files: BaseFiles, family: Family) -> None:
    module, identity = identify_base(files)
    apart = module.load(files, identity, CPU, torch.float32, Placement(apart=True))
    assert not any(_is_autoencoder(value) for value in vars(apart).values())
    assert torch.equal(apart.encode_images(_pixels(1, 2)), family.encode_images(_pixels(1, 2)))
    for own, other in zip(apart.encode_prompts(["red", "blue"]), family.encode_prompts(["red", "blue"]), strict=True):
        assert all(torch.equal(own[key], other[key]) for key in other)
    assert not any(_is_autoencoder(value) for value in vars(apart).values())
    assert (
        apart.draw(_requests(apart, 1), SETTINGS)[0].tobytes()
        == family.draw(_requests(family, 1), SETTINGS)[0].tobytes()
    )
    apart.release_encoders()
    with pytest.raises(BaseModelError, match="no longer in memory"):
        apart.encode_images(_pixels(1))


def test_each_measure_that_saves_memory_is_taken_once_and_keeps_the_results(files: BaseFiles) -> None:
    family = _load(files)
    latents, (red,) = family.encode_images(_pixels(1)), family.encode_prompts(["red"])
    assert family.save_memory("apart")
    assert not family.save_memory("apart")
    assert torch.equal(family.encode_images(_pixels(1)), latents)
    assert all(torch.equal(value, red[key]) for key, value in family.encode_prompts(["red"])[0].items())
    # There is no device to leave.
    assert not family.save_memory("draw on cpu")


def test_tiles_are_smaller_than_the_base_models_own_pictures_and_nearly_as_good(files: BaseFiles) -> None:
    family = _load(files)
    assert family.tile_side == 0
    (whole,), (drawn,) = family.encode_images(_pixels(1)), family.draw(_requests(family, 1), SETTINGS)
    assert family.save_memory("tiles")
    assert not family.save_memory("tiles")
    assert 0 < family.tile_side < TINY_SIDE
    (tiled,) = family.encode_images(_pixels(1))
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < whole.std()
    assert family.draw(_requests(family, 1), SETTINGS)[0].size == drawn.size
    small = _pixels(1)[..., : family.tile_side, : family.tile_side]
    assert torch.equal(family.encode_images(small), _load(files).encode_images(small))


def _is_autoencoder(value: Any) -> bool:
    return type(value).__name__.startswith("Autoencoder")


def test_every_target_names_layers_of_the_denoiser(family: Family) -> None:
    spec = family.spec
    # The real model has more blocks than the tiny one: a layer named by its block's number is looked for in the first.
    suffixes = (*spec.targets["attention-mlp"], *spec.conv_targets)
    for suffix in {re.sub(r"blocks\.\d+\.", "blocks.0.", suffix) for suffix in suffixes}:
        assert _matching(family.denoiser, (suffix,)), suffix
    assert set(spec.trainable_text_encoders) <= set(spec.text_parts) == set(family.text_encoders)
    assert bool(spec.trainable_text_encoders) == bool(spec.text_encoder_targets)
    for component in spec.trainable_text_encoders:
        for suffix in spec.text_encoder_targets:
            assert _matching(family.text_encoders[component], (suffix,)), suffix
    attention = _matching(family.denoiser, spec.targets["attention"])
    assert {type(layer) for layer in attention.values()} == {torch.nn.Linear}
    kinds = {type(layer) for layer in _matching(family.denoiser, spec.conv_targets).values()}
    assert kinds <= {torch.nn.Conv2d, torch.nn.Linear}


def test_block_classes_are_those_that_repeat_in_the_denoiser(family: Family) -> None:
    present = {type(part).__name__ for part in family.denoiser.modules()}
    assert set(family.spec.block_classes) <= present


def test_every_layer_has_a_name_of_its_own_in_every_layout(module: FamilyModule, family: Family) -> None:
    for layout in module.SPEC.layouts:
        parts = {"denoiser": family.denoiser}
        parts |= {name: family.text_encoders[name] for name in module.SPEC.trainable_text_encoders}
        names = [
            _place(module.export_name(layout, component, path), path)
            for component, part in parts.items()
            for path, layer in part.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        ]
        assert len(names) == len(set(names))
    with pytest.raises(ExportError, match="no flat-earth name"):
        module.export_name("flat-earth", "denoiser", "mid_block")


def test_a_chosen_prediction_wins_over_the_files(module: FamilyModule, files: BaseFiles) -> None:
    if module.SPEC.objective != "ddpm":
        pytest.skip("only ddpm models differ in what they predict")
    _, identity = identify_base(files)
    assert _load(files).noise_schedule["prediction_type"] == identity.prediction
    other = dataclasses.replace(identity, prediction="v_prediction")
    family = module.load(files, other, CPU, torch.float32)
    assert family.noise_schedule["prediction_type"] == "v_prediction"


def test_tokenizers_load_alone(module: FamilyModule, files: BaseFiles) -> None:
    tokenizers = module.load_tokenizers(files)
    assert len(tokenizers) == len(module.SPEC.text_parts)
    for tokenizer in tokenizers:
        ids = tokenizer("red circle").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red circle"


def _place(name: str | FusedName, path: str) -> tuple[str, int]:
    """Where a layer's weight lies: the name, and its rows among those of fused layers."""
    return (name, 0) if isinstance(name, str) else (name.name, name.rows.index(path))


def _matching(network: torch.nn.Module, suffixes: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    ends = tuple(f".{suffix}" for suffix in suffixes)
    # What holds a layer may be called as another layer is (`to_out` and `to_out.0`); it is no layer itself.
    layers = ((path, layer) for path, layer in network.named_modules() if not isinstance(layer, torch.nn.ModuleList))
    return {path: layer for path, layer in layers if f".{path}".endswith(ends)}
