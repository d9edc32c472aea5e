"""Addresses that an operator or a management client gives."""

import pytest

from vtpmd.config import Address, parse_address
from vtpmd.errors import VtpmdError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:0", Address("host", 0)),
        ("host:65535", Address("host", 65535)),
        ("host:00001", Address("host", 1)),
        ("[::1]:4433", Address("::1", 4433)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:-1",
        "host:65536",
        "host:000001",
        "host:²",
        "::1:4433",
        "host:" + "9" * 5000,  # more digits than int() takes
        "x" * 5000 + ":1:",
    ],
)
def test_what_is_no_address_is_said_in_a_short_line(text: str) -> None:
    with pytest.raises(VtpmdError, match="is no address: give HOST:PORT") as raised:
        parse_address(text)
    assert len(str(raised.value)) < 200
