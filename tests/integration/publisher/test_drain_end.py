"""Nothing is written after the end of a drain: its caller would get no answer. Promises 1 and 11."""

import asyncio
import os
import signal

import aiohttp
import asyncpg

from testbed import Servers
from tests.support.callers import SEND_PATH, Caller, Client
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.raw_http import connect
from tests.support.scripted_broker import ScriptedBroker


async def test_a_request_whose_query_outlasts_the_drain_is_refused_and_not_written(
    servers: Servers, caller: Caller
) -> None:
    locker = await asyncpg.connect(servers.database_url)
    async with ScriptedBroker() as broker, aiohttp.ClientSession() as session:
        settings = process_environment(
            servers,
            GATEWAY_AMQP_URL=broker.url,
            GATEWAY_DATABASE_TIMEOUT_S="15",
            GATEWAY_CONFIRM_TIMEOUT_S="20",
            GATEWAY_DRAIN_TIMEOUT_S="4",
        )
        async with running(GatewayProcess(settings)) as process, connect(f"{process.url}{SEND_PATH}") as begun:
            broker.mode = "silent"
            head = f"POST {SEND_PATH} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {caller.key}\r\nContent-Length: 99\r\n\r\n"
            async with locker.transaction():
                await locker.execute("LOCK TABLE sending_lists IN ACCESS EXCLUSIVE MODE")
                slow = asyncio.create_task(Client(process.url, session, caller).post(caller.body(3)))
                await begun.send(head.encode() + b"{")
                await asyncio.sleep(0.5)
                os.kill(process.pid, signal.SIGTERM)
                # This answer comes at the end of the drain's waits, when no confirm is waited for any more.
                assert (await begun.read_answer()).json()["code"] == "draining"
            answered = (await asyncio.gather(slow, return_exceptions=True))[0]
            assert broker.published == [], answered
            assert not isinstance(answered, BaseException)
            assert (answered[0], answered[1]["code"]) == (503, "queue_unavailable")
    await locker.close()
