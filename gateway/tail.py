"""`python -m gateway tail`, both ends: a stream of lines on the operations listener, and the terminal that shows them.

GET /tail?account=42&list_number=%2B18005551000&whole=1 → 200 application/x-ndjson, for as long as both live: one object
a line (watching.Line, watching.Missed), an empty line as a sign of life. `whole=1` takes `Authorization: Bearer` with
the gateway's GATEWAY_TAIL_TOKEN. Refusals are {"error": "<sentence>"} with 400, 403 or 503.
"""

import asyncio
import hmac
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from gateway.config import PREFIX
from gateway.runtime import RUNTIME
from gateway.watching import (
    MOST_WATCHERS,
    SIGN_OF_LIFE,
    SIGN_OF_LIFE_S,
    Choice,
    Line,
    Missed,
    TooManyWatchers,
)

PATH = "/tail"
UNREAD_S = 30.0  # lines that nobody reads for so long: the stream is cut
RETRY_S = 1.0  # before a gateway is asked again
CONNECT_TIMEOUT_S = 3.0
SILENT_S = 3 * SIGN_OF_LIFE_S  # without even a sign of life the other end is gone
RELAYED_LINES = 1_000  # between the workers and a slow reader; beyond, the workers' own bounds hold
_is_number = re.compile(r"\+[1-9][0-9]{1,14}").fullmatch
_is_id = re.compile(r"[0-9]{1,18}").fullmatch


class TailError(Exception):
    """There is nothing to be watched; the text says why and what to do."""


# The gateway's end


class _Refused(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def serve_tail(request: web.Request) -> web.StreamResponse:
    """Stream what this process publishes, and what became of it."""
    runtime = request.app[RUNTIME]
    try:
        choice = _read_choice(request, runtime.settings.tail_token)
        with runtime.watchers.watch(choice) as watcher:
            return await _stream(request, watcher.next_lines, lambda: watcher.is_over)
    except TooManyWatchers:
        return _refuse(_too_many())
    except _Refused as refused:
        return _refuse(refused)


async def end_tails(app: web.Application) -> None:
    """Of aiohttp's on_shutdown: a stream would keep the listener from closing."""
    app[RUNTIME].watchers.close()


class Relay:
    """The same for `serve --workers`: the streams of all workers as one."""

    def __init__(self, sockets: Sequence[Path], tail_token: str) -> None:
        """`sockets` are where the workers' operations listeners are."""
        self._sockets = sockets
        self._tail_token = tail_token
        self._ends: set[asyncio.Event] = set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Stream what all workers publish."""
        try:
            _read_choice(request, self._tail_token)
            if len(self._ends) >= MOST_WATCHERS:
                raise _too_many()
        except _Refused as refused:
            return _refuse(refused)
        end = asyncio.Event()
        self._ends.add(end)
        lines: asyncio.Queue[bytes] = asyncio.Queue(RELAYED_LINES)
        copies = [asyncio.create_task(_copy(socket, request, lines)) for socket in self._sockets]
        try:
            return await _stream(request, lambda: _next_of(lines, end), end.is_set)
        finally:
            self._ends.discard(end)
            for copy in copies:
                copy.cancel()
            await asyncio.wait(copies)

    async def end(self, _app: web.Application) -> None:
        """Of aiohttp's on_shutdown."""
        for end in self._ends:
            end.set()


async def _copy(socket: Path, request: web.Request, lines: "asyncio.Queue[bytes]") -> None:
    """Put a worker's lines in the queue; one that dies will be there again."""
    url = URL.build(scheme="http", host="worker", path=PATH, query=request.query)
    headers = CIMultiDict((hdrs.AUTHORIZATION, value) for value in request.headers.getall(hdrs.AUTHORIZATION, []))
    while True:
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with (
                _session(aiohttp.UnixConnector(path=str(socket))) as session,
                session.get(url, headers=headers) as response,
            ):
                if response.status == 200:
                    async for line in _whole_lines(response.content):
                        if line:
                            await lines.put(line + b"\n")
        await asyncio.sleep(RETRY_S)


async def _next_of(lines: "asyncio.Queue[bytes]", end: asyncio.Event) -> bytes:
    getting, ending = asyncio.create_task(lines.get()), asyncio.create_task(end.wait())
    done, pending = await asyncio.wait({getting, ending}, timeout=SIGN_OF_LIFE_S, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return getting.result() if getting in done else SIGN_OF_LIFE


async def _stream(
    request: web.Request, next_lines: Callable[[], Awaitable[bytes]], is_over: Callable[[], bool]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "application/x-ndjson", hdrs.CACHE_CONTROL: "no-store"})
    try:
        await response.prepare(request)
        await response.write(SIGN_OF_LIFE)  # the head goes out with the first octet, and the caller waits for it
        while not is_over():
            lines = await next_lines()
            async with asyncio.timeout(UNREAD_S):
                await response.write(lines)
    except (ConnectionError, TimeoutError):  # who watched has gone, or does not read
        if request.transport is not None:
            request.transport.abort()
    return response


def _read_choice(request: web.Request, tail_token: str) -> Choice:
    query = request.query
    account_id, list_number, whole = query.get("account"), query.get("list_number"), query.get("whole")
    if account_id is not None and not _is_id(account_id):
        raise _Refused(400, "account must be an account's id, as `account list` shows it")
    if list_number is not None and not _is_number(list_number):
        raise _Refused(400, "list_number must be an E.164 phone number such as +18005551000")
    if whole is not None:
        _check_token(request.headers.getall(hdrs.AUTHORIZATION, []), tail_token)
    return Choice(int(account_id) if account_id else None, list_number, whole is not None)


def _check_token(sent: list[str], tail_token: str) -> None:
    """The listener is open to probes and monitoring; texts and numbers are not for them."""
    if not tail_token:
        raise _Refused(403, f"Texts and whole numbers are shown to nobody: this gateway has no {PREFIX}TAIL_TOKEN")
    # Octets over 127 in a header reach us as lone surrogates.
    token = "".join(sent).removeprefix("Bearer ").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(token, tail_token.encode()):
        raise _Refused(403, f"Texts and whole numbers are shown to those who send the gateway's {PREFIX}TAIL_TOKEN")


def _too_many() -> _Refused:
    return _Refused(503, f"{MOST_WATCHERS} watch this gateway already. End another tail first")


def _refuse(refused: _Refused) -> web.Response:
    return web.json_response({"error": str(refused)}, status=refused.status)


# The terminal's end


class Tail:
    """Watches gateways and shows what they tell, until it is stopped, has shown enough, or nobody reads."""

    def __init__(
        self, gateways: Sequence[URL], choice: Choice, *, token: str, limit: int | None, as_json: bool
    ) -> None:
        """`gateways`: their operations listeners. A name with several addresses is as many gateways."""
        self._gateways = gateways
        self._query = {
            name: str(value)
            for name, value in (("account", choice.account_id), ("list_number", choice.list_number))
            if value is not None
        } | ({"whole": "1"} if choice.whole else {})
        self._headers = {hdrs.AUTHORIZATION: f"Bearer {token}"} if token and choice.whole else {}
        self._left = limit
        self._as_json = as_json
        self._stopped = asyncio.Event()
        self._unreachable: set[str] = set()

    async def run(self) -> None:
        """Raises TailError when a gateway refuses."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stopped.set)
        stopped = asyncio.create_task(self._stopped.wait())
        watching: dict[URL, asyncio.Task[None]] = {}
        try:
            async with _session() as session:
                while not self._stopped.is_set():
                    for address in await self._addresses():
                        if address not in watching:
                            watching[address] = asyncio.create_task(self._watch(session, address))
                    done, _ = await asyncio.wait(
                        {stopped, *watching.values()}, timeout=RETRY_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    for address in [address for address, task in watching.items() if task in done]:
                        watching.pop(address).result()  # raises what ended it; else it is asked again
        except BrokenPipeError:
            # Or Python complains when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            stopped.cancel()
            for task in watching.values():
                task.cancel()
            await asyncio.wait([stopped, *watching.values()])

    async def _addresses(self) -> list[URL]:
        """All addresses of all gateways; asked again and again, for behind a name they come and go."""
        loop = asyncio.get_running_loop()
        found = []
        for gateway in self._gateways:
            host, port = gateway.host or "", gateway.port or 80
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, TimeoutError) as error:
                self._note(str(gateway), f"has no address: {error}")
                continue
            one_family = [info for info in infos if info[0] == infos[0][0]]  # of one host, the other is the same again
            found += [gateway.with_host(str(address[0])) for *_, address in one_family]
        return found

    async def _watch(self, session: aiohttp.ClientSession, gateway: URL) -> None:
        """Show one gateway's lines until they end, for whatever reason; return in time for another try."""
        try:
            async with session.get(gateway.with_path(PATH).with_query(self._query), headers=self._headers) as response:
                if response.status != 200:
                    await _raise_refusal(gateway, response)
                self._unreachable.discard(str(gateway))
                print(f"watching {gateway}", file=sys.stderr)
                async for line in _whole_lines(response.content):
                    if line:
                        self._show(line)
                        if self._left == 0:
                            self._stopped.set()
                            return
        except BrokenPipeError:
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._note(str(gateway), f"cannot be reached: {str(error) or type(error).__name__}")
        else:
            self._note(str(gateway), "has ended")
        await asyncio.sleep(RETRY_S)

    def _note(self, gateway: str, what: str) -> None:
        if gateway not in self._unreachable:  # said once, until it is back
            self._unreachable.add(gateway)
            print(f"{gateway} {what}; trying again", file=sys.stderr)

    def _show(self, line: bytes) -> None:
        if line.startswith(b'{"missed":'):
            missed = msgspec.json.decode(line, type=Missed).missed
            print(f"{missed} AMQP messages went by unseen: there were more than can be shown", file=sys.stderr)
            if not self._as_json:
                return
        elif self._left is not None:
            self._left -= 1
        shown = line if self._as_json else as_text(msgspec.json.decode(line, type=Line)).encode()
        sys.stdout.buffer.write(shown + b"\n")
        sys.stdout.buffer.flush()


def as_text(line: Line) -> str:
    """One line for people: when, what became of it, which message, whose, from where to where, and what."""
    text = f"{line.body_characters} characters" if isinstance(line.body, msgspec.UnsetType) else _printable(line.body)
    return (
        f"{line.accepted_at[11:23]}  {line.outcome:8}  {line.id}  account {line.account_id}  "
        f"{line.list_number} → {line.to}  {text}"
    )


def _printable(text: str) -> str:
    """Nothing that a terminal would obey, or that would reorder or break the line."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


async def _raise_refusal(gateway: URL, response: aiohttp.ClientResponse) -> NoReturn:
    try:
        sentence = msgspec.json.decode(await response.read(), type=dict[str, object])["error"]
    except (msgspec.DecodeError, KeyError):
        sentence = f"answers {response.status}: this is no operations listener of a gateway that knows tail"
    raise TailError(f"{gateway}: {sentence}")


def _session(connector: aiohttp.BaseConnector | None = None) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENT_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


async def _whole_lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Line by line, of any length; aiohttp's own readline stops at 64 KiB."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
