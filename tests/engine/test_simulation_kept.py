"""Simulated steps that are kept, and the recorded forecasts of published peaks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import identify_base
from lorasmith.engine.memory.constants import Law, StepLaws, StepMemory
from lorasmith.engine.memory.simulated import cached_step_memory, step_key, store_step_memory
from lorasmith.engine.simulation import simulated_step_memory
from lorasmith.engine.simulation.measured_steps import StepCounter
from lorasmith.engine.sources import BaseFiles
from lorasmith.engine.storage import cache_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAWS = StepLaws(Law(1.0, 2.0, 3.0), Law(0.5, 1.0, 2.0), Law(0.25, 0.5, 1.0), Law(0.0, 0.1, 0.2), Law(0.0, 0.0, 0.1))
STEP = StepMemory(1000, LAWS, LAWS)


def config_for(**adapter: Any) -> RunConfig:
    return RunConfig.model_validate({"adapter": adapter})


def test_a_model_is_simulated_once(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def step_memory(counter: StepCounter, targets: str) -> StepMemory:
        counted.append((counter.family.device.type, counter.settings.adapter.kind if counter.settings else "", targets))
        return STEP

    monkeypatch.setattr(StepCounter, "step_memory", step_memory)
    files = BaseFiles("folder", tiny_sd15, str(tiny_sd15))
    module, identity = identify_base(files)
    config = config_for(kind="loha")
    assert cached_step_memory(step_key("sd15", files, config)) is None
    for _ in range(2):
        assert simulated_step_memory(module, files, identity, config) == STEP
    assert counted == [("meta", "loha", "attention")]
    assert cached_step_memory(step_key("sd15", files, config)) == STEP


def test_the_key_is_of_what_changes_memory(tiny_sd15: Path, tiny_sd15_v: Path) -> None:
    files = BaseFiles("folder", tiny_sd15, str(tiny_sd15))
    key = step_key("sd15", files, config_for())
    same = [config_for(rank=64, alpha=3.0), RunConfig.model_validate({"train": {"batch_size": 4}})]
    assert [step_key("sd15", files, config) for config in same] == [key, key]
    other_layers = BaseFiles("folder", tiny_sd15_v, "other")
    assert step_key("sd15", other_layers, config_for()) != key
    others = [
        config_for(kind="dora"),
        config_for(targets="attention-mlp"),
        config_for(exclude=["mid"]),
        config_for(dropout=0.1),
        RunConfig.model_validate({"train": {"precision": "fp32"}}),
    ]
    assert len({key, *(step_key("sd15", files, config) for config in others)}) == 1 + len(others)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"per_rank": 3}', '{"per_rank": 1, "fp32": {}, "base": {}}'])
def test_a_damaged_file_is_none(text: str) -> None:
    store_step_memory("key", STEP)
    assert cached_step_memory("key") == STEP
    (cache_folder() / "memory" / "key.json").write_text(text)
    assert cached_step_memory("key") is None


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "file"))
    store_step_memory("key", STEP)
    assert cached_step_memory("key") is None


def test_a_trained_text_encoder_is_refused(tiny_sd15: Path) -> None:
    files = BaseFiles("folder", tiny_sd15, str(tiny_sd15))
    module, identity = identify_base(files)
    with pytest.raises(ConfigError, match="text encoder"):
        simulated_step_memory(module, files, identity, config_for(text_encoder=True))


class TestPublishedPeaks:
    def test_the_recorded_errors_are_small(self) -> None:
        record = recorded()
        cells = [point[key] for point in record["points"] for key in ("plain", "checkpointed")]
        errors = [cell["forecast"] / cell["published"] - 1 for cell in cells if cell["published"]]
        assert len(errors) == 11
        rms = 100 * math.sqrt(sum(error**2 for error in errors) / len(errors))
        assert rms == pytest.approx(record["rms_percent"], abs=0.02)
        assert rms <= 6.0

    def test_a_recorded_forecast_comes_out_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import forecast_published

        point = next(point for point in forecast_published.POINTS if point.family == "sd15")
        found = forecast_published.forecast(point)
        then = next(entry for entry in recorded()["points"] if entry["name"] == point.name)
        for key in ("plain", "checkpointed"):
            assert found[key]["published"] == then[key]["published"]
            assert found[key]["forecast"] == pytest.approx(then[key]["forecast"], rel=0.01)
        for name in ("forecast_published", "autocast", "facts"):
            sys.modules.pop(name, None)


def recorded() -> dict[str, Any]:
    newest = max((BENCHMARKS / "results").glob("*-forecast-published.json"))
    found: dict[str, Any] = json.loads(newest.read_text())
    return found
