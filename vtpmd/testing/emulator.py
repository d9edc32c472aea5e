"""TPM emulators as processes: vtpmd and, to compare and to move to and from, swtpm."""

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vtpmd.testing.credentials import HOST
from vtpmd.testing.program import POLL_S, START_TIMEOUT_S, Program
from vtpmd.wire.tpm import TpmVersion

VTPMD = Path(sys.executable).with_name("vtpmd")
KILL_TIMEOUT_S = 20.0
ATTACHED = "is attached to its engine"
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
    kind: EmulatorKind,
    state: Path,
    directory: Path,
    peering: Peering | None,
    version: TpmVersion,
) -> list[str | Path]:
    control_path = directory / "tpm"
    if kind is EmulatorKind.SWTPM:
        control = f"type=unixio,path={control_path}"
        wanted = ["--tpm2"] if version is TpmVersion.TPM_2_0 else []
        return ["swtpm", "socket", *wanted, "--tpmstate", f"dir={state}", "--ctrl", control]
    arguments: list[str | Path] = [VTPMD, "run", state, "--socket", control_path]
    if version is not TpmVersion.TPM_2_0:
        arguments += ["--tpm", version.facts.word]
    return arguments + _daemon_arguments(directory, peering)


def _daemon_arguments(directory: Path, peering: Peering | None) -> list[str | Path]:
    """Return what `vtpmd attach` is told as well."""
    if peering is None:
        return ["--log", "level=debug"]
    arguments: list[str | Path] = ["--log", f"level={peering.log_level}"]
    arguments += ["--manage", directory / "manage"]
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
        version: TpmVersion = TpmVersion.TPM_2_0,
    ) -> None:
        """Start an emulator and wait until it accepts control connections.

        `directory` is the emulator's own, short as socket paths must be; `state` is the state
        directory, by default a new one in there; `options` are put at the end of the command line.
        `network` is the network namespace that it has, `version` that of a new TPM.
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
        arguments = [*_arguments(kind, self.state, directory, peering, version), *options]
        self._daemon_arguments = [*_daemon_arguments(directory, peering), *options]
        self._directory, self._network = directory, network
        self._before: list[Program] = []  # if there are any, the program is `vtpmd attach`
        self._name = HOST if peering is None else peering.name
        self.program = Program(kind.value, arguments, directory, network)
        self.program.connect(self.control_path).close()
        self._engine: int | None = None  # a descriptor of the process
        if kind is EmulatorKind.VTPMD:
            self._engine = os.pidfd_open(self._find_engine())

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

    def attach(self, *options: str) -> None:
        """Start a vtpmd for the engine, in place of any that was there; wait until it serves.

        With options that both programs have. RuntimeError when it ends instead.
        """
        n_before = self.program.output.count(ATTACHED)
        arguments = [VTPMD, "attach", self.state, *self._daemon_arguments, *options]
        self._before.append(self.program)
        self.program = Program("vtpmd", arguments, self._directory, self._network)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.program.output.count(ATTACHED) == n_before:
            self.program.raise_if_ended()
            assert time.monotonic() < deadline, self.program.output
            time.sleep(POLL_S)

    def stop(self) -> int:
        """Stop cleanly; return the exit code."""
        if not self._before:
            return self.program.stop()
        self.signal_engine(signal.SIGTERM)
        status = self.program.wait()
        for program in self._before:  # one of them may have become the engine
            program.wait()
        return status

    def engines(self) -> list[int]:
        """Return the process numbers of vtpmd's engines that live; swtpm has none."""
        if self._engine is None or has_ended(self._engine):
            return []
        return [self._engine_pid]

    def _find_engine(self) -> int:
        """Return the engine's process number, as soon as it has been started."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.program.raise_if_ended()
            found = self.program.children()
            if self.program.name_of_process == "vtpmd-engine":
                found = [self.program.pid]
            if found:
                (self._engine_pid,) = found
                return self._engine_pid
            time.sleep(POLL_S)
        raise TimeoutError(f"no engine was started: {self.program.output}")

    def signal_engine(self, number: signal.Signals) -> None:
        """Send the engine a signal, also one whose vtpmd is gone; unless it has ended."""
        if self._engine is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._engine, number)

    def wait_for_engine(self) -> None:
        """Wait until the engine has ended. TimeoutError when it does not."""
        if self._engine is not None and not has_ended(self._engine, KILL_TIMEOUT_S):
            raise TimeoutError("the engine does not end")

    def kill(self) -> None:
        """Kill the emulator and its engines, as a host's failure does; all are gone then."""
        # The engine first: what its vtpmd does because of that, a host's failure would not leave.
        self.signal_engine(signal.SIGKILL)
        for program in (self.program, *self._before):
            program.kill()
        self.wait_for_engine()
        if self._engine is not None:
            os.close(self._engine)
            self._engine = None


def has_ended(pidfd: int, timeout_s: float = 0) -> bool:
    """Return whether a process has ended, or ends in time."""
    ends = select.poll()
    ends.register(pidfd, select.POLLIN)
    return bool(ends.poll(timeout_s * 1000))
