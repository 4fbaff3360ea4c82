"""/metrics, through HTTP: known traffic gives exact counts, and callers cannot create series."""

import asyncio
import re
from collections import Counter
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway import errors
from tests.support.admission import held_slot
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.raw_http import exchange
from tests.support.scripted_broker import Published, ScriptedBroker, Session

MOST_SERIES = 500  # of one process: 15 kB, some milliseconds; Prometheus' own advice is to stay under thousands

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


async def scrape(gateway: GatewayUnderTest, **headers: str) -> str:
    async with gateway.session.get(f"{gateway.ops_url}/metrics", headers=headers) as response:
        assert response.status == 200
        return await response.text()


def samples_of(text: str) -> Samples:
    """Return the samples: name → labels → value."""
    found: Samples = {}
    for family in parse(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def read(gateway: GatewayUnderTest, name: str, **labels: str) -> float:
    return samples_of(await scrape(gateway))[name][tuple(sorted(labels.items()))]


async def counted(gateway: GatewayUnderTest, name: str) -> dict[str, float]:
    """Return the series of a counter that are not 0, by the values of their labels."""
    series = samples_of(await scrape(gateway))[name]
    return {"/".join(value for _, value in labels): number for labels, number in series.items() if number}


async def test_known_traffic_gives_exact_counts(gateway: GatewayUnderTest) -> None:
    good = gateway.message()
    await gateway.send([good] * 10)
    await gateway.send([good] * 3 + [gateway.message(to="bad")] * 2 + [gateway.message(list_number="+18005559999")])
    await gateway.post(b"{")
    await gateway.post(b"{}", X_Api_Key="trk_" + "x" * 32)
    body = msgspec.json.encode({"messages": [good] * 5})
    await gateway.post(body, Idempotency_Key="once")
    await gateway.post(body, Idempotency_Key="once")
    await gateway.post(b'{"messages":[{}]}', Idempotency_Key="once")
    await exchange(gateway.url, request=b"NO HTTP\r\n\r\n")

    # Labels in the order of their names: code, status.
    assert await counted(gateway, "gateway_requests_total") == {
        "ok/200": 4,
        "invalid_json/400": 1,
        "invalid_api_key/401": 1,
        "idempotency_key_reused/422": 1,
        "malformed_http/400": 1,
    }
    assert await counted(gateway, "gateway_messages_total") == {
        "queued": 18,
        "invalid_phone": 2,
        "list_not_found": 1,
        "replayed": 5,
        "idempotency_key_reused": 1,
    }
    assert await counted(gateway, "gateway_published_total") == {"acked": 18}
    assert await counted(gateway, "gateway_idempotent_requests_total") == {"first": 1, "replayed": 1, "conflict": 1}
    found = samples_of(await scrape(gateway))
    stages = {labels[0][1]: count for labels, count in found["gateway_stage_duration_seconds_count"].items()}
    # Lists are looked up with the key, and alone where an Idempotency-Key is held, too.
    expected = {"authenticate": 6, "wait": 0, "read": 0, "validate": 5, "resolve_lists": 1, "build": 3, "publish": 3}
    assert stages == expected
    results = {labels[0][1]: count for labels, count in found["gateway_request_duration_seconds_count"].items()}
    assert results == {"answered": 4, "refused": 3}  # what is no HTTP has no duration
    assert found["gateway_request_messages_sum"][()] == 10 + 6 + 5 + 5 + 1
    for name in (
        "requests_in_flight",
        "requests_waiting",
        "messages_in_flight",
        "body_bytes_in_flight",
        "unconfirmed_messages",
    ):
        assert found[f"gateway_{name}"][()] == 0
    assert found["gateway_message_id_leases_total"][()] >= 1
    assert found["gateway_database_up"][()] == 1
    assert found["gateway_ready"][()] == 1


async def test_unconfirmed_messages_are_counted_when_answered_and_when_confirmed_late(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
        gateway = await start_gateway(settings)

        def settle_some(session: Session, published: Published) -> None:
            if published.delivery_tag == 5:
                session.ack(2, multiple=True)
                session.nack(3)
                session.return_(4)
                session.ack(4)

        broker.on_publish = settle_some
        sending = asyncio.create_task(gateway.send([gateway.message()] * 5))
        await eventually(lambda: len(broker.published) == 5)
        found = samples_of(await scrape(gateway))
        assert found["gateway_requests_in_flight"][()] == 1
        assert found["gateway_messages_in_flight"][()] == 5
        assert found["gateway_unconfirmed_messages"][()] == 5
        await sending
        assert await counted(gateway, "gateway_published_total") == {
            "acked": 2,
            "nacked": 1,
            "returned": 1,
            "unknown": 1,
        }
        expected = {"queued": 2, "queue_rejected": 2, "outcome_unknown": 1}
        assert await counted(gateway, "gateway_messages_total") == expected
        assert await read(gateway, "gateway_unconfirmed_age_seconds") > 0.4
        broker.sessions[0].ack(5)
        await eventually(lambda: gateway.runtime.publisher.connections.late_confirms > 0)
        assert await read(gateway, "gateway_late_confirms_total") == 5


async def test_a_broker_alarm_shows(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1))
        assert await counted(gateway, "gateway_broker_connections") == {"open": 1}
        broker.sessions[-1].blocked("low on memory")
        await eventually(lambda: not gateway.runtime.publisher.connections.is_usable())
        assert await counted(gateway, "gateway_broker_connections") == {"blocked": 1}
        first = await read(gateway, "gateway_broker_blocked_seconds_total")
        assert await read(gateway, "gateway_broker_blocked_seconds_total") > first  # it goes on
        status, _ = await gateway.send([gateway.message()] * 7)
        assert status == 503
        assert await counted(gateway, "gateway_messages_total") == {"queue_unavailable": 7}


async def test_shed_requests_are_counted_by_reason(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    gateway = await start_gateway(make_settings(max_requests_in_flight=1))
    with held_slot(gateway.runtime.admission):
        status, _ = await gateway.send([gateway.message()])
    assert status == 503
    assert await counted(gateway, "gateway_shed_total") == {"slots": 1}
    assert await counted(gateway, "gateway_requests_total") == {"overloaded/503": 1}


async def test_nothing_a_caller_sends_makes_a_new_series(gateway: GatewayUnderTest) -> None:
    def series(found: Samples) -> set[tuple[str, Any]]:
        return {(name, labels) for name, of_name in found.items() for labels in of_name}

    await eventually(lambda: all(depth.is_known() for depth in gateway.runtime.depths.all))
    before = series(samples_of(await scrape(gateway)))
    assert len(before) < MOST_SERIES
    for number in range(20):
        await gateway.send([gateway.message(to=f"bad{number}", list_number=f"+1800555{number:04}")])
        await gateway.post(
            b"{}", X_Api_Key=f"trk_{number:032}", X_Request_Id=f"id-{number}", Idempotency_Key=f"{number}"
        )
        await gateway.session.request(("GET", "PUT", f"VERB{number}")[number % 3], f"{gateway.api_url}/{number}")
        await gateway.session.request("DELETE", gateway.url)
    after = series(samples_of(await scrape(gateway)))
    assert after == before


async def test_every_code_has_its_series_from_the_start(gateway: GatewayUnderTest) -> None:
    """`rate()` misses the first event of a series that begins with a 1. The codes are those of errors.py."""
    requests = {(str(kind.status), kind.code) for kind in errors.kinds()} | {("200", "ok"), ("499", "cancelled")}
    # An unknown message of a single send is a 504.
    refused = {error.code for error in errors.row_errors()} - {errors.OUTCOME_UNKNOWN.code}
    requests |= {("200", "dry_run"), *(("400", code) for code in refused)}
    messages = {"queued", "replayed", "dry_run", "cancelled", errors.OUTCOME_UNKNOWN.code, *refused}
    found = samples_of(await scrape(gateway))
    shown = [dict(labels) for labels in found["gateway_requests_total"]]
    assert {(labels["status"], labels["code"]) for labels in shown} == requests
    assert {labels[0][1] for labels in found["gateway_messages_total"]} >= messages


async def test_every_metric_says_what_it_is_and_keeps_the_conventions(gateway: GatewayUnderTest) -> None:
    families = list(parse(await scrape(gateway)))
    assert [name for name, times in Counter(family.name for family in families).items() if times > 1] == []
    for family in families:
        assert family.documentation.endswith("."), family.name
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"gateway(_[a-z]+)+", family.name)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0"),
    ],
)
async def test_the_scraper_chooses_the_format(gateway: GatewayUnderTest, accept: str, kind: str) -> None:
    async with gateway.session.get(f"{gateway.ops_url}/metrics", headers={"Accept": accept}) as response:
        assert response.headers["Content-Type"].startswith(kind)
        text = await response.text()
    assert list((parse_openmetrics if "openmetrics" in kind else parse)(text))


async def test_a_scrape_under_load_sees_counters_that_only_rise(gateway: GatewayUnderTest) -> None:
    sending = asyncio.gather(*(gateway.send([gateway.message()] * 100) for _ in range(30)))
    seen = []
    while not sending.done():
        seen.append(await read(gateway, "gateway_messages_total", outcome="queued"))
    await sending
    assert seen == sorted(seen)
    assert await read(gateway, "gateway_messages_total", outcome="queued") == 3000


async def test_callers_cannot_reach_metrics(gateway: GatewayUnderTest) -> None:
    async with gateway.session.get(f"{gateway.api_url}/metrics") as response:
        assert response.status == 404


async def test_probes_and_scrapes_are_no_requests(gateway: GatewayUnderTest) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/nothing"):
        async with gateway.session.get(gateway.ops_url + path) as response:
            await response.read()
    assert await counted(gateway, "gateway_requests_total") == {}


async def test_metrics_are_served_while_both_servers_are_gone(gateway: GatewayUnderTest) -> None:
    """An outage is when metrics are needed."""
    await gateway.runtime.publisher.close()
    await gateway.runtime.pool.close()
    found = samples_of(await scrape(gateway))
    assert found["gateway_broker_connections"][(("state", "open"),)] == 0
