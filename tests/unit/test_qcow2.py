"""Snapshots in qcow2 images: found where QEMU's format says, and nothing in an image is trusted.

The images are made here, by QEMU's docs/interop/qcow2.rst; tests/system/test_inspect_savevm.py has
one that QEMU has made.
"""

import os
from pathlib import Path
from struct import pack, pack_into

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import states
from tests.support.cli_run import QuietRun
from tests.unit.test_cli_inspect import IDENTITY, stream
from vtpmd.inspect import qcow2
from vtpmd.inspect.qcow2 import Image, Qcow2Error
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage

CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS
DISK_BYTES = 3 << 20  # one and a half tables of the second level


def image(
    *snapshots: tuple[str, bytes],
    version: int = 3,
    features: int = 0,
    encryption: int = 0,
    flags: int = 1 << 63,
) -> bytes:
    """Return an image with these snapshots, each a name and a guest's state.

    ``flags`` are those of each cluster that has a part of a state.
    """
    entry_bytes = 16 if features & 1 << 4 else 8
    per_table = CLUSTER // entry_bytes
    head = bytearray(CLUSTER)
    clusters: list[bytes] = []

    def put(cluster: bytes) -> int:
        """Return where a cluster is, behind the header."""
        clusters.append(cluster.ljust(CLUSTER, b"\0"))
        return len(clusters) * CLUSTER

    table = b""
    for name, state in snapshots:
        begin = -(-DISK_BYTES // (per_table * CLUSTER))
        first = [0] * begin
        pieces = [state[at : at + CLUSTER] for at in range(0, len(state), CLUSTER)]
        for at in range(0, len(pieces), per_table):
            second = bytearray(CLUSTER)
            for number, piece in enumerate(pieces[at : at + per_table]):
                place = put(piece) | flags if any(piece) else 0
                pack_into(">Q", second, number * entry_bytes, place)
            first.append(put(bytes(second)) | 1 << 63)
        l1 = put(b"".join(pack(">Q", each) for each in first))
        entry = pack(">QIHHIIQII", l1, len(first), 1, len(name), 0, 0, 0, len(state), 16)
        entry += pack(">QQ", len(state), DISK_BYTES) + b"1" + name.encode()
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    at = put(table)
    pack_into(
        *(">4sIQIIQIIQQIIQ", head, 0, b"QFI\xfb", version, 0, 0, CLUSTER_BITS, DISK_BYTES),
        *(encryption, 0, 0, 0, 0, len(snapshots), at),
    )
    pack_into(">Q", head, 72, features)
    return bytes(head) + b"".join(clusters)


def guest(state: bytes, generation: int) -> bytes:
    """Return a guest's state, with more memory than one table maps, and a vTPM behind it."""
    blob = swtpm_format.encode_blob(state, Lineage(IDENTITY, generation))
    return b"memory" + bytes(2 * CLUSTER * CLUSTER // 8) + stream(blob, b"", b"")


BOTH = (("old", guest(states.LEVEL_1, 3)), ("new one", guest(states.BUSY, 9)))
FORMS = {"2": {"version": 2}, "3": {}, "extended": {"features": 1 << 4}}


@pytest.mark.parametrize("form", FORMS)
def test_the_last_snapshot_is_shown_or_the_one_that_is_named(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image(*BOTH, ("without a guest", b""), **FORMS[form]))
    for options, name, generation in (
        ((), "new one", 9),
        (("--snapshot", "old"), "old", 3),
        (("--snapshot", "new one"), "new one", 9),
    ):
        shown = QuietRun(capsys, "inspect", path, "--json", *options)
        known = shown.outcome
        assert (shown.status, known["kind"], known["snapshot"]) == (0, "snapshot", name)
        assert (known["generation"], known["identity"]) == (generation, IDENTITY.hex())
    assert "the snapshot new one in a disk image" in QuietRun(capsys, "inspect", path).lines[0]
    assert QuietRun(capsys, "verify", path, "--snapshot", "old").status == 0


@pytest.mark.parametrize(
    ("snapshots", "options"),
    [
        ((), ()),
        ((("empty", b""),), ()),
        ((("no vTPM", b"memory" * 9999),), ()),
        (BOTH, ("--snapshot", "another")),
    ],
)
def test_an_image_without_a_vtpm_is_refused(
    snapshots: tuple[tuple[str, bytes], ...],
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image(*snapshots))
    refused = QuietRun(capsys, "inspect", path, *options)
    assert (refused.status, refused.output) == (9, "")
    assert "a disk image of QEMU's with no snapshot" in refused.error


def test_a_snapshot_is_of_a_disk_image_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state"
    path.write_bytes(states.LEVEL_1)
    assert QuietRun(capsys, "inspect", path, "--snapshot", "old").status == 9


@pytest.mark.parametrize(
    "wrong", [{"version": 4}, {"features": 1 << 2}, {"encryption": 1}, {"flags": 1 << 62}]
)
def test_an_image_of_another_kind_is_refused(
    wrong: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image(*BOTH, **wrong))
    refused = QuietRun(capsys, "inspect", path)
    assert (refused.status, refused.output) == (5, "")


def test_the_end_of_a_large_state_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = os.urandom(5 * CLUSTER + 99)
    path = tmp_path / "disk"
    path.write_bytes(image(("one", state)))
    for n_bytes in (1, CLUSTER, 2 * CLUSTER + 7, len(state), 10 * len(state)):
        monkeypatch.setattr(qcow2, "WINDOW_BYTES_MAX", n_bytes)
        with path.open("rb") as file:
            opened = Image(file.fileno())
            (snapshot,) = opened.snapshots()
            assert opened.end_of_state(snapshot) == state[-n_bytes:]


SMALL = image(("one", stream(swtpm_format.encode_blob(states.LEVEL_1), b"", b"")))


@given(data=st.data())
@settings(max_examples=300, deadline=4000)
def test_an_altered_image_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = bytearray(SMALL)
    tables = [*range(80), *range(len(SMALL) - 2 * CLUSTER, len(SMALL) - 2 * CLUSTER + 40)]
    tables += range(len(SMALL) - CLUSTER, len(SMALL) - CLUSTER + 80)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.sampled_from(tables))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "altered-disk"
    path.write_bytes(changed)
    with path.open("rb") as file:
        try:
            opened = Image(file.fileno())
            for snapshot in opened.snapshots():
                assert len(opened.end_of_state(snapshot)) <= qcow2.WINDOW_BYTES_MAX
        except Qcow2Error as error:
            assert len(str(error).splitlines()) == 1
