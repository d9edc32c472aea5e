"""Certificates for peers, made by `vtpmd pki` once and used by all tests of a process."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from vtpmd import pki
from vtpmd.testing import leftovers

# All peers of the tests are on this machine. Peers connect to this name, and allow it.
HOST = "localhost"
ISSUE_TIMEOUT_S = 60.0


class Authority:
    """A certificate authority and the credentials directories that it has issued."""

    def __init__(self, directory: Path) -> None:
        """Make an authority in a new directory."""
        self.directory = directory
        _vtpmd_pki("init", directory)

    def issue(self, name: str) -> Path:
        """Return a new credentials directory for a host of this name."""
        _vtpmd_pki("issue", self.directory, name)
        return self.directory / name

    def issue_named(self, *names: str) -> Path:
        """Return a new credentials directory for a host of several names."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        _vtpmd_pki("issue", self.directory, *names, "--out", directory)
        return directory

    def issue_until(self, not_after: datetime) -> Path:
        """Return a new credentials directory for HOST that is valid up to a moment.

        `vtpmd pki` counts in days; so this is made with what it is made of.
        """
        authority = pki.read_authority(self.directory)
        validity = pki.Validity(not_before=not_after - timedelta(days=2), not_after=not_after)
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        shutil.copy(self.directory / "ca-cert.pem", directory)
        for role, usage in pki.USAGES.items():
            holder = pki.issue_one(authority, [HOST], usage, validity)
            (directory / f"{role}-cert.pem").write_bytes(holder.certificate_pem())
            key = directory / f"{role}-key.pem"
            key.touch(pki.KEY_MODE)
            key.write_bytes(holder.key_pem())
        return directory

    def issue_expired(self) -> Path:
        """Return a new credentials directory for HOST that was valid until a minute ago."""
        return self.issue_until(datetime.now(UTC) - timedelta(minutes=1))


def _vtpmd_pki(action: str, *arguments: Path | str) -> None:
    vtpmd = Path(sys.executable).with_name("vtpmd")
    command = [vtpmd, "pki", action, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=ISSUE_TIMEOUT_S)


@cache
def _directory() -> Path:
    directory = leftovers.new_directory()
    atexit.register(shutil.rmtree, directory)
    return directory


@cache
def authority() -> Authority:
    """Return the authority that the tests' peers trust."""
    return Authority(_directory() / "authority")


@cache
def other_authority() -> Authority:
    """Return an authority that the tests' peers do not trust."""
    return Authority(_directory() / "other-authority")


@cache
def credentials() -> Path:
    """Return the credentials directory of the tests' peers."""
    return authority().issue(HOST)


@cache
def credentials_for(name: str) -> Path:
    """Return the credentials directory of a peer that others find by another name than HOST."""
    return authority().issue(name)


@cache
def foreign_credentials() -> Path:
    """Return a credentials directory for HOST of another authority, which trusts only that."""
    return other_authority().issue(HOST)


@cache
def stranger_credentials() -> Path:
    """Return a credentials directory of the trusted authority for a name that nobody allows."""
    return authority().issue("stranger.example")
