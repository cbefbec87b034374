"""What the fault tests share: how thorough they are, and the figures that they leave behind.

`make test` injects a sample of the faults, `make faults` (`--campaign`) every one of them and prints the figures.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.fault_server import FaultServer, why_impossible

Figure = tuple[int, str, str]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[int, str, str], None]:
    """Return `record(promise, name, value)`: a figure for the table of promises 1 to 12, such as `212 of 212`."""

    def add(promise: int, name: str, value: str) -> None:
        request.node.user_properties.append(("figure", (promise, name, value)))

    return add


@pytest.fixture(scope="session")
def faults() -> Iterator[FaultServer]:
    """The process that runs scenarios with a fault in them (`fault_server.py` says how)."""
    if reason := why_impossible():
        pytest.skip(reason)
    server = FaultServer()
    try:
        if server.problem:
            pytest.skip(server.problem)
        yield server
    finally:
        server.close()


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of saves would wait for the disk otherwise."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lorasmith-", dir=parent) as folder:
        yield Path(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Print the figures of a campaign and write them to the file that `--figures` names."""
    if not config.getoption("--campaign"):
        return
    found: set[Figure] = set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "figure":
                    found.add((int(value[0]), str(value[1]), str(value[2])))
    figures = sorted(found)
    terminalreporter.section("fault figures")
    for promise, name, value in figures:
        terminalreporter.write_line(f"{promise:3}  {name}: {value}")
    target = config.getoption("--figures")
    if target:
        rows = [{"promise": promise, "name": name, "value": value} for promise, name, value in figures]
        Path(target).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
