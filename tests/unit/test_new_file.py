"""A file that a command makes: whole or not at all, and never in place of another."""

import errno
import os
import stat
from pathlib import Path

import pytest

from vtpmd.cli import new_file
from vtpmd.cli.new_file import CannotWrite
from vtpmd.errors import UsageError

CONTENT = b"some content"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return where the file is to be, in a directory of its own."""
    return tmp_path / "file"


def names(out: Path) -> list[str]:
    """Return what is in its directory."""
    return sorted(each.name for each in out.parent.iterdir())


def test_it_is_made_for_its_owner_alone(out: Path) -> None:
    new_file.make(out, CONTENT)
    assert out.read_bytes() == CONTENT
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.stat().st_nlink == 1
    assert names(out) == ["file"]


def test_it_has_no_name_before_it_is_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor before the disk has it."""
    seen = []

    def see(fd: int) -> None:
        seen.append((out.exists(), os.fstat(fd).st_size))

    monkeypatch.setattr(os, "fsync", see)
    new_file.make(out, CONTENT)
    assert seen[0] == (False, len(CONTENT))
    assert [was_there for was_there, _ in seen[1:]] == [True]  # the directory's


@pytest.mark.parametrize("number", [None, *new_file.NO_LINKS])
def test_one_that_comes_meanwhile_is_left_alone(
    number: int | None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file can have one name alone."""

    def link(*_: object, **__: object) -> None:
        raise FileExistsError if number is None else OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    out.write_bytes(b"another's")
    with pytest.raises(UsageError, match="is there already: give another name"):
        new_file.make(out, CONTENT)
    assert out.read_bytes() == b"another's"
    assert names(out) == ["file"]


@pytest.mark.parametrize("number", new_file.NO_LINKS)
def test_it_is_made_where_a_file_has_one_name_alone(
    number: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    new_file.make(out, CONTENT)
    assert out.read_bytes() == CONTENT
    assert names(out) == ["file"]


@pytest.mark.parametrize("fails_at", ["write", "link", "directory"])
def test_one_that_cannot_be_written_is_not_there(
    fails_at: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **_: object) -> None:
        is_directory = fails_at != "link" and stat.S_ISDIR(os.fstat(int(str(arguments[0]))).st_mode)
        if fails_at == "link" or is_directory == (fails_at == "directory"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link" if fails_at == "link" else "fsync", fail)
    with pytest.raises(CannotWrite) as met:
        new_file.make(out, CONTENT)
    assert str(met.value) == f"cannot write {out}: No space left on device; give another place"
    assert names(out) == []


def test_a_directory_that_is_not_there_is_said(out: Path) -> None:
    with pytest.raises(CannotWrite, match="No such file or directory"):
        new_file.make(out / "file", CONTENT)


@pytest.mark.parametrize("other", ["file", "directory", "link to nothing"])
def test_whatever_has_the_name_is_said_before(other: str, out: Path) -> None:
    new_file.check_is_new(out)
    if other == "file":
        out.touch()
    elif other == "directory":
        out.mkdir()
    else:
        out.symlink_to(out.with_name("nothing"))
    with pytest.raises(UsageError):
        new_file.check_is_new(out)
    with pytest.raises(UsageError):
        new_file.make(out, CONTENT)
    assert names(out) == ["file"]
