"""Keys as ``--key`` names them: swtpm makes the same ones, and nothing of them is ever said."""

import hmac
import os
import stat
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.support.emulator_client import ControlClient
from vtpmd.errors import UsageError, VtpmdError
from vtpmd.store import keys
from vtpmd.store.directory import StateDirectory, StateKeyError
from vtpmd.store.keys import Key, parse_key_source, read_key
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.wire.tpm import StateType

SWTPM = EmulatorKind.SWTPM
HEX_128 = b"000102030405060708090a0b0c0d0e0f"
HEX_256 = HEX_128 + b"F0E1D2C3B4A5968778695a4b3c2d1e0f"
PERMANENT_MAGIC = bytes.fromhex("ab364723")  # libtpms' PERSISTENT_ALL

# What stands before the path, what comes after it, and what is in the file.
OPTIONS = {
    "defaults": ("file", "", HEX_128 + b"\n"),
    "no newline": ("file", ",mode=aes-cbc", HEX_128),
    "0x, and more after a blank": ("file", ",format=hex", b"0x" + HEX_128 + b" a comment"),
    "256 bits": ("file", ",mode=aes-256-cbc", b"0x" + HEX_256 + b"\n"),
    "capital digits": ("file", ",mode=aes-128-cbc", HEX_128.upper()),
    "a NUL at the end": ("file", "", HEX_128 + b"\0\0"),
    "binary": ("file", ",format=binary", b"\0\n 0123456789xyz"),
    "binary, 256 bits": ("file", ",format=binary,mode=aes-256-cbc", bytes(range(32))),
    "password": ("pwdfile", "", b"a password"),
    "its newline counts": ("pwdfile", ",kdf=pbkdf2", b"a password\n"),
    "256 bits of a password": ("pwdfile", ",mode=aes-256-cbc", b"a password"),
    "a long password": ("pwdfile", "", b"a password, " * 300),
    "sha512": ("pwdfile", ",kdf=sha512", b"a password\n"),
    "no password": ("pwdfile", "", b""),
    "256 bits of no password": ("pwdfile", ",mode=aes-256-cbc", b""),
    "sha512 of no password": ("pwdfile", ",kdf=sha512", b""),
    "256 bits of sha512": ("pwdfile", ",kdf=sha512,mode=aes-256-cbc", b"a password"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_swtpm_makes_the_same_key(lab: Lab, name: str) -> None:
    """A directory that the real one wrote opens with the same option."""
    source, rest, content = OPTIONS[name]
    path = lab.new_path("key")
    path.write_bytes(content)
    option = f"{source}={path}{rest}"
    swtpm = lab.emulator(SWTPM, options=("--key", option))
    with ControlClient(swtpm.control_path) as control:
        control.init()
        control.store_volatile()
        control.shutdown()
    assert swtpm.program.wait() == 0
    with StateDirectory.open(swtpm.state) as directory:
        states = directory.read_states(read_key(parse_key_source(option)))
    assert states[StateType.PERMANENT][2:6] == PERMANENT_MAGIC
    assert states.keys() == {StateType.PERMANENT, StateType.VOLATILE}


def key_of(path: Path, content: bytes, rest: str = "", source: str = "file") -> bytes:
    """Return the key that a file of this content makes."""
    path.write_bytes(content)
    return bytes(read_key(parse_key_source(f"{source}={path}{rest}")).material)


@pytest.mark.parametrize(
    ("content", "rest", "reason"),
    [
        (b"", "", "not in hexadecimal digits"),
        (b"\n", "", "not in hexadecimal digits"),
        (b" " + HEX_128, "", "not in hexadecimal digits"),
        (b"0x", "", "not in hexadecimal digits"),
        (HEX_128[:-1], "", "not in hexadecimal digits"),
        (HEX_128[:-1] + b"g", "", "not in hexadecimal digits"),
        (HEX_128[:-1] + b"_", "", "not in hexadecimal digits"),
        (b"\xff" * 32, "", "not in hexadecimal digits"),
        (HEX_128[:-2], "", "has 120 bits, and mode= asks for 128"),
        (HEX_128 + b"00", "", "has 136 bits, and mode= asks for 128"),
        (HEX_256, "", "has 256 bits, and mode= asks for 128"),
        (HEX_128, ",mode=aes-256-cbc", "has 128 bits, and mode= asks for 256"),
        (bytes(15), ",format=binary", "has 120 bits"),
        (bytes(17), ",format=binary", "has 136 bits"),
        (bytes(16), ",format=binary,mode=aes-256-cbc", "has 128 bits, and mode= asks for 256"),
        (b"", ",format=binary", "has 0 bits"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes, rest: str, reason: str) -> None:
    """A short one, too, of which swtpm would take what is there."""
    with pytest.raises(VtpmdError, match=reason) as caught:
        key_of(tmp_path / "key", content, rest)
    assert "\n" not in str(caught.value)
    assert HEX_128[:8].decode() not in repr(caught.value) + repr(caught.value.__cause__)


def test_endless_passwords_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    with pytest.raises(VtpmdError, match="has more than 65536 bytes"):
        key_of(path, bytes(keys.PASSWORD_BYTES_MAX + 1), source="pwdfile")
    assert len(key_of(path, bytes(keys.PASSWORD_BYTES_MAX), source="pwdfile")) == 16


def test_empty_password_is_warned_of_where_swtpm_takes_one_and_refused_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "password"
    path.touch(0o600)
    for option in ("--key", "--migration-key"):
        assert len(read_key(parse_key_source(f"pwdfile={path}", option)).material) == 16
        told = capsys.readouterr().err
        assert told.startswith(f"vtpmd: warning: the password in {path} is empty")
        assert told.count("\n") == 1 and told.endswith(f"check {option}\n")
    for option in ("--new-key", "--seal-key"):
        with pytest.raises(VtpmdError, match=f"{path} is empty; check {option}$"):
            read_key(parse_key_source(f"pwdfile={path}", option))
        assert path.exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("", "has no ''"),
        ("mode=aes-cbc", "needs one of file=, fd=, pwdfile=, pwdfd="),
        ("file=a,pwdfile=b", "needs one of"),
        ("file=a,file=b", "'file' twice"),
        ("file=", "file= has no value"),
        ("file", "file= has no value"),
        ("file=a,colour=red", "has no 'colour'"),
        ("file=a,mode=aes-192-cbc", "use one of aes-cbc, aes-128-cbc, aes-256-cbc"),
        ("file=a,format=base64", "use one of hex, binary"),
        ("pwdfile=a,kdf=scrypt", "use one of pbkdf2, sha512"),
        ("file=a,remove=maybe", "use one of true, false"),
        ("file=a,kdf=sha512", "kdf= does not go with file="),
        ("pwdfd=3,format=hex", "format= does not go with pwdfd="),
        ("fd=-1", "no number of a descriptor"),
        ("fd=x", "no number of a descriptor"),
    ],
)
def test_wrong_options_are_refused(option: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_key_source(option)


@pytest.mark.parametrize("source", ["fd", "pwdfd"])
def test_a_descriptor_is_read_to_its_end_and_closed(tmp_path: Path, source: str) -> None:
    """Also when what is written to a pipe comes in pieces."""
    fd, writer = os.pipe()
    os.write(writer, HEX_128[:10])
    os.write(writer, HEX_128[10:])
    os.close(writer)
    os.set_inheritable(fd, True)  # as what a process is given is
    key = read_key(parse_key_source(f"{source}={fd}"))
    assert bytes(key.material) == key_of(tmp_path / "k", HEX_128, source=source[:-2] + "file")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_that_the_process_was_not_given_is_left_alone(tmp_path: Path) -> None:
    """It is the state directory's, or of another file of its own."""
    path = tmp_path / "own"
    path.write_bytes(HEX_128)
    with path.open("rb") as own:
        with pytest.raises(VtpmdError, match="Bad file descriptor; check --key"):
            read_key(parse_key_source(f"fd={own.fileno()}"))
        assert own.read() == HEX_128


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(VtpmdError, match=f"from {missing}: No such file") as caught:
        read_key(parse_key_source(f"file={missing}"))
    assert caught.value.exit_status == 1
    with pytest.raises(VtpmdError, match="from descriptor 999: Bad file descriptor"):
        read_key(parse_key_source("pwdfd=999"))
    with pytest.raises(VtpmdError, match="Is a directory"):
        read_key(parse_key_source(f"file={tmp_path}"))


@pytest.mark.parametrize("rest", [",remove", ",remove=true"])
def test_remove_leaves_no_file(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "key"
    assert len(key_of(path, HEX_128, rest)) == 16
    assert not path.exists()
    key_of(path, HEX_128, ",remove=false")
    assert path.exists()


def test_a_key_that_is_refused_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(VtpmdError):
        key_of(path, HEX_128[1:], ",remove")
    assert path.exists()


def test_a_key_file_that_stays_is_an_error() -> None:
    """/proc lets nobody remove a file, not even root."""
    source = parse_key_source("file=/proc/sys/kernel/random/boot_id,remove")
    with pytest.raises(VtpmdError, match="not in hexadecimal digits"):
        read_key(source)
    source = parse_key_source("pwdfile=/proc/sys/kernel/random/boot_id,remove")
    with pytest.raises(VtpmdError, match="cannot remove the key file"):
        read_key(source)


def test_a_key_is_never_shown_and_can_be_wiped() -> None:
    key = Key(bytearray(b"a key of 16 byte"))
    assert repr(key) == str(key) == "Key(16 bytes)"
    material = key.material
    key.close()
    assert material == bytes(16)


def test_each_purpose_has_a_key_of_its_own() -> None:
    """RFC 5869 with SHA-256, worked out apart from the code under test."""
    key = Key(bytearray(b"a key of 16 byte"))
    salt = b"s" * 32
    extracted = hmac.digest(salt, b"a key of 16 byte", "sha256")
    expected = hmac.digest(extracted, b"vtpmd journal\x01", "sha256")
    assert key.derive(keys.INFO_JOURNAL, salt) == expected
    derived = {
        key.derive(info, s) for info in (keys.INFO_JOURNAL, keys.INFO_INCOMING) for s in (b"", salt)
    }
    assert len(derived) == 4
    assert bytes(key.material) not in {each[:16] for each in derived}


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (None, "is encrypted with swtpm's file key: give it with --key"),
        (HEX_256[32:], "does not open with this key"),
        (HEX_256, "with a key of 128 bits; the one given has 256"),
    ],
)
def test_a_directory_with_another_key_is_refused_in_one_line(
    lab: Lab, option: bytes | None, reason: str
) -> None:
    path = lab.new_path("key")
    path.write_bytes(HEX_128)
    swtpm = lab.emulator(SWTPM, options=("--key", f"file={path}"))
    with ControlClient(swtpm.control_path) as control:
        control.init()
        control.shutdown()
    assert swtpm.program.wait() == 0
    file = swtpm.state / "tpm2-00.permall"
    before = file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns
    other = None if option is None else Key(bytearray.fromhex(option.decode()))
    with StateDirectory.open(swtpm.state) as directory:
        with pytest.raises(StateKeyError, match=reason) as caught:
            directory.read_states(other)
        assert caught.value.exit_status == 4
        assert str(caught.value).startswith(f"cannot read state file {file}: ")
        assert "\n" not in str(caught.value)
    assert before == (file.read_bytes(), stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns)


def test_key_that_others_may_read_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    path.write_bytes(HEX_128)
    for mode, warnings in ((0o600, 0), (0o640, 0), (0o644, 1)):
        path.chmod(mode)
        read_key(parse_key_source(f"file={path}")).close()
        told = capsys.readouterr().err
        assert told.count("\n") == told.count("every user may read the key") == warnings
        assert HEX_128.decode() not in told
