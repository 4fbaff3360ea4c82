"""PgBouncer in front of a PostgreSQL, from the system's `pgbouncer`."""

import os
import socket
from urllib.parse import urlsplit

from testbed.processes import NOBODY, Server, ServerError, find_program


class PgBouncer(Server):
    """PgBouncer in transaction mode, with one connection to the server: all clients meet on it."""

    name = "PgBouncer"

    def __init__(self, database_url: str) -> None:
        """`database_url`: the database behind it. Clients are not authenticated."""
        super().__init__()
        self._database = urlsplit(database_url)

    @property
    def url(self) -> str:
        """Return the URL of the database, through PgBouncer."""
        parts = self._database
        return parts._replace(netloc=f"{parts.username}@127.0.0.1:{self.port}").geturl()

    @property
    def _user_id(self) -> int:
        return NOBODY if os.getuid() == 0 else os.getuid()

    def _prepare(self) -> None:
        parts = self._database
        server = f"host={parts.hostname} port={parts.port} user={parts.username} password={parts.password or ''}"
        (self.directory / "pgbouncer.ini").write_text(
            f"[databases]\n{parts.path[1:]} = {server}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            # Every client is let in, as the user of [databases].
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 1\n"
        )

    def _command(self) -> list[str]:
        program = find_program("pgbouncer")
        if program is None:
            raise ServerError("PgBouncer is missing: install the package pgbouncer (scripts/setup tests does).")
        return [str(program), str(self.directory / "pgbouncer.ini")]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port.number), timeout=1.0).close()
        except OSError:
            return False
        return True
