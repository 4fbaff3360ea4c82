"""Fixtures for tests of the publisher: a scripted broker, quick reconnects, no task left, no text in logs."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.amqp import reconnection
from tests.support.eventually import eventually
from tests.support.publishing import (
    scripted_broker,
)
from tests.support.scripted_broker import ScriptedBroker


@pytest.fixture(autouse=True)
def reconnects_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnection, "RECONNECT_DELAYS_S", (0.0, 0.01))


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    async with scripted_broker() as scripted:
        yield scripted


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await eventually(lambda: asyncio.all_tasks() - before <= {asyncio.current_task()}, timeout=5.0)


@pytest.fixture(autouse=True)
def no_message_text_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, logger="gateway")
    yield
    assert '{"n":' not in caplog.text
