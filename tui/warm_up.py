"""Importing torch and its company behind the first pages, without the screen feeling it.

Ten seconds of imports hold the interpreter in bursts and trigger full garbage collections of 0.2 s and more. So the
thread yields before each module, and collections rest until it is done.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from lorasmith.tui.findings import HEAVY_IMPORTS

HEAVY = ("torch", "transformers", "diffusers", "peft")
YIELD_SECONDS = 200e-6


class _Yielding(importlib.abc.MetaPathFinder):
    """Finds nothing, but lets other threads run first when its own thread imports a module."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Sleep for a moment and leave the search to the next finder."""
        if threading.get_ident() == self._thread:
            time.sleep(YIELD_SECONDS)
        return None


def import_heavy() -> None:
    """Import what training needs, so that Start does not wait for it.

    A failure is not told here: it comes up again, with words, where the package is needed.
    """
    from lorasmith.engine.doctor import set_aside_broken_packages
    from lorasmith.engine.run_log import quiet_libraries

    quiet_libraries()
    finder = _Yielding()
    with HEAVY_IMPORTS:
        sys.meta_path.insert(0, finder)
        gc.disable()
        try:
            set_aside_broken_packages()
            for name in HEAVY:
                importlib.import_module(name)
        except Exception:
            return
        finally:
            gc.freeze()
            gc.enable()
            sys.meta_path.remove(finder)
