"""A log line never shows a secret: the two filters of telemetry/log.py, and settings in every form of a URL."""

import asyncio
import gc
import json
import logging
import re
import sys
from collections.abc import Callable
from urllib.parse import quote

import asyncpg
import msgspec
import pytest

from gateway import config
from gateway.config import Settings
from gateway.ingest.wire import Message
from gateway.postgres.pool import reason
from gateway.telemetry.log import ConsoleLines, JsonLines, redact

KEY = "trk_" + "Kk0Zz9" * 5 + "aB"
TEXT = "a text for one reader"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key {KEY}!", "key trk_Kk0Z***!"),
        ("to +447911123412, +14155551234", "to +4479******12, +1415*****34"),
        ("KeyError: '+14155551234\\n'", "KeyError: '+1415*****34\\n'"),
        ("amqp://u:p@h/,amqps://u:q%40@h2:5671/v", "amqp://u:***@h/,amqps://u:***@h2:5671/v"),
        ("postgres://u:p:q@h1:5432,h2/db?x=1", "postgres://u:***@h1:5432,h2/db?x=1"),
        ("//h/db?password=abc&sslpassword=d%20e f", "//h/db?password=***&sslpassword=*** f"),
        ("amqp://:only@h", "amqp://:***@h"),
        ("+1234567 is the shortest", "+1234*67 is the shortest"),
    ],
)
def test_text_in_the_form_of_a_secret_is_masked(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-23T11:00:00.123+00:00",
        "http://127.0.0.1:8080/api/v2/send/bulk",
        "connected to the broker at mq1.internal:5672",
        "1,000 messages, 5242880 bytes, +123456",
        "{'api_port': 8080, 'database_url': 'postgres://gateway:***@db/gateway'}",
    ],
)
def test_everything_else_is_left_as_it_is(text: str) -> None:
    assert redact(text) == text


def logged(raising: Callable[[], object]) -> str:
    """Return the line that log.exception writes."""
    try:
        raising()
    except Exception:
        made = logging.LogRecord("gateway.web.api", logging.ERROR, "api.py", 7, "failed", (), sys.exc_info())
    line = JsonLines().format(made)
    assert "failed" in json.loads(line)["message"]
    return line


def look_up() -> object:
    lists: dict[str, int] = {}
    return lists[TEXT]


def wrap() -> object:
    try:
        return look_up()
    except KeyError as error:
        raise RuntimeError(repr(Message(to="+14155551234", body=TEXT))) from error


def handle_badly() -> object:
    try:
        return look_up()
    except KeyError:
        return int(TEXT)


def in_a_group() -> object:
    raise ExceptionGroup(TEXT, [ValueError(TEXT)])


def with_a_note() -> object:
    error = ValueError(TEXT)
    error.add_note(TEXT)
    raise error


def in_a_circle() -> object:
    one, other = ValueError(TEXT), ValueError(TEXT)
    one.__cause__, other.__cause__ = other, one
    raise one


@pytest.mark.parametrize(
    ("raising", "kinds"),
    [
        (look_up, ["KeyError"]),
        (wrap, ["KeyError", "RuntimeError"]),
        (handle_badly, ["KeyError", "ValueError"]),
        (lambda: msgspec.convert(TEXT, int), ["ValidationError"]),
        (in_a_group, ["ExceptionGroup"]),
        (with_a_note, ["ValueError"]),
        (in_a_circle, ["ValueError"]),
    ],
)
def test_a_traceback_shows_places_and_types_but_no_data(raising: Callable[[], object], kinds: list[str]) -> None:
    line = logged(raising)
    assert TEXT not in line
    assert "14155551234" not in line
    traceback = json.loads(line)["traceback"]
    assert re.search(".*".join(kinds), traceback, re.DOTALL), "the cause comes first"
    assert "test_secrets.py" in traceback


class Lines(logging.Handler):
    """The lines that a formatter makes of all records."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(form)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.mark.parametrize("form", [JsonLines(), ConsoleLines()])
def test_the_failure_of_a_task_that_nobody_awaits_shows_no_data(form: logging.Formatter) -> None:
    """The message is asyncio's own, and has the repr of the task with its error."""

    async def fail() -> None:
        look_up()

    async def lose_a_task() -> None:
        task = asyncio.create_task(fail(), name="lost")
        await asyncio.wait([task])

    handler = Lines(form)
    logging.getLogger("asyncio").addHandler(handler)
    try:
        asyncio.run(lose_a_task())
        gc.collect()
    finally:
        logging.getLogger("asyncio").removeHandler(handler)
    (line,) = [line for line in handler.lines if "never retrieved" in line]
    assert "name='lost'" in line
    assert "exception=KeyError>" in line
    assert TEXT not in line


def test_error_messages_about_code_are_logged_and_still_masked() -> None:
    def broken() -> object:
        raise TypeError(f"unsupported operand for +14155551234 and {KEY}")

    traceback = json.loads(logged(broken))["traceback"]
    assert traceback.endswith("TypeError: unsupported operand for +1415*****34 and trk_Kk0Z***")


def test_a_traceback_leaves_out_what_from_none_leaves_out() -> None:
    def refuse() -> object:
        try:
            return look_up()
        except KeyError:
            raise ValueError(TEXT) from None

    assert "KeyError\n" not in json.loads(logged(refuse))["traceback"]


@pytest.mark.parametrize("form", [JsonLines(), ConsoleLines()])
def test_message_fields_and_traceback_of_a_line_are_masked(form: logging.Formatter) -> None:
    made = logging.LogRecord("gateway", logging.ERROR, "x.py", 7, "key %s", (KEY,), (TypeError, TypeError(KEY), None))
    vars(made)["fields"] = {"request_id": KEY, "status": 200}
    line = form.format(made)
    assert KEY not in line
    assert line.count("trk_Kk0Z***") == 3


# Errors of the database


def detailed(error: Exception) -> Exception:
    """Return an error as PostgreSQL sends it, with the row in its detail."""
    vars(error).update(detail=f"Key (account_id, key)=(1, {TEXT}) already exists.", hint=TEXT)
    assert TEXT in str(error)
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (detailed(asyncpg.UniqueViolationError("duplicate key")), "UniqueViolationError duplicate key"),
        (asyncpg.DataError(f"invalid input for query argument $2: '{TEXT}'"), "DataError"),
        (asyncpg.exceptions._base.DataError(f"invalid input: '{TEXT}'"), "DataError"),
        (asyncpg.ClientConfigurationError(f"invalid DSN: {TEXT}"), "ClientConfigurationError"),
        (ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 5432)"), "[Errno 111] Connect call failed"),
        (TimeoutError(), "TimeoutError"),
        (asyncpg.UndefinedTableError('relation "accounts" does not exist'), "Run `python -m gateway migrate`"),
        (asyncpg.InvalidPasswordError('password authentication failed for user "u"'), 'failed for user "u"'),
    ],
)
def test_a_database_error_is_logged_without_the_values_it_quotes(error: Exception, told: str) -> None:
    assert told in reason(error)
    assert TEXT not in reason(error)


# Settings

FORMS = [
    "{scheme}://user:{password}@host/name",
    "{scheme}://:{password}@host:1234/name",
    "{scheme}://user:{password}@[::1]:1234/name",
    "{scheme}://user@host/name?password={password}",
    "{scheme}://host/name?user=u&password={password}&sslpassword={password}",
    "{scheme}://user:{password}@host/name?passfile=/x&sslkey={password}#{password}",
    " {scheme}://user:{password}@host/name\n",
]
SEVERAL = {
    "GATEWAY_DATABASE_URL": "postgres://user:{password}@one:5432,two,[::1]:5433/name?options={password}",
    "GATEWAY_AMQP_URL": "amqp://user:{password}@one/ , amqps://user:{password}@two:5671/v?auth=PLAIN",
}
SCHEMES = {"GATEWAY_DATABASE_URL": ("postgres", "postgresql"), "GATEWAY_AMQP_URL": ("amqp", "amqps")}
PASSWORDS = ["hunter2", "hünter2", "hunter2 %", "hunter2@:/?#[],&='\"", "hunter2***", "\N{KEY}hunter2"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("variable", SCHEMES)
def test_no_form_of_a_url_shows_its_password(variable: str, password: str) -> None:
    encoded = quote(password, safe="")
    forms = [form.replace("{scheme}", scheme) for form in FORMS for scheme in SCHEMES[variable]]
    for form in [*forms, SEVERAL[variable]]:
        url = form.replace("{password}", encoded)
        others = {"GATEWAY_DATABASE_URL": "postgres://u@h/d", "GATEWAY_AMQP_URL": "amqp://h/"}
        try:
            loaded = config.load(others | {variable: url})
        except config.ConfigurationError as refusal:
            texts = [str(refusal), repr(refusal)]
        else:
            texts = [told(loaded), logged_settings(loaded)]
        for shown in texts:
            assert "hunter2" not in shown, form
            assert "nter2" not in shown, form
            assert encoded not in shown, form


def told(loaded: Settings) -> str:
    return (
        f"{loaded!r} {loaded} {loaded.masked()} {msgspec.json.encode(loaded.masked()).decode()} {[loaded]} {(loaded,)}"
    )


def logged_settings(loaded: Settings) -> str:
    made = logging.LogRecord("gateway", logging.INFO, "", 1, "settings %s", (loaded,), None)
    made.fields = {"settings": loaded.masked()}
    return JsonLines().format(made) + ConsoleLines().format(made)
