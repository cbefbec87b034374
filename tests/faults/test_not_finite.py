"""A loss or gradient that is no number, injected at a step of a real training: promise 8."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.combinations import ONE_RATE, SCHEDULE_FREE
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.controls import Controls
from lorasmith.engine.dataset.loader import Batch, Loader
from lorasmith.engine.errors import TrainingError
from lorasmith.engine.events import CheckpointSaved, NotFinite, RolledBack, RunEnded, StepsDone
from lorasmith.engine.learner import Learner, build_learner
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_setup import read_dataset
from lorasmith.engine.step_guard import MAX_BAD, WINDOW
from lorasmith.engine.trainer import Training
from lorasmith.engine.training_parts import TrainingParts
from lorasmith.tui.state import RunState, reduce
from tests.engine.running import RecordingHost, new_run, run_training, tiny_config
from tests.engine.test_trainer import tiny_learner

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion")
Record = Callable[[int, str, str], None]
Inject = Callable[[dict[int, str]], None]
Tensors = dict[str, dict[str, torch.Tensor]]
State = tuple[Tensors, Any]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Return `inject({step: what})`: from now on these steps, counted from 1, have a loss or gradient of NaN or inf."""
    broken: dict[int, str] = {}
    real = Learner.batch_loss

    def batch_loss(self: Learner, batch: Batch, step: int, first: int) -> torch.Tensor:
        loss = real(self, batch, step, first)
        if step + 1 not in broken or first:  # in the first micro-batch alone
            return loss
        parameter = self.adapter.parameters()[-1]
        # The root of 0 is 0, and its slope there is infinite.
        slope = (parameter - parameter.detach()).abs().sqrt().sum()
        return {"loss": loss * math.nan, "infinity": loss + math.inf, "gradient": loss + slope}[broken[step + 1]]

    def replace(steps: dict[int, str]) -> None:
        broken.clear()
        broken.update(steps)

    monkeypatch.setattr(Learner, "batch_loss", batch_loss)
    return replace


def all_state(learner: Learner) -> State:
    tensors, rest = learner.state()
    return tensors, without_rates(rest)


def without_rates(rest: Any) -> Any:
    """Take out the rates: they belong to the last step that was tried, and are set anew before each."""
    for group in rest["optimizer"]["groups"]:
        group.pop("lr")
    return rest


def assert_same_bits(one: State, other: State) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, group in one[0].items():
        assert group.keys() == other[0][name].keys()
        for key, value in group.items():
            there = other[0][name][key]
            assert value.dtype == there.dtype
            assert value.numpy().tobytes() == there.numpy().tobytes(), (name, key)


@pytest.fixture(scope="module")
def loaded(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A base model with an adapter, and a dataset, for all trainings of this module."""
    return Loaded(tiny_sd15, tmp_path_factory.mktemp("not-finite"))


class Loaded:
    """A learner of which everything but the optimizer is used again by one training after the other."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORASMITH_CACHE", str(folder / "cache"))
            config = self.config(adapter={"rank": 2, "alpha": 2.0, "dropout": 0.1})
            self.material = read_dataset(config, 8, lambda event: None)
            self.learner = tiny_learner(config)
        self.first = self.learner.adapter.state_dict()

    def config(self, **sections: dict[str, Any]) -> RunConfig:
        train = {"steps": 12, "log_every": 5, "batch_size": 1} | sections.pop("train", {})
        return tiny_config(self.base, self.folder, train=train, **sections)

    def new_learner(self, config: RunConfig) -> Learner:
        """Return a learner of the first weights."""
        old = self.learner
        old.adapter.load_state_dict(self.first)
        loader = Loader(self.material.plan, old.loader._latents, config)
        return build_learner(old.family, old.adapter, loader, old.conditionings, config)

    def after(self, config: RunConfig, steps: range, left_out: tuple[int, ...] = (), *, device: bool = False) -> State:
        """Return the state after `steps`, counted from 1, as if those of `left_out` had never been."""
        learner = self.new_learner(config)
        # On a CPU it costs nothing to ask; on a GPU these optimizers are put back there.
        learner.guard._asks &= not device
        for number in steps:
            if number not in left_out:
                learner.run_step(number - 1)
        return all_state(learner)

    def train(self, config: RunConfig) -> tuple[RunFolder, RecordingHost]:
        """Run a training from its first step to its end."""
        run, host = new_run(config), RecordingHost()
        self.train_in(run, host, config)
        return run, host

    def train_in(self, run: RunFolder, host: RecordingHost, config: RunConfig) -> None:
        learner, controls = self.new_learner(config), Controls(host, 0)
        rungs = Rungs(host.emit, lambda: controls.step, None)
        Training(TrainingParts(run, config, host, controls, learner, self.material, rungs)).run()

    def ends_badly(self, config: RunConfig) -> tuple[RunFolder, RecordingHost, TrainingError]:
        run, host = new_run(config), RecordingHost()
        with pytest.raises(TrainingError) as caught:
            self.train_in(run, host, config)
        assert all_finite(run)
        return run, host, caught.value


def hard_config(loaded: Loaded, optimizer: str, accumulation: int) -> RunConfig:
    """Return settings with everything on that a bad step could change."""
    free = optimizer in SCHEDULE_FREE
    return loaded.config(
        optimizer={"name": optimizer, "learning_rate": 1.0 if optimizer in ONE_RATE else 1e-3},
        train={"steps": 9, "gradient_accumulation": accumulation, "ema_decay": 0.0 if free else 0.9},
        schedule={"name": "constant" if free else "cosine", "warmup_steps": 3},
        adapter={"rank": 2, "alpha": 2.0, "dropout": 0.1},
    )


def test_a_bad_step_changes_no_bit_of_weights_optimizer_and_average(
    loaded: Loaded, inject: Inject, campaign: bool, record: Record
) -> None:
    injected = survived = 0
    cases = [(name, accumulation) for name in OPTIMIZERS for accumulation in (1, 2)]
    whats = ("loss", "infinity", "gradient")
    for optimizer, accumulation in cases if campaign else cases[::3]:
        config = hard_config(loaded, optimizer, accumulation)
        for place in (1, 2, 3, 4, 5) if campaign else (1, 4):
            without = loaded.after(config, range(1, 6), (place,))
            for what in whats if campaign else whats[injected % 3 :][:1]:
                inject({place: what})
                injected += 1
                assert_same_bits(loaded.after(config, range(1, 6)), without)
                inject({})
                survived += 1
    record(
        8, "bad steps that changed no bit (5 optimizers, accumulation, average, warm-up)", f"{survived} of {injected}"
    )


@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "came", "adamw_schedulefree"])
def test_where_only_the_device_knows_that_a_step_was_bad_it_changes_no_bit_either(
    optimizer: str, loaded: Loaded, inject: Inject
) -> None:
    config, steps = hard_config(loaded, optimizer, 1), range(1, 6)
    assert_same_bits(loaded.after(config, steps, device=True), loaded.after(config, steps))
    for place in (1, 2, 5):
        without = loaded.after(config, steps, (place,))
        inject({place: "gradient"})
        assert_same_bits(loaded.after(config, steps, device=True), without)
        inject({})


# Whole runs


def train_from_file(config: RunConfig, run: RunFolder | None = None) -> tuple[RunFolder, RecordingHost, TrainingError]:
    """Run a whole training, loading included, that is expected to end badly."""
    run, host = run or new_run(config), RecordingHost()
    with pytest.raises(TrainingError) as caught:
        run_training(config, host, run)
    assert all_finite(run)
    return run, host, caught.value


def all_finite(run: RunFolder) -> bool:
    """Tell whether every tensor that the run has written is finite."""
    written = [load_file(path) for path in run.path.rglob("*.safetensors")]
    return all(
        bool(tensor.isfinite().all()) for file in written for tensor in file.values() if tensor.is_floating_point()
    )


def saved_steps(run: RunFolder) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in run.checkpoints.glob("step-*"))


def test_a_bad_step_is_marked_with_its_pictures_and_the_run_goes_on(loaded: Loaded, inject: Inject) -> None:
    config = loaded.config(train={"gradient_accumulation": 2})
    inject({3: "loss", 12: "gradient"})
    run, host = loaded.train(config)
    loader = Loader(loaded.material.plan, loaded.learner.loader._latents, config)
    expected = [loader._samples[index].item.relative for micro in (4, 5) for index in loader.batch(micro).indices]
    assert [(event.step, event.what) for event in host.of(NotFinite)] == [(3, "loss"), (12, "gradient")]
    assert host.of(NotFinite)[0].files == list(dict.fromkeys(expected))
    assert [math.isnan(loss) for loss in host.losses()] == [number == 3 for number in range(1, 13)]
    assert host.of(RunEnded)[0].outcome == "finished"
    assert all_finite(run)
    state = RunState()
    for event in host.events:
        state = reduce(state, event)
    assert [event.step for event in state.not_finite] == [3, 12]


@pytest.mark.parametrize("log_every", [1, 50])
def test_the_third_within_twenty_steps_ends_the_attempt_at_its_last_good_step(
    log_every: int, loaded: Loaded, inject: Inject
) -> None:
    config = loaded.config(train={"steps": 60, "log_every": log_every, "ema_decay": 0.9}, checkpoints={"every": 5})
    inject({4: "loss", 8: "gradient", 12: "gradient"})
    run, host, error = loaded.ends_badly(config)
    assert [event.step for event in host.of(NotFinite)] == [4, 8, 12]
    [back] = host.of(RolledBack)
    assert back.step == 11
    assert 12 <= back.given_up <= 12 + WINDOW
    assert "ended at step 12: the loss or gradient was no number in steps 4, 8 and 12" in error.what
    for event in host.of(NotFinite):
        assert f"{event.step}: {', '.join(event.files)}" in error.why
    assert "state of step 11" in error.why
    assert error.fix.endswith(f"lorasmith runs extend {run.path} --set optimizer.learning_rate=0.00025")
    assert saved_steps(run) == [5, 10, 11]
    assert [event.step for event in host.of(CheckpointSaved)] == [5, 10, 11]
    checkpoint = newest_checkpoint(run.checkpoints, lambda *_: pytest.fail("damaged"))
    assert checkpoint is not None
    assert checkpoint.state["not_finite"] == [[4, "loss"], [8, "gradient"]]
    inject({})
    expected = loaded.after(config, range(1, 12), (4, 8))
    saved: Tensors = {name: checkpoint.tensors(name) for name in expected[0]}
    assert_same_bits((saved, without_rates(checkpoint.state["learner"])), expected)


def test_bad_steps_far_from_one_another_end_nothing(loaded: Loaded, inject: Inject) -> None:
    inject({1: "loss", 2: "loss", 1 + WINDOW: "loss", 2 * WINDOW: "loss"})
    _, host = loaded.train(loaded.config(train={"steps": 2 * WINDOW + 1, "log_every": 7}))
    assert len(host.of(NotFinite)) == 4
    assert host.of(RunEnded)[0].outcome == "finished"


def test_stop_ends_the_attempt_at_the_first_bad_step(loaded: Loaded, inject: Inject) -> None:
    inject({7: "gradient"})
    config = loaded.config(train={"not_finite": "stop", "log_every": 12})
    run, host, error = loaded.ends_badly(config)
    assert error.what == "Training ended at step 7: the gradient was no number in step 7."
    assert [event.step for event in host.of(NotFinite)] == [7]
    assert saved_steps(run) == [6]


def test_a_bad_last_step_is_left_out_and_the_run_finishes(loaded: Loaded, inject: Inject) -> None:
    inject({4: "loss"})
    run, host = loaded.train(loaded.config(train={"steps": 4, "log_every": 50}))
    assert [event.step for event in host.of(NotFinite)] == [4]
    assert host.of(RunEnded)[0].outcome == "finished"
    assert all_finite(run)


def test_bad_steps_up_to_the_last_one_end_the_run_without_an_export(loaded: Loaded, inject: Inject) -> None:
    inject(dict.fromkeys((3, 4, 5, 6), "loss"))
    run, _, error = loaded.ends_badly(loaded.config(train={"steps": 6, "log_every": 50}))
    assert saved_steps(run) == [2]
    assert not list(run.export.iterdir())
    assert "step 2, the last good one" in error.why


def test_a_run_that_is_bad_from_the_first_step_on_has_nothing_to_go_on_from(loaded: Loaded, inject: Inject) -> None:
    inject(dict.fromkeys(range(1, 13), "loss"))
    run, host, error = loaded.ends_badly(loaded.config())
    assert [event.step for event in host.of(NotFinite)] == [1, 2, 3]
    assert not saved_steps(run)
    assert f"lorasmith train {run.path}/run.toml --set optimizer.learning_rate=0.00025" in error.fix


def test_the_count_goes_on_after_a_resume(tiny_sd15: Path, tmp_path: Path, inject: Inject) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 12, "log_every": 1})
    inject({2: "loss", 3: "loss", 6: "loss"})
    run, host = run_training(config, RecordingHost(at={4: [Command.STOP]}))
    assert host.of(RunEnded)[0].step == 4
    run, host, error = train_from_file(config, run)
    assert "steps 2, 3 and 6" in error.what
    assert saved_steps(run) == [4, 5]
    # The same start again meets the same steps and ends in the same words.
    _, host, again = train_from_file(config, run)
    assert (again.what, again.why, again.fix) == (error.what, error.why, error.fix)


def test_a_picture_that_every_bad_step_has_is_named_as_the_one_to_leave_out(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded.config(train={"steps": 40})
    real = Learner.batch_loss

    def batch_loss(self: Learner, batch: Batch, step: int, first: int) -> torch.Tensor:
        names = [self.loader._samples[index].item.relative for index in batch.indices]
        loss = real(self, batch, step, first)
        return loss * math.nan if "03.png" in names else loss

    monkeypatch.setattr(Learner, "batch_loss", batch_loss)
    run, host, error = loaded.ends_badly(config)
    assert {tuple(event.files) for event in host.of(NotFinite)} == {("03.png",)}
    assert error.fix.startswith("Leave out 03.png: every bad step has it in its batch")
    assert error.fix.endswith(f"lorasmith train {run.path}/run.toml")


def test_with_prodigy_which_finds_its_rate_shorter_gradients_are_proposed(loaded: Loaded, inject: Inject) -> None:
    inject(dict.fromkeys((3, 4, 5), "gradient"))
    config = loaded.config(optimizer={"name": "prodigy", "learning_rate": 1.0})
    _, _, error = loaded.ends_badly(config)
    assert error.fix.endswith("--set optimizer.max_grad_norm=0.25")


# Half precision: a gradient that overflows is the scaler's business, a loss is not


def test_in_fp16_bf16_is_proposed(tiny_sd15: Path, tmp_path: Path, inject: Inject) -> None:
    inject({2: "gradient"} | dict.fromkeys((3, 4, 5), "loss"))
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 12, "precision": "fp16", "log_every": 9})
    run, host, error = train_from_file(config)
    # The scaler met the gradient of step 2 on purpose.
    assert [event.step for event in host.of(NotFinite)] == [3, 4, 5]
    assert error.fix.endswith("--set train.precision=bf16")
    assert saved_steps(run) == [2]


# Weights that break although every step was finite


@pytest.fixture
def break_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes a weight infinite at the end of a step, counted from 1."""

    def at(broken: int) -> None:
        real = Learner.run_step

        def run_step(self: Learner, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            result = real(self, step)
            if step + 1 == broken:
                with torch.no_grad():
                    self.adapter.parameters()[2].view(-1)[0] = math.inf
            return result

        monkeypatch.setattr(Learner, "run_step", run_step)

    return at


@pytest.mark.parametrize("broken", [6, 7, 9])
def test_broken_weights_bring_the_newest_checkpoint_back(
    broken: int, loaded: Loaded, break_weights: Callable[[int], None]
) -> None:
    break_weights(broken)
    config = loaded.config(checkpoints={"every": 3}, train={"log_every": 20})
    run, host, error = loaded.ends_badly(config)
    whole = 3 * ((broken - 1) // 3)
    assert [event.step for event in host.of(RolledBack)] == [whole]
    assert saved_steps(run)[-1] == whole
    assert f"stopped being numbers after step {broken}" in error.what
    assert f"the checkpoint of step {whole} is" in error.why
    assert "runs extend" in error.fix


def test_weights_that_break_in_the_last_step_are_neither_saved_nor_exported(
    loaded: Loaded, break_weights: Callable[[int], None]
) -> None:
    break_weights(4)
    run, _, error = loaded.ends_badly(loaded.config(train={"steps": 4}))
    assert not saved_steps(run)
    assert not list(run.export.iterdir())
    assert "No checkpoint had been saved before" in error.why


def test_wherever_a_run_breaks_all_that_it_wrote_is_finite(
    loaded: Loaded, inject: Inject, campaign: bool, record: Record
) -> None:
    cases = list(itertools.product(range(1, 9), ("loss", "gradient"), ("skip", "stop")))
    runs = ended = 0
    for place, what, policy in cases if campaign else cases[::11]:
        train = {"steps": 8, "log_every": 1 + place % 4, "not_finite": policy}
        config = loaded.config(train=train, checkpoints={"every": 2})
        inject(dict.fromkeys(range(place, place + MAX_BAD["skip"]), what))
        runs += 1
        if policy == "skip" and place > 6:
            run, _ = loaded.train(config)
            assert all_finite(run)
        else:
            run, host, error = loaded.ends_badly(config)
            assert host.of(NotFinite)[0].step == place
            # Left-out steps change nothing, so a planned save among them has the state of the last good one.
            assert host.of(RolledBack)[0].step >= place - 1
            assert [0, *saved_steps(run)][-1] == host.of(RolledBack)[0].step
            assert error.fix
            ended += 1
    record(8, "runs that broke and left only finite files, the last good step among them", f"{runs} of {runs}")
    assert ended


def test_losses_are_looked_at_every_twenty_steps_and_told_when_asked_for(loaded: Loaded, inject: Inject) -> None:
    inject({2: "loss"})
    _, host = loaded.train(loaded.config(train={"steps": WINDOW + 5, "log_every": 1000}))
    told = [event for event in host.events if isinstance(event, NotFinite | StepsDone)]
    assert [type(event) for event in told] == [NotFinite, StepsDone]
    assert len(host.losses()) == WINDOW + 5
