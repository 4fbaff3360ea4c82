"""docs/api.md, "Answer": messages that the broker refuses, returns or does not confirm. Promises 2, 3 and 4."""

from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway
from tests.support.scripted_broker import Published, ScriptedBroker, Session


async def test_what_is_refused_or_unanswered_is_a_row_and_the_rest_is_counted(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """Of six messages two are acked, one is nacked, one returned and then acked, two are never answered."""
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5))

        def settle_some(session: Session, published: Published) -> None:
            if published.delivery_tag == 6:
                session.ack(2, multiple=True)
                session.nack(3)
                session.return_(4)
                session.ack(4)

        broker.on_publish = settle_some
        messages = [gateway.message(to="bad")] + [gateway.message(to=f"+1415555000{n}") for n in range(1, 7)]
        status, answer = await gateway.send(messages)
        assert (status, answer["queued_count"]) == (200, 2)
        assert [(row["index"], row["to"], row["code"]) for row in answer["errors"]] == [
            (0, "bad", "invalid_phone"),
            (3, "+14155550003", "queue_rejected"),
            (4, "+14155550004", "queue_rejected"),
            (5, "+14155550005", "outcome_unknown"),
            (6, "+14155550006", "outcome_unknown"),
        ]
        ids = [published.properties.message_id for published in broker.published]
        certain, unknown = answer["errors"][:3], answer["errors"][3:]
        assert all(set(row) == {"index", "to", "code", "error"} for row in certain)
        assert [(row["may_be_queued"], row["message_id"]) for row in unknown] == [(True, ids[4]), (True, ids[5])]
        assert broker.violations == []


async def test_a_request_with_nothing_confirmed_and_something_unknown_is_unknown(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = lambda session, published: session.nack(1) if published.delivery_tag == 2 else None
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.3))
        status, answer, headers = await gateway.post(gateway.caller.body(2))
        assert (status, answer["code"], set(answer)) == (504, "outcome_unknown", {"error", "code"})
        assert "Retry-After" not in headers


async def test_a_nack_of_a_queue_that_is_not_quorum_is_unknown_and_the_sentence_claims_no_timeout(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = lambda session, published: (
            session.nack(published.delivery_tag) if published.delivery_tag != 2 else session.ack(2)
        )
        gateway = await start_gateway(
            make_settings(amqp_url=broker.url, amqp_connections=1, amqp_queue_type="classic", confirm_timeout_s=60)
        )
        _, answer = await gateway.send([gateway.message()])
        assert answer["error"] == "The queue did not confirm these messages: they may or may not be queued"
        _, answer = await gateway.send([gateway.message()] * 2)
        (row,) = answer["errors"]
        assert (row["code"], row["may_be_queued"]) == ("outcome_unknown", True)
        assert row["error"] == "The queue did not confirm this message: it may or may not be queued"


async def test_when_everything_is_refused_nothing_was_queued(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = lambda session, published: session.nack(published.delivery_tag)
        gateway = await start_gateway(make_settings(amqp_url=broker.url))
        status, answer, headers = await gateway.post(gateway.caller.body(2))
        assert (status, answer["code"]) == (503, "queue_unavailable")
        assert int(headers["Retry-After"]) > 0


async def test_a_blocked_broker_means_503_before_anything_is_written(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1))
        broker.sessions[-1].blocked("low on memory")
        await eventually(lambda: not gateway.runtime.publisher.connections.is_usable())
        status, answer, _ = await gateway.post(gateway.caller.body())
        assert (status, answer["code"]) == (503, "queue_unavailable")
        assert broker.published == []


async def test_a_draining_gateway_says_so(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url))
        gateway.runtime.draining = True
        status, _, headers = await gateway.post(gateway.caller.body())
        assert (status, headers["Connection"]) == (200, "close")
        gateway.runtime.admission.closed = True
        status, answer, headers = await gateway.post(b"{}")
        assert (status, answer["code"]) == (503, "draining")
        assert int(headers["Retry-After"]) > 0
        assert len(broker.published) == 1
