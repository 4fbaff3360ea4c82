"""What aiohttp's own listener lacks: errors of the HTTP parser in JSON, and an end to answers that nobody reads."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway import api, errors

log = logging.getLogger(__name__)


class JsonRunner(web.AppRunner):
    """An AppRunner whose connections answer malformed HTTP as everything else: in JSON, with a request id."""

    def __init__(
        self,
        app: web.Application,
        *,
        answer_timeout_s: float,
        on_refused: Callable[[int, str], None] = lambda status, code: None,
        **options: Any,
    ) -> None:
        """`answer_timeout_s`: how long a caller may leave an answer unread before the connection is cut.

        `on_refused` is told status and code of what no handler sees.
        """
        super().__init__(app, access_log=None, **options)
        self._answer_timeout_s = answer_timeout_s
        self._on_refused = on_refused

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            self._answer_timeout_s,
            self._on_refused,
            made.request_handler,
            request_factory=made.request_factory,
            **self._kwargs,
        )


class _Server(web.Server):
    def __init__(
        self, answer_timeout_s: float, on_refused: Callable[[int, str], None], *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._answer_timeout_s = answer_timeout_s
        self._on_refused = on_refused

    def __call__(self) -> RequestHandler:
        return _Connection(self._answer_timeout_s, self._on_refused, self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ("_answer_timeout_s", "_cut", "_on_refused")

    def __init__(
        self, answer_timeout_s: float, on_refused: Callable[[int, str], None], *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._answer_timeout_s = answer_timeout_s
        self._on_refused = on_refused
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
        self._on_refused(response.status, response[api.CODE])
        response.headers[api.REQUEST_ID_HEADER] = request_id
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.error(*args, **kwargs)
