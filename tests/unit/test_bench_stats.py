"""The pure parts of the bench: percentiles, ratios by round, and Python's import times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.breakdown import Import, by_package, parse_import_time
from tests.bench.report import Target
from tests.bench.stats import Distribution, percentile, pooled, round_ratios

SAMPLES = st.lists(st.integers(min_value=1, max_value=10**12).map(float), min_size=1)

IMPORT_TIME = """\
import time: self [us] | cumulative | imported package
import time:       152 |        152 |   _io
a line of the program that was started
import time:        20 |         20 |     asyncio.events
import time:       300 |        320 |   asyncio
import time:      1000 |       1472 | vtpmd.daemon
"""


@given(samples=SAMPLES, percent=st.integers(min_value=0, max_value=100))
def test_percentile_is_the_least_sample_that_enough_samples_do_not_exceed(
    samples: list[float], percent: int
) -> None:
    found = percentile(sorted(samples), percent)
    below = sum(sample < found for sample in samples)
    up_to = sum(sample <= found for sample in samples)
    assert found in samples
    assert up_to * 100 >= percent * len(samples)
    assert below == 0 or below * 100 < percent * len(samples)


@pytest.mark.parametrize("samples, percent", [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses_what_has_none(samples: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(samples, percent)


def test_percentiles_of_a_hundred_samples_are_the_samples() -> None:
    described = Distribution.of([float(number) for number in range(100, 0, -1)])
    assert (described.p50, described.p99, described.percentiles[99.9]) == (50.0, 99.0, 100.0)
    assert (described.count, described.mean) == (100, 50.5)
    assert described.to_json()["percentiles"] == {
        **{str(percent): float(max(percent, 1)) for percent in range(101)},
        "99.9": 100.0,
    }


def test_round_ratios_are_blind_to_a_drift_that_hits_both() -> None:
    drift = [1.0, 10.0, 100.0]
    rounds = [[3 * slow, 6 * slow, 9 * slow] for slow in drift]
    reference = [[2 * slow, 4 * slow, 8 * slow] for slow in drift]
    ratios = round_ratios(rounds, reference)
    assert (ratios.percentiles[0.0], ratios.percentiles[100.0]) == (1.5, 1.5)
    assert pooled(rounds).p50 == 60.0


def test_round_ratios_need_a_reference_for_each_round() -> None:
    with pytest.raises(ValueError):
        round_ratios([[1.0], [1.0]], [[1.0]])


@pytest.mark.parametrize("measured, met", [(1.0, True), (1.0001, False)])
def test_target_is_met_up_to_its_limit(measured: float, met: bool) -> None:
    assert Target(what="", unit="", measured=measured, limit=1.0).met is met


def test_import_times_are_read_with_their_nesting() -> None:
    imports = parse_import_time(IMPORT_TIME)
    assert imports == [
        Import(module="_io", self_us=152, depth=1),
        Import(module="asyncio.events", self_us=20, depth=2),
        Import(module="asyncio", self_us=300, depth=1),
        Import(module="vtpmd.daemon", self_us=1000, depth=0),
    ]
    assert by_package(imports) == {"vtpmd": 1.0, "asyncio": 0.32, "_io": 0.152}
    assert list(by_package(imports)) == ["vtpmd", "asyncio", "_io"]
