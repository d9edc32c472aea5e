"""The installed program named swtpm, and whether its AppArmor profile allows what it does.

Capabilities are enforced: it runs with those of the profile alone. What it does to files and
sockets is traced, and compared with the rules.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from tests.harness import traced
from tests.harness.apparmor import Access, Profile
from tests.harness.fresh_root import FreshRoot
from tests.harness.lab import Lab
from tests.harness.raw_guest import Blobs, RawGuest
from tests.harness.traced import Traced
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

PROFILE: Final = "/etc/apparmor.d/vtpmd-swtpm"
SWTPM: Final = "/usr/bin/swtpm"
UID: Final = 54321  # of nobody that is known
NO_BLOBS: Final = Blobs(b"", b"", b"")
PROBES: Final = (
    ("--help",),
    ("--version",),
    ("--print-capabilities", "--tpm2"),
    ("--print-states", "--tpm2"),
    ("--print-info", "0x20", "--tpm2"),
)


class Confined:
    """A place in which the program is started with a profile's capabilities, and traced."""

    def __init__(self, root: FreshRoot, lab: Lab, profile: Profile) -> None:
        self._root = root
        self._lab = lab
        self._profile = profile
        self._logs: list[Path] = []
        self.directory = lab.new_path("confined")
        self.state = self.directory / "state"
        self.control = self.directory / "ctrl"
        self.pid_file = self.directory / "pid"
        self.log = self.directory / "log"
        self.state.mkdir(parents=True)
        key = self.directory / "key"
        key.write_text("0123456789abcdef" * 4)
        for path in (self.directory, self.state, key):
            os.chown(path, UID, UID)  # and root has no right to them but by capabilities
        self.state.chmod(0o700)
        lab.directory.chmod(0o711)  # who is not root has to get there

    def start(self, *options: str | Path) -> Program:
        """Start it, with these options of `socket`."""
        self._logs.append(self._lab.new_path("trace"))
        wanted = ",".join(["-all", *(f"+{name}" for name in self._profile.capabilities)])
        words = ("setpriv", "--bounding-set", wanted, SWTPM, "socket", *options)
        command = traced.command(self._logs[-1], *words)
        program = Program("swtpm", self._root.command(*command), self.directory)
        self._lab.kill_at_end(program)
        return program

    def serve(self, *options: str | Path) -> Program:
        """Start what serves on the control socket; return once it does."""
        control = ("--ctrl", f"type=unixio,path={self.control}")
        pid = ("--pid", f"file={self.pid_file}", "--log", f"file={self.log}")
        program = self.start(*control, *pid, *options)
        wait_until(lambda: self.pid_file.exists() or program.exit_code is not None)
        assert program.exit_code is None, program.output
        return program

    def accesses(self) -> list[Traced]:
        """Return what each start has done."""
        return [Traced(self._root, log, SWTPM) for log in self._logs]


def _work(place: Confined, *options: str | Path) -> None:
    """Serve a guest, whose state is stored, given away, and brought back."""
    blobs = NO_BLOBS
    for brings in (False, True):
        program = place.serve(*options)
        with closing(RawGuest(place.control)) as guest:
            if brings:
                guest.load(blobs)
            else:
                guest.control.init()
                guest.tpm.startup()
            guest.control.store_volatile()
            blobs = guest.save()
            guest.resume()
            guest.control.shutdown()
        assert program.wait() == 0, program.output


def _in_directory(place: Confined) -> None:
    key = f"file={place.directory / 'key'},mode=aes-256-cbc"
    state = f"dir={place.state},mode=0600,backup"
    _work(place, "--tpm2", "--tpmstate", state, "--key", key, "--migration-key", key)
    assert "swapped out" not in place.log.read_text()


def _after_a_crash(place: Confined) -> None:
    options = ("--tpm2", "--tpmstate", f"dir={place.state}")
    program = place.serve(*options)
    with closing(RawGuest(place.control)) as guest:
        guest.boot()
        os.kill(int(place.pid_file.read_text()), signal.SIGKILL)
        program.wait()
    for path in (place.control, place.pid_file):
        path.unlink()
    assert (place.state / "tpm2-00.journal").exists()
    _work(place, *options)


def _on_shared_storage(place: Confined) -> None:
    migration = ("--migration", "release-lock-outgoing")
    _work(place, "--tpm2", "--tpmstate", f"dir={place.state}", *migration)


def _in_a_file(place: Confined) -> None:
    path = place.state / "file"
    path.touch()
    os.truncate(path, 4 << 20)
    _work(place, "--tpm2", "--tpmstate", f"backend-uri=file://{path}")


def _in_the_background_as_another_user(place: Confined) -> None:
    state = ("--tpm2", "--tpmstate", f"dir={place.state}", "--daemon", "--runas", str(UID))
    _work(place, *state)


def _below_another_root(place: Confined) -> None:
    options = ("--tpm2", "--chroot", place.directory, "--runas", str(UID))
    paths = ("--pid", "file=/pid", "--log", "file=/log", "--ctrl", "type=unixio,path=/ctrl")
    _work(place, *options, "--tpmstate", "dir=/state", *paths)


def _tpm_12_over_tcp(place: Confined) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    started = ("--flags", "not-need-init,startup-clear", "--terminate")
    pid = ("--pid", f"file={place.pid_file}")
    server = ("--server", f"type=tcp,port={port}")
    program = place.start("--tpmstate", f"dir={place.state}", *server, *started, *pid)
    wait_until(place.pid_file.exists)
    socket.create_connection(("127.0.0.1", port)).close()
    assert program.wait() == 0, program.output


def _probes(place: Confined) -> None:
    for options in PROBES:
        place.start(*options, "--tpmstate", f"dir={place.state}").wait()


SCENARIOS: Final[Sequence[Callable[[Confined], None]]] = (
    _in_directory,
    _after_a_crash,
    _on_shared_storage,
    _in_a_file,
    _in_the_background_as_another_user,
    _below_another_root,
    _tpm_12_over_tcp,
    _probes,
)

# What is missed where a line of the profile is.
RULES: Final = (
    "/usr/bin/{swtpm,vtpmd-swtpm} rix,",
    "/usr/bin/python3{,.[0-9]*} mrix,",
    "/usr/lib/vtpmd/vtpmd/vtpmd-engine mrix,",
    "/** rwkl,",
    "network unix stream,",
)
CAPABILITIES: Final = ("sys_chroot", "setuid", "setgid")


def check_profile(root: FreshRoot, lab: Lab) -> None:
    """Check that the profile allows all that is done, and that rules that are missing are seen."""
    profile = Profile(root, Path(PROFILE))
    seen: list[Traced] = []
    for scenario in SCENARIOS:
        place = Confined(root, lab, profile)
        scenario(place)
        seen += place.accesses()
    refused = _refused(profile, seen)
    assert not refused, refused
    text = root.path(PROFILE).read_text()
    for rule in RULES:
        assert _refused(_without(root, lab, text, rule), seen), rule
    for name in CAPABILITIES:
        place = Confined(root, lab, _without(root, lab, text, f"capability {name},"))
        state = ("--tpm2", "--tpmstate", "dir=/state", "--chroot", place.directory)
        program = place.start("--ctrl", "type=unixio,path=/ctrl", *state, "--runas", str(UID))
        assert program.wait() == 1, name


def _without(root: FreshRoot, lab: Lab, text: str, rule: str) -> Profile:
    """Return the profile without one of its rules."""
    assert text.count(f"  {rule}\n") == 1, rule
    path = lab.new_path("profile")
    path.write_text(text.replace(f"  {rule}\n", ""))
    return Profile(root, path)


def _refused(profile: Profile, seen: Sequence[Traced]) -> list[Access | tuple[str, str]]:
    refused: list[Access | tuple[str, str]] = []
    for each in seen:
        assert len(each.accesses) > 10  # or nothing was traced
        refused += profile.refused(each.accesses)
        refused += profile.refused_sockets(each.sockets)
    return sorted(set(refused), key=str)
