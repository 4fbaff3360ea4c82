"""What aiohttp's own listener lacks: errors of the HTTP parser in JSON, an end to answers that nobody reads, and a look
at who serves a unix socket.
"""

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway import api, errors

log = logging.getLogger(__name__)


class JsonRunner(web.AppRunner):
    """An AppRunner whose connections answer malformed HTTP as everything else: in JSON, with a request id."""

    def __init__(self, app: web.Application, *, answer_timeout_s: float, **options: Any) -> None:
        """`answer_timeout_s`: how long a caller may leave an answer unread before the connection is cut."""
        super().__init__(app, access_log=None, **options)
        self._answer_timeout_s = answer_timeout_s

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            self._answer_timeout_s, made.request_handler, request_factory=made.request_factory, **self._kwargs
        )


class _Server(web.Server):
    def __init__(self, answer_timeout_s: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answer_timeout_s = answer_timeout_s

    def __call__(self) -> RequestHandler:
        return _Connection(self._answer_timeout_s, self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ("_answer_timeout_s", "_cut")

    def __init__(self, answer_timeout_s: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answer_timeout_s = answer_timeout_s
        self._cut: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The transport holds more than it likes: the caller does not read. aiohttp would wait for ever."""
        super().pause_writing()
        if self.transport is not None:
            self._cut = self._loop.call_later(self._answer_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the HTTP parser refused, and log a line where aiohttp logs a traceback."""
        request_id = api.sane_request_id([])
        if status == 400:
            log.info("malformed HTTP: %s", type(exc).__name__)
            response = api.refuse(errors.MalformedHttp())
        else:
            log.error("request %s failed outside its handler", request_id, exc_info=exc)
            response = api.refuse(errors.InternalError())
        response.headers[api.REQUEST_ID_HEADER] = request_id
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.error(*args, **kwargs)


def is_served(path: str) -> bool:
    """Whether somebody accepts connections on the unix socket; False for one whose process is dead, and for none."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(0)  # it is accepted at once, or the queue of one who lives is full
        try:
            caller.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for ourselves, among those who ask so too. Raises BlockingIOError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
