"""The load generator, an HTTP/1.1 client on plain asyncio protocols. A worker (see workers.py).

The generator shares two cores with the server under test, so it does little. Requests are encoded before the clock
starts, each is one write, and only status and counts of an answer are read. aiohttp's client takes ten times the CPU.

Closed loop: each connection sends its next request when the last one is answered. A slow server then gets fewer
requests, so its latencies look better than they are. Open loop: requests are due at fixed times, however slow the
server is. Latency counts from the moment a request was due, the wait for a free connection included.
"""

import asyncio
import math
import random
import ssl
import sys
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from itertools import count, cycle
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

from benchmarks.drivers import latency, traffic, workers
from benchmarks.drivers.workers import Counter, Ready, Result, Start

PATH = "/api/v2/send/bulk"
BODIES = 16  # different request bodies, sent in turn
RECONNECT_S = 0.05
SLOW_BYTES = 80  # of a slow body: the last bytes, sent one by one
CONNECT_TIMEOUT_S = 5.0
NEXT_KEY = b"the next Idempotency-Key"  # stands in a prepared request for a number


class Plan(msgspec.Struct):
    """The requests of one worker, and their timing."""

    url: str  # of the server; PATH is added when the URL has no path
    key: str
    list_numbers: list[str]
    batch: int = 1_000
    connections: int = 8
    body_length: int = traffic.BODY_LENGTH
    bad_share: float = 0.0
    requests_per_s: float = 0.0  # open loop at this rate; 0: closed loop
    ramp_s: float = 0.0  # time to reach all connections, or the whole rate
    timeout_s: float = 30.0  # of one request
    give_up_s: float = 3.0  # the server counts as gone after this time without any connection
    share: int = 0  # the number of this worker among `shares`, which take the arrivals of an open loop in turn
    shares: int = 1
    all_bad: str = ""  # one flaw in every message: "format" or "type"
    honours_retry_after: bool = False  # closed loop: after a 503 wait as long as it says, otherwise send at once
    more_callers: dict[str, list[str]] = {}  # API key → lists, of further accounts: all accounts send in turn
    pause_s: float = 0.0  # closed loop: from an answer to the next request
    drip_s: float = 0.0  # slow bodies: from one of the last SLOW_BYTES to the next; aborted when the time is up
    keyed: bool = False  # each request has an Idempotency-Key of its own


def arrivals(plan: Plan) -> Iterator[float]:
    """Yield the times at which this worker's requests are due in an open loop, in seconds from the start.

    The rate rises during the ramp, then it is constant. During the ramp it is r·t/ramp, so r·t²/(2·ramp) requests are
    due by t. The time of the n-th request follows from that.
    """
    in_ramp = plan.requests_per_s * plan.ramp_s / 2
    for n in count(plan.share, plan.shares):
        if n < in_ramp:
            yield math.sqrt(2 * n * plan.ramp_s / plan.requests_per_s)
        else:
            yield plan.ramp_s + (n - in_ramp) / plan.requests_per_s


class Answer(msgspec.Struct):
    """The part of an answer that is read."""

    queued_count: int


_answer = msgspec.json.Decoder(Answer)


class _Request:
    """One of the prepared requests."""

    __slots__ = ("content", "good")

    def __init__(self, head: str, body: bytes, good: int) -> None:
        self.content = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.good = good


def prepare(plan: Plan) -> list[_Request]:
    """Return the requests, encoded. The accounts take turns."""
    callers = {plan.key: plan.list_numbers} | plan.more_callers
    turns = zip(*(_prepare(plan, key, list_numbers) for key, list_numbers in callers.items()), strict=True)
    return [request for turn in turns for request in turn]


def _prepare(plan: Plan, key: str, list_numbers: list[str]) -> list[_Request]:
    """Return the requests of one account."""
    url = urlsplit(plan.url)
    head = (
        f"POST {url.path.rstrip('/') or PATH} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"X-Api-Key: {key}\r\nContent-Type: application/json\r\n"
    )
    if plan.keyed:
        head += f"Idempotency-Key: {NEXT_KEY.decode()}\r\n"
    if plan.all_bad:
        flaw = {"format": traffic.WRONG_FORMAT, "type": traffic.WRONG_TYPE}[plan.all_bad]
        content = traffic.messages(plan.batch, list_numbers, body_length=plan.body_length, bad=plan.batch, flaws=[flaw])
        return [_Request(head, msgspec.json.encode({"messages": content}), 0)]
    bodies = traffic.request_bodies(
        BODIES, plan.batch, list_numbers, body_length=plan.body_length, bad_share=plan.bad_share
    )
    return [_Request(head, body, good) for body, good in bodies]


class _Connection(asyncio.Protocol):
    """One keep-alive connection, with at most one request in flight."""

    def __init__(self, load: "Load", drip_s: float) -> None:
        self._load = load
        self._drip_s = drip_s
        self._drip_timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._request: _Request | None = None
        self._since = 0.0

    @property
    def overdue_since(self) -> float | None:
        """The time since which the connection has waited for an answer, or None."""
        return None if self._request is None else self._since

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # TCP and TLS transports are Transports
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: _Request, since: float) -> None:
        """Send a request that was due at `since`."""
        assert self._transport is not None  # noqa: S101 - only made connections are asked to send
        self._request, self._since = request, since
        content = self._load.with_key(request.content)
        if self._drip_s:
            self._transport.write(content[:-SLOW_BYTES])
            self._drip_later(content[-SLOW_BYTES:])
        else:
            self._transport.write(content)

    def _drip_later(self, rest: bytes) -> None:
        self._drip_timer = asyncio.get_running_loop().call_later(self._drip_s, self._drip, rest) if rest else None

    def _drip(self, rest: bytes) -> None:
        """Send the first byte of the rest of a slow body, and the others later."""
        assert self._transport is not None  # noqa: S101 - a request has been begun
        self._transport.write(rest[:1])
        self._drip_later(rest[1:])

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._drip_timer is not None:
            self._drip_timer.cancel()
        request, self._request = self._request, None
        if request is not None:
            self._load.completed(self._since, "lost", 0, failed=True)
        self._load.lost(self)

    # Called by httptools.

    def on_message_begin(self) -> None:
        self._body: list[bytes] = []
        self._retry_after_s = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after_s = int(value)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        request, self._request = self._request, None
        if request is None:
            self.abort()  # an answer without a request
            return
        status = self._parser.get_status_code()
        stays_open = self._parser.should_keep_alive() and self._drip_timer is None
        body = b"".join(self._body)
        queued = _queued(body) if status == 200 else 0
        failed = status != 200 or queued != request.good
        if failed:
            self._load.failed(status, body)
        self._load.completed(self._since, str(status), queued, failed=failed)
        if stays_open:
            self._load.idle_after(self._retry_after_s, self)
        else:
            self.abort()


def _queued(body: bytes) -> int:
    try:
        return _answer.decode(body).queued_count
    except msgspec.DecodeError:
        return -1  # not an answer of this API


class Load:
    """All connections of this worker, and the schedule of their requests."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._requests = cycle(prepare(plan))
        self._keys = count(random.getrandbits(48) << 16)
        self._idle: deque[_Connection] = deque()
        self._due: deque[float] = deque()  # open loop: arrivals that wait for a connection
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_open_at = 0.0
        self._started = False
        self._sending = True
        self._recorder = latency.Recorder()

    async def connect(self) -> None:
        """Open the first connection, so that a wrong address fails at once. Raises OSError."""
        await self._connect()

    async def run(self, start: Start) -> Result:
        """Send until the time is up or the server is gone."""
        plan = self._plan
        self._counter = Counter(start)
        await asyncio.sleep(start.begin - time.perf_counter())
        self._started = True
        self._last_open_at = time.perf_counter()
        for number in range(plan.connections):
            delay = plan.ramp_s * number / plan.connections if not plan.requests_per_s else 0.0
            self._spawn(self._keep_open(delay, is_open=number == 0))
        if plan.requests_per_s:
            self._spawn(self._arrive(start))
        elif self._idle:
            self.idle(self._idle.popleft())
        cpu_s, ended_early = await self._watch(start)
        for due in self._due:
            self.completed(due, "unsent", 0, failed=True)
        for task in self._tasks:
            task.cancel()
        result = self._counter.result
        result.cpu_s, result.ended_early = cpu_s, ended_early
        result.seconds = max(0.0, min(time.perf_counter() - start.measure_from, start.duration_s))
        result.latencies = self._recorder.encoded()
        return result

    def with_key(self, content: bytes) -> bytes:
        """Return a prepared request with an Idempotency-Key that no other request has, if the plan says so."""
        return content.replace(NEXT_KEY, b"%d" % next(self._keys), 1) if self._plan.keyed else content

    def completed(self, since: float, status: str, queued: int, *, failed: bool) -> None:
        """Count a request that has been answered, or that never will be."""
        now = time.perf_counter()
        statuses = self._counter.result.statuses
        statuses[status] = statuses.get(status, 0) + 1
        due = since if self._plan.requests_per_s else None
        if self._counter.completed(now, now - since, max(queued, 0), failed=failed, due=due):
            self._recorder.record(now - since)

    def failed(self, status: int, body: bytes) -> None:
        """Keep the answer to the first request that failed, for the report."""
        result = self._counter.result
        if not result.first_failure:
            result.first_failure = f"{status}: {body[:300].decode(errors='replace')}"

    def idle(self, connection: _Connection) -> None:
        """Send the next request on a free connection, or keep the connection until one is due."""
        if not self._started or not self._sending:
            self._idle.append(connection)
        elif not self._plan.requests_per_s:
            connection.send(next(self._requests), time.perf_counter())
        elif self._due:
            connection.send(next(self._requests), self._due.popleft())
        else:
            self._idle.append(connection)

    def idle_after(self, retry_after_s: int, connection: _Connection) -> None:
        """Use a connection again, after the plan's pause or, if the plan says so, its last answer's Retry-After."""
        pause_s = self._plan.pause_s
        if retry_after_s and self._plan.honours_retry_after:
            pause_s = retry_after_s * random.uniform(1, 1.5)  # noqa: S311
        if pause_s:
            asyncio.get_running_loop().call_later(pause_s, self.idle, connection)
        else:
            self.idle(connection)

    def lost(self, connection: _Connection) -> None:
        """Replace a connection that has ended."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._open:
            self._last_open_at = time.perf_counter()
        if self._started and self._sending:
            self._spawn(self._keep_open(RECONNECT_S))

    async def _connect(self) -> None:
        url = urlsplit(self._plan.url)
        secure = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if secure else 80)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self, self._plan.drip_s), url.hostname or "", port, ssl=secure
            )
        self._open.add(connection)
        self.idle(connection)

    async def _keep_open(self, delay: float, *, is_open: bool = False) -> None:
        await asyncio.sleep(delay)
        while self._sending and not is_open:
            try:
                await self._connect()
            except OSError:  # TimeoutError is one
                await asyncio.sleep(RECONNECT_S)
            else:
                return

    async def _arrive(self, start: Start) -> None:
        """Send requests when they are due. Timers of the event loop, and so latencies, are exact to a millisecond."""
        until = start.measure_until
        for offset in arrivals(self._plan):
            due = start.begin + offset
            if due >= until:
                return
            wait_ms = (due - time.perf_counter()) * 1000
            if wait_ms > 0:
                await asyncio.sleep(math.ceil(wait_ms) / 1000)
            if self._idle:
                self._idle.popleft().send(next(self._requests), due)
            else:
                self._due.append(due)

    async def _watch(self, start: Start) -> tuple[float, str]:
        """Report ticks until the end. Return the CPU time of the measurement, and the reason of an early end or ''."""
        cpu_before = cpu_after = None
        while True:
            now = time.perf_counter()
            if cpu_before is None and now >= start.measure_from:
                cpu_before = time.process_time()
            if cpu_after is None and now >= start.measure_until:
                cpu_after = time.process_time()
                self._sending = bool(self._due)  # requests that were due are still sent, so that their latency counts
            waiting = [connection for connection in self._open if connection.overdue_since is not None]
            if now - start.begin > workers.TICK_S / 2:
                workers.write_line(self._counter.take_tick(now, len(waiting) + len(self._due)))
            if not self._open and now - self._last_open_at > self._plan.give_up_s:
                return time.process_time() - (cpu_before or 0.0), "the server is gone: no connection can be opened"
            for connection in waiting:
                is_cut_off = self._plan.drip_s and now >= start.measure_until
                if is_cut_off or now - (connection.overdue_since or now) > self._plan.timeout_s:
                    connection.abort()
            if now >= start.measure_until:
                self._sending = bool(self._due) and now < start.measure_until + self._plan.timeout_s
                if not waiting and not self._sending:
                    return (cpu_after or 0.0) - (cpu_before or 0.0), ""
            await asyncio.sleep(workers.next_tick_in(start, now))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def run(plan: Plan) -> Result:
    """Connect, wait for the start, send."""
    load = Load(plan)
    try:
        await load.connect()
    except (OSError, UnicodeError) as error:
        sys.exit(f"cannot connect to {plan.url}: {str(error) or 'no answer in time'}")
    workers.write_line(Ready())
    start = workers.read_line(Start)
    workers.exit_with_parent()
    return await load.run(start)


if __name__ == "__main__":
    workers.write_line(uvloop.run(run(workers.read_line(Plan))))
