"""``swtpm socket …``: serve one vTPM as swtpm does, by swtpm's command line.

The process that is started becomes the engine: whoever started it holds its process number, and the
descriptors that it was given.
"""

from __future__ import annotations

import gc
import os
import sys

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.front.options import parse
from vtpmd.front.standard_descriptors import open_standard_descriptors
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from vtpmd.core import LinkDescriptor
    from vtpmd.front.boot import Message
    from vtpmd.front.options import Given, Values
    from vtpmd.front.place import Place, Sharing
    from vtpmd.front.process import User
    from vtpmd.front.root import OtherRoot
    from vtpmd.front.sockets import Channel
    from vtpmd.store.directory import TpmVersion
    from vtpmd.store.keys import Key

FAILED = 1  # swtpm's status for everything that goes wrong
PROGRAM = "swtpm"
VERBOSE_LEVEL = 5  # of --log, from which on swtpm logs what it is told
# The engine keeps to its allow-list whatever is asked for: to do with less is nobody's loss.
SECCOMP_ACTIONS = ("kill", "log", "none")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program named swtpm; return the exit status. Errors are one line."""
    open_standard_descriptors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except VtpmdError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    except OSError as error:
        what = "" if error.filename is None else f"{error.filename}: "
        print(f"{PROGRAM}: cannot start: {what}{error.strerror}", file=sys.stderr)
    return FAILED


def _run(arguments: list[str]) -> int:
    kind, *rest = arguments or [""]
    if kind in ("-h", "--help"):
        from vtpmd.front.prints import HELP

        print(HELP, end="")
        return 0
    if kind in ("-v", "--version"):
        from vtpmd.front.prints import version

        print(version())
        return 0
    if kind == "socket":
        return socket(rest)
    if kind in ("chardev", "cuse"):
        raise UsageError(f"{kind} is not served: only `socket` is; use swtpm's own program for it")
    raise UsageError(f"unknown interface {kind!r}: begin with `socket`, or see --help")


def socket(arguments: Sequence[str]) -> int:
    """Run ``socket`` with these arguments. Raises VtpmdError or OSError."""
    given = parse(arguments)
    if _wants_print(given):
        from vtpmd.front import prints

        return prints.run(given)
    gc.disable()
    _check(given)
    _serve(given)
    return 0


def _wants_print(given: Given) -> bool:
    return "print-info" in given.words or any(
        flag in ("help", "version") or flag.startswith("print-") for flag in given.flags
    )


def _check(given: Given) -> None:
    """Refuse what does not go together, and what is not served. Raises UsageError."""
    action = given.lists.get("seccomp", {}).get("action", SECCOMP_ACTIONS[0])
    if action not in SECCOMP_ACTIONS:
        raise UsageError(f"--seccomp action={action}: use {', '.join(SECCOMP_ACTIONS)}")
    flags = given.lists.get("flags", {})
    if flags.get("startup-deactivated") and "tpm2" in given.flags:
        raise UsageError("--flags startup-deactivated is for a TPM 1.2")
    if given.lists.get("migration", {}).get("incoming") and _starts_at_once(flags):
        raise UsageError(
            "--migration incoming has the state come before the TPM starts: leave out --flags "
            "not-need-init, startup-clear and the like"
        )
    has_data = "server" in given.lists or given.words.keys() & {"port", "fd"}
    if "ctrl" not in given.lists and not has_data:
        raise UsageError("there is no socket to serve: give --ctrl or --server")
    _check_prefix(str(given.lists.get("log", {}).get("prefix", "")))


def _check_prefix(prefix: str) -> None:
    """Refuse what the engine has no room for. Raises UsageError."""
    from vtpmd.core.boot import PROGRAM_BYTES_MAX

    bytes_max = PROGRAM_BYTES_MAX - len(PROGRAM)
    if len(os.fsencode(prefix)) > bytes_max:
        raise UsageError(f"--log prefix= has more than {bytes_max} bytes: give a shorter one")


def version_of(given: Given) -> TpmVersion:
    """Return which TPM a command line is for."""
    from vtpmd.store.directory import TpmVersion

    return TpmVersion.TPM_2_0 if "tpm2" in given.flags else TpmVersion.TPM_1_2


def _serve(given: Given) -> None:
    """Become the engine."""
    from contextlib import ExitStack

    from vtpmd.core import forbid_core_dumps
    from vtpmd.front.process import find_user, in_background, open_log

    forbid_core_dumps()
    user = find_user(str(given.words["runas"])) if "runas" in given.words else None
    if "chroot" in given.words and "migration" in given.lists:
        from vtpmd.store.holder import here

        here()  # nothing tells it there
    root = enter_root(given)
    if user is not None:  # before anything that is named is opened
        user.become(for_good=root is None)
    log_fd = open_log(given.lists.get("log", {}))
    with ExitStack() as stack:
        tell_fd = stack.enter_context(in_background(wanted="daemon" in given.flags))
        _Starting(stack, given, user, root, log_fd, tell_fd).become_engine()


def enter_root(given: Given) -> OtherRoot | None:
    """Enter the root directory that a command line names, if it does. Raises VtpmdError."""
    if "chroot" not in given.words:
        return None
    from vtpmd.front.root import OtherRoot

    return OtherRoot(str(given.words["chroot"]), given)


class _Channels(NamedTuple):
    control: Channel | None
    data: Channel | None


class _Starting:
    """A start: what is opened for the engine, in swtpm's order."""

    def __init__(
        self,
        stack: ExitStack,
        given: Given,
        user: User | None,
        root: OtherRoot | None,
        log_fd: int | None,
        tell_fd: int | None,
    ) -> None:
        self._stack = stack
        self._given = given
        self._user = user
        self._root = root
        self._log_fd = log_fd
        self._tell_fd = tell_fd
        self._descriptors: dict[LinkDescriptor, int] = {}

    def become_engine(self) -> None:
        """Open everything, then become the engine. Raises VtpmdError or OSError."""
        from vtpmd.core import LinkDescriptor
        from vtpmd.daemon import engine_process, signals
        from vtpmd.front.file_limit import NO_JOURNAL, open_store
        from vtpmd.front.place import open_place, sharing

        given, stack = self._given, self._stack
        key, migration_key = (read_key(stack, given, name) for name in ("key", "migration-key"))
        profile = self._read_profile()
        channels = self._open_channels()
        shared = sharing(given.lists.get("migration", {}))
        state = given.lists.get("tpmstate", {})
        place = open_place(stack, state, version_of(given), key, shared)
        if place.news:
            self._say(place.news)
        if profile is not None and not place.begun.is_new:
            raise UsageError("--profile is for a TPM that is made, and there is one already")
        signals.hold()
        serving = self._serving(channels, place.link_name, shared)
        arguments = self._leave_root()
        store = open_store(stack)
        if not store.is_shared and place.begun.keeps_journal:
            self._say(NO_JOURNAL)
            place = place._replace(begun=store.limited(place.begun))
        self._descriptors |= {
            LinkDescriptor.SOCKET: self._listen(place),
            LinkDescriptor.DIRECTORY: place.fd,
            LinkDescriptor.LOCK: place.lock_fd,
            LinkDescriptor.STORE: store.fd,
        }
        first = _keep(place, shared, migration_key, profile)
        self._write_boot_record(place, key, first, channels.data, serving)
        engine_process.become(self._descriptors, self._announce, arguments)

    def _leave_root(self) -> tuple[str, ...]:
        """Come back to where the engine is, if it is to have another root; return its arguments."""
        from vtpmd.core import LinkDescriptor
        from vtpmd.core.program import ARGUMENTS

        if self._root is None:
            return ARGUMENTS
        self._root.leave(self._stack)
        self._descriptors[LinkDescriptor.ROOT] = self._root.fd
        uid = 0 if self._user is None else self._user.uid
        return (*ARGUMENTS, "chroot", str(uid))

    def _listen(self, place: Place) -> int:
        """Return a descriptor of the engine's own socket, which is to be the engine's user's."""
        if self._root is None or self._user is None:
            return place.listen(self._stack)
        os.seteuid(self._user.uid)  # it has the group already
        try:
            return place.listen(self._stack)
        finally:
            os.seteuid(0)

    def _say(self, news: str) -> None:
        """Say something where the engine will say what it has to."""
        from vtpmd.front.process import ERROR_FD

        prefix = self._given.lists.get("log", {}).get("prefix", "")
        to = ERROR_FD if self._log_fd is None else self._log_fd
        os.write(to, f"{prefix}{PROGRAM}: {news}\n".encode())

    def _announce(self) -> None:
        """All is there: what is said from now on is the log's."""
        from vtpmd.front.process import ERROR_FD

        if self._log_fd is not None:
            os.dup2(self._log_fd, ERROR_FD)

    def _starting(self) -> int:
        """Return what the engine does once it serves: who started this goes on then."""
        from vtpmd.core import LinkDescriptor
        from vtpmd.core.boot import LinkStarting

        if self._tell_fd is None:
            return 0
        self._descriptors[LinkDescriptor.STARTED] = self._tell_fd
        return LinkStarting.TOLD | (LinkStarting.SILENT if self._log_fd is None else 0)

    def _open_channels(self) -> _Channels:
        from vtpmd.core import LinkDescriptor
        from vtpmd.front.sockets import control_channel, data_channel

        given = self._given
        control = data = None
        if "ctrl" in given.lists:
            control = control_channel(self._stack, given.lists["ctrl"])
            self._add(LinkDescriptor.CONTROL, LinkDescriptor.CONTROL_DIRECTORY, control)
        server = given.lists.get("server")
        if server is None and (words := given.words.keys() & {"port", "fd"}):
            server = {word: given.words[word] for word in words}
        if server is not None:
            data = data_channel(self._stack, server)
            self._add(LinkDescriptor.DATA, LinkDescriptor.DATA_DIRECTORY, data)
        return _Channels(control, data)

    def _add(self, socket: LinkDescriptor, place: LinkDescriptor, channel: Channel) -> None:
        self._descriptors[socket] = channel.fd
        if channel.path is not None:
            self._descriptors[place] = self._open_parent(channel.path)
        if channel.news is not None:
            self._say(channel.news)

    def _open_parent(self, path: str) -> int:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(os.path.dirname(path) or ".", flags)
        self._stack.callback(os.close, fd)
        return fd

    def _read_profile(self) -> str | None:
        """Read the profile of a TPM that is made, if one is given. Raises VtpmdError.

        A TPM 1.2 has none, and what is given for one counts for nothing, as with swtpm: swtpm_setup
        0.10 gives all of them one.
        """
        if "profile" not in self._given.lists or "tpm2" not in self._given.flags:
            return None
        from vtpmd.front.profile import read_profile

        return read_profile(self._given.lists["profile"])

    def _write_boot_record(
        self,
        place: Place,
        key: Key | None,
        first: list[Message],
        data: Channel | None,
        serving: bytes,
    ) -> None:
        from vtpmd.core import LinkDescriptor
        from vtpmd.front.boot import boot_record

        then = first + _power(self._given.lists.get("flags", {}), place.begun.version)
        then += _data(data)
        record = boot_record(place.begun, key, None, serving, then)
        self._descriptors[LinkDescriptor.BOOT] = self._stack.enter_context(record)

    def _serving(self, channels: _Channels, link_name: str, shared: Sharing) -> bytes:
        from vtpmd.core import LinkDescriptor, LinkNames, pack_link_serving
        from vtpmd.core.boot import LinkControl

        given = self._given
        log = given.lists.get("log", {})
        pid = given.lists.get("pid")
        pid_path = None
        if pid is not None:
            from vtpmd.front.process import write_pid

            pid_path = write_pid(pid)
        if pid_path is not None:
            self._descriptors[LinkDescriptor.PID_DIRECTORY] = self._open_parent(pid_path)
        control, data = channels
        names = LinkNames(
            socket=_name(control and control.path),
            link=link_name,
            data=_name(data and data.path),
            pid=_name(pid_path),
        )
        kind = LinkControl.NONE
        if control is not None:
            kind = LinkControl.CONNECTED if control.is_connected else LinkControl.LISTENS
        return pack_link_serving(
            f"{log.get('prefix', '')}{PROGRAM}",
            names,
            is_verbose=int(log.get("level", 0)) >= VERBOSE_LEVEL,
            is_alone=True,
            control=kind,
            ends=_ends(given, channels),
            locality_max=3 if given.lists.get("locality", {}).get("reject-locality-4") else 4,
            file_mode=int(given.lists.get("tpmstate", {}).get("mode", 0)),
            sharing=shared.flags(),
            starting=self._starting(),
        )


def read_key(stack: ExitStack, given: Given, name: str) -> Key | None:
    """Read the key that an option names, if it is there. Raises UsageError or VtpmdError."""
    values = given.lists.get(name)
    if values is None:
        return None
    from vtpmd.store.keys import key_source
    from vtpmd.store.keys import read_key as read

    source = key_source({key: _said(value) for key, value in values.items()}, f"--{name}")
    return stack.enter_context(read(source))


def _keep(
    place: Place, shared: Sharing, migration_key: Key | None, profile: str | None
) -> list[Message]:
    """Return what the engine is to know before the TPM is powered on."""
    from vtpmd.core import LinkKey, LinkOperation

    messages: list[Message] = []
    if place.header:
        messages.append((LinkOperation.EXPECT_HEADER, 0, place.header))
    if place.holder:
        messages.append((LinkOperation.SET_HOLDER, 0 if shared.is_to_come else 1, place.holder))
    if migration_key is not None:
        messages.append((LinkOperation.SET_KEY, LinkKey.MIGRATION, migration_key.material))
    if profile is not None:
        messages.append((LinkOperation.SET_PROFILE, 0, profile.encode() + b"\0"))
    return messages


def _ends(given: Given, channels: _Channels) -> int:
    from vtpmd.core.boot import LinkEnd

    control, data = channels
    ends = 0
    if control is not None and control.ends:
        ends |= LinkEnd.CONTROL
    if "terminate" in given.flags or (data is not None and data.ends):
        ends |= LinkEnd.DATA
    return ends


def _name(path: str | None) -> str:
    return "" if path is None else os.path.basename(path)


def _starts_at_once(flags: Values) -> bool:
    return any(value for name, value in flags.items() if name != "disable-auto-shutdown")


def _power(flags: Values, version: TpmVersion) -> list[Message]:
    """Return what powers the TPM on from the start, and starts it up."""
    from vtpmd.core import LinkOperation

    messages: list[Message] = []
    startups = version.facts.startups
    startup = next((command for name, command in startups.items() if flags.get(name)), None)
    if flags.get("not-need-init") or startup is not None:
        messages.append((LinkOperation.INIT, 0, b""))
    if startup is not None:
        messages.append((LinkOperation.EXECUTE, 0, startup))
    return messages


def _data(data: Channel | None) -> list[Message]:
    """Return what serves the data channel's own socket."""
    from vtpmd.core import LinkOperation
    from vtpmd.core.boot import LinkData

    if data is None:
        return []
    flags = LinkData.CONNECTED if data.is_connected else 0
    flags |= LinkData.DISCONNECTS if data.disconnects else 0
    return [(LinkOperation.SERVE_DATA, flags, b"")]


def _said(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
