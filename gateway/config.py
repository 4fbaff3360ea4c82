"""Settings: one frozen struct, read from the environment once, at start. No other module reads the environment.

A setting's variable is `GATEWAY_` and the field's name in upper case. The error for a bad value names the variable.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from gateway import urls

PREFIX = "GATEWAY_"

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: a free port
Positive = Annotated[int, Meta(ge=1, le=10**12)]  # far above any use, and loads computed from it fit 64 bits
Seconds = Annotated[float, Meta(gt=0, le=3600)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=3600)]
Share = Annotated[float, Meta(ge=0, le=1)]
AmqpName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,200}$")]

STATEMENT_CACHE = 100

# Parameters of AMQP URLs, as libraries and RabbitMQ name them, which the gateway has settings for.
AMQP_SETTINGS = {
    "heartbeat": "AMQP_HEARTBEAT_S",
    "timeout": "AMQP_CONNECT_TIMEOUT_S",
    "connection_timeout": "AMQP_CONNECT_TIMEOUT_S",
    "cafile": "AMQP_CA_FILE",
    "cacertfile": "AMQP_CA_FILE",
    "capath": "AMQP_CA_FILE",
    "cadata": "AMQP_CA_FILE",
    "verify": "AMQP_CA_FILE",
    "no_verify_ssl": "AMQP_CA_FILE",
    "certfile": "AMQP_CERT_FILE",
    "keyfile": "AMQP_KEY_FILE",
}
AMQP_AUTH = ("plain", "external")

# libpq's variables about a connection. The URL alone counts (decision 0042).
PG_VARIABLES = {
    *("PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGPASSWORD", "PGPASSFILE", "PGDATABASE", "PGSERVICE", "PGOPTIONS"),
    *("PGSSLMODE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGSSLCRL", "PGSSLNEGOTIATION", "PGTARGETSESSIONATTRS"),
    *("PGAPPNAME", "PGCONNECT_TIMEOUT", "PGCHANNELBINDING", "PGREQUIREAUTH", "PGKRBSRVNAME", "PGGSSLIB"),
}

# Deadlines that depend on each other: the shorter one, the longer one, and what happens otherwise.
DEADLINES = (
    ("database_timeout_s", "confirm_timeout_s", "one slow query would take all the time of a request"),
    ("amqp_heartbeat_s", "confirm_timeout_s", "a dead broker would be noticed after the deadline of its messages"),
    ("confirm_timeout_s", "abandon_timeout_s", "connections would be closed before the deadline of their messages"),
)


class ConfigurationError(Exception):
    """The settings cannot work. The text names the variable, and says what to do."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's settings. Names end in their unit. The defaults suit one process in a container."""

    # Several hosts are allowed; queries go to the primary.
    database_url: str
    # Several nodes are separated by commas.
    amqp_url: str

    # Address of the API. "::": all addresses, IPv6 and IPv4. "*": the same, or all of IPv4 on a machine without IPv6.
    api_host: str = "0.0.0.0"  # noqa: S104 - the container exists to offer the API
    api_port: Port = 8080
    # Path of a unix socket that replaces host and port.
    api_socket: str = ""
    # PEM file with the certificate and its chain, read again on SIGHUP; "" serves plain HTTP.
    api_tls_cert_file: str = ""
    # PEM file of the key; "" if the certificate's file holds it. The same holds for the key files below.
    api_tls_key_file: str = ""
    # "on": /docs, the API's documentation, is also served on the API's port, to anyone who reaches it.
    api_docs: Literal["on", "off"] = "off"
    # Address of the operations listener. Probes from outside need 0.0.0.0.
    ops_host: str = "127.0.0.1"
    ops_port: Port = 9090

    # PEM file of the CA that signed the server's certificate; "" uses the system's CAs.
    database_ca_file: str = ""
    # PEM files of the client certificate; "" sends none. All TLS files are read at each connect.
    database_cert_file: str = ""
    database_key_file: str = ""
    # Connections per process. Requests share queries, so a larger pool stays idle.
    database_pool_size: Annotated[int, Meta(ge=1, le=1_000)] = 5
    # Longest time for one query, the wait for a connection included.
    database_timeout_s: Seconds = 2.0
    # Prepared statements per connection; 0 behind PgBouncer before 1.21.
    database_statement_cache: Annotated[int, Meta(ge=0)] = STATEMENT_CACHE

    # TLS files, as for the database.
    amqp_ca_file: str = ""
    amqp_cert_file: str = ""
    amqp_key_file: str = ""
    # Names of the exchange and of the outbound queue.
    amqp_exchange: AmqpName = "sms.outbound"
    amqp_queue: AmqpName = "sms.outbound"
    amqp_queue_type: Literal["quorum", "classic", "stream"] = "quorum"
    # "check": exchange and queues must exist already.
    amqp_topology: Literal["declare", "check"] = "declare"
    # Above 1, SMS of one list share an AMQP message.
    messages_per_envelope: Annotated[int, Meta(ge=1, le=1000)] = 1
    # Above 1, there are as many queues, and a list's messages go to one of them.
    queue_shards: Annotated[int, Meta(ge=1, le=256)] = 1
    # Publish connections, spread over the nodes.
    amqp_connections: Annotated[int, Meta(ge=1, le=64)] = 2
    # A peer that is silent for one second longer is considered dead.
    amqp_heartbeat_s: Annotated[int, Meta(ge=1, le=600)] = 5
    amqp_connect_timeout_s: Seconds = 5.0
    # After this time a written message is answered as unknown, and one that was not written is refused. Load balancers
    # usually wait 30 s: this leaves time for a retry.
    confirm_timeout_s: Seconds = 10.0
    # A connection with a batch that is unconfirmed for longer after its write is closed, even under a broker alarm.
    abandon_timeout_s: Seconds = 30.0
    # Bounds on unconfirmed messages, in number and in bytes. Below 1,000 a full batch would never fit.
    max_unconfirmed_messages: Annotated[int, Meta(ge=1_000, le=10**9)] = 100_000
    max_unconfirmed_bytes: Positive = 128 * 1024 * 1024

    # An idle connection costs about 7 kB; with TLS 54 kB, and it counts twice. At the limit the oldest waiting one is
    # closed (web/connections.py).
    max_connections: Positive = 8_192
    # Longest time for a TLS handshake, for the head of a request, and for a new connection to send one.
    header_timeout_s: Seconds = 10.0
    # Longest time for the body of a request.
    body_timeout_s: Seconds = 10.0
    # Longest time for a caller to read its answer. Then the connection is closed.
    answer_timeout_s: Seconds = 30.0
    # Above the 60 s after which load balancers usually drop an idle connection.
    keepalive_timeout_s: Seconds = 75.0
    # Requests beyond this number are refused as overloaded.
    max_requests_in_flight: Positive = 512
    # Bytes of request bodies; a chunked body counts as 5 MiB. This default keeps a process under 512 MB (scripts/bench
    # memory): docs/operations.md, "Sizing".
    max_bytes_in_flight: Annotated[int, Meta(ge=5_242_880)] = 64 * 1024 * 1024

    # Stored Idempotency-Keys of one account, beyond which new keys are refused. A key takes about 300 bytes for 24 h.
    max_idempotency_keys: Positive = 1_000_000

    # After SIGTERM the gateway serves for this long, while load balancers see that it is not ready.
    drain_delay_s: SecondsOrZero = 3.0
    # Then requests in flight have this long to end. The sum must be 10 s below the grace period.
    drain_timeout_s: Seconds = 20.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # The default does not depend on a terminal: logs look the same everywhere.
    log_format: Literal["json", "console"] = "json"
    # Share of fully queued, replayed, dry-run and read requests that are logged (telemetry/requests.py has the others).
    request_log_sample: Share = 1.0
    traces: Literal["on", "off"] = "off"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.masked().items())
        return f"Settings({shown})"

    def masked(self) -> dict[str, object]:
        """Return all settings by name, with the passwords in URLs replaced by `***`."""
        values = msgspec.structs.asdict(self)
        values["database_url"] = urls.without_password(self.database_url)
        values["amqp_url"] = ",".join(map(urls.without_password, self.amqp_nodes()))
        return values

    def queues(self) -> list[str]:
        """Return the names of the outbound queues, one per shard. Each is bound by its own name."""
        if self.queue_shards == 1:
            return [self.amqp_queue]
        return [f"{self.amqp_queue}.{shard}" for shard in range(self.queue_shards)]

    def database_url_with_tls(self) -> str:
        """Return the database's URL with explicit TLS parameters (urls.with_tls)."""
        return urls.with_tls(
            self.database_url,
            sslrootcert=self.database_ca_file,
            sslcert=self.database_cert_file,
            sslkey=self.database_key_file,
        )

    def database(self) -> urls.Database:
        """Return the parts of the database's URL. Raises urls.UnusableUrl."""
        return urls.Database.of(self.database_url_with_tls())

    def amqp_nodes(self) -> list[str]:
        """Return the URLs of the broker's nodes, in order."""
        return urls.split_nodes(self.amqp_url)


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises ConfigurationError."""
    values = _read(get_type_hints(Settings, include_extras=True), environ)
    load_database_url(environ)  # only for its checks: `values` has the URL as it was given
    for name in ("api_host", "ops_host"):
        if name in values:
            values[name] = _listen_host(PREFIX + name.upper(), values[name])
    _check_amqp_urls(PREFIX + "AMQP_URL", str(values.get("amqp_url", "")), has_certificate="amqp_cert_file" in values)
    settings = msgspec.convert(values, Settings)
    _check_deadlines(settings)
    _check_ports(settings)
    return settings


def _read(kinds: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the variables that are set. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        variable = PREFIX + name.upper()
        if not (raw := _raw(variable, environ)):
            continue
        try:
            values[name] = msgspec.convert(raw, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{variable}={raw!r} cannot be used: {_allowed(kind, str(error))}") from None
    return values


def _allowed(kind: Any, error: str) -> str:
    """Return msgspec's error about a value of this kind, in an operator's words where it names types of Python."""
    if get_origin(kind) is Literal:
        return f"{error}. Use one of {', '.join(get_args(kind))}"
    if error.endswith("got `str`"):
        number = "whole number" if "`int`" in error else "number"
        return f"it must be a {number}, without a unit"
    return error


def _raw(variable: str, environ: Mapping[str, str]) -> str:
    """Return a variable's value; "" if it is not set: compose files and shells set a variable to "" to unset it."""
    raw = environ.get(variable, "").strip()
    if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"":
        raise ConfigurationError(f"{variable} is in quotation marks, which are read as a part of it. Remove them")
    return raw


def _listen_host(variable: str, text: str) -> str:
    """Return the address to listen on. Raises ConfigurationError for what is neither an address nor a host name."""
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - as the operator asks
    host = everywhere if text == "*" else re.sub(r"^\[(.*)\]$", r"\1", text)
    if ":" in host:
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            host = ""
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
        raise ConfigurationError(
            f"{variable}={text!r} is not an address. Use 0.0.0.0 (IPv4), :: (IPv6 and IPv4), * (what this machine "
            f"has), or one address of this machine. The port is set by {variable.removesuffix('HOST')}PORT"
        )
    return host


def _check_ports(settings: Settings) -> None:
    """Raise ConfigurationError if both listeners have one port on addresses that overlap. Resolves no host names."""
    port, hosts = settings.api_port, {settings.api_host, settings.ops_host}
    if settings.api_socket or not port or port != settings.ops_port:
        return
    is_ipv4 = all(re.fullmatch(r"[0-9.]+", host) for host in hosts)
    if len(hosts) == 1 or "::" in hosts or ("0.0.0.0" in hosts and is_ipv4):  # noqa: S104 - compared
        raise ConfigurationError(
            f"{PREFIX}API_PORT and {PREFIX}OPS_PORT are both {port}, on overlapping addresses. Set one to another port"
        )


def _check_deadlines(settings: Settings) -> None:
    for shorter, longer, otherwise in DEADLINES:
        if getattr(settings, shorter) > getattr(settings, longer):
            first, second = (f"{PREFIX}{name.upper()}={getattr(settings, name):g}" for name in (shorter, longer))
            raise ConfigurationError(f"{first} must not be above {second}: {otherwise}")


def load_database_url(environ: Mapping[str, str] = os.environ) -> str:
    """Read the database's URL alone, with explicit TLS parameters, for administration. Raises ConfigurationError."""
    variable = PREFIX + "DATABASE_URL"
    if not (url := _raw(variable, environ)):
        raise ConfigurationError(
            f"{variable} is not set. Set {variable} to a URL such as postgres://user:password@host/name"
        )
    ca_file, cert_file, key_file = (
        _raw(f"{PREFIX}DATABASE_{name}", environ) for name in ("CA_FILE", "CERT_FILE", "KEY_FILE")
    )
    files = {"sslrootcert": ca_file, "sslcert": cert_file, "sslkey": key_file}
    try:
        parameters = urls.Database.of(url, **files).parameters
    except urls.UnusableUrl as error:
        raise ConfigurationError(f"{variable} {error}") from None
    if "sslkey" in parameters and "sslcert" not in parameters and not key_file:
        raise ConfigurationError(f"{variable} has sslkey without sslcert. Set {PREFIX}DATABASE_CERT_FILE")
    return urls.with_tls(url, **files)


def load_statement_cache(environ: Mapping[str, str] = os.environ) -> int:
    """Read the number of prepared statements per connection alone, for administration. Raises ConfigurationError."""
    name = "database_statement_cache"
    found = _read({name: get_type_hints(Settings, include_extras=True)[name]}, environ)
    return int(found.get(name, STATEMENT_CACHE))


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables with our prefix that are no setting, sorted. Most are spelling mistakes.

    They are reported, not refused: Kubernetes sets `GATEWAY_PORT=tcp://…` for a Service named `gateway`.
    """
    known = {PREFIX + name.upper() for name in Settings.__struct_fields__}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def ignored_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return those of PG_VARIABLES that are set, sorted."""
    return sorted(PG_VARIABLES & environ.keys())


def _check_amqp_urls(variable: str, value: str, *, has_certificate: bool) -> None:
    nodes = urls.split_nodes(value)
    if not nodes:
        raise ConfigurationError(
            f"{variable} is not set. Set {variable} to a URL such as amqp://user:password@host/name"
        )
    for url in nodes:
        try:
            given = urls.check_broker(url)
        except urls.UnusableUrl as error:
            raise ConfigurationError(f"{variable} {error}. A comma separates nodes") from None
        auth = given.pop("auth", "plain").lower()
        if auth not in AMQP_AUTH:
            raise ConfigurationError(f"{variable} has another auth. Set auth to one of {', '.join(AMQP_AUTH)}")
        if auth == "external" and not (url.lower().startswith("amqps:") and has_certificate):
            raise ConfigurationError(
                f"{variable} has auth=external, which needs amqps:// and a client certificate. "
                f"Set {PREFIX}AMQP_CERT_FILE"
            )
        if given:
            raise ConfigurationError(f"{variable} {_unsupported(given)}")


def _unsupported(given: Mapping[str, str]) -> str:
    settings = sorted({PREFIX + AMQP_SETTINGS[name] for name in given if name in AMQP_SETTINGS})
    named = urls.names_of(given, hides_password="password" in given)
    return f"has {named}, which the gateway would ignore. " + (
        f"Set {' and '.join(settings)} instead" if settings else "Remove it. The only supported parameter is auth"
    )
