"""The man pages and completions say what the command line takes: they are made from it."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.manual import commands_of, write
from vtpmd.cli.parser import COMMANDS, build_parser
from vtpmd.front.prints import HELP


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manual")
    write(directory)
    return directory


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and all below it."""
    yield parser
    commands = commands_of(parser)
    for each in commands.choices.values() if commands else ():
        yield from parsers(each)


def page(manual: Path, name: str) -> str:
    """Return a man page, with its dashes as a person sees them."""
    return (manual / f"man/{name}.1").read_text().replace("\\-", "-")


def test_each_command_has_a_page_with_every_option_and_status(manual: Path) -> None:
    for parser in parsers(build_parser()):
        text = page(manual, parser.prog.replace(" ", "-"))
        assert [text.count(f".SH {name}\n") for name in ("NAME", "SYNOPSIS", "EXAMPLE")] == [1] * 3
        options = {word for action in parser._actions for word in action.option_strings}
        assert {word for word in options if word not in text} <= {"--help"}
        assert ("exit status:" in (parser.epilog or "")) == (".SH EXIT STATUS\n.TP\n0" in text)


def test_the_page_of_vtpmd_names_the_others(manual: Path) -> None:
    text = page(manual, "vtpmd")
    assert [name for name in COMMANDS if f".BR vtpmd-{name} (1)" not in text] == []


def test_the_page_of_the_program_like_swtpm_has_its_help(manual: Path) -> None:
    text = page(manual, "vtpmd-swtpm")
    options = HELP.partition("\n\n")[2].partition("exit status")[0].split()
    assert [word for word in options if word.startswith("--") and word not in text] == []


def test_bash_completes_options_and_directories(manual: Path, tmp_path: Path) -> None:
    (tmp_path / "web1-tpm").mkdir()
    (tmp_path / "file").touch()
    script = f'. {manual}/completion/vtpmd; COMP_CWORD=2; COMP_WORDS=(vtpmd run "$1"); _shtab_vtpmd'
    for word, expected in (("--tls", "--tls-creds"), ("", "web1-tpm")):
        command = ["bash", "-c", f'{script}; echo "${{COMPREPLY[@]}}"', "bash", word]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ended.stdout.split()[-1:] == [expected]


def test_a_directory_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "scripts.manual", str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
