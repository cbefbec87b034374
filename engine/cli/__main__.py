"""`python -m lorasmith.engine.cli`: the headless commands without the wizard's package."""

import sys

from lorasmith.engine.cli import main

sys.exit(main())
