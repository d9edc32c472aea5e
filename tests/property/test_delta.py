"""The store and the delta record against models: any images, any sequence of captures.

Invariants 5 and 10: what a record makes is the image bit by bit; generations only grow.
"""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.image_digest import image_digest
from vtpmd import core
from vtpmd.core import Image, Store
from vtpmd.core.delta import DeltaMismatchError, delta_apply, delta_encode, delta_inspect

PERMANENT = 1
OVERHEAD_BYTES = 104 + 3 + 4  # header, the longest beginning of one INSERT, checksum


@dataclass(frozen=True)
class Piece:
    """A piece of an image that is made from another: a part of that, or new bytes."""

    start: int
    length: int
    new: bytes

    def of(self, base: bytes) -> bytes:
        """Return the piece."""
        return base[self.start : self.start + self.length] + self.new


# Few different bytes make many false matches, many make few.
CONTENT = st.one_of(
    st.binary(max_size=600),
    st.text("ab", max_size=2000).map(str.encode),
    st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 60)).map(lambda t: t[0] * t[1]),
)
PIECES = st.lists(
    st.builds(Piece, st.integers(0, 2400), st.integers(0, 2400), st.binary(max_size=80)), max_size=6
)


@st.composite
def image_pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw a base, and an image made of pieces of it or of its own."""
    base = draw(CONTENT)
    pieces = draw(PIECES)
    return base, b"".join(piece.of(base) for piece in pieces) or draw(CONTENT)


# Pages that are there twice and in another order, and last ones that are the beginning of a page.
PAGED = st.builds(
    lambda pages, last: b"".join(bytes([page]) * 4096 for page in pages) + last,
    st.lists(st.integers(1, 3), max_size=6),
    st.builds(lambda page, length: bytes([page]) * length, st.integers(1, 3), st.integers(0, 4095)),
)


@given(image_pairs(), st.integers(1, 2**62 - 1), st.integers(1, 2**62))
def test_a_record_makes_the_image(pair: tuple[bytes, bytes], first: int, more: int) -> None:
    base, following = Image(PERMANENT, first, pair[0]), Image(PERMANENT, first + more, pair[1])
    record = delta_encode(base, following)
    assert len(record) <= len(following.data) + OVERHEAD_BYTES
    made = delta_apply(base, record)
    assert made[:3] == following[:3]
    assert made.digest == image_digest(following.data)
    assert made.digest[:32] == delta_inspect(record).result_digest


@given(image_pairs(), image_pairs())
def test_a_record_applies_to_its_base_only(
    pair: tuple[bytes, bytes], other: tuple[bytes, bytes]
) -> None:
    record = delta_encode(Image(PERMANENT, 1, pair[0]), Image(PERMANENT, 2, pair[1]))
    for base in {*other, pair[1]} - {pair[0]}:
        try:
            delta_apply(Image(PERMANENT, 1, base), record)
        except DeltaMismatchError:
            continue
        raise AssertionError("the record of another image was applied")


@given(image_pairs())
def test_records_are_a_function_of_the_images(pair: tuple[bytes, bytes]) -> None:
    images = Image(PERMANENT, 1, pair[0]), Image(PERMANENT, 2, pair[1])
    assert delta_encode(*images) == delta_encode(*images)


def page(image: bytes, number: int) -> bytes:
    """Return a page of an image, short at its end, empty behind it."""
    return image[number * core.PAGE_BYTES : (number + 1) * core.PAGE_BYTES]


class StoreMachine(RuleBasedStateMachine):
    """A store beside a list of all images that it ever held."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Store.create()
        self.writer = Store.map(self.reader.fd, writable=True)
        self.images = {0: b""}  # by generation
        self.floor = 0

    def teardown(self) -> None:
        self.writer.close()
        self.reader.close()

    @property
    def last(self) -> int:
        """The generation that is in the store."""
        return max(self.images)

    @rule(pieces=PIECES)
    def capture(self, pieces: list[Piece]) -> None:
        """Capture an image made from the last one."""
        last = self.images[self.last]
        image = b"".join(piece.of(last) for piece in pieces)[:4000]
        expected = self.last if image == last else max(self.last, self.floor) + 1
        assert self.writer.capture(PERMANENT, image) == expected
        self.images[expected] = image

    @rule(more=st.integers(0, 5))
    def raise_generation(self, more: int) -> None:
        """Raise the floor."""
        self.floor = max(self.floor, self.last + more)
        self.writer.raise_generation(PERMANENT, self.last + more)

    @rule()
    def restart(self) -> None:
        """Let another writer go on: what it does not know of the floor it is told again."""
        self.writer.close()
        self.writer = Store.map(self.reader.fd, writable=True)
        self.writer.raise_generation(PERMANENT, self.floor)

    @rule(data=st.data())
    def changes(self, data: st.DataObject) -> None:
        """A page that differs from what it was at a generation is always among the changes."""
        since = data.draw(st.sampled_from(sorted(self.images)))
        found = self.reader.changes(PERMANENT, since)
        image, before = self.images[self.last], self.images[since]
        assert (found.generation, found.image_bytes) == (self.last, len(image))
        assert found.n_bytes == sum(each.n_bytes for each in found.ranges)
        covered = {
            offset // core.PAGE_BYTES
            for each in found.ranges
            for offset in range(each.offset, each.offset + each.n_bytes, core.PAGE_BYTES)
        }
        pages = range(-(-len(image) // core.PAGE_BYTES))
        assert {n for n in pages if page(image, n) != page(before, n)} <= covered <= set(pages)
        if since == self.last:
            assert covered == set()

    @invariant()
    def reads_the_last_image(self) -> None:
        """What is read is the last image."""
        assert self.reader.read(PERMANENT)[1:3] == (self.last, self.images[self.last])


TestStore = StoreMachine.TestCase


@given(PAGED, PAGED, st.booleans())
def test_a_digest_is_the_same_with_and_without_an_image_before(
    before: bytes, following: bytes, is_digested: bool
) -> None:
    base = Image(PERMANENT, 1, before, image_digest(before) if is_digested else None)
    assert core.image.image_digest(Image(PERMANENT, 2, following), base) == image_digest(following)
