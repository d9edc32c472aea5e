"""A libvirtd of this test alone, without systemd, which finds a program of ours as its swtpm.

It has a mount namespace: what it keeps in /etc, /run and /var is gone with it.
"""

import shutil
import socket
import subprocess
import time
from pathlib import Path

from vtpmd.closing import Closing
from vtpmd.testing import guest_image
from vtpmd.testing.guest import KERNEL_COMMAND_LINE
from vtpmd.testing.program import Program
from vtpmd.testing.workload import Workload

START_TIMEOUT_S = 60
POLL_S = 0.05
VIRSH_TIMEOUT_S = 120  # a start makes a TPM's keys and certificates
# Where it writes, and what starts its swtpm.
DIRECTORIES = (
    *("/etc/libvirt", "/run", "/var/log", "/var/cache/libvirt", "/var/lib/libvirt"),
    "/var/lib/swtpm-localca",
)
# It does not start where there are no such users, whoever its guests run as.
USERS = ("libvirt-qemu", "swtpm")
USER_ID = 64055  # of Debian's
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
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>96</memory>
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
</domain>
"""


class VirshError(Exception):
    """virsh has failed; the message is what it said."""


class Libvirt(Closing):
    """A libvirtd, and virsh on it."""

    def __init__(self, directory: Path, swtpm: Path) -> None:
        """Start it; `swtpm` is what it finds under that name. RuntimeError when it ends instead."""
        self._directory = directory
        self._bin = directory / "bin"
        self._bin.mkdir(parents=True)
        (self._bin / "swtpm").symlink_to(swtpm)
        (directory / "qemu.conf").write_text(SETTINGS)
        (directory / "libvirtd.conf").write_text(
            f'listen_tls = 0\nauth_unix_rw = "none"\nunix_sock_dir = "{directory}"\n'
        )
        for name, rest in (("passwd", f"{USER_ID}::/:/bin/false"), ("group", "")):
            lines = [f"{user}:x:{USER_ID}:{rest}\n" for user in USERS]
            (directory / name).write_text(Path("/etc", name).read_text() + "".join(lines))
        self._program = Program("libvirtd", self._command(), directory)
        self._wait_until_it_answers()

    def _command(self) -> list[str]:
        script = f"""
        set -e
        for each in {" ".join(DIRECTORIES)}; do mkdir -p $each; mount -t tmpfs tmpfs $each; done
        for each in passwd group; do mount --bind {self._directory}/$each /etc/$each; done
        cp {self._directory}/qemu.conf /etc/libvirt
        PATH={self._bin}:$PATH exec libvirtd -f {self._directory}/libvirtd.conf
        """
        return ["unshare", "--mount", "sh", "-c", script]

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

    def virsh(self, *command: str | Path) -> str:
        """Run a command of virsh; return what it prints. Raises VirshError."""
        uri = f"qemu+unix:///system?socket={self._directory}/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-q", "-c", uri, *map(str, command)],
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

    def __init__(self, libvirt: Libvirt, directory: Path, name: str, backend: str) -> None:
        """Define it; `backend` is the TPM's, as XML. Raises VirshError."""
        directory.mkdir()
        self.name = name
        self._libvirt = libvirt
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "work"))
        self._listener.listen(1)
        self._listener.settimeout(START_TIMEOUT_S)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", directory / "disk", "16M"], check=True
        )
        for part in (guest_image.KERNEL, guest_image.INITRAMFS):
            shutil.copy(guest_image.find() / part, directory)
        text = DOMAIN_XML.format(
            name=name,
            image=directory,
            command_line=KERNEL_COMMAND_LINE,
            disk=directory / "disk",
            console=directory / "console",
            work=directory / "work",
            backend=backend,
        )
        (directory / "domain.xml").write_text(text)
        libvirt.virsh("define", directory / "domain.xml")

    def close(self) -> None:
        """End it, if it runs."""
        if self.state == "running":
            self._libvirt.virsh("destroy", self.name)
        self._listener.close()

    @property
    def state(self) -> str:
        """What libvirt calls its state."""
        return self._libvirt.virsh("domstate", self.name).strip()

    def virsh(self, command: str, *more: str) -> None:
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
