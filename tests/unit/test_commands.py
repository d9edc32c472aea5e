"""Commands are found in documents however they are written, and nothing else is taken for one."""

from pathlib import Path

from tests.support.commands import Command, commands

DOCUMENT = """# Title

    make all       # for people
    VAR=1 make -k 'x y' > out

Text. A drawing, a dump, Python, and what the caller knows:

    a ──► b
    c

Text.

    0000  56 54
    0010  00

Text.

    import this
    make nothing

Text.

    --option

## Session

    $ shell /there
    Welcome

    (SHELL) make
    (QEMU) make it
    done
"""


def test_commands_of_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(DOCUMENT)
    first, second, session = commands(path, ["--option"])
    assert first == Command(section="a.md: Title", text="make all")
    assert second.text == "VAR=1 make -k 'x y' > out"
    assert session == Command(
        section="a.md: Session",
        text="shell /there",
        typed=("make it",),
        printed=("Welcome", "(SHELL) make", "done"),
    )


def test_block_that_nobody_knows_is_taken_for_commands(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(DOCUMENT)
    assert "--option" in [command.text for command in commands(path, [])]
