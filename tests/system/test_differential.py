"""The same commands to swtpm and to vtpmd: the same answers, but for what is random or time."""

import random
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.command_sequences import Sequence, Sequence12
from tests.harness.lab import Lab
from tests.support import tpm2, tpm12
from tests.support.emulator_client import Blob, Control, ControlClient, DataSocket
from vtpmd.store.directory import names_of
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.wire.tpm import TpmVersion

CONTROL_EVERY = 12
HEADER_BYTES = 10


class Side(NamedTuple):
    """One emulator, and the connections to it."""

    control: ControlClient
    data: DataSocket


def control_body(choice: random.Random) -> tuple[Control, bytes, int]:
    """Return a command of the control channel, and how long its answer is after the result."""
    locality = choice.choice((0, 1, 2, 3, 4, 5, 255))
    data = choice.randbytes(choice.choice((0, 1, 64, 4096)))
    return choice.choice(
        [
            (Control.SET_LOCALITY, bytes([locality]), 0),
            (Control.SET_LOCALITY, bytes([0]), 0),
            (Control.GET_TPMESTABLISHED, b"", 4),
            (Control.RESET_TPMESTABLISHED, bytes([locality]), 0),
            (Control.HASH_START, b"", 0),
            (Control.HASH_DATA, len(data).to_bytes(4, "big") + data, 0),
            (Control.HASH_END, b"", 0),
            (Control.CANCEL_TPM_CMD, b"", 0),
            (Control.GET_CONFIG, b"", 4),
            (Control.SET_BUFFERSIZE, choice.choice((0, 1, 4096)).to_bytes(4, "big"), 12),
        ]
    )


def ask(side: Side, command: tuple[Control, bytes, int]) -> tuple[int, bytes]:
    number, body, size = command
    result = side.control.request(number, body)
    if result != 0:
        return result, b""
    return result, side.control.receive(size)


class Kind(NamedTuple):
    """What is compared of a version."""

    version: TpmVersion
    sequence: type[Sequence]
    startup: bytes
    # Without a last word vtpmd says one in the guest's place, and swtpm 0.7 does not.
    last_word: bytes | None
    commands: int


# A TPM 1.2 makes an RSA key at each start.
TPM_1_2 = Kind(TpmVersion.TPM_1_2, Sequence12, tpm12.startup(), None, 120)
TPM_2_0 = Kind(TpmVersion.TPM_2_0, Sequence, tpm2.startup(), tpm2.shutdown(), 800)
CASES = [*((TPM_2_0, seed) for seed in range(5)), (TPM_1_2, 0)]


def power_on(side: Side, kind: Kind) -> None:
    side.control.init()
    side.data.transact(kind.startup)


@pytest.mark.parametrize(
    ("kind", "seed"), CASES, ids=[f"{kind.version.facts.word}-{seed}" for kind, seed in CASES]
)
def test_same_sequences_have_the_same_answers(lab: Lab, kind: Kind, seed: int) -> None:
    """Both begin with one state: what is derived from its seeds is the same, too."""
    state = make_state(lab, kind)
    swtpm, vtpmd = (
        serve(lab, program, state, kind) for program in (EmulatorKind.SWTPM, EmulatorKind.VTPMD)
    )
    sides = (swtpm, vtpmd)
    for side in sides:
        power_on(side, kind)
    choice = random.Random(seed)
    for number, command in enumerate(kind.sequence(choice).commands(kind.commands)):
        theirs, ours = (side.data.transact(command) for side in sides)
        shown = f"command {number}: {command.hex()}: {theirs.hex()} and {ours.hex()}"
        assert ours[:HEADER_BYTES] == theirs[:HEADER_BYTES], shown
        assert ours == theirs or not kind.sequence.is_repeatable(command), shown
        if choice.random() < 1 / CONTROL_EVERY:
            asked = control_body(choice)
            assert ask(vtpmd, asked) == ask(swtpm, asked), f"{number}: {asked[0].name}"
        if choice.random() < 1 / 200:  # a reset
            for side in sides:
                if kind.last_word is not None:
                    side.data.transact(kind.last_word)
                side.control.stop()
                power_on(side, kind)
    assert vtpmd.control.get_state_blob(Blob.PERMANENT) != b""
    for side in sides:
        side.data.close()
        side.control.close()


def make_state(lab: Lab, kind: Kind) -> Path:
    made = lab.emulator(EmulatorKind.SWTPM, version=kind.version)
    with ControlClient(made.control_path) as control, closing(control.attach_data()) as data:
        side = Side(control, data)
        power_on(side, kind)
        control.shutdown()
    return made.state / names_of(kind.version).permanent


def serve(lab: Lab, program: EmulatorKind, file: Path, kind: Kind) -> Side:
    state = lab.new_path("state")
    state.mkdir()
    (state / file.name).write_bytes(file.read_bytes())
    control = ControlClient(lab.emulator(program, state, version=kind.version).control_path)
    return Side(control, control.attach_data())
