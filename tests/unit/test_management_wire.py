"""The management socket's codec: what is a command, what is answered, which state allows what.

Properties, whatever a client sends: it is understood the same in whatever pieces it comes; each
answer is one line of JSON; no more is held than one message; after a broken line the next is
understood.
"""

import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpmd.wire import management
from vtpmd.wire.management import (
    CLOSED,
    INTEGER_MAX,
    INTEGER_MIN,
    MESSAGE_BYTES_MAX,
    NEED_DATA,
    NESTING_MAX,
    TRANSITIONS,
    Command,
    Connection,
    Error,
    ErrorClass,
    Event,
    Greeting,
    Id,
    LocalProtocolError,
    Negotiate,
    Negotiated,
    Received,
    Refusal,
    Return,
    Sent,
    State,
)

NEGOTIATE = b'{"execute": "qmp_capabilities"}'
QUERY = b'{"execute": "query-status", "id": 7}'
QUERY_COMMAND = Command("query-status", {}, Id(7))


def connection_in(state: State) -> Connection:
    """Return a connection that came to a state by its own rules."""
    connection = Connection()
    if state is State.CLOSED:
        connection.send(Refusal("no"))
    if state in (State.NEGOTIATING, State.READY):
        connection.send(Greeting({}))
    if state is State.READY:
        connection.send(Negotiated(None))
    assert connection.state is state
    return connection


def received(connection: Connection, *pieces: bytes) -> list[Received]:
    """Return what a connection makes of some reads, up to and with CLOSED."""
    found: list[Received] = []
    for piece in pieces:
        connection.receive_data(piece)
        while (event := connection.next_event()) is not NEED_DATA:
            found.append(event)
            if event is CLOSED:
                break
    return found


def described(data: bytes, state: State = State.READY) -> str:
    """Return how the one error in some data is described; the connection goes on."""
    connection = connection_in(state)
    (error,) = received(connection, data)
    assert isinstance(error, Error)
    assert error.error_class is ErrorClass.GENERIC
    assert received(connection, b"\n" + QUERY)
    return error.description


@pytest.mark.parametrize(
    ("sent", "command"),
    [
        (b'{"execute":"a"}', Command("a", {}, None)),
        (b'\r\n {"execute" : "a"}\n', Command("a", {}, None)),
        (b'{"execute":"a","arguments":{"b":[{}]}}', Command("a", {"b": [{}]}, None)),
        (b'{"id":null,"execute":"a"}', Command("a", {}, Id(None))),
        (b'{"execute":"a","id":{"b":[]}}', Command("a", {}, Id({"b": []}))),
        (rb'{"execute":"\"}{\\","id":"]"}', Command('"}{\\', {}, Id("]"))),
        ('{"execute":"ä\\u00e4"}'.encode(), Command("ää", {}, None)),
    ],
)  # fmt: skip
def test_command(sent: bytes, command: Command) -> None:
    assert received(connection_in(State.READY), sent) == [command]


def test_commands_need_nothing_between_them() -> None:
    commands = received(connection_in(State.READY), QUERY * 3 + b"\n" + QUERY)
    assert commands == [QUERY_COMMAND] * 4


@pytest.mark.parametrize("number", [INTEGER_MIN, -1, 0, INTEGER_MAX])
def test_integers_of_64_bits(number: int) -> None:
    (command,) = received(connection_in(State.READY), b'{"execute":"a","id":%d}' % number)
    assert command == Command("a", {}, Id(number))


@pytest.mark.parametrize(
    ("sent", "description"),
    [
        (b"query-status\n", "JSON is malformed at character 0: Expecting value"),
        (b"42\n", "a message must be a JSON object"),
        (b"}\n", "JSON is malformed at character 0: Expecting value"),
        (b"[]", "a message must be a JSON object"),
        (b"{]", "JSON is malformed at character 1"),
        (b'{"execute": "a', "JSON is malformed at character 12: Unterminated string"),
        (b'{"execute": "a"}'.replace(b"a", b"\xff"), "a message is not UTF-8"),
        (rb'{"execute": "\ud800"}', "a message is not UTF-8"),
        (b'{"execute": "a\x01"}', "JSON is malformed at character 14: Invalid control character"),
        (b"{}", "a message needs the member 'execute', a string"),
        (b'{"execute": 1}', "a message needs the member 'execute', a string"),
        (b'{"execute":"a","arguments":[]}', "the member 'arguments' of a message must be"),
        (b'{"exec-oob": "a"}', "the member 'exec-oob' of a message is unknown"),
        (b'{"execute": "a", "execute": "b"}', "the member 'execute' of an object is there twice"),
        (b'{"arguments": {"b": 1, "b": 1}}', "the member 'b' of an object is there twice"),
        (b'{"id": NaN}', "NaN is no JSON"),
        (b'{"id": -Infinity}', "-Infinity is no JSON"),
        (b'{"id": 1e999}', "a number is too large"),
        (b'{"id": %d}' % (INTEGER_MAX + 1), "an integer does not fit into 64 bits"),
        (b'{"id": %d}' % (INTEGER_MIN - 1), "an integer does not fit into 64 bits"),
        (b'{"id": ' + b"9" * 60_000 + b"}", "an integer does not fit into 64 bits"),
    ],
)  # fmt: skip
def test_what_is_no_command_is_answered(sent: bytes, description: str) -> None:
    assert described(sent + b"\n").startswith(description)


def test_an_error_has_the_id_where_the_message_has_one() -> None:
    connection = connection_in(State.READY)
    (error,) = received(connection, b'{"id": 5}')
    assert isinstance(error, Error)
    assert json.loads(connection.send(error))["id"] == 5
    (error,) = received(connection, b'{"id": ]}')
    assert isinstance(error, Error)
    assert "id" not in json.loads(connection.send(error))


def test_nesting_may_reach_its_limit_and_no_further() -> None:
    def nested(levels: int) -> bytes:
        return b'{"execute":"a","id":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    (command,) = received(connection_in(State.READY), nested(NESTING_MAX))
    assert isinstance(command, Command)
    assert described(nested(NESTING_MAX + 1)) == f"JSON is nested deeper than {NESTING_MAX}"
    assert described(nested(30_000)) == f"JSON is nested deeper than {NESTING_MAX}"


def padded(size: int) -> bytes:
    """Return a command of so many bytes."""
    frame = b'{"execute":"a","id":"%s"}'
    return frame % (b"x" * (size - len(frame) + 2))


@pytest.mark.parametrize("follows", [b"", QUERY])
def test_message_may_reach_its_limit_and_no_further(follows: bytes) -> None:
    commands = received(connection_in(State.READY), padded(MESSAGE_BYTES_MAX) + follows)
    assert isinstance(commands[0], Command)
    connection = connection_in(State.READY)
    found = received(connection, padded(MESSAGE_BYTES_MAX + 1) + follows, QUERY)
    assert [type(each) for each in found] == [Error, type(CLOSED), type(CLOSED)]
    assert connection.state is State.CLOSED


@pytest.mark.parametrize("endless", [b"x", b"[", b'{"a":', b'{"'], ids=repr)
def test_message_without_an_end_closes_the_connection(endless: bytes) -> None:
    connection = connection_in(State.READY)
    assert received(connection, endless, b" 1" * (MESSAGE_BYTES_MAX // 2 - 10)) == []
    connection.receive_data(b" 1" * 20)
    error = connection.next_event()
    assert isinstance(error, Error)
    assert error.description.startswith(f"a message has more than {MESSAGE_BYTES_MAX} bytes")
    connection.send(error)
    connection.receive_data(QUERY)
    assert connection.next_event() is CLOSED


def test_white_space_is_not_collected() -> None:
    connection = connection_in(State.READY)
    assert received(connection, *[b" \n\r\t" * 10_000] * 4, QUERY) == [QUERY_COMMAND]


def test_what_came_before_the_end_is_answered() -> None:
    connection = connection_in(State.READY)
    connection.receive_data(QUERY + QUERY + b'{"execute"')
    connection.receive_data(b"")
    connection.receive_data(QUERY)
    assert connection.next_event() == QUERY_COMMAND
    connection.send(Return({}, Id(7)))
    assert connection.next_event() == QUERY_COMMAND
    assert connection.next_event() is CLOSED
    assert connection.next_event() is CLOSED


@pytest.mark.parametrize("arguments", [b"", b',"arguments":{}', b',"arguments":{"enable":[]}'])
def test_negotiation(arguments: bytes) -> None:
    connection = connection_in(State.NEGOTIATING)
    sent = b'{"execute":"qmp_capabilities"%s,"id":1}' % arguments
    assert received(connection, sent) == [Negotiate(Id(1))]
    with pytest.raises(LocalProtocolError):
        connection.send(Event("TOO_EARLY", {}, 0))
    assert json.loads(connection.send(Negotiated(Id(1)))) == {"return": {}, "id": 1}
    assert connection.state is State.READY


@pytest.mark.parametrize("arguments", [b'{"enable":["oob"]}', b'{"enable":1}', b'{"disable":[]}'])
def test_negotiation_of_what_there_is_not(arguments: bytes) -> None:
    connection = connection_in(State.NEGOTIATING)
    (error,) = received(connection, b'{"execute":"qmp_capabilities","arguments":%s}' % arguments)
    assert isinstance(error, Error)
    connection.send(error)
    assert received(connection, NEGOTIATE) == [Negotiate(None)]


@pytest.mark.parametrize(
    ("state", "sent"), [(State.NEGOTIATING, QUERY), (State.READY, NEGOTIATE)], ids=["early", "late"]
)
def test_negotiation_comes_first_and_once(state: State, sent: bytes) -> None:
    (error,) = received(connection_in(state), sent)
    assert isinstance(error, Error)
    assert error.error_class is ErrorClass.COMMAND_NOT_FOUND


MESSAGES: list[Sent] = [
    Greeting({"qemu": {}}),
    Negotiated(Id("x")),
    Return([1], None),
    Error(ErrorClass.COMMAND_NOT_FOUND, "no", Id(None)),
    Refusal("no"),
    Event("ROUND", {"number": 1}, 1_700_000_000_000_042),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("state", State)
def test_states_allow_what_the_table_says_and_nothing_else(state: State, message: Sent) -> None:
    connection = connection_in(state)
    if (state, type(message)) in TRANSITIONS:
        connection.send(message)
        assert connection.state is TRANSITIONS[state, type(message)]
    else:
        with pytest.raises(
            LocalProtocolError, match=f"{type(message).__name__} while {state.name}"
        ):
            connection.send(message)
        assert connection.state is state


def test_an_error_has_its_exit_status_unless_that_is_1() -> None:
    sent = {
        status: json.loads(
            connection_in(State.READY).send(Error(ErrorClass.GENERIC, "no", exit_status=status))
        )
        for status in (1, 5)
    }
    error = {"class": "GenericError", "desc": "no"}
    assert sent == {1: {"error": error}, 5: {"error": {**error, "exit-status": 5}}}


def test_messages_as_they_are_sent() -> None:
    connection = Connection()
    sent = [connection.send(message) for message in MESSAGES if not isinstance(message, Refusal)]
    sent.append(Connection().send(Refusal("no")))
    assert all(line.endswith(b"\r\n") and line.count(b"\n") == 1 for line in sent)
    assert [json.loads(line) for line in sent] == [
        {"QMP": {"version": {"qemu": {}}, "capabilities": []}},
        {"return": {}, "id": "x"},
        {"return": [1]},
        {"error": {"class": "CommandNotFound", "desc": "no"}, "id": None},
        {
            "event": "ROUND",
            "data": {"number": 1},
            "timestamp": {"seconds": 1_700_000_000, "microseconds": 42},
        },
        {"error": {"class": "GenericError", "desc": "no"}},
    ]


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()], ids=["set", "nan", "object"])
def test_what_json_cannot_say_leaves_the_state_as_it_was(value: object) -> None:
    connection = connection_in(State.READY)
    with pytest.raises((TypeError, ValueError)):
        connection.send(Return(value, None))
    assert connection.send(Return({}, None)) == b'{"return": {}}\r\n'


def test_a_clients_words_are_shown_short_and_in_one_line() -> None:
    assert management.shown("a\nb\x1b\u2028") == "'a?b??'"
    assert len(management.shown("x" * 10_000)) == management.WORD_LENGTH_MAX + 3


FRAGMENTS = st.sampled_from(
    [QUERY, NEGOTIATE, b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b" ", b"null", b'{"execute":"']
)
STREAMS = st.lists(FRAGMENTS | st.binary(max_size=8), max_size=30).map(b"".join)


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    """Yield the pieces of some data, none of them empty."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    for start, end in pairwise(edges):
        yield data[start:end]


@given(STREAMS, st.lists(st.integers(0, 500), max_size=20))
def test_pieces_do_not_matter(data: bytes, places: list[int]) -> None:
    whole = received(connection_in(State.READY), *([data] if data else []))
    assert received(connection_in(State.READY), *cut(data, places)) == whole
    assert received(connection_in(State.READY), *cut(data, list(range(len(data))))) == whole


@given(STREAMS)
def test_after_any_line_the_next_is_understood(data: bytes) -> None:
    """A line's end outside of brackets ends what was broken; brackets may have been left open."""
    connection = connection_in(State.READY)
    # Two lines' ends: the first may be the character after a backslash. A bracket that was opened
    # must be closed, which takes at most one each.
    repaired = data + b"\n\n" + b"]" * (data.count(b"{") + data.count(b"[")) + b"\n\n"
    events = received(connection, repaired, QUERY)
    assert events[-1] == QUERY_COMMAND


@given(STREAMS)
def test_every_answer_is_one_line_of_json(data: bytes) -> None:
    connection = connection_in(State.READY)
    for event in received(connection, *([data] if data else [])):
        if isinstance(event, Error):
            line = connection.send(event)
            assert line.count(b"\n") == 1
            assert json.loads(line)["error"]["class"] in list(ErrorClass)
