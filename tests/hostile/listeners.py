"""The three ways to reach the API of a gateway process: TCP, TLS, and a unix socket."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from testbed import Servers
from tests.hostile.attacked_gateway import AttackedGateway, open_gateway
from tests.support.authority import Authority
from tests.support.raw_http import Conversation

KINDS = ("TCP", "TLS", "unix")


class Listener:
    """The API of a gateway process. open_listener() starts one."""

    def __init__(self, gateway: AttackedGateway, socket_path: str, context: ssl.SSLContext | None) -> None:
        self.gateway = gateway
        self._socket_path = socket_path
        self.context = context

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Conversation]:
        """Open a connection; abort it at the end."""
        loop = asyncio.get_running_loop()
        if self._socket_path:
            _, conversation = await loop.create_unix_connection(Conversation, self._socket_path)
        else:
            port = self.gateway.process.port.number
            _, conversation = await loop.create_connection(Conversation, "127.0.0.1", port, ssl=self.context)
        try:
            yield conversation
        finally:
            conversation.abort()


@asynccontextmanager
async def open_listener(servers: Servers, folder: Path, kind: str, **settings: str) -> AsyncIterator[Listener]:
    """Start a gateway process that is reached as `kind` of KINDS says, with files in a folder; end it afterwards."""
    socket_path, context = "", None
    if kind == "TLS":
        authority = Authority(folder)
        _, cert, key = authority.issue("127.0.0.1")
        settings |= {"api_tls_cert_file": str(cert), "api_tls_key_file": str(key)}
        context = authority.client_context()
    elif kind == "unix":
        settings["api_socket"] = socket_path = str(folder / "api")
    async with open_gateway(servers, **settings) as gateway:
        yield Listener(gateway, socket_path, context)
