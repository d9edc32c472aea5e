"""This machine's system as a root of its own, to install packages in: nothing of it stays."""

import subprocess
from pathlib import Path
from typing import Final

from vtpmd.testing.program import Program

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100

# In a mount namespace: a layer in memory over / takes what is written, and one over $2, which may
# be a mount of its own. $1 is a directory that is the same in there.
_ENTER: Final = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/tree-upper /mnt/tree-work
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
for name in proc sys dev; do mount --rbind /$name /mnt/root/$name; done
mkdir -p "/mnt/root$2"
mount -t overlay -o "lowerdir=$2,upperdir=/mnt/tree-upper,workdir=/mnt/tree-work" \\
    overlay "/mnt/root$2"
mkdir -p "/mnt/root$1"
mount --bind "$1" "/mnt/root$1"
exec chroot /mnt/root sh -c 'echo ready; exec sleep infinity'
"""


class FreshRoot:
    """A root that lasts until it is killed. Needs root."""

    def __init__(self, directory: Path, network: Path | None = None) -> None:
        """Make it; `directory` has its log, and is the same inside and outside.

        `network` is the network namespace of what runs there, by default this process's.
        """
        words = ["unshare", "--mount", "bash", "-euc", _ENTER, "-", str(directory), str(ROOT)]
        self._holder = Program("root", words, directory, network)
        self._holder.wait_for_output("ready\n")

    def kill(self) -> None:
        """End it, and with it its mounts, once no program runs there any more."""
        self._holder.kill()

    def path(self, inside: str | Path) -> Path:
        """Return where something that is in there is for this process."""
        return Path(f"/proc/{self._holder.pid}/root") / str(inside).lstrip("/")

    def command(self, *words: str | Path) -> list[str]:
        """Return the command that runs another one in there, by becoming it."""
        enter = ["nsenter", f"--target={self._holder.pid}", "--mount", "--net", "--root", "--wd=/"]
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        return [*enter, "env", "-i", path, "LC_ALL=C.UTF-8", *map(str, words)]

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in there to its end; what it printed is in a failed test's report."""
        ended = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        print(ended.args, ended.stdout, ended.stderr)
        return ended

    def output(self, *words: str | Path) -> str:
        """Run a command that is to succeed; return what it printed on standard output."""
        ended = self.run(*words)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
