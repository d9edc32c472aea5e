"""Which row of a table of versions holds."""

import pytest

from tests.harness.versions import Version, row

TABLE = {(7, 2): "seven", (10, 0): "ten"}


@pytest.mark.parametrize(
    ("version", "expected"),
    [((7, 1), "seven"), ((7, 2), "seven"), ((9, 9), "seven"), ((10, 0), "ten"), ((11, 1), "ten")],
)
def test_row_holds_until_the_next(version: Version, expected: str) -> None:
    assert row(TABLE, version) == expected
