"""Headers that proxies add to a request change nothing."""

from tests.support.gateways import GatewayUnderTest
from tests.support.outbound_queue import OutboundQueue


async def test_forwarded_headers_change_nothing(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    """Anybody can send these headers, so a server that trusts them lets callers forge their address."""
    body = gateway.caller.body()
    said = {
        "Forwarded": "for=10.0.0.1;host=evil.example;proto=https",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/evil",
        "X-Real-IP": "10.0.0.1",
        "X-Original-URL": "/livez",
        "X-HTTP-Method-Override": "DELETE",
    }
    plain = await gateway.post(body, X_Request_Id="same")
    forwarded = await gateway.post(body, X_Request_Id="same", **said)
    assert plain[:2] == forwarded[:2] == (200, {"queued_count": 1, "error_count": 0, "errors": []})
    assert plain[2].keys() == forwarded[2].keys()
    one, other = await queue.take_payloads()
    differ = {name for name in one if one[name] != other[name]}
    assert differ <= {"id", "body", "accepted_at"}
    assert not any("evil" in str(value) or "10.0.0.1" in str(value) for value in other.values())
    unauthorised, _, _ = await gateway.post(body, X_Api_Key="trk_" + "0" * 32, **said)
    assert unauthorised == 401
