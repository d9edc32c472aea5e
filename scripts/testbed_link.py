"""How a person says what a link shall do: `--rate 50mbit --delay 20ms`, in tc's units."""

import argparse
import re
from collections.abc import Callable

from tests.harness.wire import Conditions

RATES_BITS_S = {"kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
TIMES_US = {"us": 1, "ms": 1_000, "s": 1_000_000}
PERCENTAGES_PPM = {"%": 10_000}


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `conditions` takes."""
    options = parser.add_argument_group("the link, either way")
    options.add_argument("--rate", type=quantity(RATES_BITS_S), default="1gbit", metavar="1gbit")
    options.add_argument("--delay", type=quantity(TIMES_US), default="0us", metavar="20ms")
    options.add_argument("--jitter", type=quantity(TIMES_US), default="0us", metavar="2ms")
    options.add_argument("--loss", type=quantity(PERCENTAGES_PPM), default="0%", metavar="0.1%")


def quantity(units: dict[str, int]) -> Callable[[str], int]:
    """Return a parser of numbers with one of these units, as tc writes them."""
    form = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(units)})")

    def parse(text: str) -> int:
        found = form.fullmatch(text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no number with a unit ({', '.join(units)})"
            )
        return round(float(found[1]) * units[found[2]])

    return parse


def conditions(options: argparse.Namespace) -> Conditions:
    """Return what the link shall do. ValueError when no link can."""
    if options.rate == 0 or options.jitter > options.delay:
        raise ValueError("a link needs a rate, and a jitter that is at most its delay")
    return Conditions(
        rate_bits_s=options.rate,
        delay_us=options.delay,
        jitter_us=options.jitter,
        loss_ppm=options.loss,
    )
