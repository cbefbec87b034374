"""One body over base models × adapters: what is trained is saved, resumed, drawn, shared and read back unchanged.

`make test` runs a part that covers every base model and every adapter, `make test-all` every pair.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.commands import Command
from lorasmith.engine.compatibility import chosen_layouts, compatibility_problems, layout_errors, loads_in
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig
from lorasmith.engine.events import ExportDone, PreviewReady
from lorasmith.engine.families import Conditioning, Family, FamilySpec, families, identify_base
from lorasmith.engine.learner import Learner
from lorasmith.engine.lora_files import start_adapter
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.run_setup import build_training, read_dataset
from lorasmith.engine.sources import locate_base
from tests.contracts.cells import ADAPTERS, all_cells, covering_cells
from tests.engine.running import RecordingHost, load_tiny, run_training, tiny_config
from tests.tiny import TINY_BUILDERS, TINY_SIDE

COVERING = set(covering_cells())
CELLS = [
    pytest.param(*cell, id="-".join(cell), marks=() if cell in COVERING else pytest.mark.campaign)
    for cell in all_cells()
]


@dataclass
class Cell:
    """One pair: its settings, and the tiny base model's folder."""

    family: str
    base: Path
    config: RunConfig


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny base models by family, built when first asked for."""

    class Built(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = TINY_BUILDERS[name](tmp_path_factory.mktemp("matrix") / name)
            return self[name]

    return Built()


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the collections at the end of stages: a third of the time here, and other tests hold what they free."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def cell(family: str, adapter: str, bases: dict[str, Path], tmp_path: Path) -> Cell:
    """The settings of a run of four steps that saves and draws after the second."""
    spec = families()[family].SPEC
    settings = {"rank": 2, "alpha": 2.0, **ADAPTERS[adapter]}
    layouts = [name for name in spec.layouts if can_be_written(spec, settings, name)]
    config = tiny_config(
        bases[family],
        tmp_path,
        adapter=settings,
        optimizer={"learning_rate": 3e-3},
        checkpoints={"every": 2},
        previews={"every": 2, "steps": 2, "prompts": ["[trigger]"]},
        export={"layouts": layouts, "precision": "fp32"},
    )
    return Cell(family, bases[family], config)


def can_be_written(spec: FamilySpec, settings: dict[str, Any], layout: str) -> bool:
    """Whether a file of this layout can hold the adapter."""
    config = RunConfig(adapter=AdapterSettings(**settings), export=ExportSettings(layouts=[layout]))  # type: ignore[list-item]
    return not layout_errors(config, spec)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": rate})})


def build(cell: Cell) -> tuple[Learner, Adapter, Family]:
    family = load_tiny(cell.base)
    adapter = attach_adapter(family, cell.config.adapter, cell.config.run.seed)
    host = RecordingHost()
    material = read_dataset(cell.config, family.spec.pixel_multiple, host.emit)
    files = locate_base(str(cell.base))
    learner = build_training(cell.config, files, family, material, adapter, host.emit, lambda: False, Rungs(host.emit))
    assert learner is not None
    return learner, adapter, family


@pytest.mark.parametrize(("family", "adapter"), CELLS)
def test_twenty_steps_on_the_same_batch_and_noise_lower_the_loss(cell: Cell) -> None:
    learner, _, _ = build(Cell(cell.family, cell.base, with_rate(cell.config, 1e-2)))
    losses = [float(learner.run_step(0)[0]) for _ in range(20)]
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0] * 0.99, losses


@pytest.mark.parametrize(("family", "adapter"), CELLS)
def test_a_run_is_resumed_to_the_bit_and_its_file_gives_what_was_trained(cell: Cell, tmp_path: Path) -> None:
    run, host = run_training(cell.config)
    assert len(host.of(PreviewReady)) == 2
    exports = [Path(event.path) for event in host.of(ExportDone)]
    assert len(exports) == len(chosen_layouts(cell.config.export, families()[cell.family].SPEC))

    stopped, first = run_training(cell.config, RecordingHost(at={2: [Command.STOP]}))
    assert first.losses() == host.losses()[:2]
    _, second = run_training(cell.config, run=stopped)
    assert first.losses() + second.losses() == host.losses()
    for path in exports:
        again = stopped.export / path.name
        own, other = load_file(path), load_file(again)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)

    trained = predictions_of_checkpoint(cell, run.checkpoints)
    for path, layout in zip(exports, chosen_layouts(cell.config.export, families()[cell.family].SPEC), strict=True):
        read_back(cell, path, layout, trained)


@dataclass
class Predictions:
    """What a base model answers with and without the trained adapter, on fixed noise."""

    plain: torch.Tensor
    trained: torch.Tensor


def predictions_of_checkpoint(cell: Cell, checkpoints: Path) -> Predictions:
    from lorasmith.engine.checkpoints import newest_checkpoint

    family = load_tiny(cell.base)
    plain = answer(family)
    adapter = attach_adapter(family, cell.config.adapter, cell.config.run.seed)
    checkpoint = newest_checkpoint(checkpoints, lambda *_: None)
    assert checkpoint is not None
    adapter.load_state_dict(checkpoint.tensors("adapter"))
    adapter.train(False)
    trained = answer(family)
    assert (trained - plain).abs().max() > 1e-5, "the adapter changes nothing"
    return Predictions(plain, trained)


def answer(family: Family) -> torch.Tensor:
    spec = family.spec
    side = TINY_SIDE // spec.latent_downscale
    noisy = torch.randn((1, spec.latent_channels, side, side), generator=torch.Generator().manual_seed(7))
    timesteps = torch.tensor([400]) if spec.objective == "ddpm" else torch.tensor([400.0])
    with torch.no_grad():
        conditioning: Conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, timesteps, conditioning)


def read_back(cell: Cell, path: Path, layout: str, expected: Predictions) -> None:
    """Load the file into a fresh base model: with diffusers where that is promised, and always by our own reader."""
    tolerance = 1e-3 * float((expected.trained - expected.plain).abs().max()) + 1e-5
    module, _ = identify_base(locate_base(str(cell.base)))
    readers = loads_in(module.SPEC, cell.config.adapter, layout)
    if "diffusers" in readers:
        fresh = load_tiny(cell.base)
        module.load_lora(path, {"denoiser": fresh.denoiser})
        assert (answer(fresh) - expected.trained).abs().max() <= tolerance, f"diffusers, {layout}"
    fresh = load_tiny(cell.base)
    adapter = attach_adapter(fresh, cell.config.adapter.model_copy(update={"init": "default"}), seed=99)
    words = start_adapter(adapter, path, fresh)
    adapter.train(False)
    if cell.config.adapter.init == "default":
        assert (answer(fresh) - expected.trained).abs().max() <= tolerance, f"start_from, {layout}: {words}"


def test_the_covering_part_has_every_family_and_every_adapter() -> None:
    assert {family for family, _ in COVERING} == set(TINY_BUILDERS) == set(families())
    assert {adapter for _, adapter in COVERING} == set(ADAPTERS)


def test_an_adapter_that_no_layout_of_the_base_can_hold_is_refused_before_the_training(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for name, module in families().items():
        for settings in ADAPTERS.values():
            chosen = AdapterSettings(rank=2, alpha=2.0, **settings)
            for layout in module.SPEC.layouts:
                if loads_in(module.SPEC, chosen, layout):
                    continue
                config = RunConfig(adapter=chosen, export={"layouts": [layout]})  # type: ignore[arg-type]
                problems = compatibility_problems(config, module.SPEC)
                assert problems, f"{name}, {chosen.kind}, {layout}"
                assert all(problem.endswith(".") for problem in problems)
