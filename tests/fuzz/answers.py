"""A strict parser of HTTP answers: every deviation that a lenient client would accept is an error."""

import re
from typing import NamedTuple

from multidict import CIMultiDict

_HEAD = re.compile(
    rb"HTTP/1\.[01] ([1-5][0-9]{2}) [\x20-\x7e]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\x20-\x7e]*\r\n)*)\r\n"
)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class NotHttp(Exception):
    """Raised for bytes that are no HTTP answer with a Content-Length."""


class Answer(NamedTuple):
    """A final (not 1xx) answer."""

    status: int
    headers: "CIMultiDict[str]"
    body: bytes


class AnswerReader:
    """A parser that splits the bytes of a connection into final answers; it skips an interim 100."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[Answer]:
        """Take bytes; return the answers that are complete. Raises NotHttp."""
        self.rest += data
        answers = []
        while answer := self._take():
            answers.append(answer)
        return answers

    def _take(self) -> Answer | None:
        while self.rest.startswith(_CONTINUE):
            self.rest = self.rest[len(_CONTINUE) :]
        end = self.rest.find(b"\r\n\r\n") + 4
        if end < 4:
            if self.rest and not self.rest.startswith(b"HTTP/1."[: len(self.rest)]):
                raise NotHttp(repr(self.rest[:200]))
            return None
        head = _HEAD.fullmatch(self.rest, 0, end)
        if head is None:
            raise NotHttp(repr(self.rest[:end]))
        lines = [line.partition(": ") for line in head[2].decode("ascii").splitlines()]
        headers = CIMultiDict([(name, value) for name, _, value in lines])
        lengths = headers.getall("Content-Length", [])
        if len(lengths) != 1 or not lengths[0].isdecimal():
            raise NotHttp(f"Content-Length is {lengths}")
        whole = end + int(lengths[0])
        if len(self.rest) < whole:
            return None
        body, self.rest = self.rest[end:whole], self.rest[whole:]
        return Answer(int(head[1]), headers, body)
