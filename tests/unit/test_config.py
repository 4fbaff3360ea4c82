"""Settings come from the environment: each from its variable; a bad one is refused by name; no password is shown."""

import ssl

import msgspec
import pytest

from gateway import config, tls
from gateway.config import ConfigurationError, Settings
from gateway.urls import Database, with_tls

URLS = {
    "GATEWAY_DATABASE_URL": "postgres://gateway:pg-secret@db.internal/gateway",
    "GATEWAY_AMQP_URL": "amqp://gateway:mq-secret@mq1.internal/,amqp://gateway:mq-secret@mq2.internal/",
}

# For each setting a good value that is not its default, as an operator writes it, and what it means.
GOOD: dict[str, tuple[str, object]] = {
    "database_url": ("postgresql://u:p@h1:5432,h2:5433/db", "postgresql://u:p@h1:5432,h2:5433/db"),
    "amqp_url": ("amqps://u:p@h/vhost", "amqps://u:p@h/vhost"),
    "api_host": ("::", "::"),
    "api_port": ("0", 0),
    "api_socket": ("/run/gateway/api", "/run/gateway/api"),
    "api_tls_cert_file": ("/tls/api.pem", "/tls/api.pem"),
    "api_tls_key_file": ("/tls/api.key", "/tls/api.key"),
    "database_ca_file": ("/tls/ca.pem", "/tls/ca.pem"),
    "database_cert_file": ("/tls/us.pem", "/tls/us.pem"),
    "database_key_file": ("/tls/us.key", "/tls/us.key"),
    "amqp_ca_file": ("/tls/ca.pem", "/tls/ca.pem"),
    "amqp_cert_file": ("/tls/us.pem", "/tls/us.pem"),
    "amqp_key_file": ("/tls/us.key", "/tls/us.key"),
    "api_docs": ("on", "on"),
    "ops_host": ("0.0.0.0", "0.0.0.0"),  # noqa: S104 - read, not bound
    "ops_port": ("65535", 65_535),
    "database_pool_size": ("1", 1),
    "database_timeout_s": ("0.5", 0.5),
    "database_statement_cache": ("0", 0),
    "amqp_exchange": ("sms:eu.west-1_x", "sms:eu.west-1_x"),
    "amqp_queue": ("q" * 200, "q" * 200),
    "amqp_queue_type": ("stream", "stream"),
    "amqp_topology": ("check", "check"),
    "messages_per_envelope": ("100", 100),
    "queue_shards": ("4", 4),
    "answer_timeout_s": ("5", 5.0),
    "amqp_connections": ("64", 64),
    "amqp_heartbeat_s": ("10", 10),
    "amqp_connect_timeout_s": ("1", 1.0),
    "confirm_timeout_s": ("5.5", 5.5),
    "abandon_timeout_s": ("3600", 3_600.0),
    "max_unconfirmed_messages": ("1000", 1_000),
    "max_unconfirmed_bytes": ("1", 1),
    "max_connections": ("1", 1),
    "header_timeout_s": ("2.5", 2.5),
    "body_timeout_s": ("0.001", 0.001),
    "keepalive_timeout_s": ("61", 61.0),
    "max_requests_in_flight": ("1", 1),
    "max_bytes_in_flight": ("5242880", 5_242_880),
    "max_idempotency_keys": ("5", 5),
    "drain_delay_s": ("0", 0.0),
    "drain_timeout_s": ("1e1", 10.0),
    "log_level": ("DEBUG", "DEBUG"),
    "log_format": ("console", "console"),
    "request_log_sample": ("0.01", 0.01),
    "traces": ("on", "on"),
}

# What a setting does not take, and a word of the hint that says what it does take.
BAD: list[tuple[str, str, str]] = [
    ("api_port", "-1", ">= 0"),
    ("api_port", "65536", "<= 65535"),
    ("api_port", "http", "must be a whole number, without a unit"),
    ("api_docs", "yes", "Use one of on, off"),
    ("ops_port", "80.5", "must be a whole number, without a unit"),
    ("database_pool_size", "0", ">= 1"),
    ("database_pool_size", "1001", "<= 1000"),
    ("max_unconfirmed_messages", "1000000001", "<= 1000000000"),
    ("max_connections", "1" + "0" * 13, "<= 1000000000000"),
    ("database_timeout_s", "0", "> 0"),
    ("database_timeout_s", "2s", "must be a number, without a unit"),
    ("database_statement_cache", "-1", ">= 0"),
    ("amqp_exchange", "sms outbound", "matching regex"),
    ("amqp_exchange", "q" * 201, "matching regex"),
    ("amqp_queue", "büro", "matching regex"),
    ("amqp_queue_type", "quorums", "Invalid enum value"),
    ("amqp_topology", "Declare", "Invalid enum value"),
    ("messages_per_envelope", "0", "Expected `int` >= 1"),
    ("messages_per_envelope", "1001", "Expected `int` <= 1000"),
    ("queue_shards", "0", "Expected `int` >= 1"),
    ("answer_timeout_s", "0", "Expected `float` > 0"),
    ("amqp_connections", "0", ">= 1"),
    ("amqp_connections", "65", "<= 64"),
    ("amqp_heartbeat_s", "0", ">= 1"),  # 0 would be "no heartbeat": a dead broker would never show
    ("amqp_heartbeat_s", "601", "<= 600"),
    ("amqp_connect_timeout_s", "-1", "> 0"),
    ("confirm_timeout_s", "nan", "> 0"),
    ("confirm_timeout_s", "inf", "<= 3600"),
    ("abandon_timeout_s", "3601", "<= 3600"),
    ("max_unconfirmed_messages", "999", ">= 1000"),
    ("max_unconfirmed_bytes", "128MB", "must be a whole number, without a unit"),
    ("max_connections", "0", ">= 1"),
    ("header_timeout_s", "0", "> 0"),
    ("body_timeout_s", "0", "> 0"),
    ("keepalive_timeout_s", "never", "must be a number, without a unit"),
    ("max_requests_in_flight", "1_000.0.0", "must be a whole number, without a unit"),
    ("max_bytes_in_flight", "5242879", ">= 5242880"),
    ("max_idempotency_keys", "0", ">= 1"),
    ("drain_delay_s", "-0.1", ">= 0"),
    ("drain_timeout_s", "0", "> 0"),
    ("log_level", "verbose", "Invalid enum value"),
    ("log_format", "text", "Use one of json, console"),
    ("request_log_sample", "1.01", "<= 1"),
    ("request_log_sample", "-0.1", ">= 0"),
    ("request_log_sample", "1%", "must be a number, without a unit"),
    ("traces", "true", "Invalid enum value"),
]


def test_the_tables_of_this_module_have_every_setting() -> None:
    assert set(GOOD) == set(Settings.__struct_fields__)
    # The URLs have tests of their own below, files and the socket in tests/integration/tls/test_files.py.
    free_text = {"database_url", "amqp_url", "api_host", "ops_host", "api_socket"}
    free_text |= {name for name in Settings.__struct_fields__ if name.endswith("_file")}
    assert {name for name, _, _ in BAD} | free_text == set(Settings.__struct_fields__)


def test_with_only_the_two_urls_every_other_setting_has_its_default() -> None:
    loaded = config.load(URLS)
    assert loaded == Settings(database_url=URLS["GATEWAY_DATABASE_URL"], amqp_url=URLS["GATEWAY_AMQP_URL"])


@pytest.mark.parametrize(("name", "raw", "value"), [(name, *good) for name, good in GOOD.items()])
def test_each_setting_is_read_from_its_own_variable_and_no_other_changes(name: str, raw: str, value: object) -> None:
    before, after = config.load(URLS), config.load(URLS | {f"GATEWAY_{name.upper()}": f" {raw}\n"})
    assert getattr(after, name) == value != getattr(before, name)
    assert type(getattr(after, name)) is type(getattr(before, name))
    changed = {field for field in Settings.__struct_fields__ if getattr(before, field) != getattr(after, field)}
    assert changed == {name}


@pytest.mark.parametrize(("name", "raw", "hint"), BAD)
def test_a_bad_value_is_refused_with_the_variables_name_and_what_it_takes(name: str, raw: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        config.load(URLS | {f"GATEWAY_{name.upper()}": raw})
    assert str(refused.value).startswith(f"GATEWAY_{name.upper()}={raw!r} ")
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"DATABASE_TIMEOUT_S": "10.5"},
            "GATEWAY_DATABASE_TIMEOUT_S=10.5 must not be above GATEWAY_CONFIRM_TIMEOUT_S=10:",
        ),
        ({"CONFIRM_TIMEOUT_S": "1", "AMQP_HEARTBEAT_S": "1"}, "GATEWAY_DATABASE_TIMEOUT_S=2 must not be above"),
        ({"AMQP_HEARTBEAT_S": "11"}, "GATEWAY_AMQP_HEARTBEAT_S=11 must not be above GATEWAY_CONFIRM_TIMEOUT_S=10:"),
        ({"CONFIRM_TIMEOUT_S": "4"}, "GATEWAY_AMQP_HEARTBEAT_S=5 must not be above GATEWAY_CONFIRM_TIMEOUT_S=4:"),
        ({"ABANDON_TIMEOUT_S": "9"}, "GATEWAY_CONFIRM_TIMEOUT_S=10 must not be above GATEWAY_ABANDON_TIMEOUT_S=9:"),
        ({"CONFIRM_TIMEOUT_S": "60"}, "GATEWAY_CONFIRM_TIMEOUT_S=60 must not be above GATEWAY_ABANDON_TIMEOUT_S=30:"),
    ],
)
def test_deadlines_that_contradict_each_other_are_refused_by_name(variables: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        config.load(URLS | {f"GATEWAY_{name}": value for name, value in variables.items()})
    assert str(refused.value).startswith(says)


def test_equal_deadlines_are_accepted() -> None:
    names = ("DATABASE_TIMEOUT_S", "AMQP_HEARTBEAT_S", "CONFIRM_TIMEOUT_S", "ABANDON_TIMEOUT_S")
    loaded = config.load(URLS | {f"GATEWAY_{name}": "7" for name in names})
    assert (loaded.database_timeout_s, loaded.abandon_timeout_s) == (7.0, 7.0)


@pytest.mark.parametrize("name", GOOD)
def test_set_but_empty_is_not_set(name: str) -> None:
    """Compose files and shells write an unset variable as an empty one."""
    if f"GATEWAY_{name.upper()}" in URLS:
        with pytest.raises(ConfigurationError, match=f"GATEWAY_{name.upper()} is not set"):
            config.load(URLS | {f"GATEWAY_{name.upper()}": " "})
    else:
        assert config.load(URLS | {f"GATEWAY_{name.upper()}": " "}) == config.load(URLS)


@pytest.mark.parametrize("variable", URLS)
def test_a_missing_url_is_named_with_an_example_of_one(variable: str) -> None:
    environ = {name: url for name, url in URLS.items() if name != variable}
    with pytest.raises(ConfigurationError, match=rf"{variable} is not set.*(postgres|amqp)://user:password@host/name"):
        config.load(environ)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("GATEWAY_DATABASE_URL", "mysql://u:pass-word@h/db"),
        ("GATEWAY_DATABASE_URL", "db.internal"),
        ("GATEWAY_DATABASE_URL", "postgres://u:pass-word@h/db?sslmode=disable&sslmode=prefer"),
        ("GATEWAY_DATABASE_URL", "postgres://[::1"),
        ("GATEWAY_DATABASE_URL", "postgres://user:pass-word/db"),
        ("GATEWAY_DATABASE_URL", "postgres://u:pass-word@h1:5432,h2:543x/db"),
        ("GATEWAY_DATABASE_URL", "postgres://u:pass-word@h:65536/db"),
        ("GATEWAY_AMQP_URL", "http://u:pass-word@h/"),
        ("GATEWAY_AMQP_URL", "mq.internal:5672"),
        ("GATEWAY_AMQP_URL", "amqp://u:pass-word@h1/,http://u:pass-word@h2/"),
        ("GATEWAY_AMQP_URL", "amqp://u:pass-word@h1/,h2"),
        ("GATEWAY_AMQP_URL", "amqp://[::1"),
        ("GATEWAY_AMQP_URL", "amqp://u:pass-word@h:port/"),
        ("GATEWAY_AMQP_URL", "amqp://u:pass-word@h:65536/"),
        ("GATEWAY_AMQP_URL", "amqp:///"),
        ("GATEWAY_AMQP_URL", ","),
    ],
)
def test_an_unusable_url_is_refused_at_start_and_is_not_shown(variable: str, url: str) -> None:
    """Found later, it would be a failed or an endless task in a process that looks alive."""
    with pytest.raises(ConfigurationError, match=variable) as refused:
        config.load(URLS | {variable: url})
    assert "pass-word" not in str(refused.value)


def told(loaded: Settings) -> str:
    """Return every text form of the settings that a log line could contain."""
    return f"{loaded!r} {loaded} {loaded:} {loaded.masked()} {msgspec.json.encode(loaded.masked()).decode()}"


def test_passwords_are_never_shown_and_everything_else_is() -> None:
    shown = told(config.load(URLS))
    assert "secret" not in shown
    assert "postgres://gateway:***@db.internal/gateway" in shown
    assert "amqp://gateway:***@mq1.internal/,amqp://gateway:***@mq2.internal/" in shown
    assert "confirm_timeout_s=10.0" in shown


@pytest.mark.parametrize("odd", [*"@:/,?#[]&=+$!'()*;%", "@/", "://", "/@", "#@", "?@"])
@pytest.mark.parametrize("variable", URLS)
def test_a_password_that_should_have_been_percent_encoded_is_refused_or_masked(variable: str, odd: str) -> None:
    scheme = "postgres" if "DATABASE" in variable else "amqp"
    try:
        shown = told(config.load(URLS | {variable: f"{scheme}://user:hunter1{odd}hunter2{odd}hunter3@host/"}))
    except ConfigurationError as error:
        shown = str(error)
    assert "hunter" not in shown


def test_nodes_are_given_in_order_without_the_spaces_between_them() -> None:
    loaded = config.load(URLS | {"GATEWAY_AMQP_URL": "amqp://a/ , amqp://b/,,amqp://c/,"})
    assert loaded.amqp_nodes() == ["amqp://a/", "amqp://b/", "amqp://c/"]


def test_there_is_one_queue_or_one_for_each_shard() -> None:
    """A deployment without shards keeps the queue that it has."""
    assert config.load(URLS).queues() == ["sms.outbound"]
    assert config.load(URLS | {"GATEWAY_QUEUE_SHARDS": "2"}).queues() == ["sms.outbound.0", "sms.outbound.1"]


def test_variables_without_effect_are_reported_and_not_refused() -> None:
    environ = URLS | {
        "GATEWAY_CONFIRM_TIMEOUT": "5",
        "GATEWAY_PORT": "tcp://10.0.0.1:80",  # Kubernetes, beside a Service named "gateway"
        "GATEWAY_LOG_LEVEL": "INFO",
        "PATH": "/bin",
        "PGPORT": "tcp://10.0.0.1:5432",
        "PGDATA": "/var/lib/postgresql",  # of the server
        "XGATEWAY_Y": "1",
    }
    assert config.unknown_variables(environ) == ["GATEWAY_CONFIRM_TIMEOUT", "GATEWAY_PORT"]
    assert config.ignored_variables(environ) == ["PGPORT"]
    assert config.load(environ) == config.load(URLS)


def test_migrations_need_the_database_url_only() -> None:
    assert config.load_database_url({"GATEWAY_DATABASE_URL": " postgres://u@localhost/db "}) == (
        "postgres://u@localhost/db?sslmode=disable"
    )
    with pytest.raises(ConfigurationError, match="GATEWAY_DATABASE_URL is not set"):
        config.load_database_url({})
    with pytest.raises(ConfigurationError, match="GATEWAY_DATABASE_URL is not a postgres URL"):
        config.load_database_url({"GATEWAY_DATABASE_URL": "u@h/db"})


VERIFIED = "sslmode=verify-full&sslrootcert=system"


@pytest.mark.parametrize(
    ("url", "spelt_out"),
    [
        ("postgres://u:p@db.internal/x", f"postgres://u:p@db.internal/x?{VERIFIED}"),
        ("postgres://10.0.0.7:6432/x?application_name=y", f"postgres://10.0.0.7:6432/x?application_name=y&{VERIFIED}"),
        ("postgres://127.0.0.1,db.internal/x", f"postgres://127.0.0.1,db.internal/x?{VERIFIED}"),
        ("postgres://localhost.evil.example/x", f"postgres://localhost.evil.example/x?{VERIFIED}"),
        ("postgres:///x", f"postgres:///x?{VERIFIED}"),  # libpq's PGHOST may lead anywhere
        ("postgres://db.internal/x?sslmode=disable", "postgres://db.internal/x?sslmode=disable"),
        ("postgres://db.internal/x?sslmode=require", "postgres://db.internal/x?sslmode=require"),
        (
            "postgres://db.internal/x?sslrootcert=/ca.pem",
            "postgres://db.internal/x?sslrootcert=/ca.pem&sslmode=verify-full",
        ),
        ("postgres://localhost/x", "postgres://localhost/x?sslmode=disable"),
        ("postgres://u@127.8.9.1:5433,[::1]/x", "postgres://u@127.8.9.1:5433,[::1]/x?sslmode=disable"),
        ("postgres:///x?host=/run/postgresql", "postgres:///x?host=/run/postgresql&sslmode=disable"),
        ("postgres://%2Frun%2Fpostgresql/x", "postgres://%2Frun%2Fpostgresql/x?sslmode=disable"),
    ],
)
def test_a_database_elsewhere_is_verified_unless_its_url_says_otherwise(url: str, spelt_out: str) -> None:
    assert with_tls(url) == spelt_out
    assert with_tls(spelt_out) == spelt_out


def test_files_of_the_database_are_added_to_its_url_and_what_the_url_says_itself_stays() -> None:
    files = {"GATEWAY_DATABASE_CA_FILE": "/ca 1.pem", "GATEWAY_DATABASE_CERT_FILE": "/us.pem"}
    url = config.load_database_url({"GATEWAY_DATABASE_URL": "postgres://u@127.0.0.1/x", **files})
    assert url == "postgres://u@127.0.0.1/x?sslrootcert=%2Fca+1.pem&sslcert=%2Fus.pem&sslmode=verify-full"
    assert (
        config.load(URLS | files | {"GATEWAY_DATABASE_URL": "postgres://u@127.0.0.1/x"}).database_url_with_tls() == url
    )
    said = "postgres://u@h/x?sslmode=verify-ca&sslrootcert=/other.pem&sslcert=/other.pem"
    assert config.load_database_url({"GATEWAY_DATABASE_URL": said, **files}) == said


@pytest.mark.parametrize("mode", ["prefer", "allow", "verify_full", "off"])
def test_sslmodes_that_an_attacker_in_between_can_downgrade_are_refused(mode: str) -> None:
    url = f"postgres://u:secret@db.internal/x?sslmode={mode}"
    with pytest.raises(
        ConfigurationError, match=f"GATEWAY_DATABASE_URL has sslmode={mode}. Set sslmode to one of"
    ) as refused:
        config.load(URLS | {"GATEWAY_DATABASE_URL": url})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("parameter", "setting"),
    [
        ("no_verify_ssl=1", "CA_FILE"),
        ("verify=verify_none", "CA_FILE"),
        ("cafile=/ca.pem", "CA_FILE"),
        ("cacertfile=/ca.pem", "CA_FILE"),
        ("capath=/cas", "CA_FILE"),
        ("cadata=MII", "CA_FILE"),
        ("certfile=/us.pem", "CERT_FILE"),
        ("keyfile=/us.key", "KEY_FILE"),
        ("heartbeat=30", "HEARTBEAT_S"),
        ("connection_timeout=5000", "CONNECT_TIMEOUT_S"),
        ("timeout=5", "CONNECT_TIMEOUT_S"),
    ],
)
def test_a_parameter_of_a_broker_url_that_is_a_setting_is_refused_with_its_variable(
    parameter: str, setting: str
) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"GATEWAY_AMQP_URL has {parameter.partition('=')[0]}, .*Set GATEWAY_AMQP_{setting}"
    ):
        config.load(URLS | {"GATEWAY_AMQP_URL": f"amqps://u:p@h/?{parameter}"})


@pytest.mark.parametrize(
    ("changes", "weak"),
    [
        ({}, ["GATEWAY_AMQP_URL", "GATEWAY_AMQP_URL"]),  # both nodes of URLS are spoken to in plain
        ({"GATEWAY_AMQP_URL": "amqps://mq1.internal/,amqp://127.0.0.1/,amqp://localhost:5673/"}, []),
        ({"GATEWAY_AMQP_URL": "amqps://h/", "GATEWAY_DATABASE_URL": "postgres://u@127.0.0.1/x?sslmode=disable"}, []),
        (
            {"GATEWAY_AMQP_URL": "amqps://h/", "GATEWAY_DATABASE_URL": "postgres://u@h/x?sslmode=disable"},
            ["GATEWAY_DATABASE_URL"],
        ),
        (
            {"GATEWAY_AMQP_URL": "amqps://h/", "GATEWAY_DATABASE_URL": "postgres://u@h/x?sslmode=require"},
            ["GATEWAY_DATABASE_URL"],
        ),
        (
            {"GATEWAY_AMQP_URL": "amqps://h/", "GATEWAY_DATABASE_URL": "postgres://u@h/x?sslmode=verify-ca"},
            ["GATEWAY_DATABASE_URL"],
        ),
        ({"GATEWAY_AMQP_URL": "amqps://h/", "GATEWAY_DATABASE_URL": "postgres://u@h/x"}, []),
    ],
)
def test_connections_without_verified_tls_are_reported(changes: dict[str, str], weak: list[str]) -> None:
    told_of = tls.weaknesses(config.load(URLS | changes))
    assert [line.partition(":")[0] for line in told_of] == weak
    assert "secret" not in " ".join(told_of)


@pytest.mark.parametrize(
    ("query", "verify_mode", "checks_name"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?sslmode=verify-full", ssl.CERT_REQUIRED, True),
        ("?sslmode=verify-ca", ssl.CERT_REQUIRED, False),
        ("?sslmode=require&sslrootcert=system", ssl.CERT_REQUIRED, False),
        ("?sslmode=require", ssl.CERT_NONE, False),
    ],
)
def test_each_sslmode_verifies_what_libpqs_does(query: str, verify_mode: ssl.VerifyMode, checks_name: bool) -> None:
    context = tls.database_context(Database.of(f"postgres://u@h/x{query}"))
    assert context
    assert (context.verify_mode, context.check_hostname) == (verify_mode, checks_name)


def test_a_unix_socket_has_no_tls() -> None:
    settings = config.load(URLS | {"GATEWAY_API_SOCKET": "/run/api", "GATEWAY_API_TLS_CERT_FILE": "/tls/api.pem"})
    with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET serves .* without TLS"):
        tls.check(settings)


def test_the_broker_is_always_verified() -> None:
    context = tls.broker_context(config.load(URLS))
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_settings_do_not_change_once_read() -> None:
    with pytest.raises(AttributeError):
        config.load(URLS).api_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("api_host", "ops_host"),
    [
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - not listened on
        ("10.0.0.1", "0.0.0.0"),  # noqa: S104
        ("::", "127.0.0.1"),
        ("gateway.internal", "::"),
        ("[::1]", "::1"),
        ("gateway.internal", "gateway.internal"),
    ],
)
def test_one_port_for_both_listeners_is_refused_where_their_addresses_overlap(api_host: str, ops_host: str) -> None:
    hosts = {"GATEWAY_API_HOST": api_host, "GATEWAY_OPS_HOST": ops_host}
    with pytest.raises(
        ConfigurationError, match=r"GATEWAY_API_PORT and GATEWAY_OPS_PORT are both 9090, on overlapping"
    ):
        config.load(URLS | hosts | {"GATEWAY_API_PORT": "9090"})


@pytest.mark.parametrize(
    "given",
    [
        {"GATEWAY_API_PORT": "0", "GATEWAY_OPS_PORT": "0"},
        {"GATEWAY_API_PORT": "9090", "GATEWAY_API_SOCKET": "/run/api"},
        {"GATEWAY_API_PORT": "9090", "GATEWAY_API_HOST": "10.0.0.1"},
        {"GATEWAY_API_PORT": "9090", "GATEWAY_API_HOST": "10.0.0.1", "GATEWAY_OPS_HOST": "ops.internal"},
        {"GATEWAY_API_PORT": "9090", "GATEWAY_OPS_HOST": "::1"},
    ],
)
def test_one_port_for_both_listeners_is_right_on_two_addresses_and_if_only_one_has_it(given: dict[str, str]) -> None:
    config.load(URLS | given)
