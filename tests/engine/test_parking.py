"""Parking with a card that is made up: copies to other memory, and ruins what was left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from lorasmith.engine import parking, trainer
from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.events import CheckpointSaved, Event, Logged, Parked, Paused, PreviewReady, Resumed, RunEnded
from lorasmith.engine.parking import bring_back, clear, tensors_behind
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import RecordingHost, run_training, texts, tiny_config
from tests.engine.test_trainer import names, tiny_learner


class FakeCard:
    """Pretends that every tensor of a training is on it; memory that is left is filled with ones: NaN as a float."""

    def __init__(self) -> None:
        self.used = 0
        self.full = False

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().nbytes() > 0

    def to_host(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        self.used -= storage.nbytes()
        return _moved(storage)

    def to_card(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        self.used += storage.nbytes()
        return _moved(storage, ruin=False)

    def free_bytes(self) -> int:
        return 2**30 - self.used

    def release(self) -> None:
        pass


def _moved(storage: torch.UntypedStorage, *, ruin: bool = True) -> torch.UntypedStorage:
    copied = storage.clone()
    if ruin:
        storage.fill_(255)
    return copied


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the full collection before the first step: half a second for each run here."""
    monkeypatch.setattr(trainer, "freeze_garbage", lambda: None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard()
    monkeypatch.setattr(parking, "card_of", lambda device: card)
    return card


HARD = {"train": {"steps": 6, "log_every": 1, "ema_decay": 0.9, "gradient_accumulation": 2}}


def parked_config(base: Path, folder: Path, optimizer: str = "adamw") -> RunConfig:
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    return tiny_config(
        base,
        folder,
        **HARD,
        optimizer={"name": optimizer, "learning_rate": rate},
        adapter={"rank": 2, "alpha": 2.0, "dropout": 0.1},
        previews={"every": 0, "steps": 1, "prompts": ["a"]},
    )


def answering(*commands: Command, on: type[Event] = Parked) -> RecordingHost:
    """Return a host that parks at step 3 and sends `commands` once the run says that it is parked."""
    host = RecordingHost(at={3: [Command.PARK]})
    host.on_event = lambda event: host.waiting.extend(commands if isinstance(event, on) else ())
    return host


def final_bytes(run: RunFolder) -> dict[str, bytes]:
    checkpoint = newest_checkpoint(run.checkpoints, lambda *_: pytest.fail("damaged"))
    assert checkpoint is not None
    return {path.name: path.read_bytes() for path in checkpoint.path.glob("*.safetensors")}


@pytest.mark.parametrize("optimizer", ["adamw8bit", "prodigy"])
def test_a_parked_run_goes_on_to_the_same_bits(optimizer: str, tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    config = parked_config(tiny_sd15, tmp_path, optimizer)
    straight, _ = run_training(config)
    run, host = run_training(config, answering(Command.RESUME))
    assert names(host, CheckpointSaved, Parked, Resumed, RunEnded) == [
        *["CheckpointSaved", "Parked", "Resumed", "CheckpointSaved", "RunEnded"]
    ]
    assert host.of(Parked)[0].step == 3
    assert host.of(Parked)[0].freed_gib > 0
    assert card.used == 0
    assert final_bytes(run) == final_bytes(straight)


def test_every_tensor_that_a_training_keeps_is_found(tiny_sd15: Path, tmp_path: Path) -> None:
    adapter = {"rank": 2, "alpha": 2.0, "text_encoder": True}
    config = tiny_config(tiny_sd15, tmp_path, **HARD, adapter=adapter)
    gc.unfreeze()
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
    learner = tiny_learner(config)
    learner.run_step(0)
    learner.batch_loss(learner.loader.batch(0), 0, 0).backward()  # type: ignore[no-untyped-call]
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and id(thing) not in before]
    found = {tensor.untyped_storage()._cdata for tensor in tensors_behind([learner])}
    assert len(alive) > 300
    assert not [tensor.shape for tensor in alive if tensor.untyped_storage()._cdata not in found]
    gradients = [p.grad for p in learner.adapter.parameters()]
    assert all(g is not None and g.untyped_storage()._cdata in found for g in gradients)


def test_views_shared_weights_and_objects_stay_what_they_are() -> None:
    table = torch.arange(12.0)
    view, turned = table[3:7], table.view(3, 4).t()
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 2.0)
    things = {"a": [table, view], "b": (turned, {"weight": weight}), "c": lambda: view}
    place, _ = clear(FakeCard(), [things])
    assert sum(len(group) for group in place.groups) == 5
    bring_back(place)
    view.add_(100.0)
    assert table.tolist() == [0, 1, 2, 103, 104, 105, 106, 7, 8, 9, 10, 11]
    assert turned[3, 0] == 103
    assert (weight.tolist(), weight.grad.tolist()) == ([1.0] * 4, [2.0] * 4)


def test_a_card_that_is_full_keeps_the_run_parked_in_words(tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    config = parked_config(tiny_sd15, tmp_path)
    host = answering(Command.RESUME)
    usual = host.on_event

    def on_event(event: Event) -> None:
        assert usual is not None
        usual(event)
        if isinstance(event, Parked):
            card.full = True
        if isinstance(event, Logged) and "stays parked" in event.message:
            card.full = False
            host.waiting.append(Command.RESUME)

    host.on_event = on_event
    _, host = run_training(config, host)
    [said] = [event.message for event in host.of(Logged) if event.severity == "error"]
    assert "The run stays parked: it needs 0.0 GiB of the card. Only 1.0 GiB are free" in said
    assert len(host.of(Resumed)) == 1
    assert host.of(RunEnded)[0].outcome == "finished"


def test_a_machine_without_room_parks_nothing(
    tiny_sd15: Path, tmp_path: Path, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "available_bytes", lambda: 1000)
    _, host = run_training(parked_config(tiny_sd15, tmp_path), answering())
    assert "Not parked" in texts([event for event in host.of(Logged) if event.severity == "error"])
    assert not host.of(Parked)
    assert host.of(RunEnded)[0].outcome == "finished"


def test_what_makes_no_sense_while_parked_is_answered_in_words(tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    asked = (Command.SAVE_NOW, Command.PREVIEW_NOW, Command.PAUSE, Command.PARK, Command.RESUME)
    _, host = run_training(parked_config(tiny_sd15, tmp_path), answering(*asked))
    said = texts(host.of(Logged))
    for words in ("Saved already", "No previews while the run is parked", "The run is parked already"):
        assert words in said
    assert not host.of(PreviewReady)
    assert len(host.of(Parked)) == len(host.of(Resumed)) == 1
    assert [event.step for event in host.of(CheckpointSaved)] == [3, 6]


def test_stop_ends_a_parked_run(tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    run, host = run_training(parked_config(tiny_sd15, tmp_path), answering(Command.STOP))
    assert (host.of(RunEnded)[0].outcome, host.of(RunEnded)[0].step) == ("stopped", 3)
    assert not host.of(Resumed)
    _, host = run_training(parked_config(tiny_sd15, tmp_path), run=run)
    assert host.of(RunEnded)[0].outcome == "finished"


def test_a_paused_run_can_be_parked(tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    host = RecordingHost(at={2: [Command.PAUSE]})
    answers: dict[type[Event], Command] = {Paused: Command.PARK, Parked: Command.RESUME}
    host.on_event = lambda event: host.waiting.extend([answers[type(event)]] if type(event) in answers else [])
    _, host = run_training(parked_config(tiny_sd15, tmp_path), host)
    assert names(host, Paused, Parked, Resumed, RunEnded) == ["Paused", "Parked", "Resumed", "RunEnded"]


def test_a_resume_that_overtakes_a_park_wins(tiny_sd15: Path, tmp_path: Path, card: FakeCard) -> None:
    host = RecordingHost(at={2: [Command.PARK, Command.RESUME]})
    _, host = run_training(parked_config(tiny_sd15, tmp_path), host)
    assert not host.of(Parked)


def test_a_checkpoint_that_is_refused_parks_nothing(
    tiny_sd15: Path, tmp_path: Path, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.engine.saving import Saver

    monkeypatch.setattr(Saver, "save", lambda self: False)
    _, host = run_training(parked_config(tiny_sd15, tmp_path), answering())
    assert "Not parked: its checkpoint could not be written" in texts(host.of(Logged))
    assert not host.of(Parked)


def test_on_the_processor_parking_waits_and_says_that_there_is_no_card(tiny_sd15: Path, tmp_path: Path) -> None:
    _, host = run_training(parked_config(tiny_sd15, tmp_path), answering(Command.RESUME))
    assert host.of(Parked)[0].freed_gib == 0.0
    assert "there is no card to free" in texts(host.of(Logged))
    assert host.of(RunEnded)[0].outcome == "finished"
