"""Run schedules by hand: ``python -m tests.sim [SEED [COUNT]]``; one prints its transcript."""

from __future__ import annotations

import sys
import time

from tests.sim.run import simulate


def main() -> int:
    """Run them; return 1 if one failed."""
    first, count = (int(sys.argv[1]) if len(sys.argv) > 1 else 0), 1
    if len(sys.argv) > 2:
        count = int(sys.argv[2])
    began_s, failed = time.monotonic(), 0
    kinds: dict[str, list[int]] = {}
    for seed in range(first, first + count):
        outcome = simulate(seed)
        if count == 1:
            print("\n".join(outcome.transcript))
        if outcome.violation is not None:
            failed += 1
            kinds.setdefault(outcome.violation[:60], []).append(seed)
    for kind, seeds in sorted(kinds.items(), key=lambda each: -len(each[1])):
        print(f"{len(seeds):5}  {kind}: {seeds[:6]}")
    took_s = time.monotonic() - began_s
    print(f"{count} schedules, {failed} failed, {1000 * took_s / count:.1f} ms each")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
