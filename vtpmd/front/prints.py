"""What swtpm's command line has printed, on standard output, instead of serving.

The layout is swtpm's to the blank: programs look into it with less than a parser of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess

from vtpmd.daemon.engine_process import EXECUTABLE
from vtpmd.errors import UsageError, VtpmdError
from vtpmd.front.swtpm import enter_root, version_of
from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store.directory import TpmVersion

if TYPE_CHECKING:
    from vtpmd.front.options import Given

# What works, after the versions. Sizes of RSA keys, of a TPM 2.0, follow.
FEATURES = (
    "tpm-send-command-header",
    "flags-opt-startup",
    "ctrl-opt-terminate",
    "cmdarg-seccomp",
    "cmdarg-key-fd",
    "cmdarg-pwd-fd",
    "cmdarg-print-states",
    "cmdarg-chroot",
    "cmdarg-migration",
    "nvram-backend-dir",
    "nvram-backend-file",
)
# libvirt asks for a TPM's profile where it finds this, and starts no guest without an answer.
PROFILE_FEATURES = ("cmdarg-print-info",)
LAST_FEATURES = (
    "tpmstate-opt-lock",
    "tpmstate-dir-backend-opt-backup",
    "tpmstate-dir-backend-opt-fsync",
)
INFO_FEATURES = 4  # TPMLIB_INFO_TPMFEATURES
INFO_AVAILABLE_PROFILES = 0x40  # TPMLIB_INFO_AVAILABLE_PROFILES, of libtpms 0.10
ENGINE_TIMEOUT_S = 10

HELP = """\
Usage: swtpm socket [options]

Serve one vTPM, by swtpm's command line. Options, each as swtpm has it:

  --tpm2                      a TPM 2.0; else it is a TPM 1.2
  --ctrl type=unixio,path=PATH[,mode=0770][,uid=USER][,gid=GROUP][,terminate]
  --ctrl type=unixio,fd=N|clientfd=N[,terminate]
  --ctrl type=tcp,port=N[,bindaddr=ADDRESS][,terminate]
                              the control channel
  --server [type=tcp,]port=N[,bindaddr=ADDRESS][,disconnect]
  --server type=unixio,path=PATH[,mode=0770][,uid=USER][,gid=GROUP][,disconnect]
  --server fd=N; -p, --port N; -f, --fd N
                              the data channel, beside what a control channel brings
  --tpmstate dir=PATH|backend-uri=dir://PATH|backend-uri=file://PATH[,mode=0640][,lock]
    [,backup][,fsync]         where the state is: in a directory, or in one file or block device,
                              locked and synced in any case; without it TPM_PATH says so. With
                              backup a directory has a copy of what the start found
  --key file=PATH|fd=N|pwdfile=PATH|pwdfd=N[,mode=aes-256-cbc][,format=hex][,kdf=pbkdf2][,remove]
                              what the state's files are encrypted with
  --migration-key …           what state blobs are encrypted with on their way; as --key
  --migration incoming,release-lock-outgoing
                              the state is on storage that hosts share: with incoming it is locked
                              when QEMU has brought it, and with release-lock-outgoing let go of
                              once QEMU was given it. It moves by QEMU's own migration alone
  --flags not-need-init,startup-clear|startup-state|startup-none|startup-deactivated
                              be powered on from the start, and started up
  --locality reject-locality-4
  --log file=PATH|fd=N[,level=N][,prefix=TEXT][,truncate]
  --pid file=PATH|fd=N        where to write the process number
  -t, --terminate             end with the connection of the data channel
  -d, --daemon                return once the sockets listen
  -r, --runas USER            run as another user, by name or number
  -R, --chroot DIR            have this as the root directory, below which all paths are; a user's
                              name is looked up before. No vtpmd can be attached then
  --seccomp action=kill       how system calls are kept to an allow-list
  --print-capabilities        say what this program can do
  --print-states              say which states there are
  --print-info FLAGS          say what libtpms says of itself
  -h, --help; -v, --version

example:
  swtpm socket --tpm2 --ctrl type=unixio,path=/run/web1.sock --tpmstate dir=/srv/web1 --terminate

exit status:
  0  ended by SHUTDOWN, a signal, or a connection's end with terminate
  1  it could not start; standard error says why
  7  ended, but the state's journal is still needed: `vtpmd fold` makes the state swtpm's own
  8  ended, and the state directory, or what is in it, was removed meanwhile
"""


def version() -> str:
    """Return what ``--version`` says."""
    return f"TPM emulator version {_version()}, vtpmd"


def _version() -> str:
    from importlib.metadata import version as version_of

    return version_of("vtpmd")


def run(given: Given) -> int:
    """Print what a command line asks for; return the exit status. Raises VtpmdError."""
    if "help" in given.flags:
        print(HELP, end="")
    elif "version" in given.flags:
        print(version())
    elif "print-capabilities" in given.flags:
        print(capabilities(version_of(given)))
    elif "print-states" in given.flags:
        enter_root(given)
        print(states(given), end="")
    elif "print-info" in given.words:
        if "chroot" in given.words:
            raise UsageError("--print-info prints what is said of this host's: leave out --chroot")
        print(_info(version_of(given), int(given.words["print-info"])))
    else:
        raise UsageError("--print-profiles is not served yet")
    return 0


def capabilities(version: TpmVersion) -> str:
    """Return what can be done, as one line of JSON. Raises VtpmdError."""
    sizes = []
    if version is TpmVersion.TPM_2_0:
        sizes = json.loads(_info(version, INFO_FEATURES))["TPMFeatures"]["RSAKeySizes"]
    versions = [f"tpm-{each.facts.word}" for each in TpmVersion if _has(each)]
    features = [*versions, *FEATURES, *(f"rsa-keysize-{size}" for size in sizes)]
    features += [*(PROFILE_FEATURES if _has_profiles() else ()), *LAST_FEATURES]
    listed = ", ".join(f'"{feature}"' for feature in features)
    return f'{{ "type": "swtpm", "features": [ {listed} ], "version": "{_version()}" }}'


def states(given: Given) -> str:
    """Return which states' files there are, as JSON. Raises VtpmdError or OSError."""
    from vtpmd.front.place import file_mode, named_place

    if "tpmstate" not in given.lists:
        raise UsageError("--print-states needs --tpmstate")
    values = given.lists["tpmstate"]
    path, is_linear = named_place(values)
    sizes = _linear_sizes(path, file_mode(values)) if is_linear else _directory_sizes(path, given)
    found = [f'{{"name": "{name}", "size": {size}}}' for name, size in sizes.items()]
    listed = f" {', '.join(found)} " if found else ""
    return f'{{ "type": "swtpm", "states": [{listed}] }}'


def _directory_sizes(path: str, given: Given) -> dict[str, int]:
    from vtpmd.store.directory import STATE_NAMES, look_into, names_of

    names = names_of(version_of(given))
    with look_into(path) as directory:
        return {
            name: os.stat(names.state(kind), dir_fd=directory.directory_fd).st_size
            for kind, name in STATE_NAMES.items()
            if directory.exists(names.state(kind))
        }


def _linear_sizes(path: str, mode: int | None) -> dict[str, int]:
    """Return what a linear file has; one that is not there is made, as by swtpm.

    swtpm_setup asks first, and then removes the file: it takes none for an error.
    """
    from vtpmd.store.directory import STATE_NAMES
    from vtpmd.store.linear import LinearFile

    try:
        with LinearFile.look_into(path) as file:
            found = file.extents()
            return {STATE_NAMES[kind]: extent.n_bytes for kind, extent in found.items()}
    except FileNotFoundError:
        LinearFile.open(path, mode).close()
        return {}


def _has(version: TpmVersion) -> bool:
    """Return whether the libtpms of this host has TPMs of this version."""
    try:
        _info(version, 0)
    except VtpmdError:
        return False
    return True


def _has_profiles() -> bool:
    """Return whether the libtpms of this host can say which profile a TPM has."""
    try:
        known = json.loads(_info(TpmVersion.TPM_2_0, INFO_AVAILABLE_PROFILES))
    except VtpmdError:
        return False
    return "AvailableProfiles" in known


def _info(version: TpmVersion, flags: int) -> str:
    """Return what libtpms says of itself. Raises VtpmdError."""
    command = [EXECUTABLE, "info", str(int(version)), str(flags)]
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise VtpmdError(f"cannot ask libtpms: {error}; install vtpmd again") from error
    return done.stdout.rstrip("\n")
