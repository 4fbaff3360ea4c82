"""The private names and habits of aiohttp that gateway/web/connections.py relies on.

One test per name: after an update of aiohttp, the name of the failing test says which part of connections.py no longer
holds. The tests run aiohttp's own classes, without the gateway's. The last tests read the gateway's source: its list of
private names is this file's, and no other module uses one.
"""

import ast
import asyncio
import inspect
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from aiohttp import HttpVersion11, web, web_protocol
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.test_utils import make_mocked_request
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.web import connections

ROOT = Path(__file__).parents[2]
CONNECTIONS = ROOT / "gateway" / "web" / "connections.py"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"

Refusing = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Wire(asyncio.Transport):
    """A transport that records what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_paused = False
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


class Calls(RequestHandler):
    """aiohttp's connection, with the four methods that the gateway overrides counted."""

    __slots__ = ("counts",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.counts: dict[str, int] = defaultdict(int)

    async def _handle_request(self, request: web.BaseRequest, *rest: Any) -> tuple[web.StreamResponse, bool]:
        self.counts["_handle_request"] += 1
        return await super()._handle_request(request, *rest)

    def _resume_reading_if_drained(self) -> None:
        self.counts["_resume_reading_if_drained"] += 1
        super()._resume_reading_if_drained()

    def _make_error_handler(self, err_info: _ErrInfo) -> Refusing:
        self.counts["_make_error_handler"] += 1

        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            response = web.Response(status=err_info.status, text=f"{err_info.message} {err_info.exc}")
            response.force_close()
            return response

        return refuse


class Server(web.Server):
    """aiohttp's server, which makes connections as the gateway's does."""

    def __call__(self) -> RequestHandler:
        return Calls(self, loop=asyncio.get_running_loop(), **self._kwargs)


class Opened:
    """An open connection of aiohttp's, on a recording transport; its handler waits until it may answer."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.requests: list[web.BaseRequest] = []
        self.server = Server(self._handle, access_log=None, keepalive_timeout=60)
        self.protocol = self.server()
        assert isinstance(self.protocol, Calls)
        self.counts = self.protocol.counts
        self.wire = Wire()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        await self.may_answer.wait()
        return web.Response(text="answered")

    async def receive(self, *parts: bytes) -> None:
        """Let data arrive, and the connection's task run as far as it can."""
        for part in parts:
            self.protocol.data_received(part)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def answer(self) -> None:
        """Let the handler return."""
        self.may_answer.set()
        await self.settle()


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    one = Opened()
    one.protocol.connection_made(one.wire)
    await one.settle()
    yield one
    one.may_answer.set()
    one.protocol.connection_lost(None)
    await one.settle()


Check = Callable[[Opened], Awaitable[None]]
CONTRACT: dict[str, Check] = {}


def relied_on(name: str) -> Callable[[Check], Check]:
    """Register the test of one private name, as Class._name."""

    def register(check: Check) -> Check:
        CONTRACT[name] = check
        return check

    return register


# --- the runner and the server ---------------------------------------------------------------------------------------


class Runner(web.AppRunner):
    """An AppRunner that notes when its two private methods are called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(web.Application(), **options)
        self.made: list[web.Server] = []
        self.servers_at_cleanup: list[web.Server | None] = []

    async def _make_server(self) -> web.Server:
        self.made.append(await super()._make_server())
        return self.made[-1]

    async def _cleanup_server(self) -> None:
        self.servers_at_cleanup.append(self.server)
        await super()._cleanup_server()


@relied_on("AppRunner._make_server")
async def _(opened: Opened) -> None:
    runner = Runner()
    await runner.setup()
    assert runner.made == [runner.server], "setup() uses another server than the one that _make_server returned"
    assert callable(runner.made[0].request_handler)
    assert callable(runner.made[0].request_factory)
    await runner.cleanup()


@relied_on("AppRunner._cleanup_server")
async def _(opened: Opened) -> None:
    runner = Runner()
    await runner.setup()
    server = runner.server
    await runner.cleanup()
    assert runner.servers_at_cleanup == [server], "cleanup() no longer stops the sweep of connections"


@relied_on("AppRunner._kwargs")
async def _(opened: Opened) -> None:
    options = {"keepalive_timeout": 7, "lingering_time": 5.0, "auto_decompress": False, "access_log": None}
    runner = Runner(shutdown_timeout=3, **options)
    assert options.items() <= runner._kwargs.items(), "an option does not reach the gateway's server"
    assert "shutdown_timeout" not in runner._kwargs
    Server(opened._handle, request_factory=opened.server.request_factory, **runner._kwargs)()


@relied_on("Server._kwargs")
async def _(opened: Opened) -> None:
    assert opened.server._kwargs == {"access_log": None, "keepalive_timeout": 60}
    assert opened.protocol.keepalive_timeout == 60


@relied_on("Server._connections")
async def _(opened: Opened) -> None:
    assert list(opened.server._connections) == [opened.protocol], "max_connections counts them"
    other = opened.server()
    assert other not in opened.server._connections, "only open connections count"
    other.connection_made(Wire())
    assert len(opened.server._connections) == 2
    await opened.settle()
    other.connection_lost(None)
    await opened.settle()
    assert list(opened.server._connections) == [opened.protocol], "a lost connection counts for ever"


# --- a connection ----------------------------------------------------------------------------------------------------


@relied_on("RequestHandler._waiter")
async def _(opened: Opened) -> None:
    waiter = opened.protocol._waiter
    assert waiter is not None
    assert not waiter.done(), "pending while the connection waits for a head"
    await opened.receive(GET[:9])
    assert not waiter.done(), "pending until the head is complete"
    opened.protocol.data_received(GET[9:])
    assert waiter.result() is None, "the end of a head is seen too late: its timeout would start"
    await opened.settle()
    assert opened.protocol._waiter is None, "a connection in a request could be evicted"
    await opened.answer()
    assert opened.protocol._waiter is not None, "an idle connection could not be evicted"


@relied_on("RequestHandler._task_handler")
async def _(opened: Opened) -> None:
    task = opened.protocol._task_handler
    assert task is not None
    await opened.receive(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert not task.done(), "a drain would not wait for the answer"
    await opened.answer()
    assert task.done(), "a drain would wait until its end"
    assert opened.protocol._task_handler is None
    assert opened.wire.is_closed


@relied_on("RequestHandler._request_count")
async def _(opened: Opened) -> None:
    fresh = opened.server()
    fresh.connection_made(Wire())
    # Its task begins at once since Python 3.12; before, there is no waiter yet.
    assert (fresh._waiter is not None, fresh._request_count) == (sys.version_info >= (3, 12), 0)
    fresh.data_received(GET[:9])
    assert fresh._request_count == 0, "an incomplete head has no timeout"
    fresh.data_received(GET[9:])
    assert fresh._request_count == 1
    fresh.connection_lost(None)


@relied_on("RequestHandler._current_request")
async def _(opened: Opened) -> None:
    assert getattr(opened.protocol, "_current_request", "gone") is None
    await opened.receive(POST, b"12")
    (request,) = opened.requests
    assert opened.protocol._current_request is request
    assert not request.content.is_eof(), "the rest of a body would count as pipelined requests"
    await opened.receive(b"34")
    assert request.content.is_eof(), "pipelined requests are not bounded"
    await opened.answer()
    assert getattr(opened.protocol, "_current_request", "gone") is None


@relied_on("RequestHandler._messages")
async def _(opened: Opened) -> None:
    await opened.receive(GET)
    assert not opened.protocol._messages
    await opened.receive(GET[:9])
    assert not opened.protocol._messages, "an incomplete head"
    await opened.receive(GET[9:] + GET)
    assert len(opened.protocol._messages) == 2, "complete requests wait here for their turn"
    await opened.answer()
    assert len(opened.requests) == 3


@relied_on("web_protocol._ErrInfo")
async def _(opened: Opened) -> None:
    opened.protocol._messages.append((_ErrInfo(400, ValueError("reason"), "message"), EMPTY_PAYLOAD))
    assert opened.protocol._waiter is not None
    opened.protocol._waiter.set_result(None)
    await opened.settle()
    assert opened.wire.written.startswith(b"HTTP/1.0 400 ")
    assert opened.wire.written.endswith(b"message reason"), "a head that is too large gets no answer of ours"
    assert opened.wire.is_closed


@relied_on("RequestHandler._make_error_handler")
async def _(opened: Opened) -> None:
    assert list(inspect.signature(RequestHandler._make_error_handler).parameters) == ["self", "err_info"]
    await opened.receive(b"NONSENSE\r\n\r\n")
    assert opened.counts["_make_error_handler"] == 1
    assert b" 400 " in opened.wire.written


@relied_on("RequestHandler._handle_request")
async def _(opened: Opened) -> None:
    names = ["self", "request", "start_time", "request_handler"]
    assert list(inspect.signature(RequestHandler._handle_request).parameters) == names
    await opened.receive(GET)
    await opened.answer()
    assert opened.counts["_handle_request"] == 1
    assert opened.wire.written.endswith(b"answered"), "it returns before the answer is written"
    await opened.receive(b"NONSENSE\r\n\r\n")
    assert opened.counts["_handle_request"] == 2, "errors of the parser take the same path"


@relied_on("RequestHandler._close")
async def _(opened: Opened) -> None:
    opened.protocol.close()
    assert opened.protocol._close
    await opened.receive(GET)
    assert opened.requests == [], "what arrives after the close would be served"


@relied_on("RequestHandler._force_close")
async def _(opened: Opened) -> None:
    assert opened.protocol._force_close is False
    opened.protocol._force_close = True
    await opened.receive(GET)
    assert opened.requests == [], "a refused connection would be served"


@relied_on("RequestHandler._upgraded")
@relied_on("RequestHandler._message_tail")
@relied_on("RequestHandler._parser")
async def _(opened: Opened) -> None:
    opened.protocol.data_received(GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n" + GET)
    assert opened.protocol._upgraded
    assert opened.protocol._message_tail == GET
    opened.protocol._upgraded, opened.protocol._message_tail = False, b""
    parser = opened.protocol._parser
    assert parser is not None
    parser.set_upgraded(False)
    messages, upgraded, tail = parser.feed_data(GET)
    assert (len(messages), upgraded, tail) == (1, False, b""), "what follows a request to upgrade would not be served"


@relied_on("RequestHandler._payload_parser")
async def _(opened: Opened) -> None:
    class Parser:
        def __init__(self) -> None:
            self.fed = b""
            self.has_ended = False

        def feed_data(self, data: bytes) -> tuple[bool, bytes]:
            self.fed += data
            return False, b""

        def feed_eof(self) -> None:
            self.has_ended = True

    assert opened.protocol._payload_parser is None
    opened.protocol._payload_parser = parser = Parser()
    await opened.receive(GET)
    assert (opened.requests, parser.fed) == ([], GET), "what arrives after a last answer would be parsed"
    lost = opened.server()
    lost.connection_made(Wire())
    lost._payload_parser = parser
    lost.connection_lost(None)
    assert parser.has_ended, "the connection lingers although its caller has hung up"


@relied_on("RequestHandler._max_msg_queue_size")
async def _(opened: Opened) -> None:
    opened.protocol.data_received(GET * (1 + opened.protocol._max_msg_queue_size))
    assert len(opened.protocol._messages) == opened.protocol._max_msg_queue_size, "the parser has parsed more"


@relied_on("RequestHandler._buffer_paused")
async def _(opened: Opened) -> None:
    assert opened.protocol._buffer_paused is False
    opened.protocol._pause_reading_for_buffer()
    assert opened.protocol._buffer_paused is True


@relied_on("RequestHandler._pause_reading_for_buffer")
async def _(opened: Opened) -> None:
    opened.protocol._pause_reading_for_buffer()
    assert opened.wire.is_paused


@relied_on("RequestHandler._resume_reading_for_buffer")
async def _(opened: Opened) -> None:
    opened.protocol._pause_reading_for_buffer()
    opened.protocol._resume_reading_for_buffer()
    assert not opened.wire.is_paused
    assert opened.protocol._buffer_paused is False


@relied_on("RequestHandler._resume_reading_if_drained")
async def _(opened: Opened) -> None:
    await opened.receive(GET, GET)
    opened.protocol._pause_reading_for_buffer()
    assert opened.counts["_resume_reading_if_drained"] == 0
    await opened.answer()
    assert opened.counts["_resume_reading_if_drained"] == 1, "the next request's turn does not resume the reading"
    assert not opened.wire.is_paused


@relied_on("RequestHandler._next_keepalive_close_time")
async def _(opened: Opened) -> None:
    before = opened.protocol._next_keepalive_close_time
    assert 0 < before - asyncio.get_running_loop().time() <= 60
    await asyncio.sleep(0.01)
    await opened.receive(GET)
    await opened.answer()
    assert opened.protocol._next_keepalive_close_time > before, "idle connections are not evicted oldest first"


# --- a request -------------------------------------------------------------------------------------------------------


@relied_on("BaseRequest._version")
async def _(opened: Opened) -> None:
    await opened.receive(b"GET / HTTP/1.0\r\n\r\n")
    (request,) = opened.requests
    assert request._version == (1, 0)
    request._version = HttpVersion11
    await opened.answer()
    assert opened.wire.written.startswith(b"HTTP/1.1 "), "the answer is in the version of the request's head"


@relied_on("BaseRequest._message")
async def _(opened: Opened) -> None:
    await opened.receive(
        POST + b"1234" + POST.replace(b"Content-Length: 4", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"
    )
    await opened.answer()
    assert [request._message.chunked for request in opened.requests] == [False, True]


# --- one test per name -----------------------------------------------------------------------------------------------


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("aiohttp") == "3.14.5", (
        "connections.py was written against the source of aiohttp 3.14.5: read the differences (web_protocol.py, "
        "base_protocol.py, web_server.py, web_runner.py), then change the version here and in pyproject.toml"
    )


@pytest.mark.parametrize("name", CONTRACT)
async def test_aiohttp_still_has(name: str, opened: Opened) -> None:
    owner, _, attribute = name.partition(".")
    owners: dict[str, object] = {
        "AppRunner": web.AppRunner(web.Application()),
        "Server": opened.server,
        "RequestHandler": opened.protocol,
        "web_protocol": web_protocol,
        "BaseRequest": make_mocked_request("GET", "/"),
    }
    assert hasattr(owners[owner], attribute), f"connections.py uses {name}, which this version of aiohttp lacks"
    await CONTRACT[name](opened)


# --- the gateway's source --------------------------------------------------------------------------------------------

BASES = {
    name: next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("aiohttp."))
    for name, kind in vars(connections).items()
    if inspect.isclass(kind) and kind.__module__ == connections.__name__ and kind.__mro__[1] is not object
    if any(base.__module__.startswith("aiohttp.") for base in kind.__mro__)
}
DOCUMENTED = {"_replace"}  # of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def private_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "aiohttp":
            module = (node.module or "").rpartition(".")[2]
            yield from (f"{module}.{each.name}" for each in node.names if is_private(each.name))


def private_attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the private attributes that the source uses: of which expression, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield ast.unparse(node.value), node.attr


def own_names(kind: ast.ClassDef, base: type) -> set[str]:
    """Return the private names that a class brings along; those that aiohttp's class has too are aiohttp's."""
    names = {node.name for node in kind.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(kind):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            targets = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
            names |= {each.attr for each in targets if isinstance(each.ctx, ast.Store)}
    return {name for name in names if is_private(name) and not hasattr(base, name)}


def used_by_connections() -> Iterator[str]:
    tree = ast.parse(CONNECTIONS.read_text())
    yield from private_imports(tree)
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            for owner, name in private_attributes(node):
                yield f"BaseRequest.{name}" if owner == "request" else f"{owner}.{name}"
        elif node.name in BASES:
            base = getattr(connections, node.name).__mro__[1]
            own = own_names(node, base)
            overridden = {
                each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            yield from (f"{BASES[node.name]}.{name}" for name in overridden - own if is_private(name))
            for owner, name in private_attributes(node):
                if owner in ("self", "super()") and name not in own:
                    yield f"{BASES[node.name]}.{name}"
                elif owner not in ("self", "super()"):
                    yield f"{owner}.{name}"


def test_the_list_of_private_names_is_complete_and_not_stale() -> None:
    assert set(BASES.values()) == {"AppRunner", "Server", "RequestHandler", "StreamResponse"}
    used = set(used_by_connections())
    assert not used - set(CONTRACT), "connections.py uses these: add their tests"
    assert not set(CONTRACT) - used, "connections.py does not use these any more: remove their tests"


OTHERS = [path for path in sorted((ROOT / "gateway").rglob("*.py")) if path != CONNECTIONS]
USERS = [path for path in OTHERS if "aiohttp" in path.read_text()]


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name_of_aiohttp(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not list(private_imports(tree))
    strangers = [f"{owner}.{name}" for owner, name in private_attributes(tree) if owner not in ("self", "cls")]
    assert not strangers, "give connections.py a function for it"
    aiohttps = {
        (each.asname or each.name).partition(".")[0]
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "aiohttp")
        or (isinstance(node, ast.Import) and any(each.name.partition(".")[0] == "aiohttp" for each in node.names))
        for each in node.names
    }
    heirs = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).partition(".")[0] in aiohttps for base in node.bases)
    ]
    assert not heirs, "a class of aiohttp's is derived from: its `self._…` may be aiohttp's; that is for connections.py"
