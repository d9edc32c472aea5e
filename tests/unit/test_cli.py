"""The command line: what it accepts, prints and returns."""

import errno
import gc
import io
import os
import pkgutil
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vtpmd import __version__, cli
from vtpmd.cli.arguments import read_plain
from vtpmd.cli.parser import MODULES, build_parser, parse
from vtpmd.cli.run import ARGUMENTS, qemu_arguments, run
from vtpmd.store.libtpms import library


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["run"],
        ["run", "d", "extra"],
        ["run", "d", "--log", "debug"],
        ["run", "d", "--log", "level=loud"],
        ["run", "d", "--log", "levels=info"],
        ["run", "d", "--uuid", "8f2c0d6e"],
        ["run", "d", "--name", "a b"],
        ["run", "d", "--name", "x\ny"],
        ["run", "d", "--name", "x" * 65],
        ["run", "d", "--name", ""],
    ],
)
def test_wrong_command_lines_are_refused_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage line and a reason on standard error, nothing done."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: vtpmd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "run d --sock s",
        "attach d --take",
        "owner d --cla",
        "recover d --rest",
        "pki init d --day 1",
        "migrate --man m --to h:1 --qmp q --uri tcp:h:2",
        "--vers",
    ],
)
def test_options_are_not_abbreviated(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a script abbreviates may be another option's abbreviation in the next version."""
    with pytest.raises(SystemExit) as stopped:
        parse(line.split())
    assert stopped.value.code == 2
    assert "usage: vtpmd" in capsys.readouterr().err


WORDS = (
    "d /a//b/ -d - -- = --key --key=k=v --key= --name --name=web1 web1 a:b --uuid --uuid=8F --allow"
    " 8f2c0d6e-5a5b-4c1e-9d1a-3F0c7d1f2b11 --allow=x --tls-creds --log level=debug level=loud"
    " --log=level=error --anchor --socket --sock --socket=-s -1 --help --directory directory run"
)


@given(st.lists(st.sampled_from([*WORDS.split(), "", "a b", "ä"]), max_size=6))
@example(["d"])
@example(["d", "--allow", "x", "--socket", "s", "--allow", "y", "--log", "level=debug"])
def test_plain_command_lines_are_read_as_argparse_does(words: list[str]) -> None:
    """Every line that is read without it; and what it refuses is not."""
    plain = read_plain(words, ARGUMENTS)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            parsed = vars(build_parser(["run"]).parse_args(["run", *words]))
    except SystemExit:
        parsed = None
    assert plain is None or vars(plain) | {"command": run} == parsed


@pytest.mark.parametrize(
    "line",
    [
        "d",
        "--socket s d",
        "d --socket=s --log level=debug --name web1",
        "d --key file=k --listen :1 --tls-creds c --allow x --allow y --qmp q --manage m",
    ],
)
def test_command_lines_of_starts_are_plain(line: str) -> None:
    """argparse is not imported for them."""
    assert read_plain(line.split(), ARGUMENTS) is not None


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command shows how it is used."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    assert "example:\n  vtpmd run /" in capsys.readouterr().out


def test_version_names_libtpms_and_its_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """What can be told when it runs."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    installed = pkg_config("--modversion")
    has = library()
    line = f"vtpmd {__version__}, libtpms {installed}, which reads format level"
    text = capsys.readouterr().out
    assert text.startswith(line)
    assert text.count("\n") == 1
    assert f" {has.level} " in text
    assert all(name in text for name in has.profiles)
    assert bool(has.profiles) == (tuple(map(int, installed.split("."))) >= (0, 10))


def pkg_config(option: str) -> str:
    command = ["pkg-config", option, "libtpms"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a line with what it does, from its module, and no module is left out."""
    names = [module.name for module in pkgutil.iter_modules(cli.__path__)]
    modules = {name: import_module(f"vtpmd.cli.{name}") for name in names}
    called = {module: name for name, module in MODULES.items()}
    commands = [
        called.get(name, name) for name, module in modules.items() if hasattr(module, "add_parser")
    ]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out.partition("COMMAND\n")[2].partition("\noptions:")[0]
    lines = [line.split() for line in listed.splitlines()]
    assert sorted(line[0] for line in lines if line) == sorted(
        called.get(name, name) for name in commands
    )
    assert all(len(line) > 1 for line in lines if line)


@pytest.mark.parametrize("columns", [60, 120])
def test_help_and_usage_are_laid_out_for_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the texts that are given as they are to be shown."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["run", "--help"], ["run"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    captured = capsys.readouterr()
    for text in (captured.out.partition("\nexample:")[0], captured.err.rpartition("vtpmd run:")[0]):
        assert columns - 20 < max(map(len, text.splitlines())) < columns


def test_help_of_run_has_its_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a line."""
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out.partition("exit status:\n")[2]
    assert [line.split()[0] for line in text.splitlines()] == list("0123456789")


def test_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that cannot be made: what, on what, why; no traceback."""
    assert cli.main(["run", str(tmp_path / "missing" / "d")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vtpmd: cannot use state directory")
    assert error.count("\n") == 1
    assert gc.isenabled()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["status {}", "owner {} --json", "--help", "pki init {}/ca"])
def test_no_room_for_the_output_is_one_line(tmp_path: Path, line: str, unbuffered: str) -> None:
    """Of any command: what, why, and no traceback, also none when the interpreter ends."""
    command, *words = line.format(tmp_path).split()
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "vtpmd", command, *words],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    (error,) = ended.stderr.splitlines()
    assert error.startswith(f"vtpmd: {command} failed: No space left on device; ")
    assert ended.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_has_seen_enough_is_told_nothing(unbuffered: str) -> None:
    """As head(1), and a pager that is left; but what was not read has not gone well."""
    unread, written = os.pipe()
    os.close(unread)
    ended = subprocess.run(
        [sys.executable, "-m", "vtpmd", "--help"],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=written,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(written)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("level", ["info", "debug"])
def test_an_error_of_the_system_is_one_line(
    level: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever a command has not foreseen; who debugs sees where it came from."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", b"/srv/d")

    monkeypatch.setattr("vtpmd.cli.run.config_of", fail)
    assert cli.main(["run", str(tmp_path), "--log", f"level={level}"]) == 1
    *trace, line = capsys.readouterr().err.splitlines()
    assert line == ("vtpmd: run failed on /srv/d: Input/output error; see to that and try again")
    assert bool(trace) == (level == "debug")


@pytest.mark.parametrize(
    "path", ["/a/b", "a", "./a", "a/", "/a//b/./c/", "../a", "a/../b", ".", "/", "//a", "///a", "é"]
)
def test_paths_are_written_as_pathlib_does(path: str) -> None:
    """Also those that it is not asked about."""
    parser = build_parser(["run"])
    options = parser.parse_args(["run", path, "--socket", path])
    assert (options.directory, options.socket) == (str(Path(path)), str(Path(path)))


def test_qemu_arguments_survive_a_shell_and_qemus_commas() -> None:
    """A path with blanks, quotes and commas arrives in QEMU as it is."""
    words = shlex.split(qemu_arguments("/a b/it's,x", name=None, uuid=None))
    assert words[:2] == ["-chardev", "socket,id=vtpm,path=/a b/it's,,x"]
    assert words[2:] == [
        "-tpmdev",
        "emulator,id=tpm0,chardev=vtpm",
        "-device",
        "tpm-tis,tpmdev=tpm0",
    ]


def test_qemu_arguments_have_name_and_uuid() -> None:
    """As they were given."""
    uuid = "8f2c0d6e-5a5b-4c1e-9d1a-3f0c7d1f2b11"
    words = shlex.split(qemu_arguments("/s", name="web1", uuid=uuid))
    assert words[-4:] == ["-name", "guest=web1", "-uuid", uuid]
