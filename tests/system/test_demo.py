"""The demonstration shows a migration after which the guest saw no difference, and says so."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_TIMEOUT_S = 170


def test_demo_ends_with_no_difference() -> None:
    """Its JSON says what was moved, and accounts for the downtime."""
    demo = subprocess.run(
        [sys.executable, "-m", "scripts.demo", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    outcome = json.loads(demo.stdout)
    assert outcome["same"] is True
    assert outcome["differences"] == []
    assert outcome["before"].keys() == outcome["after"].keys()
    assert outcome["migration"]["ram_bytes"] > 0
    assert outcome["vtpm_bytes"] > 0
    assert len(outcome["downtime_phases"]) == 4
    assert all(phase["duration_ms"] > 0 for phase in outcome["downtime_phases"])
