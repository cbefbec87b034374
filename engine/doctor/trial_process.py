"""The child process of `doctor.trials`: `python -m lorasmith.engine.doctor.trial_process DEVICE TRIAL…`."""

from __future__ import annotations

import sys

from lorasmith.engine.doctor.trials import serve
from lorasmith.engine.run_log import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    serve(sys.argv[1], sys.argv[2:])
