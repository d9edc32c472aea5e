"""``vtpmd run``: serve one vTPM in the foreground."""

from __future__ import annotations

import gc
import os
import sys

from vtpmd.cli.arguments import (
    DAEMON_ARGUMENTS,
    KEY_ARGUMENT,
    add_arguments,
    is_made_of,
    pathlib_path,
    plain_path,
    refusal,
)
from vtpmd.config import RunConfig, parse_address
from vtpmd.errors import UsageError, VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse
    import socket
    from _socket import socket as BareSocket
    from collections.abc import Callable
    from contextlib import AbstractContextManager, ExitStack

    from vtpmd.cli.arguments import Arguments, Options
    from vtpmd.core import LinkDescriptor
    from vtpmd.front.file_limit import StoreFd
    from vtpmd.store.anchor import Anchor
    from vtpmd.store.directory import StateDirectory, TpmVersion
    from vtpmd.store.keys import Key
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.start import Start

MODE_MAX = 0o777
MODE_DIGITS_MAX = 5
SHELL_MARKS = "_@%+=:,./-"  # what needs no quotes

EPILOG = """\
example:
  vtpmd run /srv/web1-tpm

  It prints the arguments to start QEMU with, serves until it is stopped by SIGTERM, SIGINT or,
  without --stay, by QEMU's exit, and keeps the vTPM's state in the directory, in swtpm's format. A
  directory that swtpm made is taken over as it is; swtpm takes over one that vtpmd has stopped
  with. Where QEMU was given the state, as for a migration, and its guest did not run on here, the
  directory keeps its journal, and swtpm refuses it: see vtpmd fold. So does that of a vTPM which
  went to another host in a session: nobody here is to take it.

exit status:
  0  stopped by a signal, or without --stay by QEMU when it ended
  1  the vTPM could not be started, or its engine died
  2  the command line was wrong
  3  the state directory is in use by another vtpmd or swtpm, or by an engine whose vtpmd has died
  4  the state is encrypted and --key is missing or wrong, or it is not encrypted and --key is given
  5  the state is damaged: nothing was changed, see vtpmd recover
  6  the state has fallen behind the anchor: it was put back to an older one
  7  stopped, but swtpm cannot take the directory yet: its journal is still needed, see vtpmd fold
  8  this host's libtpms is too old for the state, which is as it was
  9  stopped, and the state directory, or what is in it, was removed meanwhile
"""


def _tpm_version(value: str) -> TpmVersion:
    from vtpmd.store.directory import TpmVersion

    found = next((each for each in TpmVersion if each.facts.word == value), None)
    if found is None:
        raise refusal(f"{value!r} is no version of a TPM: use 1.2 or 2.0")
    return found


def _socket_mode(value: str) -> int:
    if len(value) > MODE_DIGITS_MAX or not value or not set(value) <= set("01234567"):
        raise refusal(f"{value!r} is no mode of a socket: use octal digits, such as 0660")
    mode = int(value, 8)
    if mode > MODE_MAX:
        raise refusal(f"{value!r} is no mode of a socket: use at most 0777")
    return mode


class _Owner(NamedTuple):
    """Whose a file is to be; -1 where it stays as it is."""

    uid: int
    gid: int


def _socket_owner(value: str) -> _Owner:
    import grp
    import pwd

    user, colon, group = value.partition(":")
    try:
        uid = int(user) if user.isascii() and user.isdigit() else pwd.getpwnam(user).pw_uid
        gid = -1
        if colon:
            gid = int(group) if group.isascii() and group.isdigit() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise refusal(
            f"{value!r}: there is no such user, or group; use USER or USER:GROUP"
        ) from None
    return _Owner(uid, gid)


ARGUMENTS: Arguments = {
    "directory": {"metavar": "DIR", "type": plain_path, "help": "state directory; made if new"},
    **KEY_ARGUMENT,
    "--anchor": {
        "metavar": "PATH",
        "type": pathlib_path,
        "help": "keep on another disk how far the state has come, and do not start from less",
    },
    "--tpm": {
        "metavar": "VERSION",
        "type": _tpm_version,
        "help": "which TPM to make in a directory that holds none: 1.2 or 2.0 (default: 2.0)",
    },
    "--socket": {
        "metavar": "PATH",
        "type": plain_path,
        "help": "control socket that QEMU connects to (default: DIR/vtpmd.sock)",
    },
    "--socket-mode": {
        "metavar": "MODE",
        "type": _socket_mode,
        "default": "0600",
        "help": "the control socket's mode, in octal digits (default: 0600)",
    },
    "--socket-owner": {
        "metavar": "USER[:GROUP]",
        "type": _socket_owner,
        "help": "whose the control socket is, as of a QEMU of another user, who needs the right "
        "to enter its directory, too: see --socket",
    },
    "--stay": {
        "action": "store_true",
        "help": "do not end with QEMU, but wait for the next one",
    },
    **DAEMON_ARGUMENTS,
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "run",
        help="serve one vTPM from a state directory",
        description="Serve one vTPM from a state directory, in the foreground.",
        epilog=EPILOG,
    )
    add_arguments(parser, ARGUMENTS)
    parser.set_defaults(command=run)


def run(options: Options) -> int:
    """Serve the vTPM until it is stopped; return the exit status. Raises VtpmdError.

    It does not return where nothing but the engine is needed: then this process becomes that.
    """
    gc.disable()  # a start keeps nearly all that it makes: to look for garbage is a 20th of it
    try:
        return _start(options)
    finally:
        gc.enable()


def _start(options: Options) -> int:
    from contextlib import ExitStack
    from functools import partial

    from vtpmd.core import LinkDescriptor, forbid_core_dumps
    from vtpmd.daemon import engine_process, listener, signals
    from vtpmd.front.file_limit import no_daemon, open_store
    from vtpmd.store.directory import LINK_NAME, StateDirectory
    from vtpmd.store.moving import MovingFiles
    from vtpmd.store.start import anchor_of, start

    config = config_of(options)
    read_key = _key_reader(options.key)
    forbid_core_dumps()
    check_credentials(config)
    path: str = options.socket or os.path.join(options.directory, "vtpmd.sock")
    shown_path = listener.path_for_qemu(path)
    with ExitStack() as stack:
        directory = stack.enter_context(StateDirectory.open(options.directory, version=options.tpm))
        directory.write_in_place()
        store = open_store(stack)
        key = stack.enter_context(read_key())
        files = MovingFiles(directory, key)
        stack.callback(files.close)
        anchor = stack.enter_context(anchor_of(options.anchor, directory, files, key))
        begun = store.limited(start(directory, files, key, anchor))
        # From the socket on there is something to put in order.
        signals.hold()
        control = stack.enter_context(listener.listen_bare(path, mode=options.socket_mode))
        _give_socket(path, options.socket_owner)
        link = stack.enter_context(listener.listen_in(directory.directory_fd, LINK_NAME))
        descriptors = _descriptors(directory, store, link) | {
            LinkDescriptor.CONTROL: control.fileno(),
            LinkDescriptor.CONTROL_DIRECTORY: _open_parent(path),
        }
        is_alone = _is_alone(config, begun, files)
        if not is_alone and not store.is_shared:
            raise no_daemon()
        serving = _serving(config, path, is_alone=is_alone, stays=options.stay)
        descriptors |= _boot(stack, begun, key, anchor, serving)
        management, peers = listen_for(stack, config)
        announce = partial(_announce, shown_path, config, begun)
        if is_alone:
            engine_process.become(descriptors, announce)
        child = _spawn(stack, directory, descriptors, announce)
        for each in (control, link):
            each.close()  # one that has died is not connected to
        return _serve_beside(directory, key, (peers, management), child, config)


def _descriptors(
    directory: StateDirectory, store: StoreFd, link: BareSocket
) -> dict[LinkDescriptor, int]:
    from vtpmd.core import LinkDescriptor

    return {
        LinkDescriptor.SOCKET: link.fileno(),
        LinkDescriptor.DIRECTORY: directory.directory_fd,
        LinkDescriptor.LOCK: directory.lock_fd,
        LinkDescriptor.STORE: store.fd,
    }


def _serve_beside(
    directory: StateDirectory,
    key: Key | None,
    listening: tuple[socket.socket | None, socket.socket | None],
    child: int,
    config: RunConfig,
) -> int:
    gc.enable()
    # Imported while the engine starts: asyncio is most of this program's start-up time.
    from vtpmd.daemon import runtime

    place = directory.directory_fd, directory.path
    return runtime.serve(runtime.Resources(*place, key, *listening, child), config)


def _spawn(
    stack: ExitStack,
    directory: StateDirectory,
    descriptors: dict[LinkDescriptor, int],
    announce: Callable[[], None],
) -> int:
    """Start the engine, which this process looks after; return its process number."""
    from vtpmd.daemon import engine_process
    from vtpmd.store.daemon_lock import look_after

    stack.enter_context(look_after(directory.directory_fd, directory.path))
    return engine_process.spawn(descriptors, announce)


def _key_reader(option: str | None) -> Callable[[], AbstractContextManager[Key | None]]:
    """Return what reads the key, if there is one. Raises UsageError, and has read nothing then."""
    from contextlib import nullcontext
    from functools import partial

    if option is None:
        return nullcontext
    from vtpmd.store.keys import parse_key_source, read_key

    return partial(read_key, parse_key_source(option))


def _boot(
    stack: ExitStack, begun: Start, key: Key | None, anchor: Anchor | None, serving: bytes
) -> dict[LinkDescriptor, int]:
    """Return the descriptors of the boot record, and of the anchor if there is one."""
    from vtpmd.core import LinkDescriptor
    from vtpmd.front.boot import boot_record

    boot_fd = stack.enter_context(boot_record(begun, key, anchor, serving))
    descriptors = {LinkDescriptor.BOOT: boot_fd}
    if anchor is not None:
        descriptors[LinkDescriptor.ANCHOR] = anchor.fd
    return descriptors


def _open_parent(path: str) -> int:
    return os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_alone(config: RunConfig, begun: Start, files: MovingFiles) -> bool:
    """Return whether the engine has nobody to ask: the vTPM is this host's, and does not move."""
    if config.listen is not None or config.qmp is not None or config.manage is not None:
        return False
    return not begun.fenced and not files.is_without_a_state()


def _serving(config: RunConfig, path: str, *, is_alone: bool, stays: bool) -> bytes:
    from vtpmd.core import LinkNames, pack_link_serving
    from vtpmd.store.directory import LINK_NAME

    program = "vtpmd" if config.name is None else f"vtpmd[{config.name}]"
    is_verbose = config.log_level == "debug"
    names = LinkNames(socket=os.path.basename(path), link=LINK_NAME)
    return pack_link_serving(program, names, is_verbose=is_verbose, is_alone=is_alone, stays=stays)


def _give_socket(path: str, owner: _Owner | None) -> None:
    if owner is None:
        return
    try:
        os.chown(path, *owner, follow_symlinks=False)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is no such number"
        raise VtpmdError(
            f"cannot give {path} to another user: {reason}; leave out --socket-owner, or be root"
        ) from error


def listen_for(stack: ExitStack, config: RunConfig) -> tuple[socket.socket | None, ...]:
    """Return the management socket and the one for peers, as far as they are asked for."""
    from vtpmd.daemon import listener

    management = peers = None
    if config.manage is not None:
        management = stack.enter_context(listener.listen(config.manage, "--manage"))
    if config.listen is not None:
        peers = stack.enter_context(listener.listen_for_peers(*config.listen))
    return management, peers


def check_credentials(config: RunConfig) -> None:
    """Find out whether peers can be spoken with, before a guest runs. Raises VtpmdError.

    Who listens must. Who may move its vTPM later is told, and its guest starts: the files are read
    again then, and without them whole blobs are moved.
    """
    if config.tls_creds is None:
        return
    from pathlib import Path

    from vtpmd.daemon import tls

    directory = Path(config.tls_creds)
    if config.listen is not None:
        tls.server_context(directory)
        return
    try:
        tls.client_context(directory)
    except tls.CredentialsError as error:
        print(f"vtpmd: no peer can be spoken with yet: {error}", file=sys.stderr)


def _announce(socket: str, config: RunConfig, begun: Start) -> None:
    """Tell people what there is now: nothing is left that they could have to mend."""
    print(qemu_arguments(socket, name=config.name, uuid=config.uuid), flush=True)
    if not os.path.isabs(socket):
        print(
            f"vtpmd: the socket's path is relative, as with {os.getcwd()} it would be too long: "
            "start QEMU there",
            file=sys.stderr,
        )
    if begun.took_up:
        print("vtpmd: took up the state that had been granted to this host", file=sys.stderr)
    if begun.changes:
        from vtpmd.counted import counted

        changes = counted(begun.changes, "change")
        print(f"vtpmd: took up {changes} from the journal", file=sys.stderr)
    if not begun.keeps_journal:
        from vtpmd.front.file_limit import NO_JOURNAL

        print(f"vtpmd: {NO_JOURNAL}", file=sys.stderr)


def config_of(options: Options) -> RunConfig:
    """Return the options, checked against each other. Raises UsageError or VtpmdError."""
    if options.listen is not None and (options.tls_creds is None or not options.allow):
        raise UsageError("--listen needs --tls-creds, and a peer to wait for: --allow")
    return RunConfig(
        name=options.name,
        uuid=options.uuid,
        log_level=options.log,
        listen=None if options.listen is None else parse_address(options.listen),
        tls_creds=options.tls_creds,
        allowed=tuple(options.allow),
        qmp=options.qmp,
        manage=options.manage,
    )


def qemu_arguments(socket: str, *, name: str | None, uuid: str | None) -> str:
    """Return the arguments that make QEMU use the vTPM, as a shell would take them."""
    # In QEMU's option values a comma is written twice.
    value = socket.replace(",", ",,")
    words = ["-chardev", f"socket,id=vtpm,path={value}"]
    words += ["-tpmdev", "emulator,id=tpm0,chardev=vtpm"]
    # Not tpm-crb: in QEMU 7.2 that loses the response of a command in flight at switchover.
    words += ["-device", "tpm-tis,tpmdev=tpm0"]
    if name is not None:
        words += ["-name", f"guest={name}"]
    if uuid is not None:
        words += ["-uuid", uuid]
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    if word and is_made_of(word, SHELL_MARKS):
        return word
    return "'" + word.replace("'", "'\"'\"'") + "'"
