"""Every command that README.md and docs/ show is run as written, or a table says why not.

A scenario is for the sections that it names: it takes their commands by how they begin, in a place
that it has prepared, and must have taken all but those in the table.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.lab import Lab
from tests.harness.place import Place, Written
from tests.harness.raw_guest import RawGuest
from tests.support.commands import Command, commands
from tests.support.image_digest import whole_digest
from vtpmd.testing import guest_image, leftovers
from vtpmd.testing.monitor import Monitor
from vtpmd.testing.program import Program
from vtpmd.testing.waiting import wait_until

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What begins a block that is no command, nor looks like a drawing, a dump or Python.
OTHERS = {
    "-chardev socket,": "what vtpmd run prints",
    "/* sandbox: ": "C",
    "<domain ": "of libvirt",
    "KERNEL==": "a rule for udev",
}


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A file that runs a command as it is written."""

    file: str


TOO_LONG = "takes longer than all these tests together"
CONTINUOUS_INTEGRATION = Elsewhere(file=".ci/run")
PACKAGES = Elsewhere(file="tests/system/test_packages.py")
BY_TEST_SCRIPT = "scripts/test runs it, by the name that it has for the build, which takes minutes"

NOT_HERE: dict[str, Elsewhere | str] = {
    "scripts/demo": Elsewhere(file="tests/system/test_demo.py"),
    "scripts/setup": Elsewhere(file="scripts/test"),
    "scripts/test": CONTINUOUS_INTEGRATION,
    "scripts/test fast": "runs a part of what scripts/test does, which is what runs this",
    "scripts/test-on trixie": TOO_LONG,
    "scripts/bench": TOO_LONG,
    "scripts/build-packages": PACKAGES,
    "apt-get install ./build/packages/vtpmd_*.deb": PACKAGES,
    "apt-get install ./build/packages/vtpmd-swtpm_*.deb": PACKAGES,
    "update-alternatives --config swtpm": PACKAGES,
    "CC=clang meson setup build/sanitize -Db_sanitize=address,undefined -Db_lundef=false": (
        BY_TEST_SCRIPT
    ),
    "meson test -C build/sanitize --print-errorlogs": BY_TEST_SCRIPT,
    "CC=clang meson setup build/thread -Db_sanitize=thread -Db_lundef=false": BY_TEST_SCRIPT,
    "meson test -C build/thread --print-errorlogs": BY_TEST_SCRIPT,
    "build/thread/race_long_command 100000": "the one before it runs it, with a 20th of that",
    **{
        f"build/sanitize/fuzz_{name} -max_total_time=600 tests/fuzz/corpus/{name}": (
            "takes ten minutes; scripts/test runs it on the corpus alone"
        )
        for name in ("blob", "control", "data", "delta", "journal", "lane", "linear", "tail")
    },
    "scripts/testbed run --rate 50mbit --delay 20ms --jitter 2ms --loss 0.1%": (
        "test_testbed.py runs it over a link of 5 ms, and test_testbed_migration.py such a link"
    ),
    "scripts/testbed shell": Elsewhere(file="tests/system/test_testbed.py"),
    "scripts/testbed pingpong -n 50": "test_testbed_migration.py moves a guest as often",
    "VTPMD_SEED=123 .venv/bin/python -m pytest tests/system/test_durability.py -k 'engine-3'": (
        "scripts/test runs it, for another seed each time"
    ),
    ".venv/bin/python -m pytest -n 2 tests/sim": "scripts/test runs it, with all other tests",
    "VTPMD_SEED=123 .venv/bin/python -m pytest tests/sim": "scripts/test runs it, for each seed",
    ".venv/bin/python -m tests.sim 10000 50000": TOO_LONG,
}

HOSTS = ("host1.example.org", "host2.example.org")
STATE = "/srv/web1-tpm"
# What a reader has for "…": a guest as small as there is, whose firmware starts the TPM.
GUEST = "-accel tcg -m 32 -nodefaults -display none"
TPM = "-chardev socket,id=vtpm,path=/srv/web1-tpm/vtpmd.sock -tpmdev emulator,id=tpm0,chardev=vtpm"
SESSION = re.compile(r"[0-9a-f]{32}")  # its name is another each time
LISTENING = "waiting for vTPMs on "


class Stage:
    """What a scenario is played on: its commands, and the places that it makes."""

    def __init__(self, lab: Lab, network: Path, written: Written) -> None:
        self.lab = lab
        self.written = written
        self._network = network

    def place(self, values: dict[str, str] | None = None, *, is_alone: bool = True) -> Place:
        """Make a place that sees no other; or one that has this machine's network."""
        network = self._network if is_alone else None
        place = Place(self.written, self.lab.new_path("place"), network, values)
        self.lab.kill_at_end(place)
        return place

    def start(self, place: Place, beginning: str) -> Program:
        """Start a written command, which ends with the scenario."""
        program = place.start(beginning)
        self.lab.kill_at_end(program)
        return program

    def serve(self, place: Place, beginning: str) -> Program:
        """Start a written `vtpmd run` on STATE; return when it serves."""
        program = self.start(place, beginning)
        program.connect(place.root.path(f"{STATE}/vtpmd.sock")).close()
        return program

    def boot(self, place: Place, control: str = f"{STATE}/vtpmd.sock") -> None:
        """Use the TPM that is served there as a guest that boots does, and leaves."""
        guest = RawGuest(place.root.path(control))
        guest.boot()
        guest.close()


def all_commands() -> list[Command]:
    """Return what all documents have."""
    return [command for path in DOCUMENTS for command in commands(path, OTHERS)]


@pytest.fixture
def network() -> Iterator[Path]:
    """Give a network namespace with nothing but a loopback; what runs there ends with it."""
    name = leftovers.own_name("docs")
    leftovers.ip("netns", "add", name)
    try:
        leftovers.ip("-netns", name, "link", "set", "lo", "up")
        yield Path("/run/netns") / name
    finally:
        leftovers.remove_namespace(name)


def install(stage: Stage) -> None:
    """Into a virtual environment, which the plugin is then added to."""
    place = stage.place(is_alone=False)
    # Where it is a mount, as in a container, a root does not have it.
    resolver = Path("/etc/resolv.conf").read_text()
    place.shell("rm -f /etc/resolv.conf && cat >/etc/resolv.conf", typed=resolver)
    # Without lists of packages the newest are those that are installed.
    place.shell("rm -rf /var/lib/apt/lists")
    place.run("apt-get install build-essential")
    place.run("python3 -m venv /opt/vtpmd")
    place.run("/opt/vtpmd/bin/pip install .")
    assert "vtpmd run" in place.shell("/opt/vtpmd/bin/vtpmd --help")
    place.run("apt-get install qemu-system-x86")
    place.run("/opt/vtpmd/bin/pip install 'vtpmd[testing]'")
    place.shell("mkdir /srv/suite")
    assert "vtpm_hosts" in place.shell("cd /srv/suite && /opt/vtpmd/bin/pytest --fixtures")


def build_image(stage: Stage) -> None:
    """Where there is a kernel already: it is not fetched."""
    place = stage.place()
    image = place.directory / ".cache/vtpmd/guest"
    place.shell(f"mkdir -p {image} && cp {guest_image.find() / guest_image.KERNEL} {image}")
    place.run("vtpmd/testing/guest_image/build-image")
    assert (image / guest_image.INITRAMFS).stat().st_size > 0


def serve(stage: Stage) -> None:
    """It prints what README.md says that it prints, and ends in order."""
    place = stage.place()
    program = stage.serve(place, ".venv/bin/vtpmd run")
    stage.boot(place)
    assert program.output.splitlines()[0] in (ROOT / "README.md").read_text()
    assert program.stop() == 0


def serve_in_swtpms_place(stage: Stage) -> None:
    """It serves a guest, and ends with it."""
    place = stage.place()
    place.shell(f"mkdir {STATE}")
    program = stage.start(place, ".venv/bin/vtpmd-swtpm socket")
    program.connect(place.root.path("/srv/web1.sock")).close()
    stage.boot(place, "/srv/web1.sock")
    assert program.wait() == 0


def keep_under_a_key(stage: Stage) -> None:
    """The state is not in the clear, and the anchor says how far it has come."""
    place = stage.place()
    place.shell("mkdir -p /etc/vtpmd /mnt/elsewhere")
    place.run("openssl rand")
    program = stage.serve(place, "vtpmd run")
    stage.boot(place)
    assert program.stop() == 0
    assert place.root.path("/mnt/elsewhere/web1.anchor").stat().st_size > 0
    assert "encrypted" in place.shell(f"vtpmd status {STATE} --json")


def make_certificates(place: Place) -> None:
    """Run the written `vtpmd pki` for each host."""
    place.run("vtpmd pki init")
    for name in HOSTS:
        place.run(f"vtpmd pki issue /srv/vtpmd-ca {name}")


def bring_certificates(made_at: Place, place: Place, name: str) -> None:
    """Bring a host's certificates to it, as scp does, and let it find names."""
    made = made_at.root.path(ROOT / name.split(".")[0])
    shutil.copytree(made, place.root.path("/etc/pki/vtpmd"))
    place.shell(f"echo '127.0.0.1 {' '.join(HOSTS)}' >>/etc/hosts")


def make_peers(stage: Stage) -> None:
    """What docs/peers.md has for one host."""
    place = stage.place({"DIR": STATE})
    make_certificates(place)
    bring_certificates(place, place, HOSTS[1])
    program = stage.serve(place, "vtpmd run")
    program.wait_for_output(LISTENING)
    assert program.stop() == 0


def move_a_guest(stage: Stage) -> None:
    """Two hosts with a QEMU each; its vtpmd is killed and attached again before the guest moves."""
    values = {"…": f"{GUEST} {TPM} -device tpm-tis,tpmdev=tpm0"}
    here, there = stage.place(values), stage.place(values)
    make_certificates(here)
    for place, name in zip((here, there), HOSTS, strict=True):
        bring_certificates(here, place, name)
    stage.serve(there, "vtpmd run /srv/web1-tpm --listen").wait_for_output(LISTENING)
    stage.start(there, "qemu-system-x86_64 … -qmp unix:/run/web1-vtpmd.qmp,server=on,wait=off -inc")
    daemon = stage.serve(here, "vtpmd run /srv/web1-tpm --tls-creds")
    daemon.connect(here.root.path("/run/web1.manage")).close()
    stage.start(here, "qemu-system-x86_64 … -qmp unix:/run/web1-vtpmd.qmp,server=on,wait=off -qmp")
    wait_until(lambda: is_ready(here))
    arm_by_hand(stage, here)
    daemon.kill()
    attached = stage.start(here, "vtpmd attach")
    attached.wait_for_output("is attached to its engine")
    attached.connect(here.root.path("/run/web1.manage")).close()
    wait_until(lambda: is_ready(here))
    here.run("vtpmd migrate")
    assert answer(here, "query-migration")["outcome"] == "handed-over"


def arm_by_hand(stage: Stage, place: Place) -> None:
    """Type into qmp-shell what is written, and take it back when it has come to be."""
    session = stage.written.take("qmp-shell")
    place.run("qmp-shell", typed="\n".join(session.typed) + "\n")
    wait_until(lambda: bool(answer(place, "query-migration")["state"] == "armed"))
    answer(place, "migrate-disarm")


def is_ready(place: Place) -> bool:
    """Whether QEMU is followed, and the guest's TPM runs."""
    status = answer(place, "query-status")
    return bool(status["qemu"] == "following" and status["running"])


def answer(place: Place, command: str) -> Any:
    """Run a command on a place's management socket."""
    monitor = Monitor(str(place.root.path("/run/web1.manage")))
    try:
        monitor.connect()
        return monitor.cmd(command)
    finally:
        monitor.close()


def manage(stage: Stage) -> None:
    """A session on the management socket prints what is shown."""
    place = stage.place()
    written = stage.written.take("qmp-shell")
    place.shell("mkdir -p /run/vtpmd && vtpmd pki init /srv/ca && vtpmd pki issue /srv/ca host1")
    options = "--tls-creds /srv/ca/host1 --manage /run/vtpmd/web1.manage"
    program = place.launch(f"vtpmd run {STATE} {options}")
    stage.lab.kill_at_end(program)
    program.connect(place.root.path("/run/vtpmd/web1.manage")).close()
    stage.boot(place)
    said = place.run("qmp-shell", typed="\n".join(written.typed) + "\n")
    printed = SESSION.sub("", said.replace("(QEMU) ", "")).splitlines()
    for line in written.printed:
        assert SESSION.sub("", line) in printed
    assert program.stop() == 0


def digest_of_a_file(stage: Stage) -> None:
    """The commands make the digest that the code does."""
    data = bytes(range(256)) * 33  # two pages, and a part of one
    place = stage.place({"FILE": "/srv/image"})
    place.root.path("/srv/image").write_bytes(data)
    assert place.run("split -b 4096").split()[0] == whole_digest(data).hex()


def simulate_a_seed(stage: Stage) -> None:
    """One schedule's transcript."""
    assert stage.place().run(".venv/bin/python -m tests.sim 123").count("\n") > 10


SCENARIOS: dict[Callable[[Stage], None], tuple[str, ...]] = {
    install: ("README.md: Install", "testing.md: For other people's test suites"),
    build_image: ("testing.md: The guest's image",),
    serve: ("README.md: Serve a guest's TPM",),
    serve_in_swtpms_place: ("README.md: In swtpm's place",),
    keep_under_a_key: ("README.md: Keep the state under a key, and from being rolled back",),
    make_peers: ("peers.md: In short",),
    move_a_guest: ("README.md: Move a guest",),
    manage: ("management.md: The management socket",),
    digest_of_a_file: ("delta-format.md: Record",),
    simulate_a_seed: ("HACKING.md: Hand-overs that fail",),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_commands_of_a_section(network: Path, lab: Lab, scenario: Callable[[Stage], None]) -> None:
    """As they are written, in their place; none is left out."""
    written = Written(
        command
        for command in all_commands()
        if command.section in SCENARIOS[scenario] and command.text not in NOT_HERE
    )
    assert written.left
    scenario(Stage(lab, network, written))
    assert written.left == []


def test_every_command_is_run_or_in_the_table() -> None:
    sections = [section for names in SCENARIOS.values() for section in names]
    assert [
        f"{command.section}: {command.text}"
        for command in all_commands()
        if command.section not in sections and command.text not in NOT_HERE
    ] == []


def test_every_row_of_the_tables_is_of_use() -> None:
    texts = {command.text for command in all_commands()}
    assert [text for text in NOT_HERE if text not in texts] == []
    without = [command.text for path in DOCUMENTS for command in commands(path, ())]
    assert [each for each in OTHERS if not any(text.startswith(each) for text in without)] == []


def test_what_runs_elsewhere_is_there_as_it_is_written() -> None:
    for text, reason in NOT_HERE.items():
        if isinstance(reason, Elsewhere):
            assert text in (ROOT / reason.file).read_text(), f"{reason.file} runs no {text}"
