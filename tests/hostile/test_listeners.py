"""Attacks on the API over TCP, over TLS and over a unix socket: slots, memory and descriptors are given back."""

import asyncio
from pathlib import Path

import pytest

from testbed import Servers
from tests.hostile import table
from tests.hostile.listeners import KINDS, open_listener
from tests.support.callers import make_caller
from tests.support.eventually import eventually


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_is_read_gives_its_slot_back_and_its_connection_ends(
    servers: Servers, tmp_path: Path, kind: str
) -> None:
    """With uvloop's TLS, every second answer counted as unread until the next request, or until `answer_timeout_s`."""
    async with open_listener(servers, tmp_path, kind, answer_timeout_s="60") as listener:
        caller = await make_caller(listener.gateway.admin)
        request = table.post(caller.body(), key=caller.key.encode())
        last = table.post(caller.body(), b"Connection: close", key=caller.key.encode())
        for cuts in range(4):
            async with listener.connect() as conversation:
                for each in (request, last):
                    for start in range(cuts):
                        await conversation.send(each[start : start + 1])
                        await asyncio.sleep(0.05)
                    await conversation.send(each[cuts:])
                    assert (await conversation.read_answer()).status == 200
                    await eventually(lambda: listener.gateway.metric("gateway_requests_in_flight") == 0, timeout=10)
                assert await conversation.is_closed()
        assert listener.gateway.alarms() == []
