"""`vtpmd inspect` as a person and a program meet it: whatever a state is in, and what is none.

That a directory is left as it is, is checked each time. A served vTPM is in
tests/system/test_inspect_live.py.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from tests.support import states
from tests.support.cli_run import Command, Run
from tests.support.documents import tables
from tests.support.file_names import JOURNAL_NAME, PERMANENT_NAME
from tests.support.journal import write_journal
from vtpmd.inspect.decoding import decode
from vtpmd.inspect.layouts import USER_NVRAM
from vtpmd.inspect.qemu_stream import carried_blobs
from vtpmd.inspect.screen import RECORDS
from vtpmd.inspect.secrets import SEED_PATHS
from vtpmd.store import export_seal
from vtpmd.store.directory import ASK_IT
from vtpmd.wire import swtpm_format
from vtpmd.wire.export_format import Header
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType, TpmVersion

VOLATILE_NAME = "tpm2-00.volatilestate"
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/inspect.md").read_text()
IDENTITY = b"i" * 16
KEY, IV = b"k" * 32, b"v" * 32
MIGRATION_KEY = b"m" * 16
SECRETS = (b"password of hierarchy", b"under a policy..", b"message")
LEAF = re.compile(r" *\d+ +(\d+) +\S+: ")  # offset, length, name
NEWER = states.LEVEL_1.replace(
    pack(">HIH", 2, USER_NVRAM.magic, 1), pack(">HIH", 9, USER_NVRAM.magic, 8)
)


def content(place: Path) -> dict[str, bytes]:
    """Return all that is in a directory, or a file."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command; each time what it was given is as it was."""

    def run(path: Path, *options: str) -> Run:
        before = content(path)
        result = Run(capsys, "inspect", path, *options)
        assert content(path) == before
        return result

    return run


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Give a state directory of a used TPM, with its volatile state."""
    path = tmp_path / "state"
    path.mkdir()
    (path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(states.BUSY, LINEAGE))
    (path / VOLATILE_NAME).write_bytes(swtpm_format.encode_file(states.BUSY_VOLATILE))
    yield path


LINEAGE = Lineage(IDENTITY, 7)
EXPORT = Header(b"e" * 16, IDENTITY, 7, 0, TpmVersion.TPM_2_0, (StateType.PERMANENT,))


def key_file(tmp_path: Path, key: bytes, name: str = "key") -> str:
    """Return the option's value for a key."""
    path = tmp_path / name
    path.write_text(key.hex())
    path.chmod(0o600)
    return f"file={path},mode={'aes-256-cbc' if len(key) == 32 else 'aes-128-cbc'}"


def linear_file(*files: bytes) -> bytes:
    """Return swtpm's linear file with these states' files."""
    slots, body = b"", b""
    for file in files:
        slots += pack("<III", 4096 + len(body), len(file), len(file))
        body += file
    head = pack("<QBBH", 0x737774706D6C696E, 1, 0, 192) + slots
    return head.ljust(4096, b"\0") + body


def stream(*blobs: bytes, begin: bytes = b"QEVM", flags: int = 1) -> bytes:
    """Return a migration stream with a guest's memory, which looks like the section, and that."""
    section = b"\4" + pack(">I", 7) + b"\x0ctpm-emulator" + pack(">II", 0, 0)
    memory = section + pack(">II", 1, 1 << 31) + section[1:] + pack(">II", 1, 3) + b"any"
    carried = b"".join(pack(">II", flags, len(blob)) + blob for blob in blobs)
    return begin + pack(">I", 3) + memory * 3 + section + carried + b'{"name": "tpm-emulator"}'


CONTAINERS = {
    "migration-stream": lambda: stream(swtpm_format.encode_blob(states.BUSY, LINEAGE), b"", b""),
    "file": lambda: swtpm_format.encode_file(states.BUSY, LINEAGE),
    "blob": lambda: swtpm_format.encode_blob(states.BUSY, LINEAGE),
    "state": lambda: states.BUSY,
    "export": lambda: export_seal.sealed(EXPORT, {StateType.PERMANENT: states.BUSY}, None),
    "linear-file": lambda: linear_file(swtpm_format.encode_file(states.BUSY, LINEAGE)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_state_is_found_whatever_it_is_in(kind: str, tmp_path: Path, run: Command) -> None:
    path = tmp_path / "any name"
    path.write_bytes(CONTAINERS[kind]())
    shown = run(path, "--json")
    assert shown.status == 0
    assert shown.outcome["kind"] == kind
    permanent = shown.outcome["states"]["permanent"]
    assert permanent["decoded-bytes"] == permanent["bytes"] == len(states.BUSY)
    if kind != "state":
        assert (shown.outcome["identity"], shown.outcome["generation"]) == (IDENTITY.hex(), 7)


def test_a_directory_has_all_its_states(state: Path, run: Command) -> None:
    shown = run(state, "--json").outcome
    assert (shown["kind"], shown["in-use"], shown["owner"]) == ("directory", False, "ours")
    assert set(shown["states"]) == {"permanent", "volatile"}
    assert shown["problems"] == []


def test_a_journal_is_on_top_of_its_checkpoint(tmp_path: Path, run: Command) -> None:
    continued = Lineage(IDENTITY, 1, continued=True)
    images = states.different(3)
    file = swtpm_format.encode_file(images[0], continued)
    (tmp_path / PERMANENT_NAME).write_bytes(file)
    (tmp_path / JOURNAL_NAME).write_bytes(write_journal(images, identity=IDENTITY))
    shown = run(tmp_path, "--json", "--show-secrets").outcome
    assert (shown["generation"], shown["journal-commits"]) == (3, 2)
    seed = shown["hierarchies"]["endorsement"]["seed"]["value"]
    assert bytes.fromhex(seed).startswith(b"CCCCCCCC")


def test_a_damaged_journal_is_told_and_what_is_right_shown(tmp_path: Path, run: Command) -> None:
    continued = Lineage(IDENTITY, 1, continued=True)
    images = states.different(3)
    (tmp_path / PERMANENT_NAME).write_bytes(swtpm_format.encode_file(images[0], continued))
    journal = write_journal(images, identity=IDENTITY)
    journal[600] ^= 1
    (tmp_path / JOURNAL_NAME).write_bytes(journal)
    shown = run(tmp_path, "--json")
    assert shown.status == 5
    (problem,) = shown.outcome["problems"]
    assert "tpm2-00.journal" in problem
    assert problem in shown.outcome["surprises"]


@pytest.mark.parametrize("wrap", ["file", "directory", "blob", "linear-file"])
def test_an_encrypted_state_opens_with_its_key_alone(
    wrap: str, tmp_path: Path, run: Command
) -> None:
    file = swtpm_format.encode_file(states.LEVEL_1, key=KEY, iv=IV)
    path = tmp_path / "state"
    if wrap == "directory":
        path.mkdir()
        (path / PERMANENT_NAME).write_bytes(file)
    elif wrap == "blob":
        path.write_bytes(swtpm_format.encode_blob(states.LEVEL_1, key=KEY, iv=IV))
    else:
        path.write_bytes(linear_file(file) if wrap == "linear-file" else file)
    right, wrong = key_file(tmp_path, KEY), key_file(tmp_path, b"x" * 32, "wrong")
    shown = run(path, "--json", "--key", right)
    assert (shown.status, shown.outcome["encrypted"]) == (0, True)
    for options in ((), ("--key", wrong)):
        refused = run(path, *options)
        assert refused.status == 4
        assert refused.output == ""
        assert len(refused.error.splitlines()) == 1


def test_a_key_for_a_plain_state_is_refused(state: Path, tmp_path: Path, run: Command) -> None:
    assert run(state, "--key", key_file(tmp_path, KEY)).status == 4


def test_a_blob_under_the_migration_key(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "blob"
    blob = swtpm_format.encode_blob(states.LEVEL_1, migration_key=MIGRATION_KEY, iv=bytes(16))
    path.write_bytes(blob)
    assert run(path).status == 4
    shown = run(path, "--json", "--migration-key", key_file(tmp_path, MIGRATION_KEY))
    assert (shown.status, shown.outcome["kind"]) == (0, "blob")


def test_a_stream_that_libvirt_saved_has_both_states(tmp_path: Path, run: Command) -> None:
    blobs = [swtpm_format.encode_blob(state) for state in (states.BUSY, states.BUSY_VOLATILE)]
    path = tmp_path / "saved"
    path.write_bytes(stream(*blobs, b"", begin=b"LibvirtQemudSave"))
    shown = run(path, "--json").outcome
    assert set(shown["states"]) == {"permanent", "volatile"}
    assert shown["pcrs"]["values"]["sha256"]["0"].strip("0")


def test_each_beginning_of_a_stream_ends_with_a_line(tmp_path: Path) -> None:
    whole = stream(swtpm_format.encode_blob(states.LEVEL_1), b"", b"")
    path = tmp_path / "stream"
    for n_bytes in [*range(1, 300), *range(300, len(whole) - 60, 50)]:
        path.write_bytes(whole[:n_bytes])
        assert carried_blobs(path) is None


def test_a_stream_encrypted_with_the_file_key(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "saved"
    blob = swtpm_format.encode_blob(states.LEVEL_1, key=KEY, iv=IV)
    path.write_bytes(stream(blob, b"", b"", flags=2))
    assert run(path).status == 4
    shown = run(path, "--json", "--key", key_file(tmp_path, KEY))
    assert (shown.status, shown.outcome["encrypted"]) == (0, True)


@pytest.mark.parametrize(
    ("begin", "what"),
    [
        (b"VTPMDIN3", "a state that a peer has sent"),
        (b"VTPMANCH", "an anchor"),
        (b"QEVM", "a migration stream of QEMU's with no vTPM that is found in it"),
        (stream(b"VTPMTAIL", b"", b""), "a migration stream of QEMU's, with a tail"),
        (stream(swtpm_format.encode_blob(b"any"), b"", b""), "a migration stream of QEMU's, whose"),
        (b"\x7fELF", "a program"),
        (b'{"version": 2}', "JSON, and no owner record"),
        (b"", "no state of a TPM"),
        (b"anything else", "no state of a TPM"),
    ],
)
def test_of_what_is_no_state_it_is_said_what_it_is(
    begin: bytes, what: str, tmp_path: Path, run: Command
) -> None:
    path = tmp_path / "file"
    path.write_bytes(begin + bytes(300) if begin else b"")
    refused = run(path)
    assert refused.status == 9
    assert f"it is {what}" in refused.error
    assert len(refused.error.splitlines()) == 1


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_linear_file_with_a_state_in_anothers_place(
    n_before: int, tmp_path: Path, run: Command
) -> None:
    """Of the slots the second is a volatile state's, the third one no TPM 2.0's."""
    file = swtpm_format.encode_file(states.LEVEL_1)
    volatile = swtpm_format.encode_file(states.BUSY_VOLATILE)
    path = tmp_path / "linear"
    path.write_bytes(linear_file(*(file, volatile)[:n_before], file))
    refused = run(path)
    assert (refused.status, refused.output, len(refused.error.splitlines())) == (9, "", 1)


def test_a_linear_file_that_is_damaged(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "linear"
    path.write_bytes(linear_file(swtpm_format.encode_file(states.LEVEL_1))[:5000])
    refused = run(path)
    assert (refused.status, refused.output, len(refused.error.splitlines())) == (5, "", 1)


@pytest.fixture
def tpm12(tmp_path: Path) -> Path:
    """Give a state directory of a used TPM 1.2, with all that it can have."""
    path = tmp_path / "tpm12"
    path.mkdir()
    for state, name in (
        (states.BUSY_12, "permall"),
        (states.BUSY_12_VOLATILE, "volatilestate"),
        (states.BUSY_12_SAVED, "savestate"),
    ):
        (path / f"tpm-00.{name}").write_bytes(swtpm_format.encode_file(state))
    return path


def test_a_tpm_12_has_all_its_states(tpm12: Path, run: Command) -> None:
    shown = run(tpm12, "--json")
    assert (shown.status, shown.outcome["tpm"]) == (0, "1.2")
    assert list(shown.outcome["states"]) == ["permanent", "volatile", "savestate"]
    assert run(tpm12, "--tree").status == 0


def test_the_screen_says_what_a_tpm_12_has(tpm12: Path, run: Command) -> None:
    shown = run(tpm12)
    for words in (
        "flags:         ownership",
        "owner:         installed",
        "counter 0:     ",
        "lockout:       not locked out: 1 of 6 tries has failed",
        "  sha1      7  ",
        f"NV memory:     {len(states.BUSY_12)} of ",
        "  0x00011102  ordinary     16  set    -",
        "  0x00011104  ordinary      8  empty  yes",
        "  0x40000006  endorsement  RSA 2048: STORAGE",
        "  0x40000000  owner        RSA 2048: STORAGE",
        "  slot 1   osap    SHA1    SRK",
        f"savestate: {len(states.BUSY_12_SAVED)} of {len(states.BUSY_12_SAVED)} bytes decoded",
    ):
        assert any(line.startswith(words) for line in shown.lines), words
    assert not any(line != line.rstrip() for line in shown.lines)


def test_no_secret_of_a_tpm_12_is_shown(tpm12: Path, run: Command) -> None:
    """Those of the owner, keys, counters and an index, and what only they may read."""
    secrets = [letter * 20 for letter in (b"o", b"s", b"k", b"c", b"i", b"t")]
    secrets += [b"by password only", b"by the owner...."]
    raw = states.BUSY_12 + states.BUSY_12_VOLATILE
    assert all(secret in raw for secret in secrets)
    closed, opened = whole_output(tpm12, run), whole_output(tpm12, run, "--show-secrets")
    for secret in secrets:
        assert secret.hex() not in closed
        assert secret.decode() not in closed
    assert secrets[0].hex() in opened


def test_equal_secrets_of_a_tpm_12_have_equal_fingerprints(tpm12: Path, run: Command) -> None:
    """Whenever they are shown; another's are others."""
    found = []
    for at in (0, 0, 1):
        file = swtpm_format.encode_file(states.BUSY_12)
        if at:
            root = decode(states.BUSY_12, StateType.PERMANENT, TpmVersion.TPM_1_2).root
            seed = root.find(*SEED_PATHS[2])
            assert seed is not None
            altered = bytearray(states.BUSY_12)
            altered[seed.offset + 10] ^= 1
            file = swtpm_format.encode_file(bytes(altered))
        (tpm12 / "tpm-00.permall").write_bytes(file)
        (auth,) = run(tpm12, "--json", "--section", "permanent-data.owner-auth").outcome
        found.append(auth["secret"]["fingerprint"])  # type: ignore[index]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["file", "blob", "state", "linear-file", "migration-stream"])
def test_a_tpm_12_is_found_whatever_it_is_in(kind: str, tmp_path: Path, run: Command) -> None:
    state, volatile, saved = states.BUSY_12, states.BUSY_12_VOLATILE, states.BUSY_12_SAVED
    files = [swtpm_format.encode_file(each) for each in (state, volatile, saved)]
    blobs = [swtpm_format.encode_blob(each) for each in (state, volatile, saved)]
    contents = {
        "file": files[0],
        "blob": blobs[0],
        "state": state,
        "linear-file": linear_file(*files),
        "migration-stream": stream(*blobs),
    }
    path = tmp_path / "any name"
    path.write_bytes(contents[kind])
    shown = run(path, "--json")
    assert (shown.status, shown.outcome["kind"], shown.outcome["tpm"]) == (0, kind, "1.2")
    assert len(shown.outcome["states"]) == (3 if kind in ("linear-file", "migration-stream") else 1)


def test_a_saved_state_that_is_damaged_is_known_by_its_place(tpm12: Path, run: Command) -> None:
    damaged = states.BUSY_12_SAVED[:-1]
    (tpm12 / "tpm-00.savestate").write_bytes(swtpm_format.encode_file(damaged))
    shown = run(tpm12, "--json")
    assert shown.status == 5
    assert shown.outcome["states"]["savestate"]["faults"]
    assert shown.outcome["states"]["volatile"]["faults"] == []
    stream_of = [states.BUSY_12, states.BUSY_12_VOLATILE, damaged]
    path = tpm12 / "stream"
    path.write_bytes(stream(*map(swtpm_format.encode_blob, stream_of)))
    assert run(path, "--json").status == 5
    path.write_bytes(damaged)
    assert run(path).status == 9


def test_a_later_version_of_a_tpm_12s_format(tmp_path: Path, run: Command) -> None:
    """Nobody has made one."""
    root = decode(states.BUSY_12, StateType.PERMANENT, TpmVersion.TPM_1_2).root
    tag = root.find("permanent-all", "permanent-flags", "tag")
    assert tag is not None
    path = tmp_path / "state"
    path.write_bytes(
        states.BUSY_12[: tag.offset] + pack(">H", 3) + states.BUSY_12[tag.offset + 2 :]
    )
    (fault, *_) = run(path, "--json").outcome["states"]["permanent"]["faults"]
    assert (fault["offset"], fault["newer"]) == (tag.offset, True)
    assert "a later one than is known here" in fault["what"]


def test_a_directory_with_no_vtpm(tmp_path: Path, run: Command) -> None:
    refused = run(tmp_path)
    assert (refused.status, "no vTPM in it yet" in refused.error) == (9, True)


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert Run(capsys, "inspect", tmp_path / "pipe").status == 9


OF_A_PATH: tuple[tuple[str, ...], ...] = (
    *(("inspect",), ("verify",), ("identity",), ("export",), ("backup", "chain")),
    *(("status",), ("owner",), ("fold",), ("recover",), ("attach",)),
)


@pytest.mark.parametrize("command", OF_A_PATH, ids=lambda command: command[0])
def test_a_socket_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    """It is a vtpmd's, most of the time, which can be asked; and it is not connected to."""
    name, *others = command
    path = tmp_path / "manage"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        listening.setblocking(False)
        refused = Run(capsys, name, path, *(tmp_path / other for other in others))
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert refused.status != 0
    (line,) = refused.error.splitlines()
    assert ASK_IT in line


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = Run(capsys, "inspect", tmp_path / "nothing")
    assert (refused.status, len(refused.error.splitlines())) == (1, 1)


def test_a_damaged_container_is_one_line(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "file"
    path.write_bytes(swtpm_format.encode_file(states.LEVEL_1)[:100])
    refused = run(path)
    assert (refused.status, refused.output, len(refused.error.splitlines())) == (5, "", 1)


def test_a_broken_state_is_shown_as_far_as_it_goes(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    path.write_bytes(states.LEVEL_1[:700])
    shown = run(path)
    assert shown.status == 5
    assert shown.lines[-2] == "permanent: 662 of 700 bytes decoded"
    assert shown.lines[-1] == (
        "permanent: byte 662, in permanent.persistent-all.persistent-data: "
        "platform-seed has 66 bytes, and 38 are left"
    )
    assert any(line.startswith("owner        empty") for line in shown.lines)


def test_an_index_that_breaks_off_is_shown_as_such(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    root = decode(states.BUSY, StateType.PERMANENT).root
    index = root.find("persistent-all", "user-nvram", "entries", "0x01000001", "index", "public")
    assert index is not None
    path.write_bytes(states.BUSY[: index.offset + 5])
    assert "  0x01000001  not decoded whole" in run(path).lines
    known = run(path, "--json").outcome["nv"]["indices"]
    assert [each["type"] for each in known] == ["ordinary", None]


def test_a_state_of_a_later_libtpms(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    path.write_bytes(NEWER)
    shown = run(path, "--json")
    assert shown.status == 8
    (fault,) = shown.outcome["states"]["permanent"]["faults"]
    assert fault["newer"]
    assert fault["part"] == "permanent.persistent-all.user-nvram"


def test_the_screen_says_what_is_there(state: Path, run: Command) -> None:
    shown = run(state)
    assert shown.status == 0
    for words in (
        f"identity:      {IDENTITY.hex()}, generation 7",
        "owner        set            SHA256     on",
        "lockout:       not locked out: 0 of 5 tries have failed",
        "PCR banks:     sha1, sha256, sha384, sha512",
        "  0x01000001  counter       8  empty  -",
        "  0x81000000  owner        RSA 2048: fixedTPM",
        "  slot 2   trial   SHA256  isPolicy isTrialPolicy",
        f"permanent: {len(states.BUSY)} of {len(states.BUSY)} bytes decoded",
    ):
        assert any(line.startswith(words) for line in shown.lines), words
    assert not any(line != line.rstrip() for line in shown.lines)


def test_the_tree_has_every_byte(state: Path, run: Command) -> None:
    shown = run(state, "--tree")
    leaves = [match for line in shown.lines if (match := LEAF.match(line))]
    assert sum(int(leaf[1]) for leaf in leaves) == len(states.BUSY) + len(states.BUSY_VOLATILE)
    assert shown.lines[-1].startswith("volatile: ")


def test_a_section_is_shown_alone(state: Path, run: Command) -> None:
    shown = run(state, "--section", "user-nvram")
    assert shown.lines[0] == "permanent.persistent-all.user-nvram:"
    assert shown.lines[1].endswith("user-nvram  [USER_NVRAM]")
    both = run(state, "--json", "--section", "orderly-data.clock-ms").outcome
    assert [each["path"] for each in both] == [  # type: ignore[index]
        "permanent.persistent-all.orderly-data.clock-ms",
        "volatile.volatile-state.orderly-data.clock-ms",
    ]


def test_a_section_that_is_not_there_is_refused_with_names(state: Path, run: Command) -> None:
    refused = run(state, "--section", "nvram")
    assert refused.status == 2
    assert "user-nvram" in refused.error


def whole_output(state: Path, run: Command, *options: str) -> str:
    """Return what all ways to show print."""
    ways: tuple[tuple[str, ...], ...] = ((), ("--tree",), ("--json",), ("--section", "permanent"))
    return "".join(run(state, *way, *options).output for way in ways)


def test_no_secret_is_shown_unless_it_is_asked_for(state: Path, run: Command) -> None:
    closed, opened = whole_output(state, run), whole_output(state, run, "--show-secrets")
    for secret in SECRETS:
        assert secret.hex() not in closed
        assert secret.decode() not in closed
    assert SECRETS[0].hex() in opened
    permanent = decode(states.BUSY, StateType.PERMANENT).root
    seed = permanent.content("persistent-all", "persistent-data", "owner-seed")
    assert len(seed) == 64
    assert seed.hex() not in closed
    assert seed.hex() in opened


def test_who_is_shown_secrets_is_warned(state: Path, run: Command) -> None:
    shown = run(state, "--tree", "--show-secrets")
    assert shown.error == "vtpmd: warning: secrets follow: who reads them can be this TPM\n"
    assert run(state, "--tree").error == ""


def test_equal_secrets_of_one_tpm_have_equal_fingerprints(tmp_path: Path, run: Command) -> None:
    """Also in its other state, which has that seed, and not in another TPM's."""
    path = tmp_path / "one"
    found = []
    for content in (states.BUSY, states.BUSY_VOLATILE, states.LEVEL_1, states.LEVEL_7):
        path.write_bytes(content)
        (first, *_) = run(path, "--json", "--section", "platform-seed").outcome
        found.append(first["secret"]["fingerprint"])  # type: ignore[index]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_equal_secrets_of_two_tpms_have_other_fingerprints(tmp_path: Path, run: Command) -> None:
    """Who knows no platform seed cannot try passwords."""
    path = tmp_path / "one"
    seed = decode(states.BUSY, StateType.PERMANENT).root.find(*SEED_PATHS[0])
    assert seed is not None
    altered = bytearray(states.BUSY)
    altered[seed.offset + 2] ^= 1
    found = []
    for content in (states.BUSY, altered):
        path.write_bytes(content)
        (auth,) = run(path, "--json", "--section", "persistent-data.owner-auth").outcome
        found.append(auth["secret"]["fingerprint"])  # type: ignore[index]
    assert found[0] != found[1]


def test_surprises_are_told(tmp_path: Path, run: Command) -> None:
    path = tmp_path / "state"
    tries = states.LEVEL_1.index(pack(">IIII", 0, 3, 1000, 1000))
    path.write_bytes(states.LEVEL_1[:tries] + pack(">I", 2) + states.LEVEL_1[tries + 4 :])
    assert "it is close to lockout: 2 authorisations have failed, of 3" in run(path).output
    path.write_bytes(states.LEVEL_1[:tries] + pack(">I", 3) + states.LEVEL_1[tries + 4 :])
    shown = run(path, "--json").outcome
    assert shown["lockout"]["locked-out"]
    assert shown["surprises"] == ["it is locked out: 3 authorisations have failed, of 3"]


def documented(title: str) -> set[str]:
    """Return the keys in a table of the document."""
    return {row["key"].strip("`") for row in tables(DOCUMENT)[title]}


def keys_of(nodes: list[dict[str, Any]]) -> set[str]:
    """Return the keys of all nodes of trees."""
    found: set[str] = set()
    for node in nodes:
        found |= set(node) | keys_of(node.get("children", []))
    return found


def test_the_document_has_each_key(state: Path, tpm12: Path, run: Command) -> None:
    shown = json.loads(run(state, "--json").output)
    of_12 = run(tpm12, "--json").outcome
    trees = [each["tree"] for each in shown["states"].values()]
    said = {
        "Keys of the object": set(shown),
        "Keys of a state": {key for each in shown["states"].values() for key in each},
        "Keys of a node": keys_of(trees),
        "Keys of a hierarchy": {key for each in shown["hierarchies"].values() for key in each},
        "Keys of an entry": {key for each in shown["nv"]["entries"] for key in each},
        "Keys of an index": {key for each in shown["nv"]["indices"] for key in each},
        "Keys of an object": {key for each in shown["objects"] for key in each},
        "Keys of a session": {key for each in shown["sessions"] for key in each},
        **{f"Keys of `{name}`": set(shown[name]) for name in ("lockout", "clock", "pcrs", "nv")},
        "Keys of `tpm12`": set(of_12["tpm12"]),
        "Keys of a counter": {key for each in of_12["tpm12"]["counters"] for key in each},
    }
    assert {title: documented(title) for title in said} == said
    # What both have has the same keys in both.
    for name in ("lockout", "clock", "pcrs", "nv", "audit", "profile", "hierarchies"):
        assert of_12[name].keys() == shown[name].keys()
    assert of_12.keys() == shown.keys()
    for parts in ("objects", "sessions"):
        assert of_12[parts][0].keys() == shown[parts][0].keys()
    for parts in ("indices", "entries"):
        assert of_12["nv"][parts][0].keys() == shown["nv"][parts][0].keys()


def test_the_document_has_each_kind() -> None:
    rows = tables(DOCUMENT)["What is understood"]
    assert {row["kind"] for row in rows} == {*CONTAINERS, *RECORDS, "directory", "snapshot"}
