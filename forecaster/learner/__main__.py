"""`python -m forecaster.learner`, which the daemon runs: its task comes on standard input."""

from __future__ import annotations

import sys

from forecaster.learner.process import main

sys.exit(main())
