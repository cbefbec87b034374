"""The running average of the LoRA's weights: what it is, and that previews and the export show it and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorasmith.engine.checkpoints import load_checkpoint
from lorasmith.engine.cli import main
from lorasmith.engine.commands import Command
from lorasmith.engine.ema import WeightAverage, decay_at
from lorasmith.engine.events import RunEnded
from lorasmith.engine.learner import Learner
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import RecordingHost, run_training, tiny_config

KEPT = torch.zeros(())
LEFT_OUT = torch.ones(())


def numbers(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def set_to(parameters: list[nn.Parameter], value: float) -> None:
    for parameter in parameters:
        parameter.data.fill_(value)


def test_the_decay_begins_small_and_reaches_what_was_asked_for() -> None:
    assert [decay_at(0.99, step) for step in (0, 8, 90, 889, 890, 5000)] == pytest.approx(
        [1 / 10, 9 / 18, 91 / 100, 890 / 899, 0.99, 0.99]
    )


def test_the_average_is_the_recursion_by_hand() -> None:
    parameters, decay = numbers(1.0, -3.0), 0.6
    average, by_hand = WeightAverage(parameters, decay), [1.0, -3.0]
    for step in range(12):
        set_to(parameters, float(step))
        average.update(step, KEPT)
        kept = decay_at(decay, step)
        by_hand = [kept * value + (1 - kept) * step for value in by_hand]
    assert [tensor.item() for tensor in average.shadow] == pytest.approx(by_hand)


def test_a_step_that_was_left_out_leaves_the_average_as_it_was() -> None:
    parameters = numbers(1.0)
    average = WeightAverage(parameters, 0.9)
    set_to(parameters, 2.0)
    average.update(0, LEFT_OUT)
    assert average.shadow[0].item() == 1.0


def test_the_raw_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    odd = torch.tensor([-0.0, 1e-45, 0.1, float("inf")])
    parameter = nn.Parameter(odd.clone())
    average = WeightAverage([parameter], 0.9)
    average.shadow[0].fill_(7.0)
    inside: list[float] = []

    def show_and_fail() -> None:
        inside.extend(parameter.tolist())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), average.in_place():
        show_and_fail()
    assert inside == [7.0] * 4
    assert torch.equal(parameter.view(torch.int32), odd.view(torch.int32))
    assert average.shadow[0].tolist() == [7.0] * 4


def test_an_optimizer_goes_on_with_the_raw_weights_afterwards() -> None:
    parameter = nn.Parameter(torch.ones(3))
    average = WeightAverage([parameter], 0.9)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    with average.in_place():
        pass
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() != [1.0] * 3
    assert average.shadow[0].tolist() == [1.0] * 3


def test_the_average_moves_with_its_weights_to_another_device() -> None:
    average = WeightAverage(numbers(1.0), 0.9)
    average.move_to(torch.device("meta"))
    assert average.shadow[0].device.type == "meta"


def averaged_run(base: Path, folder: Path, **sections: dict[str, Any]) -> tuple[RunFolder, RecordingHost]:
    train = {"steps": 4, "ema_decay": 0.9}
    config = tiny_config(base, folder, train=train, export={"precision": "fp32", "layouts": ["diffusers"]}, **sections)
    return run_training(config)


def test_the_checkpoint_keeps_raw_and_averaged_weights_and_the_export_holds_the_averaged(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    run, host = averaged_run(tiny_sd15, tmp_path)
    assert host.of(RunEnded)[0].outcome == "finished"
    checkpoint = load_checkpoint(run.checkpoints, 4)
    raw, averaged = checkpoint.tensors("adapter"), checkpoint.tensors("ema")
    assert raw.keys() == averaged.keys()
    assert not all(torch.equal(raw[key], averaged[key]) for key in raw)
    assert_holds(next(run.export.glob("*.safetensors")), averaged)
    # The same from the command line, where the raw ones can be asked for; they get a name of their own.
    for arguments, name, weights in ((), "tiny", averaged), (("--raw",), "tiny-raw", raw):
        assert main(["export", str(run.path), "--output", str(tmp_path / "again"), *arguments]) == 0
        assert_holds(tmp_path / "again" / f"{name}.safetensors", weights)


def test_a_schedule_free_run_saves_both_weights_and_shares_the_averaged(tiny_sd15: Path, tmp_path: Path) -> None:
    optimizer = {"name": "adamw_schedulefree", "learning_rate": 1e-2}
    config = tiny_config(
        tiny_sd15, tmp_path, optimizer=optimizer, export={"precision": "fp32", "layouts": ["diffusers"]}
    )
    run, _ = run_training(config)
    checkpoint = load_checkpoint(run.checkpoints, 4)
    raw, averaged = checkpoint.tensors("adapter"), checkpoint.tensors("ema")
    assert not all(torch.equal(raw[key], averaged[key]) for key in raw)
    assert_holds(next(run.export.glob("*.safetensors")), averaged)


def assert_holds(path: Path, weights: dict[str, torch.Tensor]) -> None:
    downs = {key: value for key, value in load_file(path).items() if key.endswith("lora_A.weight")}
    assert downs
    for key, value in downs.items():
        assert torch.equal(value, weights[f"denoiser.{key.removeprefix('unet.')}"])


def test_previews_are_drawn_with_the_averaged_weights(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []
    real = Learner.averaged

    def noted(learner: Learner) -> Any:
        entered.append("averaged")
        return real(learner)

    monkeypatch.setattr(Learner, "averaged", noted)
    averaged_run(tiny_sd15, tmp_path / "without")
    without = len(entered)
    averaged_run(tiny_sd15, tmp_path / "with", previews={"every": 2})
    # One drawing in the middle and one at the end.
    assert len(entered) == 2 * without + 2


def test_training_is_not_touched_by_the_average_or_by_showing_it(tiny_sd15: Path, tmp_path: Path) -> None:
    plain, _ = run_training(tiny_config(tiny_sd15, tmp_path / "plain"))
    averaged, _ = averaged_run(tiny_sd15, tmp_path / "averaged", previews={"every": 1})
    one, other = (load_checkpoint(run.checkpoints, 4).tensors("adapter") for run in (plain, averaged))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_weights_of_which_only_the_average_is_no_number_are_not_written(tiny_sd15: Path, tmp_path: Path) -> None:
    from lorasmith.engine.errors import TrainingError
    from lorasmith.engine.saving import require_finite_weights
    from lorasmith.engine.training_parts import TrainingParts

    seen: list[TrainingParts] = []
    original = TrainingParts.__post_init__

    def keep(parts: TrainingParts) -> None:
        original(parts)
        seen.append(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingParts, "__post_init__", keep)
        run_training(
            tiny_config(tiny_sd15, tmp_path, train={"steps": 4, "ema_decay": 0.9}),
            RecordingHost(at={1: [Command.STOP]}),
        )
    learner = seen[0].learner
    require_finite_weights(seen[0])
    assert learner.average is not None
    learner.average.shadow[0].view(-1)[0] = float("nan")
    with pytest.raises(TrainingError):
        require_finite_weights(seen[0])
