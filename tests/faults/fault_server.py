"""Runs a piece of lorasmith in a child process and spoils its N-th file-system call: kill, error, or short write.

    def save(fault: Fault, folder: str, step: int) -> int:      # a scenario: a function at the top of a module
        folder = Path(folder)                                   # what it prepares is not counted ...
        with fault.armed(folder):                               # ... calls below this folder are, from here on
            save_checkpoint(folder, step, ...)
        return step                                             # anything that JSON can hold

    def test_it(faults: FaultServer, tmp_path: Path) -> None:   # the fixture of conftest.py: one server a session
        whole = faults.run(save, str(tmp_path / "a"), 5)        # nothing is spoilt: whole.value == 5, whole.calls
        for n in range(1, whole.count + 1):
            died = faults.run(save, str(tmp_path / str(n)), 5, spoil=Spoil.kill(n))          # before the N-th call
            died = faults.run(save, str(tmp_path / str(n)), 5, spoil=Spoil.kill(n, after=True))
            failed = faults.run(save, ..., spoil=Spoil.error(n, errno.ENOSPC))               # once
            failed = faults.run(save, ..., spoil=Spoil.error(n, errno.EIO, forever=True))    # from the N-th on
            failed = faults.run(save, ..., spoil=Spoil.error(n, errno.EMFILE, plausible=True))
            short = faults.run(save, ..., spoil=Spoil.short(n))                              # half of the bytes
            assert died.killed and failed.error == "StorageError" and "No space" in failed.text

`plausible` counts and fails only calls that can meet that error in earnest (EMFILE: what opens a file; ENOSPC: what
takes space; EROFS and EACCES: what changes something). `reads=True` also counts stat, read, mmap and directory reads.
`with fault.armed(folder, Spoil.error(...)):` spoils in another way than the run was asked for, as often as you like:
one child can try every error, and a run costs only what the scenario costs. `fault.count` is then the number of calls.
After the `with` block nothing is spoilt any more, so a scenario may go on and show that all is well again; an error
that leaves the block leaves the scenario, unless it catches it. Arguments and results travel as JSON (paths as text).

The server imports torch once and forks a child per fault: a run costs about 10 ms. `faults.warm(function, ...)` calls a
function in the server itself, for imports that all children then share; it must start no threads and run no backward
pass. Threads of a child are seen too; programs that it starts are not. Without gcc, x86-64 Linux or seccomp the
fixture skips. Not for import by lorasmith itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

SOURCE = Path(__file__).with_name("fault_shim.c")
COUNT, KILL_BEFORE, KILL_AFTER, FAIL, SHORT = range(5)
"""The actions of fault_shim.c."""
SPAN = 1 << 32


@dataclass(frozen=True)
class Spoil:
    """What happens at which counted call; `Spoil()` only counts."""

    action: int = COUNT
    at: int = 0
    errno: int = 0
    forever: bool = False
    plausible: bool = False
    reads: bool = False

    @staticmethod
    def kill(at: int, *, after: bool = False, reads: bool = False) -> Spoil:
        """SIGKILL before (or after) the `at`-th call, 1 being the first."""
        return Spoil(KILL_AFTER if after else KILL_BEFORE, at, reads=reads)

    @staticmethod
    def error(at: int, number: int, *, forever: bool = False, plausible: bool = False, reads: bool = False) -> Spoil:
        """Let the `at`-th call fail with errno `number`, or with `forever` every call from there on."""
        return Spoil(FAIL, at, number, forever, plausible, reads)

    @staticmethod
    def short(at: int, *, reads: bool = False) -> Spoil:
        """Let the `at`-th call write (or read) only half of its bytes; it passes where it is another kind of call."""
        return Spoil(SHORT, at, reads=reads)


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    `calls` are the counted calls as (name, path), `spoilt` the first of them that was spoilt. `value` is what the
    scenario returned; `error`, `text` and `trace` tell of the exception that left it (its class name, str, traceback).
    """

    killed: bool
    value: Any
    error: str
    text: str
    trace: str
    calls: list[tuple[str, str]]
    spoilt: tuple[str, str] | None

    @property
    def count(self) -> int:
        """How many calls were counted."""
        return len(self.calls)


class Fault:
    """The fault of one child, as its scenario sees it."""

    def __init__(self, library: ctypes.CDLL, spoil: Spoil, log: int) -> None:
        self._library = library
        self._spoil = spoil
        self._log = log
        self.count = 0
        """Calls counted in the last `armed` block."""

    @contextlib.contextmanager
    def armed(self, folder: Path | str, spoil: Spoil | None = None) -> Iterator[None]:
        """Count, and spoil, the calls that concern `folder` or what is below it.

        With a `spoil` of its own instead of that of the run, one child can go through hundreds of errors.
        """
        _install(self._library)
        spoil = spoil or self._spoil
        root = os.path.realpath(folder).encode()
        numbers = (spoil.errno, spoil.forever, spoil.plausible, spoil.reads)
        self._library.fault_arm(root, spoil.action, ctypes.c_long(spoil.at), *map(int, numbers), self._log)
        try:
            yield
        finally:
            self.count = self._library.fault_disarm()


Scenario = Callable[..., Any]


def why_impossible() -> str:
    """Return why faults cannot be injected on this machine, or an empty text."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "faults are injected on Linux on x86-64 only"
    if _compiler() is None:
        return "there is no C compiler"
    return ""


class FaultServer:
    """A process that has imported torch and forks a child for each run; close it, or use it as a context."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lorasmith-faults-"))
        library = build_shim(self._folder)
        self._log = self._folder / "calls"
        command = [sys.executable, "-m", "tests.faults.fault_server", str(library), str(self._log)]
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.problem: str = self._receive()["error"]
        """Why no fault can be injected here, or an empty text."""

    def run(self, scenario: Scenario, *arguments: Any, spoil: Spoil | None = None) -> Outcome:
        """Run `scenario(fault, *arguments)` in a child of its own and tell how it ended."""
        reply = self._ask("run", scenario, arguments, spoil or Spoil())
        calls, spoilt = [], None
        for line in self._log.read_text(errors="surrogateescape").splitlines():
            mark, name, path = line.split(" ", 2)
            calls.append((name, path))
            if mark == "!" and spoilt is None:
                spoilt = (name, path)
        result = reply["result"]
        status = reply["status"]
        if not result and status != -signal.SIGKILL:
            raise AssertionError(f"the child ended with status {status} and told nothing")
        return Outcome(
            killed=status == -signal.SIGKILL,
            value=result.get("value"),
            error=result.get("error", ""),
            text=result.get("text", ""),
            trace=result.get("trace", ""),
            calls=calls,
            spoilt=spoilt,
        )

    def warm(self, function: Scenario, *arguments: Any) -> None:
        """Call `function(*arguments)` in the server itself, so that its imports are there for every child."""
        reply = self._ask("warm", function, arguments, Spoil())
        if reply["error"]:
            raise RuntimeError(reply["error"])

    def close(self) -> None:
        """End the server and remove its files."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, what: str, function: Scenario, arguments: tuple[Any, ...], spoil: Spoil) -> dict[str, Any]:
        request = {
            "what": what,
            "module": function.__module__,
            "function": function.__qualname__,
            "arguments": arguments,
            "spoil": asdict(spoil),
            "environment": {name: value for name, value in os.environ.items() if name.startswith("LORASMITH_")},
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fault server died")
        return cast(dict[str, Any], json.loads(line))


def build_shim(folder: Path) -> Path:
    """Compile the shim into `folder` and return the library's path."""
    compiler = _compiler()
    assert compiler is not None, "no C compiler"
    library = folder / "fault_shim.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


@functools.cache
def _install(library: ctypes.CDLL) -> None:
    """Filter the calls of all code that is mapped now, except the shim's own; once in a process."""
    begins, ends = [], []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *rest = line.split(None, 5)
        if "x" in rights and not rest[-1].endswith(("fault_shim.so", "[vsyscall]", "[vdso]")):
            first, last = (int(part, 16) for part in span.split("-"))
            while first < last:
                # The filter compares the upper and the lower half of an address by themselves.
                end = min(last, (first // SPAN + 1) * SPAN)
                begins.append(first)
                ends.append(end)
                first = end
    kind = ctypes.c_uint64 * len(begins)
    error = library.fault_install(kind(*begins), kind(*ends), ctypes.c_size_t(len(begins)))
    if error:
        raise OSError(error, f"seccomp refuses the filter: {os.strerror(error)}")
    # vfork would share the handlers' memory and reset them: a plain fork keeps the filter's handler until exec.
    subprocess._USE_VFORK = False  # type: ignore[attr-defined]
    subprocess._USE_POSIX_SPAWN = False  # type: ignore[attr-defined]


def _resolve(request: dict[str, Any]) -> Scenario:
    module = importlib.import_module(request["module"])
    return cast(Scenario, functools.reduce(getattr, request["function"].split("."), module))


def _child(library: ctypes.CDLL, request: dict[str, Any], log: int, answer: int) -> None:
    fault = Fault(library, Spoil(**request["spoil"]), log)
    try:
        result = {"value": _resolve(request)(fault, *request["arguments"])}
        text = json.dumps(result)
    except BaseException as error:
        trace = traceback.format_exc()
        text = json.dumps({"error": type(error).__name__, "text": str(error), "trace": trace})
    with open(answer, "wb") as file:
        file.write(text.encode())


def _run_child(library: ctypes.CDLL, request: dict[str, Any], log_path: str) -> dict[str, Any]:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        # Nothing of the server may run in the child, whatever happens.
        try:
            os.close(reading)
            _child(library, request, log, writing)
        finally:
            os._exit(0)
    os.close(writing)
    os.close(log)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    return {"status": os.waitstatus_to_exitcode(status), "result": json.loads(text) if text else {}}


def _handle(library: ctypes.CDLL, request: dict[str, Any], log_path: str) -> dict[str, Any]:
    os.environ.update(request["environment"])
    try:
        function = _resolve(request)
        if request["what"] == "warm":
            function(*request["arguments"])
    except Exception:
        return {"error": traceback.format_exc(), "status": 0, "result": {"error": "Broken", "trace": ""}}
    gc.freeze()
    return {"error": ""} | ({} if request["what"] == "warm" else _run_child(library, request, log_path))


def _serve(library_path: str, log_path: str) -> None:
    library = ctypes.CDLL(library_path)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    # A trial in a child: some containers forbid the filter.
    trial = {"module": __name__, "function": "_trial", "arguments": [os.path.dirname(log_path)], "environment": {}}
    reply = _handle(library, trial | {"what": "run", "spoil": asdict(Spoil())}, log_path)
    error = reply["result"].get("text", "")
    answers.write(json.dumps({"error": error}).encode() + b"\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_handle(library, json.loads(line), log_path)).encode() + b"\n")
        answers.flush()


def _trial(fault: Any, folder: str) -> None:
    with fault.armed(folder):
        os.stat(folder)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (no network, quiet libraries)

    _serve(*sys.argv[1:])
