"""Percentiles and ratios of samples. Pure: the unit of a sample is the caller's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PERCENTS = (*(float(percent) for percent in range(101)), 99.9)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least sample that `percent` of all do not exceed.

    `ordered` ascends and is not empty; `percent` is from 0 to 100. No value is interpolated, so
    what is returned was measured.
    """
    if not ordered or not 0 <= percent <= 100:
        raise ValueError(f"no percentile {percent} of {len(ordered)} samples")
    rank = math.ceil(percent * len(ordered) / 100)
    return ordered[max(rank, 1) - 1]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What is kept of samples: their number, their mean, and the percentiles of PERCENTS."""

    count: int
    mean: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Distribution":
        """Describe samples in any order; ValueError when there are none."""
        ordered = sorted(samples)
        percentiles = {percent: percentile(ordered, percent) for percent in PERCENTS}
        return cls(count=len(ordered), mean=sum(ordered) / len(ordered), percentiles=percentiles)

    @property
    def p50(self) -> float:
        """The median."""
        return self.percentiles[50.0]

    @property
    def p99(self) -> float:
        """The 99th percentile."""
        return self.percentiles[99.0]

    def to_json(self) -> dict[str, object]:
        """Return the distribution in JSON's types."""
        percentiles = {f"{percent:g}": value for percent, value in self.percentiles.items()}
        return {"count": self.count, "mean": self.mean, "percentiles": percentiles}


def pooled(rounds: Sequence[Sequence[float]]) -> Distribution:
    """Describe the samples of all rounds together."""
    return Distribution.of([sample for samples in rounds for sample in samples])


def round_ratios(
    rounds: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> Distribution:
    """Describe the ratios of medians, round by round.

    A round and its reference ran within milliseconds of each other, so a slow drift of the machine
    leaves the ratio alone; the spread says how far to trust it.
    """
    pairs = zip(rounds, reference, strict=True)
    return Distribution.of([Distribution.of(a).p50 / Distribution.of(b).p50 for a, b in pairs])
