"""Measure vtpmd beside swtpm: `scripts/bench`. Each module of `chapters` is one chapter."""
