"""Settings: one frozen struct, read from the environment once, at start; nobody else reads it.

Every variable is the field's name in upper case behind `GATEWAY_`. A bad value is refused with the variable's name.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import parse_qs

import msgspec
from msgspec import Meta

from gateway import urls

PREFIX = "GATEWAY_"
ESCAPE = ", with the special characters of the password percent-encoded"

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0 asks the system for a free one
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=3600)]
AMQP_TLS_PARAMETERS = {"cafile", "capath", "cadata", "keyfile", "certfile", "no_verify_ssl"}  # of aiormq's URLs
Share = Annotated[float, Meta(ge=0, le=1)]
AmqpName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,200}$")]


class ConfigurationError(Exception):
    """The environment does not describe a gateway that could run; the text names the variable."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator can set. Units stand in the names; defaults are right for one process in a container."""

    database_url: str
    amqp_url: str  # several nodes: separated by commas

    api_host: str = "0.0.0.0"  # noqa: S104 - the API is what the container is there to offer
    api_port: Port = 8080
    api_socket: str = ""  # a path: a unix socket in place of host and port
    api_tls_cert_file: str = ""  # PEM, the chain behind it included; read again on SIGHUP
    api_tls_key_file: str = ""  # "" when it stands in the same file, here and below
    ops_host: str = "127.0.0.1"  # probes from outside need 0.0.0.0: a deliberate step
    ops_port: Port = 9090

    # How the server is verified and who we are; "": by the system's authorities, and nobody. Read at each connect.
    database_ca_file: str = ""
    database_cert_file: str = ""
    database_key_file: str = ""
    database_pool_size: Positive = 5  # questions are grouped, and writes of keys take turns
    database_timeout_s: Seconds = 2.0  # of a query, waiting for a connection included
    database_statement_cache: Annotated[int, Meta(ge=0)] = 100  # 0 behind PgBouncer before 1.21

    amqp_ca_file: str = ""
    amqp_cert_file: str = ""
    amqp_key_file: str = ""
    amqp_exchange: AmqpName = "sms.outbound"
    amqp_queue: AmqpName = "sms.outbound"
    amqp_queue_type: Literal["quorum", "classic", "stream"] = "quorum"
    amqp_topology: Literal["declare", "check"] = "declare"
    messages_per_envelope: Annotated[int, Meta(ge=1, le=1000)] = 1  # above 1, SMS of a list share an AMQP message
    queue_shards: Annotated[int, Meta(ge=1, le=256)] = 1  # above 1, as many queues, chosen by list
    amqp_connections: Annotated[int, Meta(ge=1, le=64)] = 2  # spread over the nodes of the URL
    amqp_heartbeat_s: Annotated[int, Meta(ge=1, le=600)] = 5  # silent for a second longer, a peer is dead
    amqp_connect_timeout_s: Seconds = 5.0
    confirm_timeout_s: Seconds = 10.0  # under the usual 30 s of a load balancer, with room for a retry
    abandon_timeout_s: Seconds = 30.0  # unconfirmed for this long: the connection is closed and made anew
    max_unconfirmed_messages: Annotated[int, Meta(ge=1_000)] = 100_000  # less would refuse a full batch for ever
    max_unconfirmed_bytes: Positive = 128 * 1024 * 1024

    # An idle one costs some 7 kB. At the limit the oldest waiting connection is closed (web/connections.py).
    max_connections: Positive = 8_192
    header_timeout_s: Seconds = 10.0  # for a TLS handshake, for the head of a request, for a new connection to send one
    body_timeout_s: Seconds = 10.0
    answer_timeout_s: Seconds = 30.0  # for a caller to read its answer; then the connection is cut
    keepalive_timeout_s: Seconds = 75.0  # above the 60 s at which load balancers drop an idle connection
    max_requests_in_flight: Positive = 512
    # Of request bodies; a chunked one counts as 5 MiB. A request takes some five times its body at its peak, so this
    # keeps a process under 512 MB (scripts/bench memory).
    max_bytes_in_flight: Annotated[int, Meta(ge=5_242_880)] = 64 * 1024 * 1024

    drain_delay_s: SecondsOrNone = 3.0  # serve on while load balancers notice that we are not ready
    drain_timeout_s: Seconds = 20.0  # then, for the requests in flight; the sum stays under Kubernetes' 30 s
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "console"] = "json"  # the same everywhere: a form that hangs on a terminal surprises
    request_log_sample: Share = 1.0  # of the requests with everything queued
    traces: Literal["on", "off"] = "off"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.masked().items())
        return f"Settings({shown})"

    def masked(self) -> dict[str, object]:
        """All settings by name, with the passwords in URLs replaced by ***."""
        values = msgspec.structs.asdict(self)
        values["database_url"] = urls.without_password(self.database_url)
        values["amqp_url"] = ",".join(map(urls.without_password, self.amqp_nodes()))
        return values

    def queues(self) -> list[str]:
        """The outbound queues, one per shard; each is bound by its own name."""
        if self.queue_shards == 1:
            return [self.amqp_queue]
        return [f"{self.amqp_queue}.{shard}" for shard in range(self.queue_shards)]

    def database_url_with_tls(self) -> str:
        """The database's URL with everything about TLS spelt out in libpq's words."""
        return urls.with_tls(
            self.database_url,
            sslrootcert=self.database_ca_file,
            sslcert=self.database_cert_file,
            sslkey=self.database_key_file,
        )

    def amqp_nodes(self) -> list[str]:
        """The broker's nodes, one URL each, in the order given."""
        return urls.split_nodes(self.amqp_url)


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises ConfigurationError, naming the variable and what it takes."""
    values = _read(get_type_hints(Settings, include_extras=True), environ)
    load_database_url(environ)
    _check_amqp_urls(PREFIX + "AMQP_URL", str(values.get("amqp_url", "")))
    return msgspec.convert(values, Settings)


def _read(kinds: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Those of the settings that are set. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        variable = PREFIX + name.upper()
        raw = environ.get(variable, "").strip()
        if not raw:
            continue  # set but empty is how compose files and shells spell "not set"
        try:
            values[name] = msgspec.convert(raw, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{variable}={raw!r} cannot be used: {error}") from None
    return values


def load_database_url(environ: Mapping[str, str] = os.environ) -> str:
    """The database's URL with TLS spelt out: all that migrations and administration need. Raises ConfigurationError."""
    variable = PREFIX + "DATABASE_URL"
    url = environ.get(variable, "").strip()
    _check_database_url(variable, url)
    ca_file, cert_file, key_file = (
        environ.get(f"{PREFIX}DATABASE_{name}", "").strip() for name in ("CA_FILE", "CERT_FILE", "KEY_FILE")
    )
    return urls.with_tls(url, sslrootcert=ca_file, sslcert=cert_file, sslkey=key_file)


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables with our prefix that no setting has: most likely misspelt.

    They are reported, not refused: Kubernetes injects `GATEWAY_PORT=tcp://…` beside any Service named `gateway`.
    """
    known = {PREFIX + name.upper() for name in Settings.__struct_fields__}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def _check_database_url(variable: str, url: str) -> None:
    hint = f"Set {variable} to a URL such as postgres://user:password@host/name"
    if not url:
        raise ConfigurationError(f"{variable} is not set. {hint}")
    if not urls.is_complete(url, urls.POSTGRES):
        raise ConfigurationError(f"{variable} is no postgres URL. {hint}{ESCAPE}")
    mode = parse_qs(urls.split_url(url).query).get("sslmode", ["verify-full"])[-1]
    if mode not in urls.SSL_MODES:
        raise ConfigurationError(f"{variable} has sslmode={mode}: choose one of {', '.join(urls.SSL_MODES)}")


def _check_amqp_urls(variable: str, value: str) -> None:
    hint = f"Set {variable} to a URL such as amqp://user:password@host/name"
    nodes = urls.split_nodes(value)
    if not nodes:
        raise ConfigurationError(f"{variable} is not set. {hint}")
    for url in nodes:
        if not urls.is_complete(url, urls.AMQP):
            raise ConfigurationError(f"{variable} is no amqp URL. {hint}{ESCAPE}")
        if ignored := AMQP_TLS_PARAMETERS & parse_qs(urls.split_url(url).query).keys():
            raise ConfigurationError(
                f"{variable} has {', '.join(sorted(ignored))}, which is not looked at. Set {PREFIX}AMQP_CA_FILE, "
                f"{PREFIX}AMQP_CERT_FILE and {PREFIX}AMQP_KEY_FILE instead"
            )
