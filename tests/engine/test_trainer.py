from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.engine import compute, disk_plan, finishing, run_setup
from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import choose_compute
from lorasmith.engine.config import RunConfig, TrainSettings
from lorasmith.engine.dataset.loader import Batch
from lorasmith.engine.errors import ConfigError, DatasetError, HardwareError, StorageError, TrainingError
from lorasmith.engine.events import (
    CheckpointPruned,
    CheckpointSaved,
    CommandReceived,
    DatasetReady,
    ExportDone,
    Logged,
    Paused,
    PreviewReady,
    Resumed,
    RunEnded,
    RunStarted,
    StageChanged,
    StepsDone,
)
from lorasmith.engine.learner import Learner
from tests.engine.running import RecordingHost, load_tiny, new_run, run_training, texts, tiny_config


def tiny_learner(config: RunConfig) -> Learner:
    host = RecordingHost()
    base = run_setup.find_base(config, host.emit)
    material = run_setup.read_dataset(config, base.module.SPEC.pixel_multiple, host.emit)
    family = run_setup.load_base(base, choose_compute(config.train), host.emit)
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    learner = run_setup.build_training(config, base.files, family, material, adapter, host.emit, lambda: False)
    assert learner is not None
    return learner


def names(host: RecordingHost, *kinds: type) -> list[str]:
    return [type(event).__name__ for event in host.events if isinstance(event, kinds)]


def test_a_run_goes_through_its_stages_and_ends_with_a_proved_file(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 5, "log_every": 2}, previews={"every": 5})
    run, host = run_training(config)
    assert isinstance(host.events[0], RunStarted)
    assert "torch" in host.events[0].versions
    assert [event.stage for event in host.of(StageChanged)] == ["scan", "load", "cache", "train", "finish"]
    assert host.of(DatasetReady)[0].images == 5
    assert [event.step for event in host.of(StepsDone)] == [2, 4, 5]
    assert all(math.isfinite(loss) for loss in host.losses())
    assert len(host.of(PreviewReady)) == 2
    assert (run.previews / "sheet.png").is_file()
    assert [event.step for event in host.of(CheckpointSaved)] == [5]
    assert Path(host.of(ExportDone)[0].path).parent == run.export
    ended = host.events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.outcome, ended.step, ended.exit_code) == ("finished", 5, 0)


def test_the_order_is_save_prune_preview(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_sd15, tmp_path, checkpoints={"every": 2, "keep": 1}, previews={"every": 2, "prompts": ["a"]}
    )
    _, host = run_training(config)
    assert names(host, StepsDone, CheckpointSaved, CheckpointPruned, PreviewReady, ExportDone) == [
        *["StepsDone", "CheckpointSaved", "PreviewReady"],
        *["StepsDone", "CheckpointSaved", "CheckpointPruned", "PreviewReady", "ExportDone"],
    ]


def test_training_on_one_batch_brings_its_loss_down(tiny_sd15: Path, tmp_path: Path) -> None:
    learner = tiny_learner(tiny_config(tiny_sd15, tmp_path, optimizer={"learning_rate": 1e-2}, adapter={"rank": 8}))
    losses = [float(learner.run_step(0)[0]) for _ in range(30)]
    assert losses[-1] < 0.97 * losses[0]


@pytest.fixture
def device_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place where Python asks a tensor for a number, which on a GPU waits for all work before it."""
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *rest: Any, _name: str = name, _original: Any = original) -> Any:
            reads.append(_name)
            return _original(self, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return reads


def test_a_step_never_waits_for_the_device(tiny_sd15: Path, tmp_path: Path, device_reads: list[str]) -> None:
    config = tiny_config(
        tiny_sd15,
        tmp_path,
        train={"gradient_accumulation": 2},
        dataset={"crop": "random"},
        objective={"preserve": "class", "preserve_class": "toy", "loss": "huber", "ip_noise": 0.1},
    )
    for number in range(5):
        Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "pictures" / f"{number:02}-masklabel.png")
    learner = tiny_learner(config)
    assert learner.loader.batch(2).pixel_weights is not None
    learner.run_step(0)
    device_reads.clear()
    loss, norm = learner.run_step(1)
    assert device_reads == []
    assert loss.dim() == norm.dim() == 0


def test_accumulating_two_pictures_gives_the_gradient_of_a_batch_of_two(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, dataset={"buckets": False})
    for number in range(3):
        Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "pictures" / f"{number:02}-masklabel.png")
    learner = tiny_learner(config)
    batch = next(batch for batch in map(learner.loader.batch, range(9)) if batch.pixel_weights is not None)
    assert batch.pixel_weights is not None
    learner.batch_loss(batch, step=3, first=0).backward()
    together = [p.grad.clone() for p in learner.adapter.parameters() if p.grad is not None]
    learner.optimizer.zero_grad()
    for i in range(2):
        part = Batch(
            batch.latents[i : i + 1],
            batch.captions[i : i + 1],
            batch.indices[i : i + 1],
            batch.weights[i : i + 1],
            batch.pixel_weights[i : i + 1],
        )
        (learner.batch_loss(part, step=3, first=i) / 2).backward()
    parts = [p.grad for p in learner.adapter.parameters() if p.grad is not None]
    assert all(torch.allclose(one, two, atol=1e-6, rtol=1e-4) for one, two in zip(together, parts, strict=True))


def test_gradient_checkpointing_changes_no_loss(tiny_sd15: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"adapter": {"rank": 2, "alpha": 2.0, "text_encoder": True, "dropout": 0.2}}
    losses = []
    for checkpointing in (False, True):
        learner = tiny_learner(
            tiny_config(tiny_sd15, tmp_path, **sections, train={"gradient_checkpointing": checkpointing})
        )
        losses.append([float(learner.run_step(step)[0]) for step in range(3)])
    assert losses[0] == losses[1]


def test_clipping_bounds_the_gradient_and_reports_its_length_before(tiny_sd15: Path, tmp_path: Path) -> None:
    free = tiny_learner(tiny_config(tiny_sd15, tmp_path, optimizer={"max_grad_norm": 0.0, "name": "lion"}))
    tight = tiny_learner(tiny_config(tiny_sd15, tmp_path, optimizer={"max_grad_norm": 1e-4, "name": "lion"}))
    norms = [float(learner.run_step(0)[1]) for learner in (free, tight)]
    assert norms[0] == norms[1] > 1e-4
    # Lion keeps a hundredth of what it was given.
    kept = [torch.stack([s["exp_avg"].norm() for s in lr.optimizer.state.values()]).norm() for lr in (free, tight)]
    assert float(kept[0]) == pytest.approx(0.01 * norms[0], rel=1e-3)
    assert float(kept[1]) == pytest.approx(0.01 * 1e-4, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_fp32_weights_to_finite_losses(precision: str, tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"precision": precision, "steps": 3})
    learner = tiny_learner(config)
    assert learner.family.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (learner.scaler is not None) == (precision == "fp16")
    before = learner.adapter.state_dict()
    losses = [float(learner.run_step(step)[0]) for step in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    after = learner.adapter.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


def test_encoders_leave_memory_after_caching_unless_they_are_trained(tiny_sd15: Path, tmp_path: Path) -> None:
    assert not tiny_learner(tiny_config(tiny_sd15, tmp_path)).family.text_encoders
    assert tiny_learner(tiny_config(tiny_sd15, tmp_path, adapter={"text_encoder": True})).family.text_encoders


def test_stop_saves_a_checkpoint_and_says_that_the_run_can_go_on(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 50, "log_every": 1})
    run, host = run_training(config, RecordingHost(at={3: [Command.STOP]}))
    ended = host.events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.outcome, ended.step, ended.exit_code) == ("stopped", 3, 130)
    assert [event.step for event in host.of(CheckpointSaved)] == [3]
    assert not host.of(ExportDone)
    assert (run.checkpoints / "step-00000003").is_dir()


def test_stop_while_pictures_are_encoded_ends_before_the_first_step(tiny_sd15: Path, tmp_path: Path) -> None:
    _, host = run_training(tiny_config(tiny_sd15, tmp_path), RecordingHost(at={0: [Command.STOP]}))
    assert host.of(RunEnded)[0].outcome == "stopped"
    assert not host.of(StepsDone)


def test_save_and_preview_come_when_asked_for(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 5, "log_every": 1}, previews={"prompts": ["a"]})
    _, host = run_training(config, RecordingHost(at={2: [Command.SAVE_NOW, Command.PREVIEW_NOW]}))
    assert [event.command for event in host.of(CommandReceived)] == ["save_now", "preview_now"]
    assert [event.step for event in host.of(CheckpointSaved)] == [2, 5]
    assert [event.step for event in host.of(PreviewReady)] == [2]


def test_pause_waits_and_resume_goes_on(tiny_sd15: Path, tmp_path: Path) -> None:
    host = RecordingHost(at={2: [Command.PAUSE]})
    host.on_event = lambda event: host.waiting.extend(
        [Command.SAVE_NOW, Command.RESUME] if isinstance(event, Paused) else []
    )
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, train={"steps": 4, "log_every": 1}), host)
    order = names(host, Paused, Resumed, CheckpointSaved, RunEnded)
    assert order == ["Paused", "CheckpointSaved", "Resumed", "CheckpointSaved", "RunEnded"]
    assert [event.step for event in host.of(Paused)] == [2]
    assert host.of(StepsDone)[-1].step == 4


def test_stop_ends_a_pause(tiny_sd15: Path, tmp_path: Path) -> None:
    host = RecordingHost(at={2: [Command.PAUSE]})
    host.on_event = lambda event: host.waiting.extend([Command.STOP] if isinstance(event, Paused) else [])
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, train={"steps": 4, "log_every": 1}), host)
    assert host.of(RunEnded)[0].outcome == "stopped"
    assert host.of(CheckpointSaved)[0].step == 2


def test_a_pause_does_not_count_as_training_time(tiny_sd15: Path, tmp_path: Path) -> None:
    host = RecordingHost(at={1: [Command.PAUSE]})

    def wait(timeout: float) -> Command:
        time.sleep(0.5)
        return Command.RESUME

    host.wait_command = wait  # type: ignore[method-assign]
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, train={"steps": 3, "log_every": 1}), host)
    assert host.of(Resumed)
    assert max(event.seconds_per_step for event in host.of(StepsDone)[1:]) < 0.4


def test_a_preview_that_fails_is_a_warning(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no decoder")

    monkeypatch.setattr(finishing, "preview_conditionings", broken)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, previews={"every": 2}))
    assert "no decoder" in texts([e for e in host.of(Logged) if e.severity == "warning"])
    assert host.of(RunEnded)[0].outcome == "finished"


def test_a_sheet_that_fails_is_a_warning(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(finishing, "build_run_sheet", broken)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path))
    assert [event.message for event in host.of(Logged) if event.severity == "warning"] == [
        "No sheet of all previews: no font"
    ]
    assert host.of(ExportDone)


def test_layers_that_training_left_unchanged_are_told(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.run_step

    def without_one(self: Learner, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = step(self, number)
        self.adapter.modules[0].up.data.zero_()
        return result

    monkeypatch.setattr(Learner, "run_step", without_one)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, export={"layouts": ["kohya", "diffusers"]}))
    told = [event.message for event in host.of(Logged) if "unchanged" in event.message]
    assert told == ["1 of 32 adapted layers was left unchanged by training."]


def test_weights_that_are_no_numbers_end_the_run_and_are_never_written(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.run_step

    def breaks(self: Learner, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number == 4:
            with torch.no_grad():
                self.adapter.parameters()[0].fill_(float("nan"))
        return step(self, number)

    monkeypatch.setattr(Learner, "run_step", breaks)
    config = tiny_config(
        tiny_sd15, tmp_path, train={"steps": 20, "log_every": 3}, checkpoints={"every": 3}, previews={"every": 3}
    )
    run, host = new_run(config), RecordingHost()
    with pytest.raises(TrainingError, match="stopped being numbers after step 4") as caught:
        run_training(config, host, run)
    assert caught.value.fix
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]
    assert not list(run.export.iterdir())


def test_a_full_disk_is_said_before_the_base_model_is_loaded(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run, host = new_run(config), RecordingHost()
    monkeypatch.setattr(disk_plan, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match="Not enough disk space"):
        run_training(config, host, run)
    assert not host.of(StageChanged)


def test_an_output_folder_that_went_away_is_said_before_step_0(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run, host = new_run(config), RecordingHost()
    run.previews.rmdir()
    run.previews.write_text("a file where a folder belongs")
    with pytest.raises(StorageError, match="Cannot write to the output folder"):
        run_training(config, host, run)
    assert not host.of(StepsDone)


def test_what_is_wrong_with_the_pictures_is_said_before_the_base_model_is_loaded(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    next((tmp_path / "pictures").glob("*.txt")).unlink()
    host = RecordingHost()
    with pytest.raises(DatasetError, match="caption"):
        run_training(config, host)
    assert [event.stage for event in host.of(StageChanged)] == ["scan"]


def test_the_steps_of_an_epoch_are_told_as_the_loader_counts_them(tiny_sd15: Path, tmp_path: Path) -> None:
    # Five batches, two a step: an epoch ends within its third step.
    config = tiny_config(tiny_sd15, tmp_path, train={"gradient_accumulation": 2, "batch_size": 1})
    _, host = run_training(config)
    assert host.of(DatasetReady)[0].steps_per_epoch == tiny_learner(config).loader.steps_per_epoch == 3


def test_an_empty_trigger_is_refused_at_once(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path, captions={"trigger": ""})
    with pytest.raises(ConfigError, match="trigger"):
        run_training(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out() -> None:
    with pytest.raises(HardwareError, match="sees no NVIDIA GPU") as caught:
        choose_compute(TrainSettings(device="cuda"))
    assert "doctor" in caught.value.fix


def test_without_a_gpu_auto_means_cpu_in_fp32() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    chosen = choose_compute(TrainSettings())
    assert (chosen.device.type, chosen.dtype, chosen.label) == ("cpu", torch.float32, "CPU, fp32")


@pytest.mark.parametrize(
    ("capability", "available", "chosen"), [((9, 0), True, "bf16"), ((7, 5), True, "fp16"), ((7, 0), False, "fp16")]
)
def test_auto_takes_bf16_only_where_the_gpu_computes_in_it(
    capability: tuple[int, int], available: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compute, "is_bf16_available", lambda: available)
    assert choose_compute(TrainSettings()).label == f"A GPU, {chosen}"
    if available:
        assert choose_compute(TrainSettings(precision="bf16")).dtype == torch.bfloat16
    else:
        with pytest.raises(HardwareError, match="cannot compute in bf16"):
            choose_compute(TrainSettings(precision="bf16"))


def test_v_prediction_with_zero_terminal_snr_trains(tiny_sd15_v: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15_v, tmp_path, objective={"min_snr_gamma": 5.0, "noise_offset": 0.05})
    learner = tiny_learner(config)
    assert learner.objective.velocity
    assert all(math.isfinite(float(learner.run_step(step)[0])) for step in range(3))


def test_previews_without_prompts_show_a_caption_as_it_is_trained(tiny_sd15: Path, tmp_path: Path) -> None:
    captions = {"prefix": "photo of", "wildcards": True, "lines": "choose"}
    config = tiny_config(tiny_sd15, tmp_path, captions=captions)
    (tmp_path / "pictures" / "00.txt").write_text("zqx {cat|kitten}\na dog")
    material = run_setup.read_dataset(config, 8, RecordingHost().emit)
    assert material.prompts == ["zqx, photo of kitten", "photo of kitten"]


def test_the_prediction_can_be_set_by_hand(tiny_sd15: Path, tmp_path: Path) -> None:
    learner = tiny_learner(tiny_config(tiny_sd15, tmp_path, base={"prediction": "v_prediction"}))
    assert learner.objective.velocity


def test_dropped_captions_and_previews_use_what_was_encoded(tiny_sd15: Path, tmp_path: Path) -> None:
    family = load_tiny(tiny_sd15)
    learner = tiny_learner(tiny_config(tiny_sd15, tmp_path, previews={"negative_prompt": "blurry"}))
    assert learner.conditionings is not None
    expected = family.encode_prompts(["blurry"])[0]
    for name, tensor in learner.conditionings["blurry"].items():
        assert torch.allclose(tensor.cpu(), expected[name].detach(), atol=1e-5)
