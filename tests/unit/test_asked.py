"""What the engine asks is answered whatever happens: QEMU waits for it.

A session that does what it should is tested in tests/system; the one here fails when told to.
"""

import asyncio
import logging

import pytest

from vtpmd.core.link import LinkQuestion
from vtpmd.daemon.asked import Asked
from vtpmd.daemon.engine import Answer, EngineDied, Question
from vtpmd.daemon.mobility import Mobility
from vtpmd.errors import VtpmdError
from vtpmd.wire.tpm import Result


class Failing(Mobility):
    """Sessions that fail at all that they are asked."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattribute__(self, name: str) -> object:
        if name.startswith("_"):
            return super().__getattribute__(name)
        raise self._error


QUESTIONS = [number for number in LinkQuestion if not number.is_news]
NEWS = [LinkQuestion.TELL_INIT, LinkQuestion.TELL_RESTORED]


def answer_of(number: LinkQuestion, error: Exception) -> Answer:
    asked = Asked(Failing(error), lambda: None)
    return asyncio.run(asked.answer(Question(number, 1, b"")))


@pytest.mark.parametrize("number", QUESTIONS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("secret"), ["{} failed: ValueError"]),
        (VtpmdError("the disk is full"), ["the disk is full"]),
        (EngineDied("which is said elsewhere"), []),
    ],
    ids=["a bug", "an error", "the engine's death"],
)
def test_what_fails_is_answered_and_said_without_a_secret(
    caplog: pytest.LogCaptureFixture, number: LinkQuestion, error: Exception, said: list[str]
) -> None:
    with caplog.at_level(logging.INFO):
        answer = answer_of(number, error)
    is_refused_tail = number is LinkQuestion.ASK_TAIL and not isinstance(error, EngineDied)
    assert answer == Answer(Result.BAD_PARAMETER if is_refused_tail else Result.FAIL)
    assert caplog.messages == [text.format(number.name) for text in said]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("number", NEWS, ids=lambda number: number.name)
def test_what_fails_after_an_answer_is_said_without_a_secret(
    caplog: pytest.LogCaptureFixture, number: LinkQuestion
) -> None:
    news = Question(number, 0, bytes(16))  # as long as two generations
    for error, said in [
        (ValueError("secret"), f"{number.name} failed: ValueError"),
        (VtpmdError("the disk is full"), "the disk is full"),
    ]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            Asked(Failing(error), lambda: None).hear(news)
        assert caplog.messages == [said]
        assert "secret" not in caplog.text


def test_where_a_bug_is_can_be_looked_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        answer_of(LinkQuestion.ASK_INIT, ValueError("which"))
    assert "ValueError: which" in caplog.text
