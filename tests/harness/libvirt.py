"""A libvirtd of this test alone, without systemd, which finds a program of ours as its swtpm.

It has a mount namespace: what it keeps in /etc, /run and /var is gone with it. It has a host's name
and UUID, too, so that a guest can move from one to another.
"""

import shutil
import socket
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path

from tests.harness.fresh_root import FreshRoot
from vtpmd.closing import Closing
from vtpmd.testing import guest_image
from vtpmd.testing.guest import KERNEL_COMMAND_LINE, ODD_KIB
from vtpmd.testing.program import Program
from vtpmd.testing.workload import Workload

START_TIMEOUT_S = 60
POLL_S = 0.05
MEMORY_MIB = 96
MEMORY_KIB = (MEMORY_MIB << 10) + ODD_KIB
VIRSH_TIMEOUT_S = 120  # a start makes a TPM's keys and certificates
# Where it writes, and what starts its swtpm.
DIRECTORIES = (
    *("/etc/libvirt", "/run", "/var/log", "/var/cache/libvirt", "/var/lib/libvirt"),
    "/var/lib/swtpm-localca",
)
# It does not start where there are no such users, whoever its guests run as.
USERS = ("libvirt-qemu", "swtpm")
USER_ID = 64055  # of Debian's
# QEMU with some memory more, as libvirt makes it whole MiB: ODD_KIB in guest.py says why.
QEMU = f"""\
#!/bin/bash
words=()
for word; do
    case $word in
    {MEMORY_MIB}) word={MEMORY_KIB}k ;;
    size={MEMORY_MIB << 10}k) word=size={MEMORY_KIB}k ;;
    esac
    words+=("${{word/\\"size\\":{MEMORY_MIB << 20}/\\"size\\":{MEMORY_KIB << 10}}}")
done
exec /usr/bin/qemu-system-x86_64 "${{words[@]}}"
"""
SETTINGS = """\
user = "root"
group = "root"
swtpm_user = "root"
swtpm_group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""
KEY_UUID = "5dd9f0c2-5b0a-4f7f-9a5e-0d1f6c1c2b1e"
KEY_XML = f"""\
<secret ephemeral='no' private='yes'>
  <uuid>{KEY_UUID}</uuid><usage type='vtpm'><name>test</name></usage>
</secret>
"""
DOMAIN_XML = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{image}/vmlinuz</kernel>
    <initrd>{image}/initramfs.cpio.gz</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda'/>
    </disk>
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path='{work}'/><target port='1'/></serial>
    <tpm model='tpm-tis'>{backend}</tpm>
  </devices>
  <qemu:commandline>{arguments}</qemu:commandline>
</domain>
"""


class VirshError(Exception):
    """virsh has failed; the message is what it said."""


class Libvirt(Closing):
    """A libvirtd, and virsh on it."""

    def __init__(
        self,
        directory: Path,
        swtpm: Path | None,
        network: Path | None = None,
        root: FreshRoot | None = None,
    ) -> None:
        """Start it; `swtpm` is what it finds under that name. RuntimeError when it ends instead.

        `network` is the network namespace that it and its guests have, `root` where they run: it
        has the directory, and may have a swtpm of its own.
        """
        self._directory = directory
        self._bin = directory / "bin"
        self._bin.mkdir(parents=True)
        if swtpm is not None:
            (self._bin / "swtpm").symlink_to(swtpm)
        (self._bin / "qemu-system-x86_64").write_text(QEMU)
        (self._bin / "qemu-system-x86_64").chmod(0o755)
        (directory / "qemu.conf").write_text(SETTINGS)
        (directory / "libvirtd.conf").write_text(
            f'listen_tls = 0\nauth_unix_rw = "none"\nunix_sock_dir = "{directory}"\n'
            f'host_uuid = "{uuid.uuid4()}"\n'
        )
        for name, rest in (("passwd", f"{USER_ID}::/:/bin/false"), ("group", "")):
            lines = [f"{user}:x:{USER_ID}:{rest}\n" for user in USERS]
            (directory / name).write_text(Path("/etc", name).read_text() + "".join(lines))
        command = self._command() if root is None else root.command(*self._command())
        self._program = Program("libvirtd", command, directory, network)
        self._wait_until_it_answers()

    def _command(self) -> list[str]:
        script = f"""
        set -e
        for each in {" ".join(DIRECTORIES)}; do mkdir -p $each; mount -t tmpfs tmpfs $each; done
        for each in passwd group; do mount --bind {self._directory}/$each /etc/$each; done
        cp {self._directory}/qemu.conf /etc/libvirt
        hostname {self._directory.name}
        PATH={self._bin}:$PATH exec libvirtd -f {self._directory}/libvirtd.conf
        """
        return ["unshare", "--mount", "--uts", "sh", "-c", script]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.virsh("list")
                return
            except VirshError:
                self._program.raise_if_ended()
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def close(self) -> None:
        """End it; guests have been ended before."""
        self._program.kill()

    def programs(self) -> list[Path]:
        """Return what runs in its mount namespace: itself, its guests and their TPMs."""
        mounts = Path(f"/proc/{self._program.pid}/ns/mnt").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is the kernel's own
                if (process / "ns/mnt").readlink() == mounts:
                    found.append((process / "exe").readlink())
        return found

    @property
    def uri(self) -> str:
        """Where virsh finds it."""
        return f"qemu+unix:///system?socket={self._directory}/libvirt-sock"

    def virsh(self, *command: str | Path) -> str:
        """Run a command of virsh; return what it prints. Raises VirshError."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *map(str, command)],
            check=False,
            capture_output=True,
            text=True,
            timeout=VIRSH_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise VirshError(f"{command}: {done.stderr}; {self._program.output}")
        return done.stdout

    def make_secret(self) -> str:
        """Make the secret that a state is encrypted with; return its UUID. Raises VirshError."""
        (self._directory / "secret.xml").write_text(KEY_XML)
        self.virsh("secret-define", self._directory / "secret.xml")
        (self._directory / "secret").write_text("a secret")
        self.virsh("secret-set-value", KEY_UUID, "--plain", "--file", self._directory / "secret")
        return KEY_UUID


class Domain(Closing):
    """A guest of libvirt's that runs the workload."""

    def __init__(
        self,
        libvirt: Libvirt,
        directory: Path,
        name: str,
        backend: str,
        *,
        monitor: Path | None = None,
        comes_from: "Domain | None" = None,
    ) -> None:
        """Define it, unless it comes from another libvirtd. Raises VirshError.

        `backend` is the TPM's, as XML; QEMU has a monitor at `monitor` for who follows it.
        """
        directory.mkdir()
        self.name = name
        self.xml_path = directory / "domain.xml"
        self._libvirt = libvirt
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "work"))
        self._listener.listen(1)
        self._listener.settimeout(START_TIMEOUT_S)
        self._uuid: uuid.UUID = comes_from._uuid if comes_from else uuid.uuid4()
        self._disk: Path = comes_from._disk if comes_from else _new_disk(directory / "disk")
        for part in (guest_image.KERNEL, guest_image.INITRAMFS):
            shutil.copy(guest_image.find() / part, directory)
        self.xml_path.write_text(self._described(directory, backend, monitor))
        if comes_from is None:
            libvirt.virsh("define", self.xml_path)

    def _described(self, directory: Path, backend: str, monitor: Path | None) -> str:
        """Return it as XML."""
        words = [] if monitor is None else ["-qmp", f"unix:{monitor},server=on,wait=off"]
        return DOMAIN_XML.format(
            name=self.name,
            uuid=self._uuid,
            memory_mib=MEMORY_MIB,
            image=directory,
            command_line=KERNEL_COMMAND_LINE,
            disk=self._disk,
            console=directory / "console",
            work=directory / "work",
            backend=backend,
            arguments="".join(f"<qemu:arg value='{word}'/>" for word in words),
        )

    def close(self) -> None:
        """End it, if it runs here."""
        if self.name in self._libvirt.virsh("list", "--name").split():
            self._libvirt.virsh("destroy", self.name)
        self._listener.close()

    def virsh(self, command: str, *more: str | Path) -> None:
        """Run a command of virsh on it. Raises VirshError."""
        self._libvirt.virsh(command, self.name, *more)

    def start(self) -> Workload:
        """Start it, or restore it where it was saved; return its workload. Raises VirshError."""
        self.virsh("start")
        return self.connected()

    def connected(self) -> Workload:
        """Return the workload of a QEMU that was started, at the latest a moment ago."""
        sock, _ = self._listener.accept()
        return Workload(sock, lambda: "nothing")

    def migrate(self, there: "Domain", address: str) -> Workload:
        """Migrate it to `there`, which comes from it; return its workload. Raises VirshError.

        `address` is where QEMU finds the other.
        """
        # Unsafe: libvirt does not see that both have the disk.
        options = ["--live", "--unsafe", "--migrateuri", f"tcp://{address}"]
        self.virsh("migrate", there._libvirt.uri, *options, "--xml", there.xml_path)
        return there.connected()


def _new_disk(path: Path) -> Path:
    """Make an empty disk, to save snapshots in."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    return path
