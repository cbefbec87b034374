"""Batches prepared ahead in threads: the same bits, few at a time, errors where they belong, no thread left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lorasmith.engine.commands import Command
from lorasmith.engine.dataset.loader import Batch
from lorasmith.engine.dataset.prefetch import AHEAD_FOR_EACH, Prefetcher
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.events import CheckpointSaved
from tests.engine.running import RecordingHost, run_training, tiny_config
from tests.engine.test_loader import make_config, make_loader

PATIENCE = 20.0


class Source:
    """Makes batches that hold their own number, keeps the order, and waits for `gate` where there is one."""

    def __init__(self, gate: threading.Event | None = None, broken: int | None = None) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self._gate = gate
        self._broken = broken

    def batch(self, micro: int) -> Batch:
        if self._gate is not None:
            assert self._gate.wait(PATIENCE)
        self.made.append(micro)
        self.threads.add(threading.current_thread().name)
        if micro == self._broken:
            raise DatasetError(f"Batch {micro} cannot be made.")
        return Batch(torch.full((1, 1), float(micro)), [""], (micro,), torch.ones(1))


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_batch_has_the_same_bits_at_any_number_of_workers(workers: int) -> None:
    config = make_config(
        captions={"trigger": "zqx", "shuffle": True, "dropout": 0.2},
        train={"batch_size": 3},
        dataset={"weights": [1.0]},
    )
    # Fractional repeats: epochs differ in length, and the threads work on both sides of their ends.
    repeats = [1.5, 2.0, 0.5, 1.25, 1.0, 3.0, 1.0]
    loader, end = make_loader(config, repeats), 60
    ahead = Prefetcher(make_loader(config, repeats), workers, end=end)
    try:
        for micro in range(end):
            one, other = loader.batch(micro), ahead.batch(micro)
            assert (one.captions, one.indices) == (other.captions, other.indices)
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.weights, other.weights)
    finally:
        ahead.close()


def test_many_threads_asking_one_loader_at_once_get_what_one_thread_gets() -> None:
    config = make_config(train={"batch_size": 2})
    repeats = [1.5, 0.5, 2.25, 1.0, 1.0]
    wanted = [make_loader(config, repeats).batch(micro).indices for micro in range(120)]
    loader, found = make_loader(config, repeats), {}

    def ask(first: int) -> None:
        for micro in range(first, 120, 6):
            found[micro] = loader.batch(micro).indices

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[micro] for micro in range(120)] == wanted


def test_only_a_few_batches_are_prepared_ahead_and_none_after_the_last() -> None:
    source = Source()
    ahead = Prefetcher(source, 2, end=7)
    ahead.batch(0)
    ahead.close()
    assert sorted(source.made)[-1] <= 2 * AHEAD_FOR_EACH
    for micro in range(7):
        assert ahead.batch(micro).indices == (micro,)
    ahead.close()
    assert max(source.made) == 6


def test_a_jump_back_gets_the_batch_that_was_asked_for() -> None:
    ahead = Prefetcher(Source(), 2, end=100)
    assert [int(ahead.batch(micro).latents.item()) for micro in (10, 11, 4, 5, 5, 90)] == [10, 11, 4, 5, 5, 90]
    ahead.close()


def test_an_error_in_a_thread_is_raised_where_its_batch_is_asked_for() -> None:
    ahead = Prefetcher(Source(broken=3), 2, end=10)
    assert [ahead.batch(micro).indices for micro in range(3)] == [(0,), (1,), (2,)]
    with pytest.raises(DatasetError, match="Batch 3"):
        ahead.batch(3)
    assert ahead.batch(4).indices == (4,)
    ahead.close()


def test_closing_waits_for_the_threads_and_drops_what_nobody_asked_for() -> None:
    gate = threading.Event()
    source = Source(gate)
    ahead = Prefetcher(source, 1, end=50)
    taken: list[Batch] = []
    asking = threading.Thread(target=lambda: taken.append(ahead.batch(0)))
    asking.start()
    gate.set()
    asking.join(PATIENCE)
    ahead.close()
    made = len(source.made)
    assert not loader_threads()
    assert made <= 1 + AHEAD_FOR_EACH
    ahead.close()


def test_without_workers_batches_are_made_in_the_asking_thread() -> None:
    source = Source()
    ahead = Prefetcher(source, 0, end=5)
    ahead.batch(2)
    ahead.close()
    assert source.made == [2]
    assert source.threads == {threading.current_thread().name}


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_no_thread_stays_behind_however_the_run_ends(
    ending: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_sd15, tmp_path, train={"loader_workers": 2, "log_every": 1})
    host = RecordingHost(at={2: [Command.STOP]} if ending == "stopped" else {})
    if ending != "failed":
        run_training(config, host)
        assert host.of(CheckpointSaved)[-1].step == {"stopped": 2, "finished": 4}[ending]
    else:
        monkeypatch.setattr("lorasmith.engine.dataset.loader.Loader.batch", Source(broken=3).batch)
        monkeypatch.setattr("lorasmith.engine.learner.Learner.batch_loss", lambda self, batch, *_: fake_loss(self))
        with pytest.raises(DatasetError):
            run_training(config, host)
    assert not loader_threads()


def fake_loss(learner: object) -> torch.Tensor:
    parameters = learner.adapter.parameters()  # type: ignore[attr-defined]
    return torch.stack([parameter.square().mean() for parameter in parameters]).sum()
