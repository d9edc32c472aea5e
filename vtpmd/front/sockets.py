"""The sockets that a command line names: the control channel's and the data channel's."""

from __future__ import annotations

import os
import stat
from _socket import AF_INET, AF_INET6, AF_UNIX, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, inet_pton
from _socket import socket as BareSocket
from contextlib import closing

from vtpmd.daemon.listener import BACKLOG, listen_bare
from vtpmd.errors import UsageError, VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from contextlib import ExitStack

    from vtpmd.front.options import Values

MODE = 0o770  # swtpm's for a control channel's socket
PORT_MAX = 65535
LOOPBACK = "127.0.0.1"
ID_MAX = 2**32 - 2  # of a user or group: the last number is none


class Channel(NamedTuple):
    """A channel's socket."""

    fd: int
    is_connected: bool  # its other end is the client; else it listens
    path: str | None  # of its file, if this process has made one
    ends: bool  # the vTPM, with a connection
    disconnects: bool = False  # a connection is for one command
    news: str | None = None  # where it listens, if that was left to the system


class _Listening(NamedTuple):
    fd: int
    path: str | None = None
    news: str | None = None


def control_channel(stack: ExitStack, values: Values) -> Channel:
    """Open what ``--ctrl`` says. Raises UsageError or VtpmdError."""
    ends = bool(values.get("terminate"))
    kind = values.get("type")
    if kind not in ("unixio", "tcp"):
        raise UsageError("--ctrl needs type=unixio or type=tcp")
    if "clientfd" in values and kind == "unixio":
        fd = _inherited("--ctrl clientfd", values["clientfd"])
        return Channel(fd, is_connected=True, path=None, ends=ends)
    if "fd" in values:
        fd = _inherited("--ctrl fd", values["fd"])
        return Channel(fd, is_connected=False, path=None, ends=ends)
    fd, path, news = _listen(stack, "--ctrl", kind, values)
    return Channel(fd, is_connected=False, path=path, ends=ends, news=news)


def data_channel(stack: ExitStack, values: Values) -> Channel:
    """Open what ``--server`` says. Raises UsageError or VtpmdError."""
    kind = values.get("type", "tcp")
    if kind not in ("unixio", "tcp"):
        raise UsageError("--server takes type=unixio or type=tcp")
    disconnects = bool(values.get("disconnect"))
    if "fd" in values:
        fd = _inherited("--server fd", values["fd"])
        is_connected = not _listens(fd)
        return Channel(fd, is_connected, path=None, ends=is_connected, disconnects=disconnects)
    if kind == "tcp" and "port" not in values:
        values = {**values, **_port_of_environment()}
    fd, path, news = _listen(stack, "--server", kind, values)
    return Channel(fd, False, path, ends=False, disconnects=disconnects, news=news)


def _port_of_environment() -> Values:
    port = os.environ.get("TPM_PORT", "")
    if not port:
        return {}
    if not (port.isascii() and port.isdigit() and len(port) <= len(str(PORT_MAX))):
        raise UsageError(f"TPM_PORT is no port: set it to one of 0 to {PORT_MAX}, or unset it")
    return {"port": int(port)}


def _listen(stack: ExitStack, option: str, kind: str | int | bool, values: Values) -> _Listening:
    if kind == "tcp":
        return _listen_tcp(stack, option, values)
    path = values.get("path")
    if not isinstance(path, str):
        raise UsageError(f"{option} type=unixio needs a path")
    mode = values.get("mode", MODE)
    assert isinstance(mode, int)  # noqa: S101 - the option's type
    fd = stack.enter_context(listen_bare(path, f"{option} path=", mode)).fileno()
    _give_to(path, option, values)
    return _Listening(fd, path)


def _listen_tcp(stack: ExitStack, option: str, values: Values) -> _Listening:
    port, address = values.get("port"), str(values.get("bindaddr", LOOPBACK))
    if not isinstance(port, int) or not 0 <= port <= PORT_MAX:
        raise UsageError(f"{option} type=tcp needs a port, of 0 to {PORT_MAX}")
    family = AF_INET6 if ":" in address else AF_INET
    try:
        inet_pton(family, address)
    except OSError:
        raise UsageError(f"{option} bindaddr={address}: this is no IP address") from None
    listening = stack.enter_context(closing(BareSocket(family, SOCK_STREAM)))
    try:
        listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(BACKLOG)
    except OSError as error:
        raise VtpmdError(
            f"cannot listen on {address}:{port}: {error.strerror}; give another port or bindaddr "
            f"with {option}"
        ) from error
    # swtpm says nothing then, and who started it has to look for the port.
    chosen = listening.getsockname()[1] if port == 0 else None
    news = None if chosen is None else f"{option} listens on {address}:{chosen}"
    return _Listening(listening.fileno(), news=news)


def _give_to(path: str, option: str, values: Values) -> None:
    uid, gid = (_owner(option, name, values.get(name)) for name in ("uid", "gid"))
    if (uid, gid) == (-1, -1):
        return
    try:
        os.chown(path, uid, gid)
    except OSError as error:
        raise VtpmdError(
            f"cannot give {path} to another user: {error.strerror}; leave out uid= and gid= of "
            f"{option}, or be root"
        ) from error


def _owner(option: str, name: str, value: str | int | bool | None) -> int:
    if value is None:
        return -1
    text = str(value)
    if text.isascii() and text.isdigit():
        if len(text) > len(str(ID_MAX)) or int(text) > ID_MAX:
            raise UsageError(f"{option} {name}={text}: a number is at most {ID_MAX}")
        return int(text)
    try:
        if name == "uid":
            import pwd

            return pwd.getpwnam(text).pw_uid
        import grp

        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise UsageError(f"{option} {name}={text}: there is no such name") from None


def _inherited(option: str, value: str | int | bool) -> int:
    """Return a descriptor that this process was given, if it is a socket. Raises UsageError."""
    fd = int(value)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except (OSError, OverflowError):
        is_socket = False
    if not is_socket:
        raise UsageError(f"{option}={fd}: this is no socket that this process was given")
    return fd


def _listens(fd: int) -> bool:
    """Return whether a socket listens. Linux, socket(7): SO_ACCEPTCONN."""
    accepts = 30
    with closing(BareSocket(AF_UNIX, SOCK_STREAM, fileno=os.dup(fd))) as copy:
        return bool(copy.getsockopt(SOL_SOCKET, accepts))
