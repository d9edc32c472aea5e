"""The demonstration shows a migration with a tail, after which the guest saw no difference."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_TIMEOUT_S = 170


def test_demo_moves_a_guest_with_a_tail_and_no_difference() -> None:
    """Its JSON says what was moved, in rounds and in the tail, and accounts for the downtime."""
    demo = subprocess.run(
        ["bash", "-c", "scripts/demo --json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    outcome = json.loads(demo.stdout)
    assert outcome["good"] is True
    assert outcome["differences"] == []
    assert outcome["before"].keys() == outcome["after"].keys()
    move = outcome["move"]
    assert move["ending"] == "tail"
    assert move["guest"]["ram-transferred-bytes"] > 0
    assert len(move["vtpm"]["rounds"]) > 1
    # What vtpmd says that it gave to QEMU is what QEMU got.
    assert outcome["stream-bytes"] == move["vtpm"]["tail-bytes"]
    assert outcome["stream-bytes"] < move["vtpm"]["rounds"][0]["bytes"]
    assert len(outcome["downtime-phases-ms"]) == 4
    assert all(duration > 0 for duration in outcome["downtime-phases-ms"].values())
