"""Settings from the environment: each variable is `CONSUMER_` and the field's name in upper case."""

import os
from collections.abc import Mapping
from typing import Annotated, get_type_hints

import msgspec
from msgspec import Meta

PREFIX = "CONSUMER_"

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e8)]  # three years; PostgreSQL's intervals and Python's have an end

KEY_LIFETIME_S = 24 * 3600.0  # for so long the gateway repeats a batch with the same ids (docs/api.md, Idempotency-Key)


class ConfigurationError(Exception):
    """Raised for a setting that is missing or cannot be used; the text names the variable."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a consumer."""

    database_url: str
    amqp_url: str  # several nodes: separated by commas
    queue: str = "sms.outbound"  # with shards: a consumer for each, `sms.outbound.0` and so on
    amqp_heartbeat_s: Annotated[int, Meta(ge=1, le=65_535)] = 10  # a dead peer is noticed after 3 × (heartbeat + 1) s
    prefetch: Annotated[int, Meta(ge=1, le=65_535)] = 1000  # AMQP messages the broker hands over before an ack
    group_size: Positive = 500  # SMS in one transaction; one envelope may go beyond it
    group_wait_s: Seconds = 0.05  # the longest wait for a group to fill: extra latency under low load
    max_age_s: Seconds = 1800.0  # since `accepted_at`; older SMS go to the dead letters
    # A request repeated with its Idempotency-Key, within 24 h, publishes the same ids with a new `accepted_at`. They
    # may wait in the queue for another max_age_s. Only after both can an id not come again; the rest is for clocks.
    remember_ids_s: Seconds = 25 * 3600.0
    sweep_interval_s: Seconds = 60.0
    # For one transaction, including the wait for a connection. PostgreSQL takes milliseconds, and 0 as no timeout.
    database_timeout_s: Annotated[float, Meta(ge=0.001, le=3600)] = 5.0

    def __post_init__(self) -> None:
        if self.remember_ids_s < (shortest := KEY_LIFETIME_S + self.max_age_s):
            raise ValueError(
                f"{PREFIX}REMEMBER_IDS_S={self.remember_ids_s:g} is below {shortest:g}, which is 24 hours plus "
                f"{PREFIX}MAX_AGE_S: a repeat could come after its id was forgotten, and be handed on twice"
            )

    def __repr__(self) -> str:
        return f"Settings(queue={self.queue!r})"  # the URLs hold passwords

    def amqp_nodes(self) -> list[str]:
        """Return the URL of each broker node."""
        return [url.strip() for url in self.amqp_url.split(",")]


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises ConfigurationError, which names the variable and the values it takes."""
    values: dict[str, object] = {}
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        variable = PREFIX + name.upper()
        # An empty variable counts as not set.
        if raw := environ.get(variable, "").strip():
            try:
                values[name] = msgspec.convert(raw, kind, strict=False)
            except msgspec.ValidationError as error:
                raise ConfigurationError(f"{variable}={raw!r} cannot be used: {_plain(str(error))}") from None
    for name, schemes in {"database_url": ("postgres", "postgresql"), "amqp_url": ("amqp", "amqps")}.items():
        urls = str(values.get(name, "")).split("," if name == "amqp_url" else None)
        if not all(url.strip().partition("://")[0] in schemes for url in urls or [""]):
            # Without the value: it may hold a password.
            raise ConfigurationError(f"Set {PREFIX}{name.upper()} to a URL: {schemes[0]}://user:password@host/name")
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(str(error)) from None


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables with our prefix that are no setting, sorted. Most are spelling mistakes."""
    known = {PREFIX + name.upper() for name in Settings.__struct_fields__}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def _plain(error: str) -> str:
    """Return msgspec's error about a value, without types of Python where the value is no number."""
    if error.endswith("got `str`"):
        return f"it must be a {'whole number' if '`int`' in error else 'number'}, without a unit"
    return error
