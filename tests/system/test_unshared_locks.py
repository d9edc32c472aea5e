"""Storage that hosts share, whose locks they do not: invariant 3 by the record in ``.lock``.

Each host has its own mount of one directory, and gets the lock, whoever else has it.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.harness.swtpm_program import OURS, TIMEOUT_S, Place
from tests.harness.unshared import UnsharedHost, UnsharedStorage
from tests.support.emulator_client import (
    INIT_DELETE_VOLATILE,
    ControlError,
)
from tests.support.tpm2 import ReturnCode, TpmError
from tests.system.test_shared_storage import (
    BOTH,
    FIRST,
    INCOMING,
    INDEX,
    NV_BYTES,
    RELEASES,
    SECOND,
    THIRD,
    Host,
    store,
)
from vtpmd.store.holder import decode
from vtpmd.testing.emulator import VTPMD


class Two:
    """Hosts by name, and what is started on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.storage = UnsharedStorage(directory)
        self.ending = ExitStack()
        self.ending.enter_context(self.storage)
        self._n_places = 0

    def _place(self) -> Place:
        self._n_places += 1
        return Place(OURS, self.directory / f"place{self._n_places}")

    def _command(self, on: UnsharedHost, place: Place, *options: str) -> list[str]:
        state = ("--tpmstate", f"dir={on.mount}")
        return [*on.enter, *place.options(*state, *options)]

    def start(self, name: str, *options: str) -> Host:
        """Start an emulator on a host that was started just now."""
        on, place = self.storage.host(name), self._place()
        host = Host(place, place.start_by(self._command(on, place, *options)))
        self.ending.callback(place.end)
        self.ending.callback(host.close)
        return host

    def refused(self, name: str, *options: str) -> str:
        """Start one that does not start; return what it says."""
        on, place = self.storage.host(name), self._place()
        return said(self._command(on, place, *options), 1)

    def vtpmd(self, name: str, *words: str, status: int) -> str:
        """Run a command on a host, on the directory; return what it says."""
        on = self.storage.host(name)
        return said([*on.enter, str(VTPMD), words[0], str(on.mount), *words[1:]], status)

    def content(self) -> dict[str, bytes]:
        """Return all that there is."""
        upper = self.storage.lock_file.parent
        return {path.name: path.read_bytes() for path in upper.iterdir()}

    def record_is_held(self) -> bool:
        """Return what the record says."""
        return decode(self.storage.lock_file.read_bytes()).is_held


def said(command: list[str], status: int) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, done
    return done.stdout + done.stderr


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    with made.ending:
        yield made


def started(two: Two, name: str = "web1") -> Host:
    """Start a guest that has stored something, and may have been here before."""
    host = two.start(name, *RELEASES)
    tpm = host.start()
    with suppress(TpmError):
        tpm.nv_define(INDEX, NV_BYTES)
    store(tpm, FIRST)
    return host


def assert_served(two: Two, name: str, wanted: bytes) -> None:
    host = two.start(name, *RELEASES)
    assert host.start().nv_read(INDEX, NV_BYTES) == wanted
    host.stop()


def test_invariant_3_directory_of_another_host_is_refused_whatever_is_asked(two: Two) -> None:
    """In a line that says who has it, and nothing is written."""
    source = started(two)
    before = two.content()
    for options in (RELEASES, ()):
        text = two.refused("web2", *options)
        assert text.count("\n") == 1
        assert f"in use by host web1, process {source.process.pid}, since 20" in text
        assert "vtpmd owner" in text
        assert "--claim" in text
    for words in (("run",), ("fold",), ("recover",)):
        assert "in use by host web1" in two.vtpmd("web2", *words, status=3)
    assert "host web1, process" in two.vtpmd("web2", "status", status=0)
    assert two.content() == before
    store(source.tpm, SECOND)
    source.stop()
    assert not two.record_is_held()
    assert_served(two, "web2", SECOND)


def test_vtpm_moves_and_comes_back(two: Two) -> None:
    """Who gives says so before the other takes."""
    source = started(two)
    there = two.start("web2", *BOTH)
    there.connect()
    blobs = source.give()
    assert not two.record_is_held()
    there.take(blobs)
    assert two.record_is_held()
    store(there.tpm, SECOND)
    source.stop()
    assert two.record_is_held()  # the other's
    there.stop()
    assert_served(two, "web1", SECOND)


def test_state_that_its_host_has_not_let_go_of_is_refused(two: Two) -> None:
    """As of a source that was not told to: its guest goes on."""
    source = two.start("web1", *INCOMING)
    source.connect()
    source.bring(started(two, "web0").give())
    other = started(two, "web2")
    before = two.content()
    with pytest.raises(ControlError):
        source.control.init(INIT_DELETE_VOLATILE)
    assert "the vTPM's state is in use by host web2, process" in source.stop()
    assert two.content() == before
    store(other.tpm, SECOND)
    other.stop()
    assert_served(two, "web2", SECOND)


def test_invariant_3_source_does_not_go_on_while_another_host_has_it(two: Two) -> None:
    """Its lock was got again, which means nothing here; what the other has written stays."""
    source = started(two)
    there = two.start("web2", *BOTH)
    there.connect()
    there.take(source.give())
    store(there.tpm, SECOND)
    before = two.content()
    with pytest.raises(ControlError):
        source.control.lock_storage(retries=3)
    with pytest.raises(TpmError) as failed:
        store(source.tpm, THIRD)
    assert failed.value.return_code == ReturnCode.FAILURE
    assert two.content() == before
    text = source.stop()
    assert "the vTPM's state is in use by host web2, process" in text
    assert two.content() == before
    there.stop()
    assert_served(two, "web1", SECOND)


def test_host_that_crashed_is_served_again_and_no_other(two: Two) -> None:
    """Started again it has another boot, and its process is gone; an operator knows of the rest."""
    source = started(two)
    source.kill()
    assert "in use by host web1" in two.refused("web2", *RELEASES)
    assert_served(two, "web1", FIRST)
    assert_served(two, "web2", FIRST)


def test_host_that_is_gone_for_good_is_claimed_from(two: Two) -> None:
    """Which is remembered, as it may have served the vTPM meanwhile."""
    started(two).kill()
    assert two.vtpmd("web2", "owner", status=0).count("possible fork") == 0
    text = two.vtpmd("web2", "owner", "--claim", status=0)
    assert "possible fork: claimed at" in text
    assert "without the word of host web1, process" in text
    assert_served(two, "web2", FIRST)
    assert "nothing to claim" in two.vtpmd("web2", "owner", "--claim", status=9)


def test_record_that_cannot_be_read_is_not_taken_for_none(two: Two) -> None:
    two.storage.lock_file.write_bytes(b"somebody else's")
    assert "its .lock is no record of vtpmd's" in two.refused("web2", *RELEASES)
    two.vtpmd("web2", "owner", "--claim", status=0)
    two.start("web2", *RELEASES).start()


def test_of_two_that_start_at_once_one_is_powered_on(two: Two) -> None:
    """Both have found the directory free: who has said last that it has it, has it."""
    first = two.start("web1", *RELEASES)
    two.storage.lock_file.write_bytes(b"")  # as the other has found it
    second = two.start("web2", *RELEASES)
    with pytest.raises(ControlError):
        first.start()
    assert "in use by host web2" in first.stop()
    second.start()
    second.stop()
