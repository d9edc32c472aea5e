"""What an operator asks of ``vtpmd run``."""

from __future__ import annotations

from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Final

PORT_MAX: Final = 65535
# Python takes no number from a text that is too long, and no port has more.
PORT_DIGITS_MAX: Final = 5
ADDRESS_SHOWN_MAX: Final = 80  # of what is no address, in an error


class Address(NamedTuple):
    """A TCP address; the host is a name or an address, without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class RunConfig(NamedTuple):
    """The options of ``vtpmd run``. Paths are text: most vTPMs start without pathlib."""

    name: str | None
    uuid: str | None
    log_level: str
    listen: Address | None
    tls_creds: str | None
    allowed: tuple[str, ...]
    qmp: str | None
    manage: str | None

    def credentials(self) -> Path | None:
        """Return the directory of certificates for both directions."""
        from pathlib import Path

        return None if self.tls_creds is None else Path(self.tls_creds)


def parse_address(text: str) -> Address:
    """Return the address that HOST:PORT or [HOST]:PORT is. Raises VtpmdError."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without its brackets: where the port begins is a guess
    if not (host and _is_port(port)):
        shown = text if len(text) <= ADDRESS_SHOWN_MAX else f"{text[:ADDRESS_SHOWN_MAX]}…"
        raise VtpmdError(f"{shown!r} is no address: give HOST:PORT, or [ADDRESS]:PORT for IPv6")
    return Address(host, int(port))


def _is_port(text: str) -> bool:
    is_number = text.isascii() and text.isdigit() and len(text) <= PORT_DIGITS_MAX
    return is_number and int(text) <= PORT_MAX
