"""The parts of database and broker URLs; what cannot work is refused with the variable's name, and quotes no secret."""

import re

import pytest

from gateway import config, tls
from gateway.config import ConfigurationError
from gateway.urls import PARAMETERS, Address, Database, check_broker

BASE = {"GATEWAY_DATABASE_URL": "postgres://u:pg-secret@db/x", "GATEWAY_AMQP_URL": "amqp://u:mq-secret@mq/"}


def refusal(variable: str, url: str, **others: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        config.load(BASE | others | {variable: url})
    said = str(refused.value)
    assert said.startswith(f"{variable} ")
    assert "secret" not in said
    return said


def database(url: str) -> Database:
    loaded = config.load(BASE | {"GATEWAY_DATABASE_URL": url}).database()
    return loaded._replace(parameters={})


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("postgres://u:p@h/x", ([("h", 5432)], "u", "p", "x")),
        ("postgresql://u@h", ([("h", 5432)], "u", "", "u")),
        ("postgres://u:p%40%3A%2F@h:5433/a%2Fb", ([("h", 5433)], "u", "p@:/", "a/b")),
        ("postgres://u@h1:1,[::1]:2,h3/x", ([("h1", 1), ("::1", 2), ("h3", 5432)], "u", "", "x")),
        ("postgres:///x?host=/run/postgresql&user=u", ([("/run/postgresql", 5432)], "u", "", "x")),
        ("postgres://u@%2Frun%2Fpg:5433/x", ([("/run/pg", 5433)], "u", "", "x")),
        ("postgres:///?host=a,b&port=1,2&user=u&password=p&dbname=x", ([("a", 1), ("b", 2)], "u", "p", "x")),
        ("postgres://u@/x?host=::1,[::2]&port=7", ([("::1", 7), ("::2", 7)], "u", "", "x")),
        ("postgres://u@h/?database=x&port=7", ([("h", 7)], "u", "", "x")),
        ("postgres://u@h/x?", ([("h", 5432)], "u", "", "x")),
        ("postgres://u@h/x?application_name=&sslmode=", ([("h", 5432)], "u", "", "x")),
        ("postgres://u@h/x?sslmode=require&", ([("h", 5432)], "u", "", "x")),
    ],
)
def test_the_parts_of_a_database_url(url: str, parts: tuple[object, ...]) -> None:
    hosts, user, password, name, _ = database(url)
    assert ([tuple(host) for host in hosts], user, password, name) == parts


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgres://u:secret@h/x#y", "must be percent-encoded"),
        ("postgres://u:secret@h/x#", "must be percent-encoded"),
        ("postgres://u:sec ret@h/x", "must be percent-encoded"),
        ("postgres://u:100%secret@h/x", "must be percent-encoded"),
        ("postgres://ü:secret@h/x", "must be percent-encoded"),
        ("postgres://u:secret%FF@h/x", "not UTF-8"),
        ("postgres://u:secret%00@h/x", "NUL"),
        ("postgres://u:secret@h:abc/x", "A port is a number from 1 to 65535"),
        ("postgres://u:secret@h:0/x", "A port is a number from 1 to 65535"),
        ("postgres://u:secret@h/x?port=tcp://10.0.0.1:5432", "A port is a number from 1 to 65535"),
        ("postgres://u:secret@h:1/x?port=2", "twice"),
        ("postgres://u:secret@h/x?host=i", "names a host twice"),
        ("postgres://u:secret@h/x?password=secret", "twice"),
        ("postgres://u:secret@h/x?sslmode=disable&sslmode=require", "twice"),
        ("postgres://u:secret@a,b,c/x?port=1,2", "another number of ports"),
        ("postgres://u:secret@a,,c/x", "a host or a port that cannot be used"),
        ("postgres://u:secret@[nonsense]/x", "a host or a port that cannot be used"),
        ("postgres://u:secret@/x", "names no host"),
        ("postgres://h/x", "names no user"),
        ("postgres://:secret@h/x", "names no user"),
        ("postgres://u:secret@h/x?foo", "name=value"),
        ("postgres://u:secret@h/x?foo=1", "has foo, not supported. Remove it. Supported parameters: application_name,"),
        ("postgres://u:secret@h/x?keepalives_idle=30", "has keepalives_idle, not supported"),
        ("postgres://u:secret@h/x?sslcrl=/x", "has sslcrl, not supported"),
        ("postgres://u@h/x?password=se&cret=1", "has a parameter, not supported"),
        ("postgres://u:secret@h/x?a%0Ab=1", "has a parameter, not supported"),
        ("postgres://u:secret@h/x?connect_timeout=2s", "connect_timeout that is not a whole number of seconds"),
        ("postgres://u:secret@h/x?connect_timeout=-1", "connect_timeout that is not a whole number of seconds"),
        ("postgres://u:secret@h/x?connect_timeout=99999999999", "connect_timeout that is not a whole number"),
        ("postgres://u:secret@h/x?channel_binding=always", "Set channel_binding to one of disable, prefer, require"),
        ("postgres://u:secret@h/x?channel_binding=require&sslmode=disable", "which needs TLS. Set sslmode=verify-full"),
        ("postgres://u:secret@h/x?sslnegotiation=maybe", "Set sslnegotiation to one of postgres, direct"),
        ("postgres://u:secret@localhost/x?sslnegotiation=direct", "which needs TLS. Set sslmode=verify-full"),
        ("postgres://u:secret@h/x?sslkey=/k", "has sslkey without sslcert"),
        ("postgres://u:secret@h/x?target_session_attrs=standby", "target_session_attrs to one of primary, read-write"),
        ('"postgres://u:secret@h/x"', "is in quotation marks, which are read as a part of it. Remove them"),
        ("'postgres://u:secret@h/x'", "is in quotation marks, which are read as a part of it. Remove them"),
        ("//[", "is not a postgres URL"),
        ("postgres:u@h", "is not a postgres URL"),
    ],
)
def test_a_database_url_that_cannot_work_is_refused_at_start(url: str, says: str) -> None:
    assert says in refusal("GATEWAY_DATABASE_URL", url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "amqp://u:secret@h/?heartbeat=30",
            "has heartbeat, which the gateway would ignore. Set GATEWAY_AMQP_HEARTBEAT_S",
        ),
        ("amqp://u:secret@h/?foo=1", "has foo, which the gateway would ignore. Remove it"),
        ("amqp://u:secret@h/?foo", "name=value"),
        ("amqp://u:secret@h/?auth=gssapi", "Set auth to one of plain, external"),
        ("amqp://u:secret@h/?auth=EXTERNAL", "needs amqps:// and a client certificate. Set GATEWAY_AMQP_CERT_FILE"),
        ("amqps://h/?auth=EXTERNAL", "needs amqps:// and a client certificate. Set GATEWAY_AMQP_CERT_FILE"),
        ("amqp://u:secret@h/#x", "must be percent-encoded"),
        ("amqp://u:sec[ret@h/", "must be percent-encoded"),
        ("amqp://u:sec\\ret@h/", "must be percent-encoded"),
        ("amqp://u:secret@h:0/", "A port is a number from 1 to 65535"),
        ("amqp://u:secret@h/%00", "NUL"),
        ("amqp://u:secret@%2Frun%2Fx/", "names a unix socket"),
        ("amqp://u:sec,ret@h/", "A comma separates nodes"),
        ('"amqp://u:secret@h/"', "is in quotation marks"),
        ("http://u:secret@h/", "is not an amqp URL"),
        ("amqp:u@h", "is not an amqp URL"),
    ],
)
def test_a_broker_url_that_cannot_work_is_refused_at_start(url: str, says: str) -> None:
    assert says in refusal("GATEWAY_AMQP_URL", url)


def test_a_broker_may_know_the_gateway_by_its_certificate() -> None:
    files = {"GATEWAY_AMQP_CERT_FILE": "/us.pem"}
    url = "amqps://h/?auth=EXTERNAL"
    assert config.load(BASE | files | {"GATEWAY_AMQP_URL": url}).amqp_nodes() == [url]
    assert check_broker(url) == {"auth": "EXTERNAL"}
    assert check_broker("amqp://u:p@[::1]:5672/a%2Fb?") == {}


def test_any_other_setting_in_quotation_marks_is_refused_as_such_too() -> None:
    assert "is in quotation marks" in refusal("GATEWAY_LOG_LEVEL", '"INFO"')


def test_channel_binding_that_is_required_is_replaced_by_a_verified_certificate() -> None:
    """Neon's URLs say `sslmode=require&channel_binding=require`. asyncpg has no channel binding."""
    for mode in ("", "&sslmode=require", "&sslmode=verify-ca", "&sslmode=verify-full"):
        loaded = Database.of(f"postgres://u@h/x?channel_binding=require{mode}")
        assert loaded.parameters["sslmode"] == "verify-full"
        assert (context := tls.database_context(loaded))
        assert context.check_hostname
        assert "channel_binding" not in loaded.url(loaded.hosts[0])
        assert "sslmode=verify-full" in loaded.url(loaded.hosts[0])
    assert Database.of("postgres://u@localhost/x?channel_binding=require").parameters["sslmode"] == "verify-full"


def test_every_parameter_is_supported_or_has_its_values() -> None:
    good = {"connect_timeout": "3", "sslmode": "verify-ca"}
    for name, values in PARAMETERS.items():
        for value in values or (good.get(name, "x"),):
            loaded = Database.of(
                f"postgres://u@h/x?sslmode=verify-full&{name}={value}".replace("sslmode=verify-full&sslmode", "sslmode")
            )
            assert loaded.parameters[name] == value or name == "sslmode"


def test_addresses_are_shown_with_brackets_around_ipv6() -> None:
    assert str(Database.of("postgres://u@a:1,[::1]/x")) == "a:1,[::1]:5432"
    assert str(Address("/run/pg", 5432)) == "/run/pg:5432"


@pytest.mark.parametrize(("host", "listens_on"), [("*", "::"), ("[::]", "::"), ("::1", "::1"), ("db-1.x", "db-1.x")])
def test_addresses_to_listen_on(host: str, listens_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.has_dualstack_ipv6", lambda: True)
    loaded = config.load(BASE | {"GATEWAY_API_HOST": host, "GATEWAY_OPS_HOST": host})
    assert (loaded.api_host, loaded.ops_host) == (listens_on, listens_on)


def test_a_star_is_ipv4_on_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.has_dualstack_ipv6", lambda: False)
    assert config.load(BASE | {"GATEWAY_API_HOST": "*"}).api_host == "0.0.0.0"  # noqa: S104 - read, not bound


@pytest.mark.parametrize("host", ["0.0.0.0:8080", "http://0.0.0.0", "[::]:8080", "a b", "**", ":::", "[]"])
def test_what_is_no_address_to_listen_on_is_refused(host: str) -> None:
    for party in ("API", "OPS"):
        with pytest.raises(
            ConfigurationError, match=re.escape(f"GATEWAY_{party}_HOST={host!r} is not an address")
        ) as no:
            config.load(BASE | {f"GATEWAY_{party}_HOST": host})
        assert f"The port is set by GATEWAY_{party}_PORT" in str(no.value)
