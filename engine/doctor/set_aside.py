"""A broken optional package must not take the libraries down that would only like to have it."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, Final

from lorasmith.engine.doctor.remembered import remembered_checks
from lorasmith.engine.run_log import plain_text, quiet_libraries

PACKAGE: Final = "bitsandbytes"
"""diffusers imports it where it finds it, and fails with it."""
logger = logging.getLogger("lorasmith.doctor")


def set_aside_broken_packages(*, trying: bool = True) -> str:
    """Let bitsandbytes count as not installed where it cannot be imported; returns why, or "" where it can.

    Without it everything works but its own optimizers and nf4. To be called before diffusers is imported, which would
    import it as well; the process has to be started anew after it was mended. One that the doctor saw crash a process
    is not tried again here; without `trying` nothing else is set aside, and nothing imported.
    """
    modules: dict[str, Any] = sys.modules
    if PACKAGE in modules:
        return "" if modules[PACKAGE] is not None else "set aside before"
    quiet_libraries()
    # It tells its missing CPU kernels to stderr, over whatever is on the screen.
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    why = next((check.detail for check in remembered_checks() if check.name == PACKAGE and check.crashed), "")
    if not why and not trying:
        return ""
    if not why:
        try:
            importlib.import_module(PACKAGE)
        except Exception as error:  # its native library can meet anything
            why = plain_text(f"{type(error).__name__}: {error}")
        else:
            return ""
    for name in [name for name in modules if name.startswith(f"{PACKAGE}.")]:
        del modules[name]
    # With this Python finds no such module, and neither does who only looks for it (importlib.util.find_spec).
    modules[PACKAGE] = None
    logger.warning("bitsandbytes is set aside, since it does not work: %s", why)
    return why
