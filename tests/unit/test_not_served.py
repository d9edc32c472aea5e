"""What a person is told where there is no engine to attach to."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_holder import MINE, OTHER, ended
from vtpmd.daemon.not_served import NO_ENGINE, NOBODY, NOBODY_SEEN, why_not
from vtpmd.store import holder
from vtpmd.store.directory import LOCK_NAME, StateDirectory

NO_ROOT = 65534
RECORDS = {
    "empty": (b"", NOBODY),
    "given back": (holder.encode(OTHER._replace(is_held=False)), NOBODY),
    "over": (holder.encode(ended()), NOBODY),
    "damaged": (b"none of ours", NOBODY),
    "another host's": (holder.encode(OTHER), "host web2, process 7, since "),
}


def told(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return why_not(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("content", "wanted"), RECORDS.values(), ids=RECORDS)
def test_by_the_record(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    assert told(tmp_path).startswith(wanted)


@pytest.mark.parametrize("content", [b"", holder.encode(MINE._replace(is_held=False))])
def test_what_has_the_lock_and_no_link_is_there(tmp_path: Path, content: bytes) -> None:
    with StateDirectory.open(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(content)
        assert told(tmp_path) == NO_ENGINE
    assert told(tmp_path) == NOBODY


def test_a_lock_that_cannot_be_read_is_left_to_a_start(tmp_path: Path) -> None:
    assert told(tmp_path) == NOBODY
    (tmp_path / LOCK_NAME).symlink_to("/dev/zero")
    assert told(tmp_path) == NOBODY


def test_who_has_the_lock_open_waits_for_it(tmp_path: Path) -> None:
    lock = tmp_path / LOCK_NAME
    lock.touch()
    with lock.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as waiting:
        said = told(tmp_path)
        waiting.kill()
    assert said.startswith(f"sleep (process {waiting.pid}) has the state directory without its lo")
    assert told(tmp_path) == NOBODY


def test_who_is_not_root_cannot_see_that(tmp_path: Path) -> None:
    lock = tmp_path / LOCK_NAME
    lock.touch(0o644)
    tmp_path.chmod(0o755)
    fd, usual = os.open(tmp_path, os.O_RDONLY), os.geteuid()
    with lock.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as waiting:
        os.seteuid(usual or NO_ROOT)
        said = why_not(fd)
        os.seteuid(usual)
        os.close(fd)
        waiting.kill()
    assert said == NOBODY_SEEN
