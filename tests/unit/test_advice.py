"""What errors tell people to do: by commands and options that there are, and by another command.

Advice is found in the source, in each text that may be shown, and in what commands say of state
directories that are wrong in every way that has a word of its own.
"""

import argparse
import ast
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import states
from tests.support.cli_run import Run
from tests.support.journal import SECTOR, digest, write_journal
from tests.support.owner import write_offer
from vtpmd import cli
from vtpmd.cli.parser import COMMANDS, build_parser
from vtpmd.front import options as swtpm_options
from vtpmd.store import importing
from vtpmd.store.anchor import Anchor, Mark
from vtpmd.store.directory import StateDirectory
from vtpmd.store.in_place import InPlace
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import OwnerRecord
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS

ROOT = Path(__file__).resolve().parents[2]
COMMAND_LINE = Path(sys.executable).with_name("vtpmd")
TIMEOUT_S = 30
IMAGES = states.different(4)

OF_SWTPM_SETUP = {"--create-ek-cert", "--create-platform-cert"}
STYLES = Path("vtpmd/inspect/html/style.py")  # with names of CSS

# A command is meant, and not the program, in quotes, where it is to be seen, and at a line's end.
ADVICE = re.compile(
    r"(?:`|\bsee |: (?=vtpmd [a-z-]+(?: X| DIR| -|$)))vtpmd (?P<command>[a-z-]+)(?P<rest>[^`;,]*)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
C_TEXT = re.compile(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*')
C_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@cache
def options_of() -> dict[str, set[str]]:
    """Return the options of each command."""
    found = {name: _options(each) for name, each in _commands(build_parser()).items()}
    return found | {"socket": {f"--{name}" for name in swtpm_options.NAMES}}


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def _options(parser: argparse.ArgumentParser) -> set[str]:
    own = {option for action in parser._actions for option in action.option_strings}
    return own.union(*map(_options, _commands(parser).values()))


def python_texts(source: str) -> Iterator[str]:
    """Return what may be shown of a module's strings; what is filled in is an X."""
    tree = ast.parse(source)
    parts = {
        id(part)
        for each in ast.walk(tree)
        if isinstance(each, ast.JoinedStr)
        for part in each.values
    }
    parts |= {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
    for each in ast.walk(tree):
        if isinstance(each, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "X" for part in each.values
            )
        elif (
            isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in parts
        ):
            yield each.value


def c_texts(source: str) -> Iterator[str]:
    """Return a C file's strings."""
    for found in C_TEXT.finditer(C_COMMENT.sub("", source)):
        yield "".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', found[0]))


def shown_texts() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "vtpmd").rglob("*.py")):
        name = path.relative_to(ROOT)
        if "testing" not in name.parts and name != STYLES:
            yield from ((name, text) for text in python_texts(path.read_text()))
    for path in sorted((ROOT / "csrc").rglob("*.c")):
        yield from ((path.relative_to(ROOT), text) for text in c_texts(path.read_text()))


def wrong_advice(text: str) -> list[str]:
    """Return what a text advises, and there is not."""
    found = []
    for advice in ADVICE.finditer(text):
        known = options_of().get(advice["command"])
        if known is None:
            found.append(advice[0])
        else:
            found += [option for option in OPTION.findall(advice["rest"]) if option not in known]
    every = set().union(*options_of().values()) | OF_SWTPM_SETUP
    found += [option for option in OPTION.findall(text) if option not in every]
    return sorted(set(found))


def test_wrong_advice_is_found() -> None:
    for text in (
        "see `vtpmd recover DIR`",
        "or see vtpmd owner --help",
        "if it is gone: vtpmd owner X --claim",
        "no vtpmd greets there; leave out --key",
        "see `vtpmd recover X`, and `vtpmd fold X`",
    ):
        assert wrong_advice(text) == []
    for text in (
        "see `vtpmd mend DIR`",
        "or see vtpmd owners",
        "if it is gone: vtpmd owner X --take",
        "leave out --no-such-option",
        "see `vtpmd recover X`, and `vtpmd unfold X`",
    ):
        assert len(wrong_advice(text)) == 1, text
    assert list(python_texts('"""Doc."""\nraise E(f"a {b} " "c")')) == ["a X c"]
    assert list(c_texts('/* "no" */ f("a "\n   "b", "\\"c");')) == ["a b", '\\"c']


def test_all_advice_is_of_what_there_is() -> None:
    texts = list(shown_texts())
    assert len(texts) > 3000
    found = {f"{path}: {wrong}" for path, text in texts for wrong in wrong_advice(text)}
    assert sorted(found) == []


Make = Callable[[Path], object]
IDENTITY, SESSION = b"i" * 16, b"s" * 16
OTHER_KEY = b"k" * 16


def served_once(path: Path) -> None:
    """A state, and changes to it that nobody has taken up."""
    (path / "tpm2-00.permall").write_bytes(swtpm_format.encode_file(IMAGES[0]))
    (path / "tpm2-00.journal").write_bytes(write_journal(IMAGES))


def with_a(name: str, content: bytes = b"damaged") -> Make:
    """Such a directory, with something in it."""

    def make(path: Path) -> None:
        served_once(path)
        (path / name).write_bytes(content)

    return make


def with_a_damaged_journal(path: Path) -> None:
    served_once(path)
    content = bytearray((path / "tpm2-00.journal").read_bytes())
    content[2 * SECTOR + 9] ^= 1
    (path / "tpm2-00.journal").write_bytes(content)


def encrypted(path: Path) -> None:
    file = swtpm_format.encode_file(IMAGES[0], key=OTHER_KEY, iv=OTHER_KEY)
    (path / "tpm2-00.permall").write_bytes(file)


def put_back(path: Path) -> None:
    """An older state was, and what was claimed."""
    lineage = Lineage(IDENTITY, EPOCH_GENERATIONS + 1)
    (path / "tpm2-00.permall").write_bytes(swtpm_format.encode_file(IMAGES[0], lineage))


def moved(path: Path) -> None:
    with StateDirectory.open(path) as directory:
        in_place = InPlace(directory)
        record = OwnerRecord(directory, in_place)
        record.reserve(SESSION, "host2.example.org:4433", 0)
        write_offer(record, SESSION)
        record.confirm(SESSION)
        in_place.close()


def importing_into(path: Path) -> None:
    """An import has begun, and was interrupted."""
    source, export = path.with_name("source"), path.with_name("export")
    source.mkdir()
    served_once(source)
    assert cli.main(["export", str(source), "--out", str(export)]) == 0
    header, states = importing.open_file(export, None, with_volatile=False)
    with StateDirectory.open(path) as directory:
        files = MovingFiles(directory)
        header = importing.prepare(directory, files, header, states, None, force=False)
        importing.commit(directory, header, states, None)
        files.close()


def in_file(content: bytes) -> Make:
    def make(path: Path) -> None:
        path.rmdir()
        path.write_bytes(content)

    return make


def a_socket(path: Path) -> None:
    path.rmdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SITUATIONS: dict[str, Make] = {
    "nothing": Path.exists,
    "no directory": Path.rmdir,
    "a file": in_file(b"no state of a TPM"),
    "a state in a file": in_file(swtpm_format.encode_file(IMAGES[0])),
    "a linear file": in_file(b"swtpmlin" + bytes(4096)),
    "a socket": a_socket,
    "changes": served_once,
    "damaged": with_a("tpm2-00.permall"),
    "a damaged journal": with_a_damaged_journal,
    "encrypted": encrypted,
    "put back": put_back,
    "moved": moved,
    "a damaged owner record": with_a("tpm2-00.owner"),
    "a damaged lock": with_a(".lock"),
    "a state of a peer's": with_a("tpm2-00.incoming"),
    "a state of QEMU's": with_a("tpm2-00.arrived"),
    "an import that was interrupted": importing_into,
    "a damaged import": with_a("tpm2-00.import"),
    "a damaged chain": with_a("vtpm-0001.vtpm"),
}

WORDS = {
    "backup": ("{state}", "{new}"),
    "diff": ("{state}", "{state}"),
    "export": ("{state}", "--out", "{new}"),
    "import": ("{state}", "{new}", "--identity", "copy"),
    "run": ("{state}", "--socket", "{new}/no/socket"),  # and so it never serves
}
MORE = {
    "inspect": (("--at", "3"), ("--key", "file={key}")),
    "export": (("--volatile",), ("--key", "file={key}")),
    "fold": (("--key", "file={key}"), ("--anchor", "{anchor}")),
    "recover": (("--restore",), ("--key", "file={key}"), ("--anchor", "{anchor}")),
    "rekey": (("--no-key",), ("--no-key", "--key", "file={key}"), ("--new-key", "file={key}")),
    "owner": (("--claim",), ("--ask", "--tls-creds", "nowhere")),
    "run": (("--key", "file={key}"), ("--anchor", "{anchor}")),
    "log": (("--key", "file={key}"),),
    "verify": (("--key", "file={key}"),),
    "backup": (("--key", "file={key}"),),
}


def command_lines(command: str) -> Iterator[tuple[str, ...]]:
    words = (command, *WORDS.get(command, ("{state}",)))
    if command != "rekey":  # which needs one of the others
        yield words
    yield from ((*words, *more) for more in MORE.get(command, ()))


def own_advice(command: str, text: str) -> list[str]:
    """Return where a text sends one to the command that has said it, not naming its options."""
    return [
        advice[0]
        for advice in ADVICE.finditer(text)
        if advice["command"] == command and not OPTION.search(text[advice.end() :].split(";")[0])
    ]


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return all that a command says."""
    if words[0] not in LASTING:
        ended = Run(capsys, *words)
        return ended.error + ended.output
    done = subprocess.run(
        [COMMAND_LINE, *words], check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return done.stderr + done.stdout


LASTING = ("run", "attach")  # they change what is the process'
ABOUT_DIRECTORIES = [name for name in COMMANDS if name not in ("migrate", "pki")]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("command", ABOUT_DIRECTORIES)
def test_no_command_sends_one_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, situation: str
) -> None:
    for number, words in enumerate(command_lines(command)):
        directory = tmp_path / str(number)
        names = {name: directory / name for name in ("state", "new", "key", "anchor")}
        names["state"].mkdir(parents=True)
        names["key"].write_text(OTHER_KEY.hex())
        names["key"].chmod(0o600)
        with Anchor.open(names["anchor"], names["state"], is_new=True) as anchor:
            anchor.write(Mark(IDENTITY, 9, digest(IMAGES[3])))
        SITUATIONS[situation](names["state"])
        said = said_by(capsys, *(word.format(**names) for word in words))
        assert own_advice(command, said) == [], said
        assert wrong_advice(said) == [], said
