"""What swtpm's command line has printed, on standard output, instead of serving.

The layout is swtpm's to the blank: programs look into it with less than a parser of JSON.
"""

from __future__ import annotations

import json

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.front.swtpm import enter_root, version_of
from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store import libtpms
from vtpmd.store.directory import TpmVersion

if TYPE_CHECKING:
    from vtpmd.front.options import Given
    from vtpmd.store.keys import Key
    from vtpmd.store.libtpms import States

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
# Of a TPM 2.0, where libtpms has profiles.
PROFILE_FEATURES = ("cmdarg-profile", "cmdarg-print-profiles", "profile-opt-remove-disabled")
# Where it has them: libvirt asks for a TPM's profile where it finds this, and starts no guest
# without an answer.
INFO_FEATURES = ("cmdarg-print-info",)
LAST_FEATURES = (
    "tpmstate-opt-lock",
    "tpmstate-dir-backend-opt-backup",
    "tpmstate-dir-backend-opt-fsync",
)

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
                              the data channel, beside what a control channel brings. Without a
                              port TPM_PORT says it. Port 0 has the system choose one, which the
                              log says
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
                              once QEMU was given it. It moves by QEMU's own migration alone, and
                              no vtpmd can be attached
  --flags not-need-init,startup-clear|startup-state|startup-none|startup-deactivated
                              be powered on from the start, and started up
  --profile name=NAME|profile=JSON|file=PATH|fd=N[,remove-disabled=check|fips-host]
                              what a TPM 2.0 has that is made now, if libtpms has profiles: all
                              from 0.10 on. A custom one without what FIPS mode disables, where the
                              host is in that mode (check), or in any case
  --locality reject-locality-4
  --log file=PATH|fd=N[,level=N][,prefix=TEXT][,truncate]
  --pid file=PATH|fd=N        where to write the process number
  -t, --terminate             end with the connection of the data channel
  -d, --daemon                return once the sockets listen
  -r, --runas USER            run as another user, by name or number
  -R, --chroot DIR            have this as the root directory, below which all paths are; a user's
                              name is looked up before
  --seccomp action=kill       how system calls are kept to an allow-list
  --print-capabilities        say what this program can do
  --print-states              say which states there are
  --print-info FLAGS          say what libtpms says of itself, and of the TPM in --tpmstate
  --print-profiles            say which profiles libtpms has
  -h, --help; -v, --version

example:
  swtpm socket --tpm2 --ctrl type=unixio,path=/run/web1.sock --tpmstate dir=/srv/web1 --terminate

exit status:
  0  ended by SHUTDOWN, a signal, or a connection's end with terminate
  1  it could not start; standard error says why
  7  ended, but the state's journal is still needed: `vtpmd fold` makes the state swtpm's own
  9  ended, and the state directory, or what is in it, was removed meanwhile
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
        print(info(given))
    else:
        print(profiles(), end="")
    return 0


def capabilities(version: TpmVersion) -> str:
    """Return what can be done, as one line of JSON. Raises VtpmdError."""
    versions = [each for each in TpmVersion if _has(each)]
    has_profiles = TpmVersion.TPM_2_0 in versions and bool(libtpms.library().profiles)
    features = [*(f"tpm-{each.facts.word}" for each in versions), *FEATURES]
    is_tpm2 = version is TpmVersion.TPM_2_0
    if is_tpm2:
        known = json.loads(libtpms.ask(version, libtpms.INFO_FEATURES).info)
        features += [f"rsa-keysize-{size}" for size in known["TPMFeatures"]["RSAKeySizes"]]
        features += PROFILE_FEATURES if has_profiles else ()
    features += [*(INFO_FEATURES if has_profiles else ()), *LAST_FEATURES]
    listed = ", ".join(f'"{feature}"' for feature in features)
    profiles = f'"profiles": {{ {_profiles() if is_tpm2 else ""}}}, ' if has_profiles else ""
    return f'{{ "type": "swtpm", "features": [ {listed} ], {profiles}"version": "{_version()}" }}'


def _profiles() -> str:
    """Return what is said of profiles with what can be done, as swtpm 0.10 says it."""
    flags = libtpms.INFO_ALGORITHMS | libtpms.INFO_COMMANDS | libtpms.INFO_AVAILABLE_PROFILES
    known = json.loads(libtpms.ask(TpmVersion.TPM_2_0, flags).info)
    names = ", ".join(f'"{profile["Name"]}"' for profile in known["AvailableProfiles"])
    algorithms, commands = known["RuntimeAlgorithms"], known["RuntimeCommands"]
    return (
        f'"names": [ {names} ], "algorithms": {_implemented(algorithms)}, '
        f'"commands": {_implemented(commands)} '
    )


def _implemented(known: dict[str, str]) -> str:
    can, all_of_them = known["CanBeDisabled"], known["Implemented"]
    return f'{{ "canbedisabled": "{can}", "implemented": "{all_of_them}" }}'


def profiles() -> str:
    """Return the profiles of libtpms, as JSON without an end of line. Raises VtpmdError."""
    has = libtpms.library()
    if not has.profiles:
        raise UsageError(f"--print-profiles: here is {has}")
    return libtpms.ask(TpmVersion.TPM_2_0, libtpms.INFO_AVAILABLE_PROFILES).info


def info(given: Given) -> str:
    """Return what libtpms says of itself, and of the TPM in ``--tpmstate``. Raises VtpmdError.

    Where that has no TPM yet, none is made for it.
    """
    version, flags = version_of(given), int(given.words["print-info"])
    if "tpmstate" not in given.lists:
        return libtpms.ask(version, flags).info
    from contextlib import ExitStack

    from vtpmd.core import forbid_core_dumps
    from vtpmd.front.place import named_place
    from vtpmd.front.swtpm import read_key

    forbid_core_dumps()
    with ExitStack() as stack:
        key = read_key(stack, given, "key")
        path, is_linear = named_place(given.lists["tpmstate"])
        read = _linear_states if is_linear else _directory_states
        states = read(path, version, key)
        libtpms.check(path, version, states)
        return libtpms.ask(version, flags, states=states).info


def _directory_states(path: str, version: TpmVersion, key: Key | None) -> States:
    from vtpmd.store.directory import StateDirectory
    from vtpmd.store.recovery import recover

    with StateDirectory.open(path, make=False, version=version) as directory:
        return recover(directory, key).states_to_start_from()


def _linear_states(path: str, version: TpmVersion, key: Key | None) -> States:
    from vtpmd.store.linear import LinearFile

    try:
        with LinearFile.look_into(path) as file:
            return file.start(version, key).states
    except FileNotFoundError:
        return {}  # it is made at the start


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
            name: size
            for kind, name in STATE_NAMES.items()
            if (size := directory.size(names.state(kind))) is not None
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
        libtpms.ask(version)
    except VtpmdError:
        return False
    return True
