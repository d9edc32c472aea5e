"""The engine's codec of the control channel, called as its server calls it."""

from vtpmd._core import ffi, lib

STOPPED: int = lib.CONTROL_STOPPED
RUNNING: int = lib.CONTROL_RUNNING
FIELDS = (
    *("flags", "type", "offset", "locality", "wanted_bytes", "retries", "data_bytes"),
    *("number", "data"),
)


class Codec:
    """The codec, for one client."""

    def __init__(self) -> None:
        """Begin with a client that has sent nothing."""
        self._control = ffi.gc(ffi.new("struct control *"), lib.control_deinit)
        lib.control_init(self._control)
        self._event = ffi.new("struct control_event *")

    def receive(self, data: bytes, power: int = RUNNING) -> int:
        """Take what one read has brought; return the verdict."""
        lib.control_receive(self._control, data, len(data), ffi.NULL, 0)
        return int(lib.control_next(self._control, power, self._event))

    @property
    def result(self) -> int:
        """What was refused is answered with this."""
        return int(self._event.result)

    def fields(self) -> dict[str, int | bytes]:
        """Return what the request says, but for fields that are 0 or empty."""
        found = {name: getattr(self._event, name) for name in FIELDS}
        size = found["data_bytes"]
        found["data"] = bytes(ffi.buffer(found["data"], size)) if found["data"] else b""
        return {name: value for name, value in found.items() if value}

    def answer(self, name: str, *arguments: object) -> bytes:
        """Answer with one of the functions; return what is sent."""
        getattr(lib, f"control_answer_{name}")(self._control, *arguments)
        return self.sent()

    def answer_state_blob(self, *pieces: bytes, is_encrypted: bool = False) -> bytes:
        """Answer with a state blob that is in pieces."""
        kept = [ffi.from_buffer("uint8_t[]", piece) for piece in pieces]
        vectors = [(buffer, len(piece)) for buffer, piece in zip(kept, pieces, strict=True)]
        vectors = ffi.new("struct iovec[]", vectors)
        return self.answer("state_blob", vectors, len(pieces), is_encrypted)

    def answer_info(self, text: bytes) -> bytes:
        """Answer with a text."""
        kept = ffi.new("char[]", text)
        return self.answer("info", kept)

    def sent(self) -> bytes:
        """Send all that there is, each piece in two steps, and return it."""
        vectors, sent = ffi.new("struct iovec **"), b""
        while lib.control_output(self._control, vectors):
            first = vectors[0][0]
            length = max(1, first.iov_len - 1)
            sent += bytes(ffi.buffer(first.iov_base, length))
            lib.control_sent(self._control, length)
        return sent


def asked(data: bytes, power: int = STOPPED) -> Codec:
    """Return a codec whose client has sent a request, and waits."""
    codec = Codec()
    assert codec.receive(data, power) == lib.CONTROL_REQUEST
    return codec
