"""What a session promises: one owner, journal first, every end in words, and a viewer that never matters."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import journal as journal_module
from lorasmith.engine import run_folder as run_folder_module
from lorasmith.engine import session as session_module
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError, DatasetError, RunLockedError, StorageError
from lorasmith.engine.events import (
    CheckpointSaved,
    Event,
    ExportDone,
    HardwareSampled,
    Logged,
    Paused,
    RunEnded,
    RunStarted,
    StageChanged,
    StepsDone,
)
from lorasmith.engine.journal import replay
from lorasmith.engine.run_file import Layer, ResolvedConfig, resolve_config
from lorasmith.engine.run_folder import file_name
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_log import plain_text, quiet_libraries
from lorasmith.engine.session import (
    RunFolder,
    Session,
    create_run,
    list_runs,
    lock_holder,
    open_run,
    summarize_run,
)

Train = Callable[[RunFolder, RunConfig, Any], None]


@pytest.fixture(autouse=True)
def _process_settings_restored() -> Iterator[None]:
    interval = sys.getswitchinterval()
    environment = dict(os.environ)
    yield
    sys.setswitchinterval(interval)
    logging.captureWarnings(False)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture
def resolved(tmp_path: Path) -> ResolvedConfig:
    return resolve_config([Layer("test", {"run": {"name": "Ünï run", "output_folder": str(tmp_path / "runs")}})])


@pytest.fixture
def run(resolved: ResolvedConfig) -> RunFolder:
    return create_run(resolved)


@pytest.fixture
def hosted(
    run: RunFolder, resolved: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Train], Session]]:
    sessions: list[Session] = []

    def host(train: Train) -> Session:
        trainer = types.ModuleType("lorasmith.engine.trainer")
        trainer.train = train  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lorasmith.engine.trainer", trainer)
        session = Session(run, resolved.config)
        session.start()
        sessions.append(session)
        return session

    yield host
    for session in sessions:
        assert session.stop_and_join(10)


def started(total: int = 10, resumed_from: int = 0) -> RunStarted:
    return RunStarted(run="r", total_steps=total, resumed_from=resumed_from, config={}, versions={}, device="cpu")


def steps(step: int) -> StepsDone:
    return StepsDone(step=step, epoch=1, losses=[0.5], learning_rate=1e-4, grad_norm=0.1, seconds_per_step=0.1)


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path="c", bytes=1, seconds=0.1)


def finished(step: int = 10) -> RunEnded:
    return RunEnded(outcome="finished", step=step, message="Done.")


def without_gauges(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, HardwareSampled)]


# Run folders


def test_a_new_run_folder_is_private_and_holds_its_settings(run: RunFolder, resolved: ResolvedConfig) -> None:
    assert re.fullmatch(r"Ünï-run-\d{8}-\d{6}", run.name)
    for folder in (run.path, run.checkpoints, run.previews, run.export):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert run.run_file.stat().st_mode & 0o777 == 0o600
    assert run.load_config().config == resolved.config
    assert not [path for path in run.path.iterdir() if path.suffix == ".tmp"]


def test_a_run_made_with_relative_folders_can_be_resumed_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"run": {"output_folder": "runs"}, "dataset": {"folder": "pictures"}, "base": {"model": "some/hub-id"}}
    run = create_run(resolve_config([Layer("run.toml", values)]))
    monkeypatch.chdir("/")
    config = open_run(run.path).load_config().config
    assert Path(config.dataset.folder) == tmp_path / "pictures"
    assert config.base.model == "some/hub-id"


def test_runs_of_the_same_second_get_folders_of_their_own(
    resolved: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder_module.time, "strftime", lambda form: "20261122-120000")
    names = [create_run(resolved).name for _ in range(3)]
    assert names == [f"Ünï-run-20261122-120000{suffix}" for suffix in ("", "-2", "-3")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain"),
        ("кот 猫", "кот-猫"),
        ("../../etc/passwd", "etc-passwd"),
        ('a:b*c?"<d>|e\\f', "a-b-c-d-e-f"),
        ("  . ", "run"),
        ("a\x1b[31mb\ud800", "a-[31mb"),
        ("é" * 100, "é" * 75),
        ("-rf", "rf"),
    ],
)
def test_names_become_folder_names_that_every_file_system_takes(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = {"run": {"output_folder": str(tmp_path / "file" / "runs")}}
    with pytest.raises(StorageError, match=r"file/runs.*Not a directory.*run\.output_folder"):
        create_run(resolve_config([Layer("test", values)]))


def test_opening_a_run_needs_a_run_file(run: RunFolder, tmp_path: Path) -> None:
    assert open_run(run.path) == run
    with pytest.raises(ConfigError, match=r"no run\.toml"):
        open_run(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        open_run(tmp_path / "nowhere")


# What became of a run


@pytest.mark.parametrize(
    ("events", "state", "words", "checkpoint"),
    [
        ([], "not started", "not started", None),
        ([started()], "interrupted", "interrupted at step 0 of 10", None),
        ([started(), steps(3), saved(3), steps(7)], "interrupted", "interrupted at step 7 of 10", 3),
        ([started(), steps(10), finished()], "finished", "finished", None),
        (
            [started(), steps(5), saved(5), RunEnded(outcome="stopped", step=5, message="x", exit_code=130)],
            "stopped",
            "stopped at step 5 of 10",
            5,
        ),
        ([RunEnded(outcome="failed", step=0, message="x", exit_code=4)], "failed", "failed at step 0", None),
        ([started(), steps(4), saved(4), finished(), started(20, 4)], "interrupted", "interrupted at step 4 of 20", 4),
    ],
)
def test_the_state_of_a_run_is_read_from_its_journal(
    run: RunFolder, events: list[Event], state: str, words: str, checkpoint: int | None
) -> None:
    if events:
        journal = journal_module.Journal(run.journal)
        for event in events:
            journal.append(event)
        journal.close()
    summary = summarize_run(run)
    assert (summary.state, summary.describe(), summary.checkpoint_step) == (state, words, checkpoint)


def test_runs_are_listed_newest_first_and_other_folders_left_out(resolved: ResolvedConfig) -> None:
    first, second = create_run(resolved), create_run(resolved)
    for run in (second, first):
        journal = journal_module.Journal(run.journal)
        journal.append(started())
        journal.close()
    (first.path.parent / "notes").mkdir()
    (first.path.parent / "file.txt").write_text("")
    assert [summary.run for summary in list_runs(first.path.parent)] == [first, second]
    assert list_runs(first.path / "nowhere") == []


def test_a_run_of_a_newer_version_is_listed_with_a_message(run: RunFolder) -> None:
    run.journal.write_text('{"event": "JournalHeader", "schema": 99}\n')
    [summary] = list_runs(run.path.parent)
    assert "newer version" in summary.message


def test_a_killed_run_is_interrupted_and_can_be_started_again_at_once(
    run: RunFolder, hosted: Callable[[Train], Session]
) -> None:
    code = """if True:
        import sys, types
        from pathlib import Path
        from lorasmith.engine.events import RunStarted, Paused, StepsDone
        def train(run, config, host):
            host.emit(RunStarted(run="r", total_steps=9, resumed_from=0, config={}, versions={}, device="cpu"))
            host.emit(StepsDone(step=4, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0))
            print("training", flush=True)
            host.wait_command(60)
        trainer = sys.modules["lorasmith.engine.trainer"] = types.ModuleType("trainer")
        trainer.train = train
        from lorasmith.engine.session import Session, open_run
        run = open_run(Path(sys.argv[1]))
        Session(run, run.load_config().config).start()
        assert "torch" not in sys.modules
    """
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        [live] = list_runs(run.path.parent)
        assert (live.state, live.process, live.step) == ("running", process.pid, 4)
        with pytest.raises(RunLockedError) as refused:
            hosted(lambda run, config, host: None)
        assert refused.value.exit_code == 8
        assert re.search(rf"Process {process.pid} on \S+ has worked on it since \d{{4}}-\d\d-\d\d", refused.value.why)
        process.kill()
    [dead] = list_runs(run.path.parent)
    assert (dead.state, dead.describe()) == ("interrupted", "interrupted at step 4 of 9")
    session = hosted(lambda run, config, host: host.emit(finished()))
    assert session.join(10)
    assert summarize_run(run).state == "finished"


def test_a_lock_that_is_only_looked_at_does_not_refuse_a_start(run: RunFolder) -> None:
    import fcntl

    lock = RunLock(run)
    lock.release()
    looking = os.open(run.lock, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.06, os.close, [looking]).start()
    RunLock(run).release()


# The engine's side


def test_events_reach_the_journal_before_the_viewer(hosted: Callable[[Train], Session]) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        for step in range(1, 201):
            host.emit(steps(step))
        host.emit(finished(200))

    session = hosted(train)
    seen: list[Event] = []
    while not session.finished:
        new = session.drain()
        in_journal = list(replay(session.run.journal))
        assert all(event in in_journal for event in new[-3:])
        seen += new
    seen += session.drain()
    assert seen == list(replay(session.run.journal))
    assert [event.step for event in seen if isinstance(event, StepsDone)] == list(range(1, 201))
    assert session.latest[StepsDone] == [event for event in seen if isinstance(event, StepsDone)][-1]


def test_training_runs_in_a_non_daemon_thread_and_gets_the_folder_and_the_settings(
    hosted: Callable[[Train], Session], resolved: ResolvedConfig
) -> None:
    seen: dict[str, Any] = {}

    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        thread = threading.current_thread()
        seen.update(run=run, config=config, name=thread.name, daemon=thread.daemon)
        host.emit(finished())

    session = hosted(train)
    assert session.join(10)
    assert seen == {"run": session.run, "config": resolved.config, "name": "engine", "daemon": False}
    assert session.finished
    assert session.outcome is not None
    assert lock_holder(session.run) is None


def test_commands_arrive_in_order_and_waiting_for_one_ends_with_it(hosted: Callable[[Train], Session]) -> None:
    got: list[Any] = []
    ready = threading.Event()

    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        got.append(host.next_commands())
        got.append(host.wait_command(0.01))
        ready.set()
        got.append(host.wait_command(10))
        while len(commands := host.next_commands()) < 1:
            time.sleep(0.001)
        got.append(commands)
        host.emit(finished())

    session = hosted(train)
    assert ready.wait(5)
    session.send(Command.SAVE_NOW)
    time.sleep(0.05)
    session.send(Command.STOP)
    assert session.join(10)
    assert got == [[], None, Command.SAVE_NOW, [Command.STOP]]


def test_stop_and_join_asks_for_the_end_and_tells_whether_it_came_in_time(hosted: Callable[[Train], Session]) -> None:
    release = threading.Event()

    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        assert host.wait_command(10) is Command.STOP
        release.wait(10)
        host.emit(saved(3))

    session = hosted(train)
    assert session.stop_and_join(0.05) is False
    assert session.finished is False
    release.set()
    assert session.stop_and_join(10) is True
    assert session.outcome is not None
    assert (session.outcome.outcome, session.outcome.exit_code) == ("stopped", 130)


@pytest.mark.parametrize(
    ("error", "message", "why", "exit_code"),
    [
        (DatasetError("No pictures.", why="Empty.", fix="Add some."), "No pictures.", "Empty.", 5),
        (MemoryError(), "ran out of memory", "MemoryError", 6),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "The GPU ran out of memory.", "CUDA", 6),
        (OSError(28, "No space left on device"), "The disk is full.", "No space left", 7),
        (ZeroDivisionError("oops [/] \x1b"), "unexpected error", r"oops [/] \x1b", 1),
        (SystemExit(3), "unexpected error", "SystemExit", 1),
    ],
)
def test_every_failure_ends_the_run_in_words_with_the_traceback_in_the_log(
    hosted: Callable[[Train], Session], error: BaseException, message: str, why: str, exit_code: int
) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        host.emit(started(resumed_from=4))
        raise error

    session = hosted(train)
    assert session.join(10)
    *_, last = replay(session.run.journal)
    assert isinstance(last, RunEnded)
    assert (last.outcome, last.step, last.exit_code) == ("failed", 4, exit_code)
    assert message in last.message
    assert why in last.why
    assert last.fix
    log = session.run.log.read_text()
    assert "Traceback" in log
    assert "in train" in log
    assert "\x1b" not in log
    assert session.run.log.stat().st_mode & 0o777 == 0o600


def test_a_trainer_that_cannot_be_imported_ends_the_run_in_words(
    run: RunFolder, resolved: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lorasmith.engine.trainer", None)
    session = Session(run, resolved.config)
    session.start()
    assert session.join(10)
    assert session.outcome is not None
    assert "ModuleNotFoundError" in session.outcome.why


@pytest.mark.parametrize(
    ("last_words", "outcome", "exit_code"),
    [
        ([], "failed", 1),
        ([saved(5)], "stopped", 130),
        ([saved(5), ExportDone(step=5, path="x", layout="kohya", keys=1, bytes=1)], "finished", 0),
    ],
)
def test_a_training_that_ends_without_a_word_counts_as_finished_only_with_an_export(
    hosted: Callable[[Train], Session], last_words: list[Event], outcome: str, exit_code: int
) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        for event in last_words:
            host.emit(event)

    session = hosted(train)
    assert session.join(10)
    assert session.outcome is not None
    assert (session.outcome.outcome, session.outcome.exit_code) == (outcome, exit_code)


def test_the_end_is_the_last_word_and_said_once(hosted: Callable[[Train], Session]) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        host.emit(finished())
        time.sleep(0.05)
        raise RuntimeError("while cleaning up")

    session = hosted(train)
    assert session.join(10)
    events = list(replay(session.run.journal))
    assert isinstance(events[-1], RunEnded)
    assert [event.outcome for event in events if isinstance(event, RunEnded)] == ["finished"]
    assert "while cleaning up" in session.run.log.read_text()


def test_gauges_are_journaled_while_the_run_lasts(hosted: Callable[[Train], Session]) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        deadline = time.monotonic() + 5
        while HardwareSampled not in host.latest and time.monotonic() < deadline:
            time.sleep(0.01)
        host.emit(finished())

    session = hosted(train)
    assert session.join(10)
    gauge = next(event for event in replay(session.run.journal) if isinstance(event, HardwareSampled))
    assert 0 < gauge.process_ram_gib < gauge.ram_total_gib


def test_a_viewer_that_never_drains_costs_bounded_memory_and_no_waiting(
    hosted: Callable[[Train], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_WAITING_EVENTS", 100)

    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        for step in range(1, 501):
            host.emit(steps(step))
        host.emit(finished(500))

    session = hosted(train)
    assert session.join(10)
    waiting = session.drain()
    assert len(waiting) == 100
    assert isinstance(waiting[-1], RunEnded)
    assert session.missed == len(list(replay(session.run.journal))) - 100


def test_a_full_disk_is_said_on_the_screen_and_training_goes_on(
    hosted: Callable[[Train], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if data.startswith(b'{"event"'):
            raise OSError(28, "No space left on device")
        return real(fd, data)

    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        host.emit(steps(1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            host.emit(steps(2))
            host.emit(steps(3))
        host.emit(steps(4))
        host.emit(finished(4))

    session = hosted(train)
    assert session.join(10)
    said = [event for event in session.drain() if isinstance(event, Logged)]
    assert [event.severity for event in said] == ["error", "info"]
    assert "disk full" in said[0].message
    journaled = [event.step for event in replay(session.run.journal) if isinstance(event, StepsDone)]
    assert journaled == [1, 2, 3, 4]


def test_a_second_start_in_the_same_process_is_refused_too(
    hosted: Callable[[Train], Session], resolved: ResolvedConfig
) -> None:
    session = hosted(lambda run, config, host: host.wait_command(10) and None)
    with pytest.raises(RunLockedError, match=f"Process {os.getpid()}"):
        Session(session.run, resolved.config).start()


def test_a_start_that_fails_leaves_the_run_free(run: RunFolder, resolved: ResolvedConfig) -> None:
    run.journal.write_text('{"event": "JournalHeader", "schema": 99}\n')
    with pytest.raises(StorageError, match="newer version"):
        Session(run, resolved.config).start()
    assert lock_holder(run) is None


# What libraries say


def test_what_libraries_say_goes_to_the_log_and_never_to_the_screen(
    hosted: Callable[[Train], Session], capfd: pytest.CaptureFixture[str]
) -> None:
    def train(run: RunFolder, config: RunConfig, host: Any) -> None:
        library = logging.getLogger("transformers")
        # As transformers itself does at import.
        library.addHandler(logging.StreamHandler())
        library.propagate = False
        # Loading a base model, as earlier tests do in this process, leaves it at errors only.
        library.setLevel(logging.WARNING)
        logging.getLogger("transformers.models").warning("a new head was made")
        logging.getLogger("bitsandbytes.cextension").error("no CUDA; token hf_%s", "a" * 34)
        logging.getLogger("httpx").info("GET https://example.com/?secret")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old \x1b[2J name", stacklevel=1)
        host.emit(finished())

    session = hosted(train)
    assert session.join(10)
    log = session.run.log.read_text()
    assert "transformers.models: a new head was made" in log
    assert "no CUDA; token [token]" in log
    assert r"old \x1b[2J name" in log
    assert "secret" not in log
    assert capfd.readouterr() == ("", "")


def test_the_real_libraries_stay_quiet_on_the_screen() -> None:
    code = """if True:
        import lorasmith.engine.session as session
        session.quiet_libraries()
        import sys
        assert "torch" not in sys.modules
        import transformers, diffusers, bitsandbytes, tqdm
        from huggingface_hub.utils import tqdm as hub_tqdm
        transformers.utils.logging.get_logger("transformers.x").warning("loud")
        diffusers.utils.logging.get_logger("diffusers.x").warning("loud")
        list(tqdm.tqdm([1])); list(hub_tqdm([1])); list(tqdm.auto.tqdm([1]))
        list(transformers.utils.logging.tqdm([1])); list(diffusers.utils.logging.tqdm([1]))
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANS", "DIFF", "TQDM"))
    }
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_quieting_twice_does_no_harm_and_keeps_the_users_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    quiet_libraries()
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


def test_plain_text_shows_control_characters_and_hides_tokens() -> None:
    assert plain_text("a\x1b[31m\tb\nc\u202e\udc80") == "a\\x1b[31m\tb\nc\\u202e\\udc80"
    assert plain_text("Authorization: Bearer abc.def hf_0123456789") == "Authorization: Bearer [token] [token]"


def test_the_journal_of_a_run_is_strict_json_with_one_header(hosted: Callable[[Train], Session]) -> None:
    session = hosted(lambda run, config, host: host.emit(StageChanged(stage="load", label="x")))
    assert session.join(10)
    records = [json.loads(line) for line in session.run.journal.read_text().splitlines()]
    assert [record["event"] for record in records if record["event"] != "HardwareSampled"] == [
        "JournalHeader",
        "StageChanged",
        "RunEnded",
    ]
    assert session.run.journal.stat().st_mode & 0o777 == 0o600


# With the real trainer


def test_a_real_run_is_stopped_resumed_and_finished_and_its_journal_tells_so(tiny_sd15: Path, tmp_path: Path) -> None:
    from tests.engine.running import tiny_config

    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 6, "log_every": 1})
    run = create_run(ResolvedConfig(config, {}))
    session = Session(run, config)
    session.send(Command.PAUSE)
    session.start()
    while Paused not in session.latest and not session.finished:
        time.sleep(0.01)
    assert session.stop_and_join(60)
    [summary] = list_runs(run.path.parent)
    assert summary.state == "stopped", summary
    assert 1 <= summary.step < 6
    assert summary.checkpoint_step == summary.step

    again = Session(open_run(run.path), run.load_config().config)
    again.start()
    assert again.join(60)
    assert again.outcome is not None
    assert (again.outcome.outcome, again.outcome.step, again.outcome.exit_code) == ("finished", 6, 0)
    [summary] = list_runs(run.path.parent)
    assert (summary.state, summary.step, summary.total_steps) == ("finished", 6, 6)
    assert [path.suffix for path in run.export.iterdir()] == [".safetensors"]
    trained = [event.step for event in replay(run.journal) if isinstance(event, StepsDone)]
    assert trained == [1, 2, 3, 4, 5, 6]


def test_a_real_run_that_fails_ends_in_the_words_of_the_error(tiny_sd15: Path, tmp_path: Path) -> None:
    from tests.engine.running import tiny_config

    config = tiny_config(tiny_sd15, tmp_path, dataset={"folder": str(tmp_path / "nowhere [/]")})
    run = create_run(ResolvedConfig(config, {}))
    session = Session(run, config)
    session.start()
    assert session.join(60)
    assert session.outcome is not None
    assert (session.outcome.outcome, session.outcome.exit_code) == ("failed", DatasetError.exit_code)
    assert "nowhere [/]" in session.outcome.message
    assert summarize_run(run).state == "failed"
