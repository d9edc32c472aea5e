"""One vTPM: what each command on its control channel does."""

from __future__ import annotations

import logging
import struct

from vtpmd.core import LinkOperation
from vtpmd.daemon.engine import Engine, EngineDied, Reply
from vtpmd.daemon.mobility import Mobility, NotOurs
from vtpmd.errors import VtpmdError
from vtpmd.migration.tail import is_tail
from vtpmd.store.keys import Key
from vtpmd.wire import control, swtpm_format
from vtpmd.wire.control import Bare, Command, Request, Result, StateType

log = logging.getLogger(__name__)

CAPABILITIES = control.Capability((1 << len(control.Capability)) - 1)

# Commands without a body whose whole answer is the engine's result.
_PASSED_ON = {
    Command.HASH_START: LinkOperation.HASH_START,
    Command.HASH_END: LinkOperation.HASH_END,
    Command.CANCEL_TPM_CMD: LinkOperation.CANCEL,
    Command.STORE_VOLATILE: LinkOperation.STORE_VOLATILE,
}


class CommandFailed(Exception):
    """A command is answered with an error; ``result`` is its number."""

    def __init__(self, result: int) -> None:
        super().__init__(f"result {result:#x}")
        self.result = result


class Instance:
    """One vTPM, behind one engine."""

    def __init__(self, engine: Engine, mobility: Mobility, key: Key | None = None) -> None:
        self._engine = engine
        self._mobility = mobility
        self._key = key
        self._running = False
        self._gave_tail = False  # QEMU takes a state, and the permanent blob of that is a tail
        mobility.is_running = lambda: self._running

    async def handle(self, request: Request, descriptors: list[int]) -> bytes:
        """Carry out a command and return its answer.

        ``descriptors`` holds the data socket of a SET_DATAFD; it stays the caller's. An engine that
        died is answered for with TPM_FAIL.
        """
        try:
            return await self._carry_out(request, descriptors)
        except CommandFailed as failure:
            return control.encode_error(request.command, failure.result)
        except EngineDied:
            return control.encode_error(request.command, Result.FAIL)
        except NotOurs as error:
            log.error("%s is refused: %s", request.command.name, error)
            return control.encode_error(request.command, Result.FAIL)

    async def finish(self) -> None:
        """Do what a command leads to that its answer need not wait for."""
        await self._mobility.finish()

    async def _carry_out(self, request: Request, descriptors: list[int]) -> bytes:
        match request:
            case Bare(command=command):
                return await self._carry_out_bare(command, descriptors)
            case control.Init():
                return await self._init(request)
            case control.GetStateBlob():
                return await self._get_state_blob(request)
            case control.SetStateBlob():
                return await self._set_state_blob(request)
            case control.SetBufferSize():
                reply = await self._ask(LinkOperation.SET_BUFFER_SIZE, request.wanted_bytes)
                smallest, largest = struct.unpack("=II", reply.payload)
                return control.encode_buffer_size(reply.argument, smallest, largest)
            case control.GetInfo():
                reply = await self._ask(LinkOperation.GET_INFO, request.flags & 0xFFFFFFFF)
                return control.encode_info(reply.payload, request.offset)
            case control.HashData():
                await self._ask(LinkOperation.HASH_DATA, payload=request.data)
            case control.SetLocality():
                await self._ask(LinkOperation.SET_LOCALITY, request.locality)
            case control.ResetEstablished():
                await self._ask(LinkOperation.RESET_ESTABLISHED, request.locality)
            case control.LockStorage():
                # The lock itself is held from start to end. QEMU's guest runs here again.
                self._gave_tail = False
                await self._mobility.guest_runs()
        return control.encode_result()

    async def _carry_out_bare(self, command: Command, descriptors: list[int]) -> bytes:
        match command:
            case Command.GET_CAPABILITY:
                return control.encode_capability(CAPABILITIES)
            case Command.GET_CONFIG:
                flags = 0 if self._key is None else control.ConfigFlag.FILE_KEY
                return control.encode_config(flags)
            case Command.GET_TPMESTABLISHED:
                reply = await self._ask(LinkOperation.GET_ESTABLISHED)
                return control.encode_established(bool(reply.argument))
            case Command.STOP:
                return await self._stop()
            case Command.SHUTDOWN:
                # A frozen TPM stays on: the destination may still ask for it.
                return control.encode_result() if self._mobility.is_frozen() else await self._stop()
            case Command.SET_DATAFD:
                await self._ask(LinkOperation.SET_DATA_SOCKET, descriptor=descriptors[0])
                await self._mobility.qemu_connected()
            case _:
                await self._ask(_PASSED_ON[command])
        return control.encode_result()

    async def _ask(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes = b"",
        descriptor: int | None = None,
    ) -> Reply:
        """Have the engine do something. Raises CommandFailed with its result, or EngineDied."""
        reply = await self._engine.request(operation, argument, payload, descriptor)
        if reply.result != Result.SUCCESS:
            raise CommandFailed(reply.result)
        return reply

    async def _init(self, request: control.Init) -> bytes:
        self._running = False
        # QEMU says so after a stream; a boot says nothing.
        is_incoming = bool(request.flags & control.InitFlag.DELETE_VOLATILE)
        result = await self._mobility.init(is_incoming=is_incoming)
        if result:
            log.error(
                "the TPM does not start: libtpms refuses its state with %#x; the state files are "
                "untouched: restore them from a copy",
                result,
            )
            raise CommandFailed(result)
        self._running = True
        return control.encode_result()

    async def _stop(self) -> bytes:
        # QEMU stops the TPM before it loads a state, with the guest standing still.
        self._gave_tail = False
        await self._mobility.stopping()
        if self._running or self._engine.death is not None:
            self._running = False
            await self._ask(LinkOperation.STOP)
        return control.encode_result()

    async def _get_state_blob(self, request: control.GetStateBlob) -> bytes:
        if request.state_type == StateType.PERMANENT:
            tail = await self._mobility.tail()
            self._gave_tail = tail is not None
            if tail is not None:
                return control.encode_state_blob(tail, request.offset)
        elif self._mobility.is_frozen():
            # The tail has it all. QEMU sets no empty blob at the other side.
            return control.encode_state_blob(b"", 0)
        elif self._gave_tail:
            log.error("the session ended while QEMU took the state: its migration fails; try again")
            raise CommandFailed(Result.FAIL)
        reply = await self._ask(LinkOperation.GET_STATE, request.state_type)
        is_permanent = request.state_type == StateType.PERMANENT
        lineage = await self._mobility.lineages.own() if is_permanent else None
        if self._key is None or request.flags & control.StateFlag.DECRYPTED:
            blob = swtpm_format.encode_blob(reply.payload, lineage)
            return control.encode_state_blob(blob, request.offset)
        key, iv = self._key.material, self._key.new_iv()
        blob = swtpm_format.encode_blob(reply.payload, lineage, key=key, iv=iv)
        return control.encode_state_blob(blob, request.offset, encrypted=True)

    async def _set_state_blob(self, request: control.SetStateBlob) -> bytes:
        if self._running:
            raise CommandFailed(Result.BAD_ORDINAL)
        if is_tail(request.blob):
            return await self._set_tail(request.blob)
        try:
            encrypted = bool(request.flags & control.StateFlag.ENCRYPTED)
            key = None if self._key is None else self._key.material
            state = swtpm_format.decode_blob(request.blob, encrypted=encrypted, key=key)
            lineage = swtpm_format.read_blob_lineage(request.blob) if request.blob else None
        except swtpm_format.FormatError as error:
            log.error("the state blob of type %d is refused: %s", request.state_type, error)
            raise CommandFailed(error.result) from error
        result = await self._mobility.set_blob(request.state_type, state, lineage)
        if result:
            raise CommandFailed(result)
        return control.encode_result()

    async def _set_tail(self, blob: bytes) -> bytes:
        try:
            await self._mobility.set_tail(blob)
        except EngineDied:
            raise
        except VtpmdError as error:
            log.error("%s", error)
            raise CommandFailed(Result.BAD_PARAMETER) from error
        return control.encode_result()
