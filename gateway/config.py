"""Settings: one frozen struct, read from the environment once, at start; nobody else reads it.

Every variable is the field's name in upper case behind `GATEWAY_`. A bad value is refused with the variable's name.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Literal, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

PREFIX = "GATEWAY_"

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0 asks the system for a free one
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=3600)]
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
    ops_host: str = "127.0.0.1"  # probes from outside need 0.0.0.0: a deliberate step
    ops_port: Port = 9090

    database_pool_size: Positive = 5  # questions are grouped, and writes of keys take turns
    database_timeout_s: Seconds = 2.0  # of a query, waiting for a connection included
    database_statement_cache: Annotated[int, Meta(ge=0)] = 100  # 0 behind PgBouncer before 1.21

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
    access_log_sample: Share = 1.0  # of the requests with everything queued
    traces: Literal["on", "off"] = "off"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.masked().items())
        return f"Settings({shown})"

    def masked(self) -> dict[str, object]:
        """All settings by name, with the passwords in URLs replaced by ***."""
        values = msgspec.structs.asdict(self)
        values["database_url"] = _without_password(self.database_url)
        values["amqp_url"] = ",".join(map(_without_password, self.amqp_nodes()))
        return values

    def queues(self) -> list[str]:
        """The outbound queues, one per shard; each is bound by its own name."""
        if self.queue_shards == 1:
            return [self.amqp_queue]
        return [f"{self.amqp_queue}.{shard}" for shard in range(self.queue_shards)]

    def amqp_nodes(self) -> list[str]:
        """The broker's nodes, one URL each, in the order given."""
        return [url.strip() for url in self.amqp_url.split(",") if url.strip()]


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises ConfigurationError, naming the variable and what it takes."""
    values: dict[str, object] = {}
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        variable = PREFIX + name.upper()
        raw = environ.get(variable, "").strip()
        if not raw:
            continue  # set but empty is how compose files and shells spell "not set"
        try:
            values[name] = msgspec.convert(raw, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{variable}={raw!r} cannot be used: {error}") from None
    load_database_url(environ)
    _check_urls(PREFIX + "AMQP_URL", str(values.get("amqp_url", "")), ("amqp", "amqps"))
    return msgspec.convert(values, Settings)


def load_database_url(environ: Mapping[str, str] = os.environ) -> str:
    """The one setting that migrations and administration need. Raises ConfigurationError."""
    variable = PREFIX + "DATABASE_URL"
    url = environ.get(variable, "").strip()
    _check_urls(variable, url, ("postgres", "postgresql"))
    return url


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables with our prefix that no setting has: most likely misspelt.

    They are reported, not refused: Kubernetes injects `GATEWAY_PORT=tcp://…` beside any Service named `gateway`.
    """
    known = {PREFIX + name.upper() for name in Settings.__struct_fields__}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def _check_urls(variable: str, value: str, schemes: tuple[str, ...]) -> None:
    mend = f"Set {variable} to a URL such as {schemes[0]}://user:password@host/name"
    # A comma separates whole URLs for the broker, and hosts inside one URL for PostgreSQL.
    is_amqp = "amqp" in schemes
    urls = [url.strip() for url in (value.split(",") if is_amqp else [value]) if url.strip()]
    if not urls:
        raise ConfigurationError(f"{variable} is not set. {mend}")
    for url in urls:
        # The library's own words are left out: they would tell the password.
        try:
            parts = urlsplit(url)
            behind_host = url.partition(parts.netloc)[2] if parts.netloc else url
            is_whole = "@" not in behind_host and (not is_amqp or bool(parts.hostname and (parts.port or 0) >= 0))
        except ValueError:
            is_whole = False
        if not is_whole or parts.scheme not in schemes:
            raise ConfigurationError(
                f"{variable} is no {schemes[0]} URL. {mend}, with the special characters of the password "
                "percent-encoded"
            )


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return parts._replace(netloc=user + (colon and ":***") + at + hosts, query="").geturl()
