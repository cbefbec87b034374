"""What all tests share: no network, no user cache, quiet libraries, and the tiny models built once a session."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# bitsandbytes complains on stderr at its first import on a CPU, transformers and diffusers about what they lack.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Set before any module reads it; each test then gets a folder of its own.
os.environ["LORASMITH_CACHE"] = tempfile.mkdtemp(prefix="lorasmith-test-cache-")
# Control sockets stay out of the user's own folder; the path is short, since a socket's has at most 107 bytes.
os.environ["LORASMITH_RUNTIME"] = tempfile.mkdtemp(prefix="lst-")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make test-all` and `make faults`."""
    parser.addoption("--campaign", action="store_true", help="run every fault and every pair, not a sample")
    parser.addoption("--figures", default="", help="file for the figures of a campaign (JSON)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `campaign` unless everything is to be run."""
    if config.getoption("--campaign"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> bool:
    """Whether everything is to be run, not a sample."""
    return bool(request.config.getoption("--campaign"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "lorasmith-cache"))


@pytest.fixture(autouse=True)
def _young_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine collect what a test has made, not every library with it: half a second, twice in each run."""
    young = SimpleNamespace(collect=lambda: gc.collect(1), freeze=gc.freeze, unfreeze=gc.unfreeze)
    for name in ("compute", "out_of_memory", "families._model", "captioners._transformers"):
        module = sys.modules.get(f"lorasmith.engine.{name}")
        if module is not None and hasattr(module, "gc"):
            monkeypatch.setattr(module, "gc", young)


@pytest.fixture(autouse=True)
def _pilot_waits_for_its_own_thread() -> None:
    # Pilot takes the process's CPU time for the app's: with a busy engine thread every key press would take 2 s.
    wait = sys.modules.get("textual._wait")
    if wait is not None:
        wait.process_time = time.thread_time  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x folder (epsilon), shared by the whole session: read only."""
    from tests.tiny import build_tiny_sd15

    return build_tiny_sd15(tmp_path_factory.mktemp("base") / "tiny-sd15")


@pytest.fixture(scope="session")
def tiny_sd15_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction, zero terminal SNR and linear projections, as Stable Diffusion 2.x has them."""
    from tests.tiny import build_tiny_sd15

    return build_tiny_sd15(
        tmp_path_factory.mktemp("base") / "tiny-sd15-v", "v_prediction", zero_snr=True, linear_projection=True
    )
