"""TPM emulators as processes: vtpmd and, to compare and to move to and from, swtpm."""

import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.harness.credentials import HOST
from tests.harness.program import Program

KILL_TIMEOUT_S = 20.0
_LISTENING = "waiting for vTPMs on "
_PORT = re.compile(rf"{_LISTENING}\S+ port (\d+)")


class EmulatorKind(StrEnum):
    """The programs that can serve a TPM to QEMU."""

    VTPMD = "vtpmd"
    SWTPM = "swtpm"


@dataclass(frozen=True, kw_only=True)
class Peering:
    """What a vtpmd is told about its peers; it then has a management socket, too."""

    credentials: Path
    allow: tuple[str, ...] = (HOST,)
    listens: bool = True
    listens_at: str = "127.0.0.1"  # which others find by the name in its certificate
    name: str = HOST
    port: int = 0  # 0: one that is free
    follows_qemu: bool = False
    uuid: str | None = None
    log_level: str = "debug"


def _arguments(
    kind: EmulatorKind, state: Path, directory: Path, peering: Peering | None
) -> list[str | Path]:
    control_path = directory / "tpm"
    if kind is EmulatorKind.SWTPM:
        control = f"type=unixio,path={control_path}"
        return ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", control]
    vtpmd = Path(sys.executable).with_name("vtpmd")
    arguments: list[str | Path] = [vtpmd, "run", state, "--socket", control_path]
    if peering is None:
        return [*arguments, "--log", "level=debug"]
    arguments += ["--log", f"level={peering.log_level}", "--manage", directory / "manage"]
    arguments += ["--tls-creds", peering.credentials]
    arguments += [word for name in peering.allow for word in ("--allow", name)]
    if peering.listens:
        arguments += ["--listen", f"{peering.listens_at}:{peering.port}"]
    if peering.follows_qemu:
        arguments += ["--qmp", directory / "qmp"]
    if peering.uuid is not None:
        arguments += ["--uuid", peering.uuid]
    return arguments


class Emulator:
    """An emulator that serves one state directory, and accepts control connections."""

    def __init__(
        self,
        kind: EmulatorKind,
        directory: Path,
        state: Path | None = None,
        peering: Peering | None = None,
        options: Sequence[str] = (),
        network: Path | None = None,
    ) -> None:
        """Start an emulator and wait until it accepts control connections.

        `directory` is the emulator's own, short as socket paths must be; `state` is the state
        directory, by default a new one in there; `options` are put at the end of the command line.
        `network` is the network namespace that it has.
        RuntimeError when the emulator ends instead.
        """
        self.kind = kind
        self.state = state or directory / "state"
        self.control_path = directory / "tpm"
        self.manage_path = directory / "manage"
        # Where QEMU has to have a monitor for it, if it is to follow QEMU.
        self.qmp_path = directory / "qmp" if peering and peering.follows_qemu else None
        directory.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        arguments = [*_arguments(kind, self.state, directory, peering), *options]
        self._name = HOST if peering is None else peering.name
        self.program = Program(kind.value, arguments, directory, network)
        self.program.connect(self.control_path).close()

    @property
    def port(self) -> int:
        """The TCP port on which it waits for vTPMs; TimeoutError when it does not."""
        self.program.wait_for_output(_LISTENING)
        found = _PORT.search(self.program.output)
        assert found is not None
        return int(found[1])

    @property
    def address(self) -> str:
        """Where a peer finds it, for migrate-arm."""
        return f"{self._name}:{self.port}"

    def stop(self) -> int:
        """Stop cleanly; return the exit code."""
        return self.program.stop()

    def engines(self) -> list[int]:
        """Return the process numbers of vtpmd's engines; swtpm has none."""
        if self.program.exit_code is not None:
            return []
        is_alone = self.program.name_of_process == "vtpmd-engine"
        return [self.program.pid] if is_alone else self.program.children()

    def kill(self) -> None:
        """Kill the emulator and its engines, as a host's failure does; all are gone then."""
        descriptors = [os.pidfd_open(engine) for engine in self.engines()]
        # The engines first: one that sees the other gone would end in order, and fold.
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        self.program.kill()
        for descriptor in descriptors:
            ended, _, _ = select.select([descriptor], [], [], KILL_TIMEOUT_S)
            os.close(descriptor)
            assert ended, "an engine does not die of SIGKILL"
