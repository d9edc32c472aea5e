"""libtpms' permanent state of a TPM 2.0: PERSISTENT_ALL."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect import layouts
from vtpmd.inspect.nv import read_orderly_ram, read_user_nvram
from vtpmd.inspect.primitives import SU_MASK, SU_STATE, read, read_fields, read_number
from vtpmd.inspect.public import read_selections
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import (
    VERSION_WITH_BLOCKS,
    read_later,
    read_orderly,
    read_pcr_policies,
    read_state_clear,
    read_state_reset,
)
from vtpmd.inspect.sessions import read_epoch
from vtpmd.inspect.words.commands import COMMANDS, FIRST_COMMAND, LISTED_COMMANDS
from vtpmd.inspect.words.constants import COMPILE_CONSTANTS

PROFILE_VERSION: Final = 4  # of PERSISTENT_ALL: from this one on it has a profile
SHUTDOWN_VERSION: Final = 3  # from this one on it has a Shutdown's state only where there was one
COMMAND_CODES_VERSION: Final = 5  # of PERSISTENT_DATA: lists have a bit for each command's number

PROFILE_BYTES_MAX: Final = 16 * 1024
CONSTANTS_MAX: Final = 1024
LIST_BYTES_MAX: Final = 256  # of a list of commands


def read_permanent(reader: Reader) -> None:
    """Read a permanent state. Raises Fault."""
    with reader.section("persistent-all", layouts.PERSISTENT_ALL) as version:
        if version >= PROFILE_VERSION:
            _read_profile(reader)
        _read_constants(reader)
        orderly_state, owner_auth_is_empty = _read_persistent_data(reader)
        read_orderly(reader)
        if version < SHUTDOWN_VERSION or orderly_state & SU_MASK == SU_STATE:
            read_state_reset(reader)
            read_state_clear(reader)
        read_orderly_ram(reader)
        read_user_nvram(reader, owner_auth_is_empty=owner_auth_is_empty)
        read_later(reader, version)
        read_end(reader, layouts.PERSISTENT_ALL.magic)


def read_end(reader: Reader, magic: int) -> None:
    """Read the magic number again, which ends a state. Raises Fault."""
    if read_number(reader, "end", "UINT32") != magic:
        raise reader.fault("the state does not end with its magic number", reader.at - 4)


def _read_profile(reader: Reader) -> None:
    raw = reader.sized("profile", PROFILE_BYTES_MAX, "String")
    node = reader.part_node.children[-1]
    node.value = raw.rstrip(b"\0").decode("utf-8", "replace")


def _read_constants(reader: Reader) -> None:
    with reader.section("compile-constants", layouts.PA_COMPILE_CONSTANTS) as version:
        count = reader.count("count", 4, CONSTANTS_MAX)
        for number in range(count):
            is_known = number < len(COMPILE_CONSTANTS)
            name = COMPILE_CONSTANTS[number] if is_known else f"constant-{number}"
            read(reader, name, "UINT32")
        read_later(reader, version)


def _read_persistent_data(reader: Reader) -> tuple[int, bool]:
    """Read PERSISTENT_DATA; return gp.orderlyState, and whether the owner's authorisation is empty.

    Raises Fault.
    """
    with reader.section("persistent-data", layouts.PERSISTENT_DATA) as version:
        data = reader.part_node
        read_fields(reader, layouts.PERSISTENT_DATA_HEAD)
        with reader.block("pcr-policies") as is_there:
            if is_there:
                read_pcr_policies(reader)
        read_selections(reader, "pcr-allocated")
        _read_commands(reader, "physical-presence-commands", version)
        read_fields(reader, layouts.PERSISTENT_DATA_LOCKOUT)
        orderly_state = read_number(reader, "orderly-state", "TPM_SU")
        _read_commands(reader, "audit-commands", version)
        read_fields(reader, layouts.PERSISTENT_DATA_AUDIT)
        read_epoch(reader, "time-epoch")
        if version >= VERSION_WITH_BLOCKS:
            _read_persistent_data_tail(reader)
    return orderly_state, not data.content("owner-auth")


def _read_persistent_data_tail(reader: Reader) -> None:
    with reader.block("version-3") as is_there:
        if is_there:
            read_selections(reader, "pcr-active")
            with reader.block("version-4") as is_there_too:
                if is_there_too:
                    read_fields(reader, layouts.SEED_LEVELS)
                    reader.later()


def _read_commands(reader: Reader, name: str, version: int) -> None:
    """Read a list of commands: a bit for each."""
    n_bytes = reader.count(f"{name}-bytes", 2, LIST_BYTES_MAX)
    raw = reader.take(name, n_bytes, "COMMANDS")
    set_bits = [bit for bit in range(8 * n_bytes) if raw[bit // 8] >> bit % 8 & 1]
    words = (_command_word(bit, version) for bit in set_bits)
    reader.part_node.children[-1].meaning = " ".join(words)


def _command_word(bit: int, version: int) -> str:
    if version >= COMMAND_CODES_VERSION:
        code = FIRST_COMMAND + bit
    elif bit < len(LISTED_COMMANDS):
        code = LISTED_COMMANDS[bit]
    else:
        return f"bit{bit}"
    return COMMANDS.get(code, f"{code:#05x}")
