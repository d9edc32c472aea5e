"""``--chroot DIR``: what a command line names is looked up below another root directory.

This program is not in there, and the engine's libraries are not. So this process enters it, opens
what is named, and comes back, also whenever it asks libtpms; the engine has that root for good
before it reads anything.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from importlib import import_module

from vtpmd.core import program
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    from vtpmd.front.options import Given

# What is imported where a start needs it: it cannot be from within.
_MODULES = (
    "grp",
    "hashlib",
    "hmac",
    "pathlib",
    "pwd",
    "vtpmd.core.boot",
    "vtpmd.core.journal",
    "vtpmd.core.program",
    "vtpmd.daemon.engine_process",
    "vtpmd.daemon.signals",
    "vtpmd.front.boot",
    "vtpmd.front.file_limit",
    "vtpmd.front.place",
    "vtpmd.front.prints",
    "vtpmd.front.process",
    "vtpmd.front.sockets",
    "vtpmd.store.anchor",
    "vtpmd.store.arrived",
    "vtpmd.store.backup",
    "vtpmd.store.incoming",
    "vtpmd.store.libtpms",
    "vtpmd.store.linear",
    "vtpmd.store.owner",
    "vtpmd.store.start",
)
_MODULES_FOR_KEYS = (
    "cryptography.exceptions",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.ciphers.algorithms",
    "cryptography.hazmat.primitives.ciphers.modes",
    "cryptography.hazmat.primitives.hashes",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "vtpmd.store.keys",
    "vtpmd.store.sealing",
    "vtpmd.wire.swtpm_encryption",
)
_MODULES_FOR_PROFILES = ("json", "vtpmd.front.profile")
_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class OtherRoot:
    """Another root directory, which this process is in until ``leave()``."""

    def __init__(self, path: str, given: Given) -> None:
        """Enter it, as root alone may, with all that a start imports. Raises VtpmdError."""
        for name in _MODULES:
            import_module(name)
        if given.lists.keys() & {"key", "migration-key"}:
            for name in _MODULES_FOR_KEYS:
                import_module(name)
        if "profile" in given.lists:
            for name in _MODULES_FOR_PROFILES:
                import_module(name)
        self._before_fd = os.open("/", _FLAGS)
        try:
            os.chroot(path)
            os.chdir("/")
        except OSError as error:
            raise VtpmdError(
                f"cannot have {path} as the root directory: {error.strerror}; be root, and give a "
                "directory with --chroot"
            ) from error
        self.fd = os.open("/", _FLAGS)
        program.where_it_is = self._outside

    def leave(self, stack: ExitStack) -> None:
        """Come back, as root. Raises OSError.

        What ``stack`` removes by its path, should the start fail, it removes below it.
        """
        os.seteuid(0)
        _enter(self._before_fd)
        program.where_it_is = nullcontext
        stack.callback(_enter, self.fd)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Be outside, as root. Raises OSError."""
        uid = os.geteuid()
        os.seteuid(0)
        _enter(self._before_fd)
        try:
            yield
        finally:
            _enter(self.fd)
            os.seteuid(uid)


def _enter(fd: int) -> None:
    os.fchdir(fd)
    os.chroot(".")
