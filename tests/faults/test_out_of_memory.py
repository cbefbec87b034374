"""Memory that runs out costs time and nothing else: no picture, no step, no bit; and at the end it costs words."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorasmith.engine import memory_ladder, out_of_memory, run_setup
from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import choose_compute
from lorasmith.engine.config import RunConfig
from lorasmith.engine.controls import Controls
from lorasmith.engine.errors import HardwareError, StorageError
from lorasmith.engine.events import CheckpointSaved, Logged, MemoryReduced, PreviewReady, RunEnded
from lorasmith.engine.families import _sd_parts
from lorasmith.engine.learner import Learner
from lorasmith.engine.memory_ladder import MemoryLadder
from lorasmith.engine.out_of_memory import Rungs, describe_shortage, is_out_of_memory
from lorasmith.engine.run_failure import describe_failure
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.tensor_file import OneByOne, write_one_by_one
from lorasmith.engine.training_parts import TrainingParts
from tests.engine.running import RecordingHost, new_run, run_training, texts, tiny_config
from tests.faults.sampling import sampled
from tests.faults.shortage import CPU, ERRORS, GPU, FailAt, Shortage
from tests.tiny import tiny_pictures

Record = Callable[[int, str, str], None]
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pass over all objects of this process takes half a second; in a run they are frozen by then.
    monkeypatch.setattr(out_of_memory.gc, "collect", lambda: 0)


def training(config: RunConfig, host: RecordingHost | None = None, taken: Any = None) -> tuple[MemoryLadder, Learner]:
    """Everything that a step needs, and the ladder around it."""
    host = host or RecordingHost()
    base = run_setup.find_base(config, host.emit)
    material = run_setup.read_dataset(config, base.module.SPEC.pixel_multiple, host.emit)
    family = run_setup.load_base(base, choose_compute(config.train), host.emit)
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    learner = run_setup.build_training(config, base.files, family, material, adapter, host.emit, lambda: False)
    assert learner is not None
    rungs = Rungs(host.emit, taken=taken)
    parts = TrainingParts(new_run(config), config, host, Controls(host, 0), learner, material, rungs)
    return MemoryLadder(parts), learner


def changes(host: RecordingHost, phase: str) -> list[str]:
    return [event.change for event in host.of(MemoryReduced) if event.phase == phase]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run.checkpoints, lambda *_: None)
    assert checkpoint is not None
    return {**checkpoint.tensors("adapter"), **checkpoint.tensors("optimizer")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What counts as running out of memory.


@pytest.mark.parametrize("kind", ERRORS)
def test_each_allocators_error_counts(kind: str) -> None:
    error = ERRORS[kind]()
    assert is_out_of_memory(error)
    ended = describe_failure(error, 3)
    assert ended.exit_code == 6
    assert "ran out of memory" in ended.message


def test_a_real_refusal_of_the_processors_allocator_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x3)"),
        ValueError("CUDA out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        HardwareError("The GPU ran out of memory."),
    ],
)
def test_other_errors_do_not_count(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_file_that_cannot_be_mapped_counts_and_so_does_what_it_caused() -> None:
    mapped = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert is_out_of_memory(mapped)
    assert is_out_of_memory(RuntimeError("unable to mmap 12 bytes from file <x>: Cannot allocate memory (12)"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    wrapped = ValueError("cannot load")
    wrapped.__cause__ = mapped
    assert is_out_of_memory(wrapped)


def test_the_numbers_that_are_known_are_told() -> None:
    assert describe_shortage(RuntimeError(CPU)).startswith("This machine ran out of memory: 8.00 GiB more were asked")
    assert describe_shortage(torch.OutOfMemoryError(GPU)) == (
        "The GPU ran out of memory: 2.00 GiB more were asked for, 1.12 GiB were free."
    )


def test_what_was_held_for_nothing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    held: list[Any] = [torch.zeros(8)]
    held.append(held)
    gone = weakref.ref(held[0])
    del held
    assert gone() is not None
    out_of_memory.free_memory()
    assert gone() is None


# Each phase, with each error.

PHASES: dict[str, Callable[[Shortage], object]] = {
    "load": lambda shortage: shortage.refuse_first(_sd_parts, "load_vae", 2),
    "image encode": lambda shortage: shortage.image_encoder(most=1),
    "text encode": lambda shortage: shortage.text_encoder(1),
    "step": lambda shortage: shortage.steps(most=1, checkpointed=True),
    "step, in the backward pass": lambda shortage: shortage.steps(most=1, checkpointed=True, backward=True),
    "preview": lambda shortage: shortage.drawing(1).image_decoder(4 * 4),
    "save": lambda shortage: shortage.refuse(Adapter, "state_dict", lambda _, copy=True: copy),
}
EXACT = {"load", "preview", "save"}
"""Elsewhere another batch size changes the last bits."""


@pytest.mark.parametrize("kind", sampled(ERRORS, ["gpu"]))
def test_every_phase_goes_on_with_less(
    kind: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: bool, record: Record
) -> None:
    config = tiny_config(
        tiny_sd15,
        tmp_path,
        train={"steps": 2, "batch_size": 4, "log_every": 1},
        dataset={"buckets": False},
        previews={"every": 2, "steps": 1, "prompts": ["a", "b"], "seeds": [1, 2]},
        captions={"trigger": "zqx", "shuffle": True},
    )
    tiny_pictures(tmp_path / "pictures", 8)
    plain, undisturbed = run_training(config)
    assert undisturbed.of(MemoryReduced) == []
    everything = {name: happens for name, happens in PHASES.items() if name != "step"}
    cases = [{name: happens} for name, happens in PHASES.items()] if campaign else []
    for number, case in enumerate([everything, *cases]):
        with monkeypatch.context() as patch:
            patch.setenv("LORASMITH_CACHE", str(tmp_path / f"cache-{number}"))
            shortages = {name: Shortage(patch, kind) for name in case}
            for name, happens in case.items():
                happens(shortages[name])
            run, host = run_training(config)
        for name, shortage in shortages.items():
            told = changes(host, name.partition(",")[0])
            assert len(told) == len(set(told)) == shortage.times >= 2, name
            record(9, f"memory errors survived: {name}", f"{len(told)} of {shortage.times} ({kind})")
        assert isinstance(host.events[-1], RunEnded)
        assert host.events[-1].outcome == "finished"
        assert host.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)
        assert len(host.of(PreviewReady)) == 4
        assert not EXACT.issuperset(case) or same(weights(run), weights(plain)), case


def test_pictures_that_fit_only_in_tiles_are_encoded_in_tiles_and_kept_apart(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 1})
    _, whole = run_training(config)
    with monkeypatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(tmp_path / "other"))
        Shortage(patch).image_encoder(pixels=32 * 32)
        run, host = run_training(config)
    assert "large pictures are encoded in overlapping tiles" in changes(host, "image encode")
    assert host.losses() != whole.losses()
    assert host.losses() == pytest.approx(whole.losses(), rel=0.5)
    state = newest_checkpoint(run.checkpoints, lambda *_: None)
    assert state is not None
    assert state.state["learner"]["memory"]["image encode"][-1] == "tiles"
    # The whole pictures' entries are others: both runs together have twice as many.
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "other"))
    _, again = run_training(config)
    assert again.losses() == whole.losses()


def test_a_machine_that_is_too_small_is_told_what_would_help(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[str, Callable[[Shortage], object], str]] = [
        ("load", lambda shortage: shortage.refuse(_sd_parts, "load_unet", lambda *_: True), "The weights are"),
        ("image encode", lambda shortage: shortage.image_encoder(most=0), "Lower dataset.resolution (now 64)"),
        ("text encode", lambda shortage: shortage.text_encoder(0), "train.precision"),
        ("step", lambda shortage: shortage.steps(most=0), "adapter.rank (now 2)"),
    ]
    for number, (phase, happens, fix) in enumerate(cases):
        with monkeypatch.context() as patch:
            patch.setenv("LORASMITH_CACHE", str(tmp_path / str(number)))
            happens(Shortage(patch))
            with pytest.raises(HardwareError, match="The GPU ran out of memory") as caught:
                run_training(tiny_config(tiny_sd15, tmp_path))
        assert fix in caught.value.fix, phase
        assert describe_failure(caught.value, 0).exit_code == 6


def test_previews_that_never_fit_are_given_up_and_training_goes_on(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path, previews={"every": 2, "steps": 1, "prompts": ["a"]})
    plain, _ = run_training(config)
    Shortage(monkeypatch).drawing(0)
    run, host = run_training(config)
    warnings = texts([event for event in host.of(Logged) if event.severity == "warning"])
    assert warnings.count("training goes on") == 2
    assert "previews.side" in warnings
    assert host.of(PreviewReady) == []
    assert same(weights(run), weights(plain))


def test_a_save_that_never_fits_is_refused_as_by_a_full_disk(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shortage(monkeypatch).refuse(Adapter, "state_dict", lambda *_, **__: True)
    host = RecordingHost(on_event=lambda event: host.waiting.append(Command.STOP) if "Paused" in str(event) else None)
    with pytest.raises(StorageError, match="ran out of memory"):
        run_training(tiny_config(tiny_sd15, tmp_path), host)


# A step in pieces.


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_pieces_have_the_loss_and_the_gradient_of_the_whole(
    accumulation: int, text_encoder: bool, tiny_sd15: Path, tmp_path: Path, record: Record
) -> None:
    config = tiny_config(
        tiny_sd15,
        tmp_path,
        train={"batch_size": 5, "gradient_accumulation": accumulation, "steps": 3},
        dataset={"buckets": False, "regularization_folder": str(tmp_path / "others")},
        objective={"min_snr_gamma": 5.0, "noise_offset": 0.1, "prior_weight": 0.3, "unmasked_weight": 0.2},
        adapter={"text_encoder": text_encoder},
    )
    tiny_pictures(tmp_path / "others", 3)
    for number in (0, 2):
        Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "pictures" / f"{number:02}-masklabel.png")
    _, learner = training(config)
    learner.before_update = None
    batches = [learner.loader.batch(number) for number in range(accumulation)]
    assert any(batch.pixel_weights is not None for batch in batches)
    assert len({float(weight) for batch in batches for weight in batch.weights}) == 2

    def gradients(at_once: int) -> tuple[float, torch.Tensor]:
        learner.pictures_at_once = at_once
        losses = [float(learner._add_gradients(batch, 0, part)) for part, batch in enumerate(batches)]
        flat = torch.cat(
            [parameter.grad.flatten() for parameter in learner.adapter.parameters() if parameter.grad is not None]
        )
        learner.optimizer.zero_grad(set_to_none=True)
        return sum(losses), flat

    loss, whole = gradients(0)
    assert whole.abs().max() > 0
    for at_once in (1, 2, 3, 4):
        other_loss, pieces = gradients(at_once)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=float(whole.abs().max()) * 1e-5)
    record(9, "steps in pieces of 1 to 4 with the whole step's gradient", "16 of 16")


def test_the_batch_is_halved_until_it_fits(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = RecordingHost()
    ladder, learner = training(
        tiny_config(tiny_sd15, tmp_path, train={"batch_size": 5}, dataset={"buckets": False}), host
    )
    Shortage(monkeypatch).steps(most=2)
    ladder.run_step(0)
    assert learner.pictures_at_once == 2
    assert changes(host, "step")[-2:] == [
        "3 pictures are taken at a time instead of 5, with the same result",
        "2 pictures are taken at a time instead of 5, with the same result",
    ]
    count = len(host.of(MemoryReduced))
    ladder.run_step(1)
    assert len(host.of(MemoryReduced)) == count


@pytest.mark.parametrize("dropout", sampled([0.0, 0.3], [0.3]))
def test_a_resumed_run_starts_on_the_rung_it_had_reached_and_is_exact_to_the_bit(
    dropout: float,
    tiny_sd15: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    config = tiny_config(
        tiny_sd15,
        tmp_path,
        train={"steps": 4, "batch_size": 4, "log_every": 1},
        dataset={"buckets": False},
        adapter={"dropout": dropout},
        checkpoints={"every": 2},
    )
    shortage = Shortage(monkeypatch).steps(most=1, checkpointed=True).image_encoder(pixels=32 * 32)
    whole, uncut = run_training(config)
    failed = shortage.times
    part, first = run_training(config, RecordingHost({2: [Command.STOP]}))
    assert first.losses() == uncut.losses()[:2]
    shortage.times = 0
    part, second = run_training(config, run=part)
    assert shortage.times == 0
    assert failed > 0
    assert second.of(MemoryReduced) == []
    assert second.losses() == uncut.losses()[2:]
    assert same(weights(part), weights(whole))
    record(9, f"resume after rungs, exact to the bit, dropout {dropout}", "1 of 1")


# An optimizer step that runs out of memory in its middle.


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    groups, rest = learner.state()
    values = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    text = json.dumps(rest["optimizer"], sort_keys=True)
    return values | {"rest": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_update_that_fails_in_its_middle_is_undone_bit_for_bit(
    optimizer: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: bool, record: Record
) -> None:
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    settings = {"name": optimizer, "learning_rate": rate}
    ladder, learner = training(tiny_config(tiny_sd15, tmp_path, train={"ema_decay": 0.9}, optimizer=settings))
    learner.run_step = _same_gradients(learner)  # type: ignore[method-assign]
    start, _ = learner.state()
    groups = [dict(group) for group in learner.optimizer.param_groups]

    def first_step(mode: FailAt) -> dict[str, torch.Tensor]:
        learner.adapter.load_state_dict(start["adapter"])
        with learner.averaged():
            learner.adapter.load_state_dict(start["ema"])
        learner.optimizer.state.clear()
        for group, fresh in zip(learner.optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(fresh)
        ladder._careful = True
        ladder._parts.rungs._freed.clear()
        with mode:
            ladder.run_step(0)
        return state_of(learner)

    counting = FailAt()
    expected = first_step(counting)
    places = range(1, counting.count + 1, max(1, counting.count // (60 if campaign else 5)))
    for at in places:
        failing = FailAt(at)
        assert same(first_step(failing), expected), f"operation {at} of {counting.count}"
        assert failing.count > counting.count
    done = f"{len(places)} of {len(places)} places among {counting.count} operations"
    record(9, f"first updates that failed in their middle, undone to the bit ({optimizer})", done)


def _same_gradients(learner: Learner) -> Callable[[int], Any]:
    """Return a step that has its gradients already, so that only the update is tried many times."""
    loss = learner._add_gradients(learner.loader.batch(0), 0, 0)
    kept = [None if p.grad is None else p.grad.clone() for p in learner.adapter.parameters()]

    def run_step(step: int) -> Any:
        for parameter, gradient in zip(learner.adapter.parameters(), kept, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return loss, learner._update(step, loss)

    return run_step


def test_a_later_update_without_room_changes_nothing_and_is_done_again(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    (plain, undisturbed), (ladder, learner) = training(config), training(config)
    for step in range(3):
        plain.run_step(step)
    ladder.run_step(0)
    Shortage(monkeypatch).refuse_first(memory_ladder, "prove_room", 1)
    for step in (1, 2):
        ladder.run_step(step)
    assert same(state_of(learner), state_of(undisturbed))
    assert ladder._undo is None


def test_a_later_update_that_is_half_done_ends_the_run_unsaved(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 4, "log_every": 1}, checkpoints={"every": 2})
    host = RecordingHost()

    def spoil(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            Shortage(monkeypatch).refuse(torch.optim.AdamW, "step", lambda *_, **__: True)

    host.on_event = spoil
    run = new_run(config)
    with pytest.raises(HardwareError, match="while step 3 changed the weights"):
        run_training(config, host, run)
    assert [event.step for event in host.of(CheckpointSaved)] == [2]
    monkeypatch.undo()


def test_a_scaler_that_has_seen_the_gradients_starts_anew(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder, learner = training(tiny_config(tiny_sd15, tmp_path, train={"precision": "fp16"}))
    assert learner.scaler is not None
    shortage = Shortage(monkeypatch).refuse_first(learner.scaler, "step", 1)
    ladder.run_step(0)
    assert shortage.times == 1
    assert learner.adapter.all_finite()


# The last rung of a save.


def test_a_file_written_tensor_by_tensor_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2).to(torch.bfloat16),
        "d": torch.tensor(True),
        "c": torch.arange(7, dtype=torch.uint8),
        "e": torch.tensor(5, dtype=torch.int64),
        "f": torch.randn(4, 6).t(),
        "g": torch.empty(0),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    write_one_by_one(tmp_path / "ours", OneByOne(tensors))
    assert same(load_file(tmp_path / "ours"), load_file(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
