"""A base model of a size that no preset has is counted once on this machine, and forecast from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import families, identify_base
from lorasmith.engine.memory.of_run import Known, forecast_run, lacks_only_counting
from lorasmith.engine.simulation import count_model, on_the_fly
from lorasmith.engine.sources import locate_base
from tests.sparse_base import build_sparse_base

NARROW = {"unet": {"block_out_channels": [192, 384, 768, 768]}}
COUNTED: dict[str, Any] = {
    "tflop": [0.0, 1.0, 0.1],
    "kernels": [3000, 4000],
    "draw": [0.0, 1.0, 100.0],
    "inputs": [0.0, 1.0, 50.0],
    "blocks": [{"name": "BasicTransformerBlock", "count": 16, "packed": 5_000_000, "plain": 1000}],
    "denoiser": {"packed": 200_000_000, "plain": 114_000_000, "layer": 5_000_000},
    "text": {"text_encoder": {"packed": 85_000_000, "plain": 38_000_000, "layer": 2_000_000, "work": [0.0, 2.0, 0.0]}},
    "autoencoder": {"packed": 0, "plain": 84_000_000, "layer": 0, "work": [0.0, 0.0, 1000.0]},
    "step": {
        "attention": {
            "per_rank": 100_000,
            "fp32": {"none": [10.0, 5.0, 2000.0], "half": [10.0, 5.0, 1000.0], "all": [10.0, 5.0, 400.0]},
            "base": {"none": [10.0, 5.0, 1800.0], "half": [10.0, 5.0, 900.0], "all": [10.0, 5.0, 300.0]},
        }
    },
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of 314 M weights, narrower than Stable Diffusion 1.x; headers alone."""
    return build_sparse_base(tmp_path_factory.mktemp("bases") / "narrow", "sd15", "v1", NARROW)


def known(folder: Path) -> tuple[Known, Any, Any]:
    files = locate_base(str(folder))
    module, identity = identify_base(files)
    return Known(families()["sd15"].SPEC, files, 512 * 512), module, identity


def test_a_model_of_another_size_is_counted_once(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    counts: list[tuple[str, ...]] = []

    def count(loaded: Any, targets: tuple[str, ...]) -> dict[str, Any]:
        counts.append(targets)
        return COUNTED

    monkeypatch.setattr(on_the_fly, "derive_loaded", count)
    run, module, identity = known(narrow)
    config = RunConfig()
    found, reason = forecast_run(config, run)
    assert found is None
    assert "of another size" in reason
    assert lacks_only_counting(config, run)
    for _ in range(2):
        count_model(module, run.files, identity, config)
    assert counts == [("attention",)]
    found, _ = forecast_run(config, run)
    assert found is not None
    assert found.step.of("activations") == pytest.approx((10 + 5 + 2000 * 0.262144) / 1024, rel=0.01)
    assert not lacks_only_counting(config, run)


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_what_is_counted_is_what_a_preset_would_say(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    run, module, identity = known(narrow)
    count_model(module, run.files, identity, RunConfig())
    found, basis = forecast_run(RunConfig(), run)
    assert found is not None
    assert "graph" in basis
    assert found.step.of("weights") == pytest.approx(identity.parameters * 2 / 2**30, rel=0.001)
    # Three quarters of the channels of a model whose activations take 1.00 GiB at 512 pixels.
    assert 0.5 < found.step.of("activations") < 0.8
