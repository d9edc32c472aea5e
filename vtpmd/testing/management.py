"""A client of vtpmd's management socket, which speaks QMP."""

import contextlib
import time
from typing import Any

from vtpmd.testing.emulator import Emulator
from vtpmd.testing.monitor import Monitor

EVENT_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 30.0
POLL_S = 0.01


class Management:
    """One connection to the management socket; it gets every event from then on."""

    def __init__(self, emulator: Emulator) -> None:
        self._monitor = Monitor(emulator.program.connect(emulator.manage_path))
        self._monitor.settimeout(COMMAND_TIMEOUT_S)
        self._monitor.connect()
        self.events: list[dict[str, Any]] = []  # that wait_for() has taken

    def close(self) -> None:
        """End the connection; the vtpmd may have gone before."""
        with contextlib.suppress(EOFError, ConnectionError):
            self._monitor.close()

    def command(self, name: str, **arguments: object) -> Any:
        """Run a command and return its result; ExecuteError when vtpmd answers an error."""
        return self._monitor.cmd(name, **arguments)

    def migration(self) -> dict[str, Any]:
        """Return the answer to query-migration."""
        answer: dict[str, Any] = self.command("query-migration")
        return answer

    def vtpm(self) -> dict[str, Any]:
        """Return what query-vtpms says of the one that there is."""
        (answer,) = self.command("query-vtpms")
        return dict(answer)

    def arm(self, address: str) -> dict[str, Any]:
        """Begin a session; return the event that says that it is armed, or why it is not."""
        self.command("migrate-arm", to=address)
        return self.wait_for("VTPM_ARMED", "VTPM_FALL_BACK")

    def wait_for_acknowledgement(self) -> bool:
        """Wait until each round is acknowledged; return False when the session ends before."""
        deadline = time.monotonic() + EVENT_TIMEOUT_S
        while time.monotonic() < deadline:
            report = self.migration()
            if all(each["acknowledged-us"] is not None for each in report["rounds"]):
                return True
            if report["state"] == "ended":
                return False
            time.sleep(POLL_S)
        raise TimeoutError("a round is not acknowledged")

    def wait_for(self, *names: str) -> dict[str, Any]:
        """Return the next event of one of these names; TimeoutError when none comes."""
        deadline = time.monotonic() + EVENT_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            event = self._monitor.pull_event(wait=left_s)
            assert event is not None
            self.events.append(event)
            if event["event"] in names:
                return event
        raise TimeoutError(f"none of {names} came; {[e['event'] for e in self.events]} did")
