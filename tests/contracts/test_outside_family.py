"""Adding a base model family takes one engine file and one preset file: here both come from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasmith.presets
from lorasmith.engine import advisor, families
from lorasmith.engine.commands import Command
from lorasmith.engine.events import ExportDone, Logged, PreviewReady
from lorasmith.engine.sources import locate_base
from tests.contracts.outside.pebble_parts import build_pebble
from tests.engine.running import RecordingHost, run_training, tiny_config

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture
def pebble(tmp_path: Path) -> Iterator[Path]:
    """A pebble's folder, while its family is known."""
    added = (families.__path__, lorasmith.presets.__path__)
    for path in added:
        path.append(str(OUTSIDE))
    families.families.cache_clear()
    yield build_pebble(tmp_path / "pebble")
    for path in added:
        path.remove(str(OUTSIDE))
    families.families.cache_clear()


def test_its_base_is_recognized_and_has_advice(pebble: Path) -> None:
    module, identity = families.identify_base(locate_base(str(pebble)))
    assert identity.label.startswith("Pebble, fp32")
    advice = {item.key: item for item in advisor.recommend("pebble", "character", 8, 64, None)}
    assert advice["adapter.rank"].value == 4
    assert advice["train.steps"].value == 80
    assert module.SPEC.layouts == ("diffusers",)


def test_a_run_learns_saves_resumes_draws_and_exports(pebble: Path, tmp_path: Path) -> None:
    config = tiny_config(
        pebble,
        tmp_path,
        train={"steps": 40},
        adapter={"targets": "attention-mlp", "rank": 8, "alpha": 8.0},
        optimizer={"learning_rate": 3e-2},
        previews={"every": 20, "steps": 2},
        checkpoints={"every": 10},
    )
    _, host = run_training(config)
    losses = host.losses()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    (export,) = host.of(ExportDone)
    assert export.layout == "diffusers"
    assert len(host.of(PreviewReady)) == 4
    assert not [event.message for event in host.of(Logged) if event.severity == "warning"]
    stopped, first = run_training(config, RecordingHost(at={10: [Command.STOP]}))
    _, second = run_training(config, run=stopped)
    assert first.losses() + second.losses() == losses
    assert (stopped.export / Path(export.path).name).read_bytes()[-64:] == Path(export.path).read_bytes()[-64:]


def test_it_is_gone_again_afterwards() -> None:
    assert "pebble" not in families.families()
