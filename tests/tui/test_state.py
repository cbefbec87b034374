"""The screen's state is a fold over the journal's events."""

from __future__ import annotations

import json
import math

import numpy as np

from lorasmith.engine import events
from lorasmith.engine.commands import Command
from lorasmith.tui.bridge import MAX_EVENTS_PER_POLL, Bridge, FollowedRun
from lorasmith.tui.state import LOG_LINES, Curve, RunState, reduce


def a_run(steps: int = 40, start: int = 0, total: int = 40) -> list[events.Event]:
    """A run as the engine tells it, with a NaN loss and a preview, stopped at `start + steps`."""
    told: list[events.Event] = [
        events.RunStarted(
            run="cat", total_steps=total, resumed_from=start, config={"run": {}}, versions={"torch": "2"}, device="cpu"
        ),
        events.StageChanged(stage="cache", label="Encoding pictures"),
        events.Progress(stage="cache", label="Encoding pictures", done=3, total=12),
        events.DatasetReady(images=12, refused=1, regularization=0, buckets={"64x64": 12}, steps_per_epoch=12),
        events.StageChanged(stage="train", label="Training"),
    ]
    for step in range(start + 5, start + steps + 1, 5):
        losses = [math.nan if step == 20 and i == 2 else 1.0 / (step + i) for i in range(5)]
        told.append(
            events.StepsDone(
                step=step, epoch=step // 12, losses=losses, learning_rate=1e-4, grad_norm=0.5, seconds_per_step=0.25
            )
        )
    told += [
        events.HardwareSampled(
            vram_used_gib=7.5, vram_total_gib=24.0, gpu_utilization_percent=98.0, temperature_c=71.0, power_w=300.0,
            ram_used_gib=4.0, ram_total_gib=8.0, process_ram_gib=1.0,
        ),
        events.PreviewReady(step=start + steps, prompt="zqx", seed=1, path="previews/a.png", line="…"),
        events.CheckpointSaved(step=start + steps, path="checkpoints/x", bytes=10, seconds=0.1),
        events.Logged(severity="warning", message="\x1b[31mforeign"),
    ]  # fmt: skip
    return told


def fold(told: list[events.Event], state: RunState | None = None) -> RunState:
    state = state or RunState()
    for event in told:
        state = reduce(state, event)
    return state


def test_state_after_a_live_run_equals_the_state_replayed_from_its_journal_lines() -> None:
    told = [
        *a_run(20), events.Paused(step=20), events.Resumed(step=20), events.CommandReceived(command="stop", step=20),
        events.RunEnded(outcome="stopped", step=20, message="Stopped.", exit_code=130),
        *a_run(20, start=20), events.RunEnded(outcome="finished", step=40, message="Done."),
    ]  # fmt: skip
    replayed = [events.from_record(json.loads(json.dumps(events.to_record(event)))) for event in told]
    assert fold(told) == fold([event for event in replayed if event is not None])
    # The comparison means something: a run that lacks one event differs.
    assert fold(told) != fold(told[:8] + told[9:])


TROUBLE: list[events.Event] = [
    events.Paused(step=20, reason="The disk is full: /data (900 bytes needed, 12 bytes free)."),
    events.Resumed(step=20),
    events.NotFinite(step=19, what="gradient", files=["a.png", "b.png"]),
    events.MemoryReduced(step=20, phase="step", change="gradient checkpointing is on"),
    events.Parked(step=20, freed_gib=7.9),
    events.Resumed(step=20),
    events.Stalled(step=20, seconds=130.0, where="synchronize", stacks="stacks.txt"),
    events.StallEnded(step=20, seconds=150.0),
    events.RolledBack(step=15, given_up=20, reason="three steps were not finite"),
]


def test_a_live_screen_equals_a_replayed_one_after_each_kind_of_trouble() -> None:
    begun = a_run(20)
    for number, event in enumerate(TROUBLE, start=1):
        told = [*begun, *TROUBLE[:number]]
        replayed = [events.from_record(json.loads(json.dumps(events.to_record(one)))) for one in told]
        assert fold(told) == fold([one for one in replayed if one is not None]), event
        assert fold(told) != fold(told[:-1]), event


def test_trouble_is_remembered_until_it_is_over() -> None:
    state = fold([*a_run(20), *TROUBLE[:1]])
    assert (state.paused, state.pause_reason) == (True, "The disk is full: /data (900 bytes needed, 12 bytes free).")
    state = fold([*a_run(20), *TROUBLE[:5]])
    assert state.parked is not None
    assert (state.parked.freed_gib, state.paused, state.pause_reason) == (7.9, True, "")
    state = fold(TROUBLE[5:7], state)
    assert (state.parked, state.paused) == (None, False)
    assert state.stalled is not None
    state = fold(TROUBLE[7:], state)
    assert state.stalled is None
    assert (state.step, len(state.losses)) == (15, 15)
    assert [line.severity for line in state.logs if "stall" in line.message.lower()] == ["warning", "info"]
    assert [item.change for item in state.memory_reduced] == ["gradient checkpointing is on"]


def test_a_step_counts_once_whether_its_loss_or_its_gradient_was_not_finite() -> None:
    state = fold([*a_run(20), events.NotFinite(step=19, what="gradient", files=[])])
    assert (state.num_invalid_losses, state.marks) == (2, (19,))
    # The loss of step 18 is NaN in this run.
    both = reduce(state, events.NotFinite(step=18, what="loss", files=[]))
    assert (both.num_invalid_losses, both.marks) == (2, (19, 18))
    resumed = reduce(
        both, events.RunStarted(run="cat", total_steps=40, resumed_from=18, config={}, versions={}, device="cpu")
    )
    assert resumed.marks == (18,)


def test_a_state_once_seen_never_changes() -> None:
    told = a_run()
    seen = []
    state = RunState()
    for event in told:
        state = reduce(state, event)
        seen.append((state, state.losses.values.copy()))
    for state, losses in seen:
        np.testing.assert_array_equal(state.losses.values, losses)


def test_two_futures_of_one_state_do_not_share_their_losses() -> None:
    begun = Curve([1.0, 2.0])
    left, right = begun.put(3, [3.0]), begun.put(3, [30.0])
    assert left.values.tolist() == [1.0, 2.0, 3.0]
    assert right.values.tolist() == [1.0, 2.0, 30.0]
    assert left != right


def test_appending_losses_reuses_the_buffer_so_that_a_long_run_stays_cheap() -> None:
    curve = Curve()
    buffers = set()
    kept = []
    for step in range(1, 20_001):
        curve = curve.put(step, [0.5])
        if id(curve._buffer) not in buffers:
            kept.append(curve._buffer)  # keeps ids unique
            buffers.add(id(curve._buffer))
    assert len(curve) == 20_000
    assert len(buffers) < 12


def test_steps_without_a_loss_are_gaps() -> None:
    values = Curve().put(3, [0.1]).put(6, [0.2, 0.3]).values
    np.testing.assert_array_equal(values, [np.nan, np.nan, 0.1, np.nan, 0.2, 0.3])


def test_a_resumed_run_drops_what_came_after_its_checkpoint() -> None:
    state = fold(a_run(40))
    assert len(state.losses) == 40
    assert state.previews
    resumed = reduce(
        state, events.RunStarted(run="cat", total_steps=40, resumed_from=20, config={}, versions={}, device="cpu")
    )
    assert (resumed.step, len(resumed.losses), resumed.previews, resumed.ended) == (20, 20, (), None)


def test_validations_go_back_with_a_resumed_run_and_a_repeated_one_counts_once() -> None:
    def validated(step: int, loss: float) -> events.Validated:
        return events.Validated(step=step, levels=[0.5], losses=[loss], pictures=1)

    state = fold([validated(step, 1.0) for step in (0, 10, 20)])
    assert [item.step for item in state.validations] == [0, 10, 20]
    resumed = reduce(
        state, events.RunStarted(run="cat", total_steps=40, resumed_from=10, config={}, versions={}, device="cpu")
    )
    assert [item.step for item in resumed.validations] == [0, 10]
    again = reduce(resumed, validated(10, 0.5))
    assert [(item.step, item.mean) for item in again.validations] == [(0, 1.0), (10, 0.5)]
    back = reduce(state, events.RolledBack(step=15, given_up=20, reason="three steps were not finite"))
    assert [item.step for item in back.validations] == [0, 10]


def test_speed_and_eta_follow_the_newest_steps() -> None:
    state = fold(a_run(20))
    assert state.seconds_per_step == 0.25
    assert state.eta_seconds == 20 * 0.25
    slow = events.StepsDone(
        step=400, epoch=1, losses=[0.1] * 380, learning_rate=1.0, grad_norm=1.0, seconds_per_step=2.0
    )
    assert reduce(state, slow).seconds_per_step == 2.0


def test_speed_is_unknown_before_the_first_step() -> None:
    assert math.isnan(RunState().seconds_per_step)
    assert math.isnan(RunState(total_steps=10).eta_seconds)


def test_non_finite_losses_are_counted() -> None:
    assert fold(a_run(40)).num_invalid_losses == 1


def test_the_log_is_bounded_and_keeps_the_newest() -> None:
    state = fold([events.Logged(severity="info", message=str(i)) for i in range(LOG_LINES + 50)])
    assert len(state.logs) == LOG_LINES
    assert state.logs[-1].message == str(LOG_LINES + 49)


def test_stop_shows_as_stopping_until_the_run_ended() -> None:
    state = reduce(fold(a_run(20)), events.CommandReceived(command=Command.STOP, step=20))
    assert state.stopping
    ended = reduce(state, events.RunEnded(outcome="stopped", step=20, message="Stopped.", exit_code=130))
    assert not ended.stopping
    assert ended.ended is not None
    assert ended.ended.exit_code == 130


class Tail:
    def __init__(self, parts: list[list[events.Event]]) -> None:
        self.parts = parts

    def poll(self) -> list[events.Event]:
        return self.parts.pop(0) if self.parts else []


def test_a_followed_run_is_finished_when_its_journal_says_so() -> None:
    source = FollowedRun(Tail([a_run(20), [events.RunEnded(outcome="finished", step=20, message="Done.")]]))
    bridge = Bridge(source)
    assert bridge.poll()
    assert not source.finished
    assert bridge.poll()
    assert source.finished
    assert not bridge.poll()


def test_the_bridge_takes_a_flood_in_parts() -> None:
    flood: list[events.Event] = [events.Logged(severity="info", message="x")] * (MAX_EVENTS_PER_POLL + 1)
    bridge = Bridge(FollowedRun(Tail([flood])))
    assert [bridge.poll(), bridge.poll(), bridge.poll()] == [True, True, False]
