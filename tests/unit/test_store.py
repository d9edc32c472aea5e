"""The store as Python sees it: lifetimes, arguments, and a writer that cannot be trusted.

Invariant 8: memory shared with the engine is untrusted. Invariant 10: generations only grow.
What a capture does to pages is in tests/c/test_pages.c.
"""

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vtpmd import core
from vtpmd.core import Image, Store
from vtpmd.core.delta import delta_apply, delta_encode

PERMANENT, VOLATILE = 1, 2
CONTROL_OFFSET = 64  # of the permanent image (csrc/pages.h): sequence, generation, length


@pytest.fixture
def store() -> Iterator[Store]:
    """Give the store as vtpmd has it."""
    with Store.create() as store:
        yield store


@pytest.fixture
def engine(store: Store) -> Iterator[Store]:
    """Give the same store as the engine has it."""
    with Store.map(store.fd, writable=True) as engine:
        yield engine


def test_an_image_is_read_as_it_was_captured(store: Store, engine: Store) -> None:
    assert store.read(PERMANENT) == Image(PERMANENT, 0, b"")
    assert engine.capture(PERMANENT, b"state") == 1
    assert engine.capture(PERMANENT, b"state") == 1
    assert store.read(PERMANENT) == Image(PERMANENT, 1, b"state")
    assert store.generation(PERMANENT) == 1
    assert store.read(VOLATILE) == Image(VOLATILE, 0, b"")


def test_changes_are_ranges_of_pages(store: Store, engine: Store) -> None:
    image = bytearray(1000)
    engine.capture(PERMANENT, bytes(image))
    image[70] = image[130] = image[999] = 1
    engine.capture(PERMANENT, bytes(image))
    assert store.changes(PERMANENT, since=1) == core.StoreChanges(
        2, 1000, 168, [core.StoreRange(64, 128), core.StoreRange(960, 40)]
    )
    assert store.changes(PERMANENT, since=2).ranges == []


def test_what_was_read_can_be_encoded(store: Store, engine: Store) -> None:
    engine.capture(PERMANENT, bytes(5000))
    base = store.read(PERMANENT)
    engine.capture(PERMANENT, bytes(4000) + b"12345678" + bytes(992))
    following = store.read(PERMANENT)
    made = delta_apply(base, delta_encode(base, following))
    assert made[:3] == following[:3]


def test_invariant_10_generations_are_above_the_floor(store: Store, engine: Store) -> None:
    engine.raise_generation(PERMANENT, 41)
    assert engine.capture(PERMANENT, b"state") == 42
    assert store.generation(PERMANENT) == 42
    assert engine.capture(VOLATILE, b"state") == 1


def raw_memory(store: Store) -> mmap.mmap:
    """Map the store as a hostile engine may."""
    return mmap.mmap(store.fd, os.fstat(store.fd).st_size)


def put_control(store: Store, field: int, value: int) -> None:
    """Overwrite the permanent image's sequence (0), generation (1) or length (2)."""
    with raw_memory(store) as memory:
        struct.pack_into("=Q", memory, CONTROL_OFFSET + 8 * field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [(1, core.GENERATION_MAX + 1), (2, core.IMAGE_BYTES_MAX + 1), (2, 2**64 - 1), (1, 1)],
)
def test_invariant_8_a_broken_store_is_not_read(
    store: Store, engine: Store, field: int, value: int
) -> None:
    """Numbers past a limit; and, the last, a generation lower than one that was there."""
    engine.raise_generation(PERMANENT, 4)
    engine.capture(PERMANENT, b"state")
    assert store.generation(PERMANENT) == 5
    put_control(store, field, value)
    reads: list[Callable[[], object]] = [
        lambda: store.read(PERMANENT),
        lambda: store.generation(PERMANENT),
        lambda: store.changes(PERMANENT, 0),
    ]
    for read in reads:
        with pytest.raises(core.StoreDamagedError, match=r"^the engine .*: .*$"):
            read()


def test_an_image_that_is_being_written_is_busy(store: Store, engine: Store) -> None:
    engine.capture(PERMANENT, b"state")
    put_control(store, 0, 3)
    with pytest.raises(core.StoreBusyError):
        store.read(PERMANENT)
    put_control(store, 0, 4)
    assert store.read(PERMANENT).data == b"state"


def test_errors_of_capture(engine: Store) -> None:
    with pytest.raises(OSError, match="long") as error:
        engine.capture(PERMANENT, bytes(core.IMAGE_BYTES_MAX + 1))
    assert error.value.errno == errno.EMSGSIZE
    engine.raise_generation(PERMANENT, core.GENERATION_MAX)
    with pytest.raises(OSError, match=r"\w") as error:
        engine.capture(PERMANENT, b"state")
    assert error.value.errno == errno.EOVERFLOW


@pytest.mark.parametrize("image_type", [-1, 0, 4, 2**32 + 1])
def test_a_type_that_no_image_has_is_the_callers_error(engine: Store, image_type: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: engine.read(image_type),
        lambda: engine.generation(image_type),
        lambda: engine.changes(image_type, 0),
        lambda: engine.capture(image_type, b""),
        lambda: engine.raise_generation(image_type, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no image type"):
            call()


@pytest.mark.parametrize("floor", [-1, core.GENERATION_MAX + 1])
def test_a_floor_that_is_no_generation_is_the_callers_error(engine: Store, floor: int) -> None:
    with pytest.raises(ValueError, match="no generation"):
        engine.raise_generation(PERMANENT, floor)


def test_a_store_that_was_made_here_is_read_only(store: Store) -> None:
    with pytest.raises(ValueError, match="read-only"):
        store.capture(PERMANENT, b"state")
    with pytest.raises(ValueError, match="read-only"):
        store.raise_generation(PERMANENT, 1)


def test_what_is_no_store_is_not_mapped() -> None:
    with Path("/dev/null").open("rb") as file, pytest.raises(OSError, match=r"\w") as error:
        Store.map(file.fileno())
    assert error.value.errno == errno.EBADMSG


def test_a_closed_store_is_closed() -> None:
    store = Store.create()
    descriptor = store.fd
    store.close()
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    calls: list[Callable[[], object]] = [
        lambda: store.fd,
        lambda: store.read(PERMANENT),
        lambda: store.changes(PERMANENT, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_store_goes_with_its_object() -> None:
    store = Store.create()
    descriptor = store.fd
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_mapped_store_outlives_the_one_that_made_it() -> None:
    with Store.create() as store:
        engine = Store.map(store.fd, writable=True)
    with engine:
        assert engine.fd == -1
        engine.capture(PERMANENT, b"state")
        assert engine.read(PERMANENT).data == b"state"


def test_a_store_is_not_inherited_by_accident(store: Store) -> None:
    assert not os.get_inheritable(store.fd)
