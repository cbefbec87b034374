from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.engine.adapter_layers import kronecker_sides, rotation_shape
from lorasmith.engine.adapters import Adapter, attach_adapter, selected_layers
from lorasmith.engine.adapters.change import base_weight
from lorasmith.engine.adapters.injection import RankDropout
from lorasmith.engine.adapters.rotation import RotatedLayer
from lorasmith.engine.adapters.started import first_product
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.config_adapter import effective_scale
from lorasmith.engine.disk_plan import plan_disk
from lorasmith.engine.errors import BaseModelError, CheckpointError, ConfigError
from lorasmith.engine.families import Family
from lorasmith.engine.quantization.frozen_linear import FrozenLinear
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_setup import find_base
from tests.engine.running import load_tiny, tiny_config

LOCON = AdapterSettings(kind="locon", rank=4, alpha=2.0, conv_rank=3, conv_alpha=1.5)


def predict(family: Family) -> torch.Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(family.dtype)
    conditioning = family.collate(family.encode_prompts(["a red circle"]))
    return family.predict(noisy, torch.tensor([500]), conditioning)


def fill(adapter: Adapter) -> None:
    with torch.no_grad():
        for number, module in enumerate(adapter.modules):
            module.up.normal_(generator=torch.Generator().manual_seed(number))


def test_lora_adapts_every_wanted_linear_layer_and_nothing_else_is_trained(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    wanted = selected_layers(family.denoiser, family.spec, AdapterSettings(), "denoiser")
    assert len(wanted) == 32
    adapter = attach_adapter(family, AdapterSettings(rank=4), seed=1)
    assert [module.path for module in adapter.modules] == sorted(wanted)
    trained = {id(p) for p in family.denoiser.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.parameters()}
    assert not any(p.requires_grad for p in family.text_encoders["text_encoder"].parameters())


def test_a_fresh_adapter_changes_nothing(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    before = predict(family)
    attach_adapter(family, AdapterSettings(), seed=1)
    assert torch.equal(predict(family), before)


def test_first_weights_follow_from_seed_and_layer_name_alone(tiny_sd15: Path) -> None:
    torch.manual_seed(0)
    one = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=5).state_dict()
    torch.manual_seed(99)
    # Other layers beside them draw nothing from a shared stream.
    more = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(targets="attention-mlp"), seed=5).state_dict()
    other = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=6).state_dict()
    assert all(torch.equal(more[key], value) for key, value in one.items())
    assert not any(torch.equal(other[key], value) for key, value in one.items() if "lora_A" in key)


def test_down_matrices_start_as_linear_layers_do(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=64), seed=1)
    for module in adapter.modules:
        bound = module.down.shape[1] ** -0.5
        assert module.down.detach().abs().max() <= bound
        assert module.down.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not module.up.any()


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sd15_v"])
def test_locon_gives_convolutions_their_own_rank_and_alpha(base: str, request: pytest.FixtureRequest) -> None:
    family = load_tiny(request.getfixturevalue(base))
    adapter = attach_adapter(family, LOCON, seed=1)
    kinds = {module.path: family.denoiser.get_submodule(module.path) for module in adapter.modules}
    ranks = {True: set(), False: set()}
    for module in adapter.modules:
        layer = kinds[module.path].base_layer
        # A 1x1 convolution is a linear layer in all but name.
        wide = isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
        ranks[wide].add((module.rank, module.alpha))
        assert module.down.dim() == layer.weight.dim()
    assert ranks == {True: {(3, 1.5)}, False: {(4, 2.0)}}


def test_delta_is_what_the_adapter_adds_to_each_weight(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, LOCON, seed=1)
    fill(adapter)
    adapted = predict(family)
    adapter.set_enabled(False)
    assert not torch.allclose(predict(family), adapted, atol=1e-3)
    with torch.no_grad():
        for module in adapter.modules:
            weight = family.denoiser.get_submodule(module.path).base_layer.weight
            assert adapter.delta(module).shape == weight.shape
            weight += adapter.delta(module)
    assert torch.allclose(predict(family), adapted, atol=1e-4, rtol=1e-4)


def test_weights_stay_fp32_beside_a_bf16_base(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15, torch.bfloat16)
    adapter = attach_adapter(family, LOCON, seed=1)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    loss = predict(family).float().square().mean()
    loss.backward()
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}
    assert len([p for p in adapter.parameters() if p.grad is not None]) == len(adapter.parameters())


def test_the_text_encoder_gets_an_adapter_only_where_asked(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(text_encoder=True), seed=1)
    assert {module.component for module in adapter.modules} == {"denoiser", "text_encoder"}
    predict(family).mean().backward()
    ups = [m.up for m in adapter.modules if m.component == "text_encoder"]
    assert any(up.grad is not None and up.grad.any() for up in ups)


def test_state_goes_round_and_its_names_tell_component_and_layer(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(text_encoder=True), seed=1)
    fill(adapter)
    saved = adapter.state_dict()
    assert "text_encoder" in {key.split(".")[0] for key in saved}
    other = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(text_encoder=True), seed=2)
    other.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())


def test_an_adapter_of_another_rank_is_refused(tiny_sd15: Path) -> None:
    saved = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=2), seed=1).state_dict()
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=4), seed=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        adapter.load_state_dict(saved)


def test_a_base_without_the_wanted_layers_is_refused(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    family.denoiser = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(BaseModelError, match="no layer to adapt"):
        attach_adapter(family, AdapterSettings(), seed=1)


def test_one_broken_weight_is_noticed(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=1)
    assert adapter.all_finite()
    with torch.no_grad():
        adapter.modules[-1].up[0, 0] = float("nan")
    assert not adapter.all_finite()


def test_dropout_is_off_outside_training(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(dropout=0.5), seed=1)
    fill(adapter)
    adapter.train(False)
    assert torch.equal(predict(family), predict(family))
    adapter.train()
    assert not torch.equal(predict(family), predict(family))


KINDS = ("lora", "locon", "dora", "loha", "lokr", "oft", "boft")


def attached(base: Path, seed: int = 1, **settings: Any) -> Adapter:
    return attach_adapter(load_tiny(base), AdapterSettings(**settings), seed=seed)


@pytest.mark.parametrize("settings", [{"kind": kind} for kind in KINDS] + [{"init": "pissa"}, {"init": "orthogonal"}])
def test_first_weights_of_every_kind_follow_from_seed_and_layer_name(tiny_sd15: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    one = attached(tiny_sd15, **settings).state_dict()
    torch.manual_seed(99)
    more = attached(tiny_sd15, **settings, targets="attention-mlp").state_dict()
    assert all(torch.equal(more[key], value) for key, value in one.items())


def test_whole_paths_are_adapted_and_not_what_ends_like_them(tiny_sd15: Path) -> None:
    # peft takes a name in a list for the end of any path.
    family = load_tiny(tiny_sd15)
    family.denoiser.to_q = nn.Linear(4, 4)
    adapter = attach_adapter(family, AdapterSettings(include=["^to_q$"]), seed=1)
    assert [module.path for module in adapter.modules] == ["to_q"]
    assert sum(name.endswith("lora_A") for name, _ in family.denoiser.named_modules()) == 1


def test_patterns_choose_layers_their_ranks_and_their_rates(tiny_sd15: Path) -> None:
    adapter = attached(
        tiny_sd15,
        rank=4,
        alpha=2.0,
        text_encoder=True,
        include=["attn1", r"^text_encoder\."],
        exclude=["to_out"],
        block_ranks=["to_q=8", "mid_block=2", r"^text_encoder\.=1"],
        block_learning_rates=["mid_block=0.25", "to_q=3"],
    )
    assert adapter.modules
    for module in adapter.modules:
        assert "to_out" not in module.path
        assert module.component == "text_encoder" or "attn1" in module.path
        middle, query = "mid_block" in module.path, "to_q" in module.path
        rank = 8 if query else 2 if middle else 1 if module.component == "text_encoder" else 4
        assert (module.rank, module.alpha, module.scale) == (rank, rank / 2, 0.5)
        assert module.down.shape[0] == rank
        assert module.rate == (0.25 if middle else 3.0 if query else 1.0)
    assert {module.rank for module in adapter.modules} == {8, 2, 1, 4}
    assert "mid_block" in "".join(module.path for module in adapter.modules)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("include", "attn7"),
        ("exclude", "attn7"),
        ("block_ranks", "attn7=4"),
        ("block_learning_rates", "attn7=0.5"),
    ],
)
def test_a_pattern_that_finds_no_layer_is_named(tiny_sd15: Path, setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.{setting}: attn7 is found in no layer"):
        attached(tiny_sd15, **{setting: [value]})


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("include", "attn(", "regular expression"),
        ("exclude", "*", "regular expression"),
        ("block_ranks", "attn1", "PATTERN=RANK"),
        ("block_ranks", "attn1=", "PATTERN=RANK"),
        ("block_ranks", "attn1=2.5", "PATTERN=RANK"),
        ("block_ranks", "attn1=5000", "0 to 1024"),
        ("block_ranks", "a(=4", "regular expression"),
        ("block_learning_rates", "attn1=", "PATTERN=FACTOR"),
        ("block_learning_rates", "attn1=nan", "PATTERN=FACTOR"),
        ("block_learning_rates", "attn1=-1", "PATTERN=FACTOR"),
        ("block_learning_rates", "=2.5", "PATTERN=FACTOR"),
        ("block_ranks", "128", "PATTERN=RANK"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused_with_its_key(setting: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([Layer("test", {"adapter": {setting: [value]}})])
    assert f"adapter.{setting}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": "loftq"}, "not quantized"),
        ({"init": "pissa", "kind": "lokr"}, "start of its own"),
        ({"init": "pissa", "kind": "dora"}, "does not go with"),
        ({"init": "olora", "start_from": "x.safetensors"}, "two different beginnings"),
        ({"init": "orthogonal", "rank": 3}, "even ranks"),
        ({"init": "orthogonal", "rank": 4, "block_ranks": ["attn1=3"]}, "even ranks"),
        ({"kind": "oft", "rslora": True}, "rslora must be false"),
        ({"kind": "boft", "block_ranks": ["attn1=3"]}, "block_ranks has no meaning"),
        ({"kind": "dora", "dropout": 0.1}, "dropout must be 0"),
        ({"kind": "boft", "rank_dropout": 0.1}, "rank_dropout must be 0"),
        ({"kind": "oft", "max_norm": 1.0}, "max_norm must be 0"),
    ],
)
def test_settings_that_cannot_hold_together_are_refused_with_a_fix(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_config([Layer("test", {"adapter": settings})])
    usual = resolve_config([Layer("test", {"adapter": {"kind": settings.get("kind", "lora")}})])
    assert usual.config.adapter.kind == settings.get("kind", "lora")


def test_target_presets_that_a_family_lacks_are_named_with_those_it_has(tiny_sd15: Path) -> None:
    with pytest.raises(ConfigError, match="ai-toolkit: Stable Diffusion") as caught:
        attached(tiny_sd15, targets="ai-toolkit")
    assert "attention-mlp" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 16, "alpha": 4.0}, 0.25),
        ({"rank": 16, "alpha": 4.0, "rslora": True}, 1.0),
        ({"kind": "oft"}, 1.0),
        ({"kind": "loha", "rank": 4, "alpha": 1.0}, 0.25),
        ({"kind": "lokr", "rank": 2, "alpha": 1.0, "lokr_factor": 2}, 0.5),
        ({"kind": "lokr", "rank": 2, "alpha": 1.0, "lokr_full": True}, 1.0),
    ],
)
def test_the_scale_that_is_shown_is_the_one_that_counts(
    tiny_sd15: Path, settings: dict[str, Any], scale: float
) -> None:
    assert effective_scale(AdapterSettings(**settings)) == scale
    assert {module.scale for module in attached(tiny_sd15, **settings, include=["attn1.to_q"]).modules} == {scale}


def test_convolutions_have_a_scale_of_their_own() -> None:
    settings = AdapterSettings(kind="locon", rank=4, alpha=2.0, conv_rank=9, conv_alpha=3.0)
    assert effective_scale(settings, convolution=True) == pytest.approx(1 / 3)
    assert effective_scale(settings.model_copy(update={"rslora": True}), convolution=True) == 1.0


@pytest.mark.parametrize("kind", ["lora", "locon", "loha", "lokr"])
def test_changes_that_grow_too_large_are_shrunk_to_the_limit_and_others_stay(tiny_sd15: Path, kind: str) -> None:
    adapter = attached(tiny_sd15, kind=kind, rank=4, alpha=2.0, max_norm=0.5, convolutions=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, module in enumerate(adapter.modules):
            for tensor in module.tensors.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if number % 2 else 0.005))
    before = [adapter.delta(module) for module in adapter.modules]
    kept = adapter.state_dict()
    adapter.after_step()
    large = 0
    for module, old in zip(adapter.modules, before, strict=True):
        new = adapter.delta(module)
        if old.norm() > 0.5:
            large += 1
            torch.testing.assert_close(new, old * (0.5 / old.norm()), rtol=1e-4, atol=1e-6)
        else:
            assert all(torch.equal(t, kept[f"{module.name}.{name}"]) for name, t in module.tensors.items())
    assert 0 < large < len(before)
    once = adapter.state_dict()
    adapter.after_step()  # a step that was left out must change nothing
    assert all(torch.equal(value, once[key]) for key, value in adapter.state_dict().items())


def test_max_norm_is_off_unless_asked_for(tiny_sd15: Path) -> None:
    adapter = attached(tiny_sd15)
    fill(adapter)
    before = adapter.state_dict()
    adapter.after_step()
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("settings", [{"kind": "locon"}, {"kind": "loha"}, {"kind": "lokr", "convolutions": True}])
def test_rank_dropout_drops_in_training_alone_and_repeats_with_the_seed(
    tiny_sd15: Path, settings: dict[str, Any]
) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(rank_dropout=0.5, rank=4, alpha=2.0, **settings), seed=1)
    assert adapter.dropouts
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1
        adapter.train(False)
        assert torch.equal(predict(family), predict(family))
        adapter.train()
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(predict(family))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropped_ranks_are_whole_ranks_of_a_picture_and_the_mean_stays() -> None:
    dropout = RankDropout(0.25, -1)
    torch.manual_seed(0)
    dropped = dropout(torch.ones(4000, 3, 5))
    values = dropped[:, 0]
    assert all(torch.equal(dropped[:, place], values) for place in range(3))
    assert values.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert values.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropout.eval()(values), values)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_from_the_weight_hold_its_main_directions(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    weight += 1e-3 * torch.randn(24, 40, generator=generator)
    first = first_product(weight, kind, 4, 0.5, torch.Generator().manual_seed(1))
    product = first["lora_B.weight"] @ first["lora_A.weight"]
    if kind == "pissa":
        left, values, right = torch.linalg.svd(weight)
        best = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(0.5 * product, best, rtol=1e-3, atol=1e-3)
    else:
        basis = first["lora_B.weight"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(product, basis @ (basis.T @ weight), rtol=1e-4, atol=1e-5)


def test_pissa_learns_as_by_the_paper_with_the_product_taken_off_the_weight(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(init="pissa", rank=4, alpha=2.0, include=["attn1.to_q"]), seed=1)
    module = adapter.modules[0]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    result = module.layer(x)
    result.square().sum().backward()
    down, up = (module.tensors[name].detach().clone().requires_grad_() for name in ("lora_A.weight", "lora_B.weight"))
    assert module.start is not None
    residual = module.layer.base_layer.weight - 0.5 * module.start["lora_B.weight"] @ module.start["lora_A.weight"]
    reference = x @ (residual + 0.5 * up @ down).T
    torch.testing.assert_close(result, reference)
    reference.square().sum().backward()
    torch.testing.assert_close(module.down.grad, down.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.up.grad, up.grad, rtol=1e-4, atol=1e-5)


def test_a_resumed_pissa_has_the_start_of_its_checkpoint(tiny_sd15: Path) -> None:
    # Another machine's linear algebra may find other signs.
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(init="pissa", rank=4), seed=1)
    saved = adapter.state_dict()
    assert sum(".start." in key for key in saved) == len(saved) // 2
    flipped = {key: -value for key, value in saved.items()}
    before = predict(family)
    adapter.load_state_dict(flipped)
    assert torch.equal(predict(family), before)
    assert all(torch.equal(value, flipped[key]) for key, value in adapter.state_dict().items())


def test_the_outputs_of_a_quantized_layer_are_turned_as_its_unpacked_weight_would_be() -> None:
    draw = torch.Generator().manual_seed(0)
    base = FrozenLinear(torch.nn.Linear(64, 32), "nf4", torch.device("cpu"))
    layer, x = RotatedLayer(base, (4, 8, 8)), torch.randn(3, 64, generator=draw)
    assert torch.equal(layer(x), base(x))
    blocks = layer.oft_blocks["default"]
    with torch.no_grad():
        blocks.copy_(torch.randn(4, 8, 8, generator=draw) * 0.2)
    weight = base_weight(layer)
    turned = weight + layer.change(weight.T).T
    found = layer(x)
    torch.testing.assert_close(found, x @ turned.T + base.bias, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    assert blocks.grad is not None
    assert bool(blocks.grad.any())


def lycoris_factors(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS' rule in words: `factor` where it divides, else the most nearly equal pair of divisors up to it."""
    if dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    pairs = [(m, dimension // m) for m in range(1, factor + 1) if dimension % m == 0 and m * m <= dimension]
    return min(pairs, key=sum)


def test_blocks_have_the_size_that_lycoris_gives_them_unless_that_is_one() -> None:
    for outputs in range(2, 700):
        for wanted in (2, 6, 32):
            number, size, again = rotation_shape(outputs, AdapterSettings(kind="oft", block_size=wanted))
            assert number * size == outputs
            assert size == again > 1
            expected = lycoris_factors(outputs, wanted)
            assert (size, number) == expected or expected[0] == 1
            # What LyCORIS makes of the size in a file, so that it loads it; a prime number of outputs is one block.
            assert (size, number) == lycoris_factors(outputs, size) or number == 1
    assert rotation_shape(16, AdapterSettings(kind="oft", block_size=32)) == (4, 4, 4)
    assert rotation_shape(1, AdapterSettings(kind="oft")) == ()


@pytest.mark.parametrize(
    ("outputs", "wanted", "shape"),
    # boft_m of lycoris/modules/boft.py is 1 + the bits that are set in blocks - 1.
    [
        (320, 32, (5, 16, 20, 20)),
        (1280, 32, (7, 64, 20, 20)),
        (4096, 32, (8, 128, 32, 32)),
        (16, 32, (1, 1, 16, 16)),
        # No such block is 32 or smaller.
        (18944, 32, (9, 256, 74, 74)),
        (15, 32, ()),
    ],
)
def test_butterflies_need_a_power_of_two_of_even_blocks(outputs: int, wanted: int, shape: tuple[int, ...]) -> None:
    assert rotation_shape(outputs, AdapterSettings(kind="boft", block_size=wanted)) == shape


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 4, 4)])
@pytest.mark.parametrize("base", [nn.Linear(5, 16), nn.Linear(5, 16, bias=False), nn.Conv2d(4, 16, 3, padding=1)])
def test_turned_outputs_are_those_of_a_turned_weight_with_the_same_bias(base: Any, shape: tuple[int, ...]) -> None:
    blocks = torch.randn((shape if len(shape) == 4 else (4, 4, 4)), generator=torch.Generator().manual_seed(0))
    layer = RotatedLayer(base, tuple(blocks.shape))
    x = torch.randn(2, 4, 6, 6) if isinstance(base, nn.Conv2d) else torch.randn(2, 3, 5)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.oft_blocks["default"].copy_(blocks)
    weight = base.weight.detach().clone()
    turned = weight + layer.change(weight.flatten(1).T).T.reshape(weight.shape)
    # A rotation leaves lengths as they are, and these are large ones.
    torch.testing.assert_close(turned.flatten(1).norm(dim=0), weight.flatten(1).norm(dim=0))
    assert (turned - weight).norm() > 0.5 * weight.norm()
    found = layer(x)
    with torch.no_grad():
        base.weight.copy_(turned)
        expected = base(x)
        base.weight.copy_(weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0, 1, 4, 6, 7, 50])
def test_kronecker_sides_are_those_of_peft(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 400):
        assert kronecker_sides(size, factor) == factorization(size, factor or -1)


def test_forecasts_of_files_know_that_pissa_is_shared_at_twice_the_rank(tiny_sd15: Path, tmp_path: Path) -> None:
    adapter, twice = {"rank": 4, "alpha": 4.0}, {"rank": 4, "alpha": 4.0, "init": "pissa"}
    plain = plan_disk(tiny_config(tiny_sd15, tmp_path, adapter=adapter), 1_000_000)
    pissa = plan_disk(tiny_config(tiny_sd15, tmp_path, adapter=twice), 1_000_000)
    assert pissa.export - plain.export == 2_000_000
    assert pissa.checkpoints - plain.checkpoints == 4_000_000 * plain.num_checkpoints


def test_a_pattern_without_a_layer_is_told_from_headers_before_anything_is_loaded(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    settings = {"include": ["attn1"], "block_ranks": ["attn7=4", "attn2=4"]}
    config = tiny_config(tiny_sd15, tmp_path, adapter=settings)
    with pytest.raises(ConfigError, match=r"adapter\.block_ranks: attn7 is found in no layer") as caught:
        find_base(config, lambda event: None)
    assert "attn2" not in str(caught.value)
    fine = tiny_config(tiny_sd15, tmp_path, adapter={"include": ["attn1"], "block_ranks": ["attn1.to_q=4"]})
    assert find_base(fine, lambda event: None).identity.family == "sd15"


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "dora", "convolutions": True},
        {"kind": "lokr", "rank_dropout": 0.5},
        {"kind": "locon", "rank_dropout": 0.5, "dropout": 0.5},
        {"kind": "boft", "block_size": 4},
        {"kind": "oft", "block_size": 4},
        {"init": "pissa"},
    ],
)
def test_activations_that_are_computed_again_give_the_same_gradients(tiny_sd15: Path, settings: dict[str, Any]) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, **settings), seed=1)
    adapter.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        torch.manual_seed(0)
        predict(family).square().mean().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    assert any(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
