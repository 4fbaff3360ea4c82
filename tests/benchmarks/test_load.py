"""The load generator against a small server: latencies, thresholds, and the end when the server dies."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from benchmarks.drivers import generator
from benchmarks.drivers.generator import Plan
from benchmarks.drivers.latency import Recorder
from benchmarks.drivers.workers import REPOSITORY, Result, Tick, start_workers
from benchmarks.questions import load
from benchmarks.questions.load import ExitCode, Options, Outcome, Thresholds
from benchmarks.report import machine
from tests.support.callers import new_number
from tests.support.gateways import GatewayUnderTest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NOTHING_ASKED = Thresholds()


def make_options(url: str = "http://127.0.0.1:1", **changes: Any) -> Options:
    values: dict[str, Any] = {
        "url": url,
        "list_numbers": ("+18005551000",),
        "batch": 10,
        "connections": 4,
        "rate": 0.0,
        "bad_share": 0.0,
        "body_length": 50,
        "duration_s": 1.0,
        "warm_up_s": 0.0,
        "ramp_s": 0.0,
        "timeout_s": 5.0,
        "processes": 1,
        "thresholds": NOTHING_ASKED,
    }
    return Options(**(values | changes))


async def accept(request: web.Request) -> web.Response:
    """Answer as the gateway does to a clean batch."""
    count = len((await request.json())["messages"])
    return web.json_response({"queued_count": count, "error_count": 0, "errors": []})


def stalling(*, at_request: int, seconds: float) -> Handler:
    """Return a handler that stands still once, for `seconds` from the given request on."""
    is_over = asyncio.Event()
    answered = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal answered
        answered += 1
        if answered == at_request:
            asyncio.get_running_loop().call_later(seconds, is_over.set)
        if answered >= at_request:
            await is_over.wait()
        return await accept(request)

    return handle


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[tuple[str, web.AppRunner]]:
    app = web.Application()
    app.router.add_post(generator.PATH, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", runner
    finally:
        await runner.cleanup()


async def run(options: Options) -> Outcome:
    return await asyncio.to_thread(load.run, options, "trk_key", lambda _: None)


def test_arrivals_are_evenly_spaced_and_divided_among_processes() -> None:
    whole = list(islice(generator.arrivals(Plan("", "", [], requests_per_s=100)), 10))
    assert whole == pytest.approx([n / 100 for n in range(10)])
    shares = [
        list(islice(generator.arrivals(Plan("", "", [], requests_per_s=100, share=k, shares=2)), 5)) for k in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == pytest.approx(whole)


def test_a_ramp_rises_to_the_rate_without_a_jump() -> None:
    plan = Plan("", "", [], requests_per_s=100, ramp_s=2)
    due = list(islice(generator.arrivals(plan), 300))
    assert sum(at < 1 for at in due) == 25  # half the rate at half the ramp: a quarter of its requests
    assert sum(at < 2 for at in due) == 100
    steps = [after - before for before, after in pairwise(due)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(steps))
    assert steps[-1] == pytest.approx(0.01)


async def test_closed_loop_counts_what_was_accepted() -> None:
    async with served(accept) as (url, _):
        outcome = await run(make_options(url, processes=2))
    assert outcome.failures == 0
    assert outcome.requests > 0
    assert outcome.messages_per_s == pytest.approx(10 * outcome.requests_per_s)
    assert outcome.exit_code == ExitCode.FINE


async def test_open_loop_latency_counts_from_the_moment_a_request_was_due() -> None:
    """The server stands still for half a second. Requests that were due then have waited, sent or not."""
    async with served(stalling(at_request=20, seconds=0.5)) as (url, _):
        outcome = await run(make_options(url, connections=2, rate=1_000.0, duration_s=2.0))
    waited = [latency_ms for percentile, latency_ms in outcome.latencies.curve_ms if percentile >= 85]
    # 50 of the 200 requests are due within the half second, and only two could be sent. A load generator with
    # coordinated omission would report just those two.
    assert outcome.requests == pytest.approx(200, abs=5)
    assert min(waited) > 100
    assert outcome.latencies.at(100) > 400
    assert outcome.latencies.at(50) < 100


async def test_open_loop_waits_for_what_was_due_before_the_time_was_up() -> None:
    """The server stands still from 0.7 s on for 0.8 s. The measurement ends at 1.0 s."""
    async with served(stalling(at_request=70, seconds=0.8)) as (url, _):
        outcome = await run(make_options(url, connections=2, rate=1_000.0, duration_s=1.0))
    assert outcome.requests == pytest.approx(100, abs=5)
    assert outcome.latencies.at(90) > 400


async def test_open_loop_counts_what_could_never_be_sent_as_failed() -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async with served(never) as (url, _):
        outcome = await run(make_options(url, connections=2, rate=1_000.0, duration_s=1.0, timeout_s=0.5))
    assert outcome.requests == pytest.approx(100, abs=5)
    assert outcome.error_rate == 1.0


async def test_it_ends_when_the_server_dies() -> None:
    async with served(accept) as (url, runner):

        async def die() -> None:
            await asyncio.sleep(1.0)
            await runner.cleanup()

        dying = asyncio.create_task(die())
        async with asyncio.timeout(20):
            outcome = await run(make_options(url, duration_s=60.0))
        await dying
    assert outcome.exit_code == ExitCode.SERVER_GONE
    assert "gone" in outcome.ended_early


async def test_a_connection_that_the_server_closes_in_good_order_is_no_failure() -> None:
    async def accept_and_close(request: web.Request) -> web.StreamResponse:
        response = await accept(request)
        response.force_close()
        return response

    async with served(accept_and_close) as (url, _):
        outcome = await run(make_options(url))
    assert outcome.requests > 3
    assert outcome.failures == 0


async def test_a_request_that_queues_less_than_its_good_messages_fails() -> None:
    async def lose_one(request: web.Request) -> web.Response:
        count = len((await request.json())["messages"])
        return web.json_response({"queued_count": count - 1, "error_count": 1, "errors": []})

    async with served(lose_one) as (url, _):
        outcome = await run(make_options(url, thresholds=Thresholds(max_error_rate=0.5)))
    assert outcome.error_rate == 1.0
    assert outcome.exit_code == ExitCode.THRESHOLD_BROKEN
    assert outcome.first_failure.startswith('200: {"queued_count": 9')


def judged(thresholds: Thresholds, **changes: Any) -> Outcome:
    recorder = Recorder()
    for milliseconds in range(1, 101):
        recorder.record(milliseconds / 1e3)
    result = Result(10.0, 100, 100_000, 2, 110, 110_000, 2, {"200": 108, "503": 2}, recorder.encoded(), 0.1)
    for name, value in changes.items():
        setattr(result, name, value)
    return load.judge(machine.describe(), make_options(duration_s=10.0, thresholds=thresholds), [result], [])


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        (NOTHING_ASKED, ExitCode.FINE),
        (Thresholds(max_p99_ms=100, min_rate=10_000, max_error_rate=0.02), ExitCode.FINE),
        (Thresholds(max_p99_ms=98), ExitCode.THRESHOLD_BROKEN),
        (Thresholds(min_rate=10_001), ExitCode.THRESHOLD_BROKEN),
        (Thresholds(max_error_rate=0.01), ExitCode.THRESHOLD_BROKEN),
    ],
)
def test_thresholds_set_the_exit_code(thresholds: Thresholds, expected: ExitCode) -> None:
    assert judged(thresholds).exit_code == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"failures": 100}, ExitCode.THRESHOLD_BROKEN),  # a wrong key, or a list of another account
        ({"failures": 50}, ExitCode.THRESHOLD_BROKEN),  # batches of 1, half of them bad
        ({"requests": 0, "failures": 0}, ExitCode.THRESHOLD_BROKEN),
        ({"failures": 0}, ExitCode.FINE),  # bad messages alone, by --bad-share 1
    ],
)
def test_a_run_in_which_nothing_was_accepted_fails(changes: dict[str, int], expected: ExitCode) -> None:
    outcome = judged(NOTHING_ASKED, messages=0, **changes)
    assert outcome.exit_code == expected
    assert outcome.broken == (["no message was accepted"] if expected else [])


def test_a_dead_server_weighs_more_than_a_threshold() -> None:
    assert judged(Thresholds(min_rate=1e9), ended_early="gone").exit_code == ExitCode.SERVER_GONE


def test_a_run_without_a_single_answer_is_all_errors() -> None:
    silent = judged(Thresholds(max_error_rate=0.5), requests=0, messages=0, failures=0, latencies=Recorder().encoded())
    assert silent.exit_code == ExitCode.THRESHOLD_BROKEN


def test_moments_add_up_the_processes() -> None:
    timeline = load.Timeline(2)
    timeline.add(0, Tick(0.5, 1, 100, 0, 3, 20.0))
    timeline.add(1, Tick(0.75, 2, 200, 1, 4, 50.0))
    timeline.add(0, Tick(1.25, 1, 100, 0, 2, 5.0))
    assert [(one.at_s, one.messages_per_s, one.failures, one.in_flight) for one in timeline.moments] == [
        (0.0, 300.0, 1, 7),
        (1.0, 100.0, 0, 6),
    ]


def type_load(
    url: str, *arguments: str, key: str = "k", list_number: str = "+18005551000"
) -> "subprocess.CompletedProcess[str]":
    """Run the command as an operator types it."""
    options = ["--url", url, "--key", key, "--list-number", list_number, *arguments]
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks", "load", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_command_line_exits_as_the_thresholds_say(tmp_path: Path) -> None:
    report, figures = tmp_path / "report.html", tmp_path / "figures.json"
    limits = ["--duration", "1", "--warm-up", "0", "--min-rate", "1e12"]
    async with served(accept) as (url, _):
        done = await asyncio.to_thread(type_load, url, *limits, "--report", str(report), "--json", str(figures))
    assert done.returncode == ExitCode.THRESHOLD_BROKEN, done.stdout + done.stderr
    page = report.read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "href=" not in page
    assert msgspec.json.decode(figures.read_bytes(), type=Outcome).broken


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "http://a..b"])
def test_an_address_where_nobody_listens_is_one_line_and_exit_code_2(url: str) -> None:
    done = type_load(url)
    assert done.returncode == ExitCode.UNUSABLE
    assert done.stderr.startswith(f"error: cannot connect to {url}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["localhost:8080", "127.0.0.1:8080", "ftp://h", "http://", "http://h:http", ""])
def test_text_that_is_no_url_is_refused_by_the_name_of_the_option(url: str) -> None:
    done = type_load(url)
    assert done.returncode == ExitCode.UNUSABLE
    assert f"--url: '{url}' is not a URL such as" in done.stderr


async def test_single_sends_reach_a_real_gateway(gateway: GatewayUnderTest) -> None:
    caller, options = gateway.caller, ["--single", "--duration", "1", "--connections", "2"]
    done = await asyncio.to_thread(type_load, gateway.api_url, *options, key=caller.key, list_number=caller.list_number)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "single sends" in done.stdout
    assert gateway.runtime.counters.messages["queued"] > 0
    assert set(gateway.runtime.counters.request_messages.counts[1:]) == {0}, "one message each"
    wrong = await asyncio.to_thread(
        type_load, gateway.api_url, *options, "--bad-share", "0.5", key=caller.key, list_number=caller.list_number
    )
    assert wrong.returncode == 2


async def test_a_foreign_list_at_a_real_gateway_fails(gateway: GatewayUnderTest) -> None:
    """It ends with status 1, and says why the first request failed."""
    options = ["--duration", "1", "--warm-up", "0", "--connections", "2", "--batch", "10"]
    key, number = gateway.caller.key, new_number()
    done = await asyncio.to_thread(type_load, gateway.url, *options, key=key, list_number=number)
    assert done.returncode == ExitCode.THRESHOLD_BROKEN, done.stdout + done.stderr
    assert "no message was accepted" in done.stdout
    assert "The first failure was" in done.stdout
    assert "list_not_found" in done.stdout.replace("\n", "")


@pytest.mark.parametrize("form", [[], ["--single"]])
async def test_a_wrong_key_at_a_real_gateway_is_one_line_and_one_request(
    gateway: GatewayUnderTest, form: list[str]
) -> None:
    number = gateway.caller.list_number
    done = await asyncio.to_thread(type_load, gateway.api_url, *form, key="another", list_number=number)
    assert (done.returncode, done.stdout) == (ExitCode.UNUSABLE, "")
    assert done.stderr == "error: the server answers 401 to the API key: give --key, or set SMS_API_KEY\n"
    assert gateway.runtime.counters.requests == {(401, "invalid_api_key"): 1}


async def test_the_request_that_checks_the_key_queues_nothing(gateway: GatewayUnderTest) -> None:
    caller = gateway.caller
    for form in (False, True):
        options = make_options(gateway.api_url, list_numbers=(caller.list_number,), single=form)
        assert await asyncio.to_thread(load.status_of_dry_run, options, caller.key) == 200
    assert gateway.runtime.counters.messages["queued"] == 0


async def refuse(_request: web.Request) -> web.Response:
    return web.json_response({"error": "", "code": "overloaded"}, status=503, headers={"Retry-After": "1"})


@pytest.mark.parametrize(("honours_retry_after", "fewest", "most"), [(True, 4, 8), (False, 40, 10**9)])
async def test_a_refused_caller_sends_again_at_once_or_after_retry_after(
    honours_retry_after: bool, fewest: int, most: int
) -> None:
    async with served(refuse) as (url, _):
        plan = Plan(url, "key", ["+18005551000"], batch=1, connections=4, honours_retry_after=honours_retry_after)
        with start_workers(generator.__name__, [plan]) as workers:
            await asyncio.to_thread(workers.wait_until_ready)
            await asyncio.to_thread(workers.start, 0.0, 1.0)
            (result,) = await asyncio.to_thread(workers.watch)
    assert fewest <= result.statuses["503"] <= most


async def sent_by(plan: Plan, seconds: float) -> Result:
    with start_workers(generator.__name__, [plan]) as workers:
        await asyncio.to_thread(workers.wait_until_ready)
        await asyncio.to_thread(workers.start, 0.0, seconds)
        (result,) = await asyncio.to_thread(workers.watch)
    return result


async def test_accounts_take_turns_with_lists_of_their_own() -> None:
    numbers = {"a": "+18005551000", "b": "+18005552000", "c": "+18005553000"}
    requests = dict.fromkeys(numbers, 0)

    async def count(request: web.Request) -> web.Response:
        key = request.headers["X-Api-Key"]
        assert {message["list_number"] for message in (await request.json())["messages"]} == {numbers[key]}
        requests[key] += 1
        return await accept(request)

    async with served(count) as (url, _):
        others = {key: [number] for key, number in numbers.items() if key != "a"}
        plan = Plan(url, "a", [numbers["a"]], batch=10, connections=2, more_callers=others, pause_s=0.01)
        result = await sent_by(plan, 0.5)
    assert result.all_failures == 0
    assert max(requests.values()) - min(requests.values()) <= 1
    assert 0 < result.all_requests <= 2 * 51  # with the pause, at most one every 10 ms on each connection


@pytest.mark.parametrize(("drip_s", "answered"), [(0.002, True), (1.0, False)])
async def test_slow_bodies_are_answered_when_whole_and_aborted_when_the_time_is_up(
    drip_s: float, *, answered: bool
) -> None:
    async with served(accept) as (url, _):
        plan = Plan(url, "key", ["+18005551000"], batch=10, connections=3, drip_s=drip_s)
        result = await sent_by(plan, 1.0)
    assert result.statuses["lost"] == 3
    assert (result.statuses.get("200", 0) > 0) is answered
    assert result.all_messages == 10 * result.statuses.get("200", 0)


async def test_a_slow_body_that_is_refused_is_begun_again_on_another_connection() -> None:
    peers = set()

    async def refuse_at_once(request: web.Request) -> web.Response:
        peers.add(request.transport and request.transport.get_extra_info("peername"))
        return web.Response(status=408)

    async with served(refuse_at_once) as (url, _):
        result = await sent_by(Plan(url, "key", ["+18005551000"], batch=10, connections=1, drip_s=1.0), 0.5)
    assert result.statuses["408"] > 1
    assert len(peers) >= result.statuses["408"]
