"""What is released, installed as a user would: sdist, wheel and Debian packages."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.confined import check_profile
from tests.harness.fresh_root import FreshRoot
from tests.harness.lab import Lab
from tests.harness.libvirt import Domain, Libvirt
from tests.harness.place import Place, Written
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Tpm
from vtpmd.cli.parser import COMMANDS
from vtpmd.testing import guest_image
from vtpmd.testing.program import Program

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300  # a compiler's, where other tests run beside it


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it printed is in the report if the test fails."""
    command = [str(word) for word in words]
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    print(ended.stdout, ended.stderr)
    return ended


def output(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that is to succeed; return what it printed on standard output."""
    ended = run(*words, cwd=cwd, **environment)
    assert ended.returncode == 0
    return ended.stdout


def copy_tree(directory: Path) -> None:
    """Copy the files that git does not ignore: a release has nothing that was built before."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)


def serve_once(command: Sequence[str], state: Path, lab: Lab) -> Path:
    """Serve a new directory with an installed vtpmd until SHUTDOWN; return its engine's file."""
    vtpmd = Program("vtpmd", command, lab.directory)
    lab.kill_at_end(vtpmd)
    vtpmd.connect(state / "vtpmd.sock").close()
    with ControlClient(state / "vtpmd.sock") as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        # It answers as the engine: the process that was started has become that.
        engine = Path(f"/proc/{vtpmd.pid}/exe").readlink()
        control.shutdown()
    assert vtpmd.wait() == 0
    assert (state / "tpm2-00.permall").exists()
    return engine


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_wheel_that_the_sdist_builds_serves_a_vtpm(tmp_path: Path, lab: Lab) -> None:
    """In a new environment, with the engine and the extension that are in the wheel."""
    tree, out, environment = (tmp_path / name for name in ("tree", "out", "environment"))
    copy_tree(tree)
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    (wheel,) = out.glob("*.whl")
    output("/usr/bin/python3", "-m", "venv", environment, cwd=tmp_path)
    output(environment / "bin/pip", "install", wheel, cwd=tmp_path)
    state = lab.new_path("state")
    engine = serve_once([str(environment / "bin/vtpmd"), "run", str(state)], state, lab)
    assert engine.is_relative_to(environment)
    assert engine.name == "vtpmd-engine"
    output(environment / "bin/pip", "install", f"{wheel}[testing]", cwd=tmp_path)
    check_example(environment / "bin/python", lab.new_path("suite"))


def check_example(python: Path, suite: Path) -> None:
    """Run what docs/testing.md shows to others, with what they have: no file of this tree's.

    But for the guest's kernel, which they would download.
    """
    suite.mkdir()
    (suite / "test_example.py").write_text(first_block(ROOT / "docs/testing.md"))
    image = suite / "image"
    build = "import sys; from pathlib import Path; from vtpmd.testing import guest_image; "
    build += "guest_image.build(Path(sys.argv[1]), Path(sys.argv[2]))"
    output(python, "-c", build, image, guest_image.find() / guest_image.KERNEL, cwd=suite)
    said = output(python, "-m", "pytest", "-rA", cwd=suite, VTPMD_GUEST_IMAGE=str(image))
    assert "1 passed" in said


def first_block(path: Path) -> str:
    """Return the first indented block of a document."""
    lines = path.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("    "))
    after = lines[begin:]
    end = next(number for number, line in enumerate(after) if line[:4].strip())
    return textwrap.dedent("\n".join(after[:end])).rstrip() + "\n"


def test_without_libtpms_the_build_says_what_to_install(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    copy_tree(tree)
    # Of the tree, and of nothing that an index has.
    options = ("--no-index", "--no-build-isolation", "--no-deps")
    build = (sys.executable, "-m", "pip", "wheel", *options, tree)
    ended = run(*build, cwd=tmp_path, PKG_CONFIG_LIBDIR=str(tmp_path))
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    (line,) = [line.strip() for line in ended.stderr.splitlines() if " error: lib" in line]
    assert line.startswith("error: libtpms's headers are missing")
    assert line.endswith("libtpms-dev")


# One test, as each worker that tests run in would build the packages for its own.
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_debian_packages_are_built_and_installed(lab: Lab) -> None:
    """As README.md has it, in a root of their own; lintian finds no error in them."""
    place = Place(Written([]), lab.directory)
    lab.kill_at_end(place)
    place.shell("rm -rf build/packages")  # what is there may be older
    printed = place.shell("export DEB_BUILD_OPTIONS=noautodbgsym; scripts/build-packages")
    assert "E: " not in printed
    place.shell("apt-get install ./build/packages/vtpmd_*.deb")
    place.shell("apt-get install ./build/packages/vtpmd-swtpm_*.deb")
    root = place.root
    state = lab.new_path("state")
    engine = serve_once(root.command("vtpmd", "run", state), state, lab)
    assert engine.match("usr/lib/vtpmd/vtpmd/vtpmd-engine")
    check_libraries(root, lab)
    check_what_is_beside_the_programs(root)
    check_libvirt(root, lab)
    check_profile(root, lab)
    check_swtpm(place, lab)


def check_libraries(root: FreshRoot, lab: Lab) -> None:
    """Check that Debian's cryptography and rich are enough, with the qemu.qmp of the package."""
    authority, host = lab.new_path("ca"), lab.new_path("host")
    root.output("vtpmd", "pki", "init", authority)
    root.output("vtpmd", "pki", "issue", authority, "host1.example.org", "--out", host)
    path = lab.new_path("nothing")
    options = ("--manage", path, "--to", "host1:1", "--qmp", path, "--uri", "tcp:host1:2")
    ended = root.run("vtpmd", "migrate", *options)
    assert "Traceback" not in ended.stderr
    # An older rich ends even a display that showed nothing with an empty line.
    assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (1, 1)


def check_what_is_beside_the_programs(root: FreshRoot) -> None:
    """Check what is for other programs to read, as far as these can say."""
    root.output("apparmor_parser", "-Q", "-K", "-T", "/etc/apparmor.d/vtpmd-swtpm")
    root.output("systemd-analyze", "verify", "/usr/lib/systemd/system/vtpmd@.service")
    root.output("bash", "-n", "/usr/share/bash-completion/completions/vtpmd")
    commands = [f"vtpmd-{name}" for name in COMMANDS]
    for page in ("vtpmd", "vtpmd-swtpm", *commands):
        root.output("man", "--where", page)


def check_libvirt(root: FreshRoot, lab: Lab) -> None:
    """Check that a domain of libvirt's has its TPM from what the packages have put in place."""
    libvirt = Libvirt(lab.new_path("libvirt"), None, root=root)
    lab.close_at_end(libvirt)
    backend = "<backend type='emulator' version='2.0'/>"
    with closing(Domain(libvirt, lab.new_path("domain"), "web1", backend)) as domain:
        with closing(domain.start()) as workload:
            workload.wait_until_ready()
            workload.command("setup")
            workload.check()
        assert [path for path in libvirt.programs() if path.match("usr/lib/vtpmd/*/vtpmd-engine")]
    libvirt.close()


def check_swtpm(place: Place, lab: Lab) -> None:
    """Check who swtpm is: vtpmd, another that was chosen, and its own when the package is gone."""
    root = place.root
    assert "vtpmd" in root.output("swtpm", "--version")
    state = lab.new_path("state")
    root.output("mkdir", "-m", "777", state)
    root.output("swtpm_setup", "--tpm2", "--tpmstate", state, "--createek")
    place.shell("update-alternatives --config swtpm", typed="1\n")  # in the order of their names
    assert "vtpmd" not in root.output("swtpm", "--version")
    root.output("dpkg", "--remove", "vtpmd-swtpm")
    assert "vtpmd" not in root.output("/usr/bin/swtpm", "--version")
    assert root.run("test", "-e", "/usr/bin/swtpm.distrib").returncode != 0
