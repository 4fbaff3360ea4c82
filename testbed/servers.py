"""PostgreSQL and RabbitMQ together: private ones, or those that the environment names."""

import os
from pathlib import Path

from testbed.postgres import Postgres
from testbed.processes import Server, Startable, in_parallel
from testbed.rabbitmq import RabbitMQ


class Servers(Startable):
    """PostgreSQL and RabbitMQ, started at the same time.

    A server that GATEWAY_DATABASE_URL or GATEWAY_AMQP_URL names is used instead; it is neither started nor stopped.
    """

    def __init__(self, *, fsync: bool = True, keep: Path | None = None) -> None:
        """`keep`: a folder for the private ones' data, ports and passwords, which stays for the next run."""
        self.postgres = None if "GATEWAY_DATABASE_URL" in os.environ else Postgres(fsync=fsync)
        self.rabbitmq = None if "GATEWAY_AMQP_URL" in os.environ else RabbitMQ()
        if keep is not None:
            for server in self._private:
                server.keep(keep)
        self.database_url = self.postgres.url if self.postgres else os.environ["GATEWAY_DATABASE_URL"]
        self.amqp_url = self.rabbitmq.url if self.rabbitmq else os.environ["GATEWAY_AMQP_URL"]

    def environment(self) -> dict[str, str]:
        """Return the gateway's settings for these servers."""
        return {"GATEWAY_DATABASE_URL": self.database_url, "GATEWAY_AMQP_URL": self.amqp_url}

    @property
    def _private(self) -> list[Server]:
        return [server for server in (self.postgres, self.rabbitmq) if server is not None]

    def start(self) -> None:
        """Start the private ones at the same time."""
        in_parallel((server.start for server in self._private), give_up=self._give_up)

    def _give_up(self) -> None:
        for server in self._private:
            server.give_up()

    def close(self) -> None:
        """Kill the private ones and remove their data, or stop them and keep it."""
        in_parallel(server.close for server in self._private)
