"""The program that stands in swtpm's place, beside swtpm: the same command lines, the same outcome.

Expected values are swtpm's: what is here runs with Debian's first, where that knows the option.
"""

import json
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tests.harness.swtpm_program import OURS, PROGRAMS, TIMEOUT_S, Place
from tests.support.emulator_client import ControlClient, ControlError, receive_exactly
from tests.support.tpm2 import Tpm
from vtpmd.testing.waiting import wait_until

GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0008")


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def assert_is_a_line(errors: str) -> None:
    assert errors.startswith("swtpm: ")
    assert errors.count("\n") == 1


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


def test_process_that_was_started_serves_and_ends_with_its_files(place: Place) -> None:
    process = place.start()
    assert int(place.pid_file.read_text()) == process.pid
    assert place.pid_file.stat().st_mode & 0o777 == 0o644
    assert place.control.stat().st_mode & 0o777 == 0o770
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    assert not place.pid_file.exists()
    assert not place.control.exists()
    assert (place.state / "tpm2-00.permall").stat().st_mode & 0o777 == 0o640


def test_sigterm_ends_it_with_0(place: Place) -> None:
    process = place.start()
    with ControlClient(place.control) as control:
        control.init()
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 0
    assert not place.control.exists()


def test_files_have_the_modes_that_were_asked_for(place: Place) -> None:
    process = place.start(
        *("--ctrl", f"type=unixio,path={place.control},mode=0600"),
        *("--tpmstate", f"dir={place.state},mode=0660"),
    )
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    assert process.wait(TIMEOUT_S) == 0
    assert (place.state / "tpm2-00.permall").stat().st_mode & 0o777 == 0o660


def test_terminate_ends_it_with_the_data_connection(place: Place) -> None:
    process = place.start("--terminate")
    with ControlClient(place.control) as control:
        with closing(control.attach_data()) as data:
            control.init()
            Tpm(data.transact).startup()
        assert process.wait(TIMEOUT_S) == 0


def test_without_terminate_it_outlives_its_connections(place: Place) -> None:
    process = place.start()
    for _ in range(2):
        with ControlClient(place.control) as control, closing(control.attach_data()) as data:
            control.init()
            Tpm(data.transact).startup()
    time.sleep(0.2)
    assert process.poll() is None


def test_daemon_returns_once_it_serves(place: Place) -> None:
    done = subprocess.run(
        place.options("--daemon"), check=False, capture_output=True, timeout=TIMEOUT_S
    )
    assert (done.returncode, done.stdout) == (0, b"")
    pid = int(place.pid_file.read_text())
    assert is_running(pid)
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    wait_until(lambda: not is_running(pid))
    assert not place.pid_file.exists()


def test_daemon_goes_on_with_relative_paths(ours: Place) -> None:
    command = ours.options("--daemon", "--tpmstate", "dir=state", "--ctrl", "type=unixio,path=c")
    subprocess.run(command, cwd=ours.directory, check=True, timeout=TIMEOUT_S)
    with ControlClient(ours.directory / "c") as control:
        control.init()
        control.shutdown()
    wait_until(lambda: not (ours.directory / "c").exists())
    assert (ours.state / "tpm2-00.permall").exists()


def test_daemon_that_cannot_start_says_so_and_fails(ours: Place) -> None:
    command = ours.options("--daemon", "--tpmstate", "dir=nowhere")
    done = subprocess.run(
        command, cwd=ours.directory, check=False, capture_output=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


def test_log_goes_to_its_file(place: Place) -> None:
    log = place.directory / "log"
    process = place.start("--log", f"file={log},level=20,prefix=[id=7] ")
    with ControlClient(place.control) as control:
        control.init()
        control.shutdown()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    lines = log.read_text().splitlines()
    assert lines and all(line.startswith("[id=7] ") for line in lines)


def test_data_over_tcp_with_and_without_the_simulators_prefix(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place.start("--server", f"type=tcp,port={port}", "--flags", "not-need-init,startup-clear")
    for _ in range(2):  # one client after another
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as client:
            client.sendall(GET_RANDOM)
            assert receive_exactly(client, 20)[:12] == bytes.fromhex("8001 00000014 00000000 0008")
            client.sendall(b"\0\0\0\x08\0" + len(GET_RANDOM).to_bytes(4, "big") + GET_RANDOM)
            answer = receive_exactly(client, 28)
            assert answer[:4] == b"\0\0\0\x14" and answer[-4:] == bytes(4)
            assert answer[4:16] == bytes.fromhex("8001 00000014 00000000 0008")


def ports_of(pid: int) -> set[int]:
    """Return the TCP ports that a process listens on. Linux, proc(5): /proc/net/tcp."""
    theirs = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed: the program starts still
            theirs.add(str(each.readlink()))
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {int(row[1].split(":")[1], 16) for row in rows if f"socket:[{row[9]}]" in theirs}


@pytest.mark.parametrize(
    "options",
    [
        ["--server", "type=tcp,port=0"],
        ["--server", "port=0,disconnect"],
        ["--port", "0"],
        ["--ctrl", "type=tcp,port=0"],
        ["--ctrl", "type=tcp,port=0", "--server", "type=tcp,port=0"],
    ],
    ids=" ".join,
)
def test_port_0_leaves_the_choice_to_the_system(place: Place, options: list[str]) -> None:
    """Ours alone says which it is, as else nobody could know."""
    process = place.start(*options, "--flags", "not-need-init,startup-clear")
    ports = ports_of(process.pid)
    assert len(ports) == sum("port=" in option or option == "--port" for option in options)
    for port in ports:
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    if place.program == OURS:
        told = re.findall(r"^swtpm: --(?:ctrl|server) listens on 127.0.0.1:(\d+)$", errors, re.M)
        assert {int(port) for port in told} == ports


def test_port_of_the_data_channel_may_be_that_of_the_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the command line has none."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [each.getsockname()[1] for each in free]
    monkeypatch.setenv("TPM_PORT", str(ports[0]))
    begun = place.start("--server", "type=tcp", "--flags", "not-need-init,startup-clear")
    assert ports_of(begun.pid) == {ports[0]}
    begun.terminate()
    begun.communicate(timeout=TIMEOUT_S)
    begun = place.start("--server", f"port={ports[1]}", "--flags", "not-need-init,startup-clear")
    assert ports_of(begun.pid) == {ports[1]}


@pytest.mark.parametrize(
    "wrong", ["abc", "65536", "-1", "1" * 1000, "\N{ARABIC-INDIC DIGIT ONE}", "80 "]
)
def test_port_of_the_environment_that_is_none(
    ours: Place, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPM_PORT", wrong)
    refused = run(ours.options("--server", "type=tcp"), ours.directory)
    assert refused.returncode == 1
    assert_is_a_line(refused.stderr)
    assert "port" in refused.stderr


def test_no_guest_chooses_its_locality_by_the_simulators_prefix(ours: Place) -> None:
    """What QEMU's socket brings is the guest's: a prefix is no command there."""
    ours.start()
    with ControlClient(ours.control) as control, closing(control.attach_data()) as data:
        control.init()
        Tpm(data.transact).startup()
        prefixed = b"\0\0\0\x08\x04" + len(GET_RANDOM).to_bytes(4, "big") + GET_RANDOM
        assert data.transact(prefixed) == bytes.fromhex("8001 0000000a 00000142")  # COMMAND_SIZE
        assert data.transact(GET_RANDOM)[:10] == bytes.fromhex("8001 00000014 00000000")


def test_data_server_that_disconnects_serves_one_command_a_connection(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place.start("--server", f"port={port},disconnect", "--flags", "startup-clear")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as client:
            client.sendall(GET_RANDOM)
            assert len(receive_exactly(client, 20)) == 20
            assert client.recv(1) == b""


def test_sockets_that_were_handed_in_are_served(place: Place) -> None:
    """As swtpm_setup does it: both connected already."""
    ours, theirs = socket.socketpair()
    data, theirs_data = socket.socketpair()
    with ours, theirs, data, theirs_data:
        place.start(
            *("--ctrl", f"type=unixio,clientfd={theirs.fileno()}"),
            *("--server", f"type=tcp,fd={theirs_data.fileno()}"),
            *("--flags", "not-need-init,startup-clear"),
            fds=(theirs.fileno(), theirs_data.fileno()),
        )
        data.settimeout(TIMEOUT_S)
        data.sendall(GET_RANDOM)
        assert len(receive_exactly(data, 20)) == 20
        ours.settimeout(TIMEOUT_S)
        ours.sendall(bytes.fromhex("00000001"))
        assert len(receive_exactly(ours, 8)) == 8


def test_control_socket_that_was_handed_in_listens(place: Place) -> None:
    """As a service manager hands it in."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place.control))
        listening.listen()
        process = place.start(
            "--ctrl", f"type=unixio,fd={listening.fileno()}", fds=(listening.fileno(),)
        )
        with ControlClient(place.control) as control:
            control.init()
            control.shutdown()
        assert process.wait(TIMEOUT_S) == 0


def test_locality_4_is_refused_where_that_is_asked_for(place: Place) -> None:
    place.start("--locality", "reject-locality-4")
    with ControlClient(place.control) as control:
        control.init()
        control.set_locality(3)
        with pytest.raises(ControlError, match="0x3d"):
            control.set_locality(4)


def test_second_one_on_a_directory_is_refused_at_once(ours: Place) -> None:
    ours.start()
    done = run(ours.options("--ctrl", "type=unixio,path=other"), ours.directory)
    assert done.returncode == 1
    assert_is_a_line(done.stderr)


@pytest.mark.parametrize(
    "options",
    [
        ["--bogus"],
        ["stray"],
        ["--ctrl"],
        ["--ctrl", "type=bogus,path=x"],
        ["--ctrl", "type=unixio"],
        ["--ctrl", "type=unixio,path="],
        ["--ctrl", "type=unixio,clientfd=77"],
        ["--ctrl", "type=unixio,path=x,uid=99999999999"],
        ["--ctrl", "type=unixio,path=x,gid=4294967296"],
        ["--ctrl", "type=tcp"],
        ["--ctrl", "type=tcp,port=23999,bindaddr="],
        ["--ctrl", "type=tcp,port=23999,bindaddr=localhost"],
        ["--pid", "level=1"],
        ["--pid", "file="],
        ["--pid", "file=/nowhere/pid"],
        ["--key", "mode=aes-cbc"],
        ["--key", "file=/nowhere/key"],
        ["--flags", "bogus"],
        ["--locality", "bogus"],
        ["--runas", "nobody-of-that-name"],
        ["--server", "type=bogus"],
        ["--server", "type=unixio"],
        ["--seccomp", "action=bogus"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_served_is_refused_with_1(place: Place, options: list[str]) -> None:
    done = run(place.options(*options), place.directory)
    assert done.returncode == 1
    assert done.stderr
    if place.program == OURS:
        assert_is_a_line(done.stderr)


@pytest.mark.parametrize(
    "options",
    [
        ["--log", "file=/nowhere/log"],
        ["--log", "fd=99"],
        ["--log", "fd=-1"],
        ["--log", f"prefix={'x' * 75}"],
        ["--tpmstate", "dir=nowhere"],
        ["--tpmstate", "backend-uri=bogus://x"],
        ["--profile", "name=bogus"],
        ["--profile", "file=/nowhere/profile"],
        ["--profile", "remove-disabled=check"],
        ["--migration-key", "file=/nowhere/key"],
    ],
    ids=" ".join,
)
def test_what_ours_alone_refuses_is_said_in_a_line(ours: Place, options: list[str]) -> None:
    done = run(ours.options(*options), ours.directory)
    assert done.returncode == 1
    assert_is_a_line(done.stderr)


def test_states_are_printed_as_swtpm_prints_them(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"hello\n")
    printed = []
    for program in PROGRAMS.values():
        for more in (["--tpm2"], []):
            command = [str(program), "socket", "--print-states", *more]
            command += ["--tpmstate", f"dir={tmp_path}"]
            done = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
            printed.append(done.stdout)
    assert printed[:2] == printed[2:]
    assert json.loads(printed[0])["states"] == [{"name": "permall", "size": 6}]


def test_capabilities_are_among_swtpms_and_in_its_order() -> None:
    ours, theirs = (
        json.loads(
            subprocess.run(
                [program, "socket", "--tpm2", "--print-capabilities"],
                check=True,
                capture_output=True,
                timeout=TIMEOUT_S,
            ).stdout
        )
        for program in (OURS, PROGRAMS["swtpm"])
    )
    assert ours["type"] == theirs["type"] == "swtpm"
    common = [feature for feature in theirs["features"] if feature in ours["features"]]
    assert [feature for feature in ours["features"] if feature in theirs["features"]] == common
    assert {"tpm-2.0", "rsa-keysize-2048", "cmdarg-pwd-fd"} <= set(ours["features"])
    # From 0.10 on, as libtpms.
    assert ours.get("profiles") == theirs.get("profiles")
    assert ("profiles" in ours) == ("cmdarg-profile" in ours["features"])


def test_info_is_offered_where_it_has_what_libvirt_looks_for(tmp_path: Path) -> None:
    """From libvirt 11 on no guest starts where that is offered, and says no profile."""
    printed = [
        run([str(OURS), "socket", "--tpm2", *options], tmp_path).stdout
        for options in (["--print-capabilities"], ["--print-info", "0x40"])
    ]
    features, info = json.loads(printed[0])["features"], json.loads(printed[1])
    assert ("cmdarg-print-info" in features) == ("AvailableProfiles" in info)
