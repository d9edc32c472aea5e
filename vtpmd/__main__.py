"""``python -m vtpmd``."""

import sys

from vtpmd.cli import main

sys.exit(main())
