"""libtpms' volatile state of a TPM 2.0: VOLATILE_STATE, what a running TPM has in memory."""

from __future__ import annotations

from typing import Final

from vtpmd.inspect import layouts
from vtpmd.inspect.nv import RAM_BYTES_MAX, read_ram_image
from vtpmd.inspect.objects import read_slot
from vtpmd.inspect.permanent import read_end
from vtpmd.inspect.primitives import read, read_fields
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.sections import (
    SESSIONS_MAX,
    VERSION_WITH_BLOCKS,
    checksummed,
    read_orderly,
    read_pcr,
    read_state_clear,
    read_state_reset,
)
from vtpmd.inspect.sessions import read_session_slot
from vtpmd.inspect.tree import Types

COMMAND_SESSIONS_MAX: Final = 16  # MAX_SESSION_NUM is 3
OBJECTS_MAX: Final = 64  # MAX_LOADED_OBJECTS is 3
PCRS_MAX: Final = 64  # IMPLEMENTATION_PCR is 24


def read_volatile(reader: Reader) -> None:
    """Read a volatile state, and the checksum behind it. Raises Fault."""
    with checksummed(reader):
        _read_state(reader)


def _read_state(reader: Reader) -> None:
    with reader.section("volatile-state", layouts.VOLATILE_STATE) as version:
        read_fields(reader, layouts.VOLATILE_HEAD)
        with reader.block("lockout-used") as is_there:
            if is_there:
                read(reader, "lockout-used", "BOOL")
        read_fields(reader, layouts.VOLATILE_POWER)
        read_orderly(reader)
        read_state_clear(reader)
        read_state_reset(reader)
        read_fields(reader, layouts.VOLATILE_STARTED)
        _read_command_sessions(reader)
        with reader.block("lockout-timers"):
            pass  # no libtpms has it: its timers are in ORDERLY_DATA
        _read_nv(reader)
        _read_slots(reader)
        _read_tail(reader)
        if version >= VERSION_WITH_BLOCKS:
            _read_later_versions(reader)
        read_end(reader, layouts.VOLATILE_STATE.magic)


def _read_command_sessions(reader: Reader) -> None:
    """Read what is left of the sessions of the last command."""
    with reader.block("command-sessions") as is_there:
        if not is_there:
            return
        count = reader.count("count", 2, COMMAND_SESSIONS_MAX)
        for number in range(count):
            with reader.part(str(number), "COMMAND_SESSION"):
                read_fields(reader, layouts.COMMAND_SESSION)
        read_fields(reader, layouts.COMMAND_SESSION_INDICES)
        with reader.block("audit") as has_audit:
            if has_audit:
                read(reader, "command-audit-parameters", "TPM2B_DIGEST")
        read(reader, "lockout-pending-on-nv", "BOOL")


def _read_nv(reader: Reader) -> None:
    with reader.block("nv") as is_there:
        if is_there:
            read(reader, "dynamic-end", "UINT32")
            n_bytes = reader.count("orderly-ram-bytes", 2, RAM_BYTES_MAX)
            read_ram_image(reader, "orderly-ram", n_bytes)
            read(reader, "counter-max", "UINT64")


def _read_slots(reader: Reader) -> None:
    with reader.block("objects") as is_there:
        if is_there:
            for number in range(reader.count("count", 2, OBJECTS_MAX)):
                read_slot(reader, str(number))
    with reader.block("pcrs") as is_there:
        if is_there:
            for number in range(reader.count("count", 2, PCRS_MAX)):
                read_pcr(reader, str(number))
    with reader.block("sessions") as is_there:
        if is_there:
            with reader.part("slots", Types.LIST):
                for number in range(reader.count("count", 2, SESSIONS_MAX)):
                    read_session_slot(reader, str(number))
            read_fields(reader, layouts.SESSION_ARRAY_TAIL)


def _read_tail(reader: Reader) -> None:
    read_fields(reader, layouts.FAILURE_FLAGS)
    for name, fields in (("failure", layouts.FAILURE), ("real-time", layouts.REAL_TIME)):
        with reader.block(name) as is_there:
            if is_there:
                read_fields(reader, fields)
    read_fields(reader, layouts.CLOCK_RATE)


def _read_later_versions(reader: Reader) -> None:
    with reader.block("version-3") as is_there:
        if is_there:
            read_fields(reader, layouts.SEEDS)
            with reader.block("version-4") as is_there_too:
                if is_there_too:
                    read_fields(reader, layouts.SUSPENSION)
                    reader.later()
