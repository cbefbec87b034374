"""The command line: what each command prints and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import errors, events
from lorasmith.engine.cli import main
from lorasmith.engine.cli.output import columns, visible
from lorasmith.engine.cli.progress import RunPrinter, duration, size
from lorasmith.engine.run_file import setting_fields
from tests.engine.cli_runs import TinyRun, make_tiny_run

COMMANDS = ("train", "demo", "check", "caption", "plan", "doctor", "runs", "inspect", "export")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> TinyRun:
    """A finished run of four steps with a checkpoint of step 2; shared: read only."""
    tiny = make_tiny_run(tmp_path_factory.mktemp("trained"), tiny_sd15)
    assert main(tiny.args("checkpoints.every=2")) == 0
    return tiny


def only_run(tiny: TinyRun) -> Path:
    (folder,) = tiny.output.iterdir()
    return folder


# Help, version, wrong usage


def test_the_version_is_told_without_loading_any_library() -> None:
    code = "import sys; from lorasmith.engine.cli import main; c = main(['--version'])\n"
    code += "print(c, [m for m in ('torch', 'numpy', 'PIL', 'diffusers', 'textual', 'rich') if m in sys.modules])"
    done = run_python(code)
    assert re.fullmatch(r"lorasmith \d+\.\d+\.\d+\n0 \[\]\n", done.stdout), done


def test_help_names_every_command_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for command in COMMANDS:
        assert f" {command} " in text
    assert "130 stopped by Ctrl-C or SIGTERM: with a checkpoint saved, unless" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: lorasmith {command}")
    assert len(text.split("\n\n")[1].strip()) > 20


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    documented = set(map(int, re.findall(r"(?:·|:)\s(\d+)\s", (errors.__doc__ or "").partition("Exit codes")[2])))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.exit_code for kind in kinds} | {0, 2, errors.EXIT_STOPPED} == documented  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["bogus"], ["train"], ["train", "--resume"], ["check"], ["plan", "--bogus"]])
def test_wrong_usage_ends_with_2_and_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error:" in captured.err


# Errors


def test_an_error_is_told_in_its_parts_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.toml")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, third = captured.err.splitlines()
    assert first.startswith("Error: Cannot read the run file")
    assert second.startswith("Why: ")
    assert third == "Fix: Check the path."


def test_with_json_the_error_is_also_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none.toml"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == 3
    assert set(error) == {"what", "why", "fix", "exit_code"}


def test_an_unexpected_error_ends_with_1_and_a_log_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom hf_abcdefghijklmnop \x1b[31m")

    monkeypatch.setattr("platformdirs.user_log_dir", lambda name: str(tmp_path / "log"))
    monkeypatch.setattr("lorasmith.engine.session.list_runs", fail)
    assert main(["runs"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "RuntimeError: boom" in captured.err
    (log,) = (tmp_path / "log").iterdir()
    assert str(log) in captured.err
    assert "Traceback" in log.read_text()
    for text in (captured.err, log.read_text()):
        assert "hf_abc" not in text
        assert "\x1b" not in text


def test_a_crash_log_goes_to_the_temporary_folder_where_the_usual_one_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("platformdirs.user_log_dir", lambda name: str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "other"))
    monkeypatch.setattr("lorasmith.engine.session.list_runs", lambda *_: 1 / 0)
    assert main(["runs"]) == 1
    assert str(tmp_path / "other") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain ünï 日本", "plain ünï 日本"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07", "a\\rb\\x07"),
        ("a\nError: b", "a\n  Error: b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\udcff", "\\udcff"),
        ("hf_abcdefghijkl", "[token]"),
    ],
)
def test_foreign_text_is_made_visible(raw: str, shown: str) -> None:
    assert visible(raw) == shown


def test_a_file_name_with_an_escape_sequence_reaches_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "\x1b[2J\u202e.toml")]) == 3
    assert "\x1b" not in capsys.readouterr().err


def test_a_terminal_without_utf8_gets_escapes_and_no_crash(tmp_path: Path) -> None:
    code = "import sys; from lorasmith.engine.cli import main; sys.exit(main(['plan', 'ünï 日本.toml']))"
    done = run_python(code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 3
    assert "\\u65e5" in done.stderr


# Plan, runs, doctor


def test_plan_without_a_file_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    for key, field in setting_fields():
        assert f"{key} = " in text
        assert " ".join((field.description or "").split()) in text
    assert "optimizer.learning_rate = 0.0001   # more than 0.0, at most 10.0" in text


def test_plan_as_json_lists_every_setting_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == [key for key, _ in setting_fields()]
    assert listed["train.steps"]["default"] == 1000
    assert listed["export.layouts"]["allowed"] == "auto, kohya, diffusers, comfyui"


def test_plan_reads_base_and_pictures_and_writes_nothing(
    trained: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(trained.run_file), "--set", f"run.output_folder={tmp_path / 'new'}", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["steps"], planned["pictures"]) == (4, 3)
    assert planned["adapter_modules"] == 32
    assert not (tmp_path / "new").exists()


def test_plan_of_a_model_on_the_hub_downloads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--set", "base.model=nobody/knows-this"]) == 0
    assert "nobody/knows-this" in capsys.readouterr().out


def test_runs_of_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No runs in {tmp_path}.\n"
    assert main(["runs", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_runs_lists_state_and_files(trained: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(trained.output)]) == 0
    assert re.search(r"tiny-\d{8}-\d{6}  finished  [\d.]+ [KM]iB  tiny\.safetensors", capsys.readouterr().out)
    assert main(["runs", str(trained.output), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["state"], run["step"], run["checkpoint_step"]) == ("finished", 4, 4)
    assert [Path(path).name for path in run["exports"]] == ["tiny.safetensors"]


def test_doctor_ends_with_the_hardware_code_where_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.engine import doctor

    good = doctor.Check("python", "pass", "3.11")
    bad = doctor.Check("cuda", "fail", "the driver is too old", "Update the driver.")

    def run_checks(*_: Any, on_check: Any, **__: Any) -> list[doctor.Check]:
        for check in (good, bad):
            on_check(check)
        return [good, bad]

    monkeypatch.setattr(doctor, "run_checks", run_checks)
    assert main(["doctor"]) == 6
    assert "fix: Update the driver." in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 6
    assert [check["status"] for check in json.loads(capsys.readouterr().out)] == ["pass", "fail"]
    monkeypatch.setattr(doctor, "run_checks", lambda *_, **__: [good])
    assert main(["doctor"]) == 0


# Inspect


def test_inspect_tells_a_lora_from_a_base_model(
    trained: TinyRun, tiny_sd15: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = next((only_run(trained) / "export").iterdir())
    assert main(["inspect", str(lora), "--norms", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["type"], report["layout"], report["ranks"]) == ("lora", "kohya", {"2": 32})
    assert min(report["norms"].values()) > 0
    assert main(["inspect", str(tiny_sd15), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["type"], report["prediction"], report["native_resolution"]) == ("base", "epsilon", 64)
    assert main(["inspect", str(lora)]) == 0
    assert "trigger" in capsys.readouterr().out


# Train, resume, export


def test_a_training_leaves_a_lora_and_says_where(trained: TinyRun) -> None:
    folder = only_run(trained)
    assert [path.name for path in (folder / "export").iterdir()] == ["tiny.safetensors"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_training_with_previews_says_where_their_sheet_is(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_run(tmp_path, tiny_sd15, steps=2)
    assert main(tiny.args("previews.every=1")) == 0
    sheet = only_run(tiny) / "previews" / "sheet.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"Preview sheet: {sheet}"
    assert sheet.is_file()


def test_with_json_stdout_is_one_document_and_progress_goes_to_stderr(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_run(tmp_path, tiny_sd15, steps=2)
    assert main([*tiny.args(), "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["outcome"], summary["step"], summary["exit_code"]) == ("finished", 2, 0)
    assert Path(summary["exports"][0]["path"]).is_file()
    assert summary["preview_sheet"] == ""
    assert "step 2/2 (100%)" in captured.err


def test_ctrl_c_saves_and_ends_with_130_and_resume_finishes_the_run(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_run(tmp_path, tiny_sd15, steps=150)
    before = signal.getsignal(signal.SIGTERM)
    show, asked = RunPrinter.show, []

    def interrupting(printer: RunPrinter, event: events.Event) -> None:
        show(printer, event)
        if isinstance(event, events.StepsDone) and not asked:
            asked.append(event.step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunPrinter, "show", interrupting)
    assert main([*tiny.args(), "--json"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    captured = capsys.readouterr()
    stopped = json.loads(captured.out)
    assert stopped["outcome"] == "stopped"
    assert 0 < stopped["step"] < 150
    assert "Saving a checkpoint" in captured.err
    (saved,) = (only_run(tiny) / "checkpoints").iterdir()
    assert saved.name == f"step-{stopped['step']:08d}"

    monkeypatch.setattr(RunPrinter, "show", show)
    assert main(["train", "--resume", str(only_run(tiny)), "--set", "train.steps=9", "--json"]) == 7
    assert "train.steps (150 → 9)" in json.loads(capsys.readouterr().out)["error"]["why"]
    assert main(["train", "--resume", str(only_run(tiny)), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 150
    assert f"resumed at step {stopped['step']}" in captured.err


def test_resume_finds_the_newest_run_of_that_name(trained: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(trained.run_file), "--set", "checkpoints.every=2", "--resume", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["run_folder"] == str(only_run(trained))
    assert "resumed at step 4" in captured.err


def test_resume_without_such_a_run_says_how_to_begin(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_run(tmp_path, tiny_sd15)
    assert main(["train", "--resume", str(tiny.run_file)]) == 3
    assert "No run named tiny" in capsys.readouterr().err


def test_export_writes_a_checkpoint_in_the_layout_that_is_asked_for(
    trained: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(only_run(trained)), "--output", str(tmp_path), "--json"]
    assert main([*arguments, "--step", "2", "--layout", "diffusers", "--precision", "fp32"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["step"], entry["layout"]) == (2, "diffusers")
    assert Path(entry["path"]) == tmp_path / "tiny-step-000002-diffusers.safetensors"
    assert main(arguments) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    from safetensors.torch import load_file

    again, original = load_file(entry["path"]), load_file(next((only_run(trained) / "export").iterdir()))
    assert again.keys() == original.keys()
    assert all((again[key] == original[key]).all() for key in again)


def test_export_of_a_missing_step_names_those_there_are(trained: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(only_run(trained)), "--step", "3"]) == 7
    assert "2, 4" in capsys.readouterr().err


def test_export_of_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 3
    assert "not a run folder" in capsys.readouterr().err


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def finished_steps(step: int) -> events.StepsDone:
    return events.StepsDone(step=step, epoch=1, losses=[0.5], learning_rate=1e-4, grad_norm=1.0, seconds_per_step=0.25)


def started() -> events.RunStarted:
    return events.RunStarted(run="r", total_steps=100, resumed_from=0, config={}, versions={}, device="cpu")


def test_progress_prints_a_step_line_now_and_then_and_always_the_last() -> None:
    stream, now = io.StringIO(), [0.0]
    printer = RunPrinter(stream, clock=lambda: now[0])
    printer.show(started())
    for step in range(1, 101):
        now[0] += 0.25
        printer.show(finished_steps(step))
    lines = [line for line in stream.getvalue().splitlines() if "step " in line]
    assert len(lines) <= 7
    assert lines[-1].startswith("  step 100/100 (100%)  loss 0.5000  lr 1.00e-04  0.250 s/step")


def test_progress_of_a_stage_says_how_long_it_still_takes() -> None:
    stream, now = io.StringIO(), [0.0]
    printer = RunPrinter(stream, clock=lambda: now[0])
    for done, left in ((0, None), (40, 90.0), (80, 0.0)):
        now[0] += 10
        printer.show(events.Progress(stage="cache", label="Encoding pictures", done=done, total=80, seconds_left=left))
    assert stream.getvalue().splitlines() == [
        "  Encoding pictures: 0 of 80",
        "  Encoding pictures: 40 of 80, 1 min 30 s left",
        "  Encoding pictures: 80 of 80",
    ]


def test_on_a_terminal_a_bar_replaces_the_step_lines() -> None:
    stream = Terminal()
    with RunPrinter(stream) as printer:
        printer.show(started())
        printer.show(events.Logged(severity="warning", message="[bold]x\x1b[31m"))
        printer.show(finished_steps(50))
    text = stream.getvalue()
    assert "[bold]x\\x1b[31m" in text
    assert "step 50/100" not in text


def test_every_event_can_be_shown() -> None:
    stream = io.StringIO()
    printer = RunPrinter(stream)
    sample: dict[str, Any] = {"int": 1, "float": 1.0, "str": "s", "list[float]": [1.0], "list[str]": ["a.png"]}
    sample["dict[str, int]"] = {"64x64": 1}
    for kind in events.Event.__subclasses__():
        fields = {name: field for name, field in kind.__dataclass_fields__.items() if name != "time"}
        values = {name: sample.get(str(field.type), {}) for name, field in fields.items()}
        printer.show(kind(**values))
    assert "64x64: 1" in stream.getvalue()


def test_durations_and_sizes_are_in_words() -> None:
    assert [duration(s) for s in (0, 59.4, 65, 3600, 7800)] == ["0 s", "59 s", "1 min 05 s", "1 h 00 min", "2 h 10 min"]
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20)] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB"]
    assert size(3 * 2**30) == "3.00 GiB"


def test_columns_align_wide_characters() -> None:
    assert columns([["日本", "x"], ["abc", "y"]], indent="") == ["日本  x", "abc   y"]
