"""What a program does to files and sockets, as strace sees it, children included."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tests.harness.apparmor import Access, May
from tests.harness.fresh_root import FreshRoot

_CALLS = "%file,%network,mmap,flock,fcntl,fchmod,fchown,ftruncate"
_LINE = re.compile(
    r"^\d+ +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>[^ <]+)(?:<(?P<to>[^>]*)>)?"
)
_RESUMED = re.compile(r"^(?P<pid>\d+ +)<\.\.\. \w+ resumed>(?P<rest>.*)$")
_UNFINISHED = re.compile(r"^(?P<pid>\d+ +)(?P<begun>.*) <unfinished \.\.\.>$")
_DESCRIPTOR = re.compile(r"^(?:AT_FDCWD|\d+)<(?P<path>[^>]*)>")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_CHANGES_NAMES = {
    *("unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir"),
    *("chmod", "fchmodat", "chown", "lchown", "fchownat", "symlink", "symlinkat", "truncate"),
}
_CHANGES_FILES = {"fchmod", "fchown", "ftruncate"}


def command(log: Path, *words: str | Path) -> list[str | Path]:
    """Return the command that runs another one, and writes what that does into a log."""
    options = ("-f", "-y", "-qq", "-s", "4096", "-e", f"trace={_CALLS}", "-o", log)
    return ["strace", *options, *words]


class Traced:
    """What a log says of a program that was run in a root."""

    def __init__(self, root: FreshRoot, log: Path, program: str) -> None:
        """Read it, from where the program has been started."""
        self._root = root
        self._links: dict[str, str] = {}
        self._opened: dict[str, str] = {}  # the last of each number
        self.accesses: set[Access] = set()
        self.sockets: set[tuple[str, str]] = set()
        before, begun, after = log.read_text().partition(f'execve("{program}"')
        for line in _whole_lines(before.rpartition("\n")[2] + begun + after):
            found = _LINE.match(line)
            if found and found["result"] != "-1":
                self._take(found)

    def _take(self, found: re.Match[str]) -> None:
        name, arguments = found["name"], found["arguments"]
        if name == "socket":
            self._take_socket(arguments)
        elif name in ("open", "openat"):
            self._opened[found["result"]] = found["to"]
            self._take_open(arguments, found["to"])
        elif name == "execve":
            self._take_program(_STRING.findall(arguments)[0])
        elif name in ("bind", "connect") and (path := re.search(r'sun_path="([^"@]+)"', arguments)):
            whole = self._named_by_descriptor(path[1])
            self._add(whole, May.WRITE | (May.READ if name == "connect" else May(0)), name)
        elif name in _CHANGES_NAMES:
            for each in _names(arguments):
                self._add(each, May.WRITE, name)
        else:
            self._take_descriptor(name, arguments)

    def _take_descriptor(self, name: str, arguments: str) -> None:
        words = arguments.split(", ")
        descriptor = _DESCRIPTOR.match(words[-2] if name == "mmap" else words[0])
        if descriptor is None or not descriptor["path"].startswith("/"):
            return  # it is of no file
        if name == "mmap" and "PROT_EXEC" in arguments:
            self._add(descriptor["path"], May.MAP, name)
        elif name == "flock" or (name == "fcntl" and "SETLK" in arguments):
            self._add(descriptor["path"], May.LOCK, name)
        elif name in _CHANGES_FILES:
            self._add(descriptor["path"], May.WRITE, name)

    def _take_socket(self, arguments: str) -> None:
        family, kind = arguments.split(", ")[:2]
        kind = kind.partition("|")[0].removeprefix("SOCK_").lower()
        self.sockets.add((family.removeprefix("AF_").lower(), kind))

    def _take_open(self, arguments: str, path: str) -> None:
        flags = _STRING.sub("", arguments)
        if "O_PATH" in flags:
            return
        may = May(0)
        if "O_RDONLY" in flags or "O_RDWR" in flags:
            may |= May.READ
        if re.search("O_WRONLY|O_RDWR|O_TRUNC|O_CREAT", flags):
            may |= May.WRITE
        self._add(f"{path.rstrip('/')}/" if "O_DIRECTORY" in flags else path, may, "open")

    def _take_program(self, path: str) -> None:
        """What the kernel opens of one: itself, if it is a script's the interpreter, the loader."""
        real = self._real(path)
        head = self._root.path(real).read_bytes()[:4096]
        self._add(real, May.EXECUTE | May.READ, "execve")
        if head.startswith(b"#!"):
            interpreter = head[2:].split(None, 1)[0].decode()
            real = self._real(interpreter)
        self._add(real, May.READ | May.MAP, "execve")

    def _named_by_descriptor(self, path: str) -> str:
        """Return the path of what a program has named below a directory that it had opened."""
        found = re.fullmatch(r"/proc/self/fd/(\d+)/(.*)", path)
        return path if found is None else f"{self._opened[found[1]]}/{found[2]}"

    def _real(self, path: str) -> str:
        if path not in self._links:
            self._links[path] = self._root.output("readlink", "-f", path).strip()
        return self._links[path]

    def _add(self, path: str, may: May, call: str) -> None:
        self.accesses.add(Access(path.removesuffix(" (deleted)"), may, call))


def _whole_lines(text: str) -> Iterator[str]:
    """Yield each call on a line of its own, in the order of their ends."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        if unfinished := _UNFINISHED.match(line):
            begun[unfinished["pid"]] = unfinished["begun"]
        elif resumed := _RESUMED.match(line):
            pid = resumed["pid"]
            yield f"{pid}{begun.pop(pid, '')}{resumed['rest']}"
        else:
            yield line


def _names(arguments: str) -> Iterator[str]:
    """Yield each path that is named, below the directory before it."""
    directory = "/"
    for word in re.findall(r'(?:AT_FDCWD|\d+)<[^>]*>|"(?:[^"\\]|\\.)*"', arguments):
        if word.startswith('"'):
            yield str(PurePosixPath(directory, word.strip('"')))
        else:
            directory = word.partition("<")[2].removesuffix(">")
