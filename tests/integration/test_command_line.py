"""`python -m gateway …` as an operator types it, against the real database."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import __version__
from gateway.cli.migrations import known_versions
from testbed import Servers
from tests.support.callers import Caller, new_number
from tests.support.gateways import GatewayUnderTest, process_environment, run_gateway
from tests.support.outbound_queue import OutboundQueue


def run_json(servers: Servers, *arguments: str) -> Any:
    """Run a command with --json; return its decoded output."""
    completed = run_gateway(*arguments, "--json", database_url=servers.database_url)
    assert completed.returncode == 0, completed.stderr
    return msgspec.json.decode(completed.stdout)


async def test_what_the_command_line_creates_can_send(
    servers: Servers, gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    number = new_number()
    account = run_json(servers, "account", "create", "Acme")
    gateway.caller = Caller(key=run_json(servers, "key", "create", str(account["id"]))["key"])
    sending_list = run_json(servers, "list", "add", str(account["id"]), number)
    _, answer = await gateway.send([gateway.message(list_number=number)])
    assert answer["queued_count"] == 1
    (payload,) = await queue.take_payloads()
    assert (payload["account_id"], payload["list_id"]) == (account["id"], sending_list["id"])


async def test_what_the_command_line_takes_away_cannot_send(servers: Servers, gateway: GatewayUnderTest) -> None:
    account, key, sending_list = str(gateway.caller.account_id), str(gateway.caller.key_id), str(gateway.caller.list_id)
    body = gateway.caller.body()
    assert run_json(servers, "list", "deactivate", sending_list)["status"] == "inactive"
    assert (await gateway.post(body))[1]["errors"][0]["code"] == "list_not_found"
    assert run_json(servers, "list", "activate", sending_list)["status"] == "active"
    assert run_json(servers, "account", "suspend", account)["status"] == "suspended"
    assert (await gateway.post(body))[1]["code"] == "account_suspended"
    assert run_json(servers, "account", "activate", account)["status"] == "active"
    assert (await gateway.post(body))[0] == 200
    assert run_json(servers, "key", "revoke", key)["revoked_at"]
    assert (await gateway.post(body))[1]["code"] == "invalid_api_key"


def test_tables_show_what_there_is_and_no_secret(servers: Servers) -> None:
    account = run_json(servers, "account", "create", "Table & Söhne")
    key = run_json(servers, "key", "create", str(account["id"]))["key"]
    number = new_number()
    run_json(servers, "list", "add", str(account["id"]), number)
    shown = [
        run_gateway(*arguments, database_url=servers.database_url).stdout
        for arguments in (
            ("account", "list"),
            ("key", "list", str(account["id"])),
            ("list", "list", str(account["id"])),
        )
    ]
    assert "Table & Söhne" in shown[0]
    assert key[:8] in shown[1]
    assert key not in "".join(shown)
    assert number in shown[2]
    for table in shown:
        assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC ", table), table


def test_a_table_shows_a_name_literally_and_escapes_what_the_terminal_would_obey(servers: Servers) -> None:
    name = "[red]A[/red] \x1b[31mB"
    created = run_gateway("account", "create", name, database_url=servers.database_url).stdout
    assert r"[red]A[/red] \x1b[31mB" in created
    assert "\x1b" not in created


@pytest.mark.parametrize("name", ["", "billing, production", "a name of some length " * 8])
def test_a_new_key_is_shown_whole_in_the_table(servers: Servers, name: str) -> None:
    account = run_json(servers, "account", "create", "Acme")
    command = ("key", "create", str(account["id"]), "--name", name, "--expires", "90d")
    shown = run_gateway(*command, database_url=servers.database_url).stdout
    assert re.search("trk_[0-9A-Za-z]{32}", shown)
    assert name.strip() in shown


def show_in_terminal(servers: Servers, columns: int, *arguments: str) -> str:
    """Run a command in a terminal, and return what it shows."""
    reading, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    settings = {"TERM": "xterm", "GATEWAY_DATABASE_URL": servers.database_url}
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "gateway", *arguments]
    try:
        subprocess.run(command, env=inherited | settings, stdout=terminal, timeout=60, check=True)  # noqa: S603
        return os.read(reading, 65_536).decode()
    finally:
        os.close(terminal)
        os.close(reading)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_shows_every_value_whole(servers: Servers, columns: int) -> None:
    """A new key cannot be shown a second time."""
    account = str(run_json(servers, "account", "create", "Acme")["id"])
    command = ("key", "create", account, "--name", "billing, production", "--expires", "90d")
    shown = show_in_terminal(servers, columns, *command)
    (key,) = re.findall("trk_[0-9A-Za-z]{32}", shown)
    listed = show_in_terminal(servers, columns, "key", "list", account)
    for text in (shown, listed):
        assert "billing, production" in text
        assert re.search(rf" {key[:8]}\s", text)
        assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\b", text)
        assert "…" not in text
    assert ("┏" in listed) is (columns == 200)


def test_keys_have_names_and_ends_and_are_rotated(servers: Servers) -> None:
    account = str(run_json(servers, "account", "create", "Acme")["id"])
    old = run_json(servers, "key", "create", account, "--name", "billing, production", "--expires", "10d")
    new = run_json(servers, "key", "rotate", str(old["id"]), "--overlap", "30m")
    assert (new["name"], new["replaces"]) == ("billing, production", old["id"])
    listed = {row["id"]: row for row in run_json(servers, "key", "list", account)}
    assert listed[old["id"]]["expires_at"] < listed[new["id"]]["expires_at"]
    expiring = [row for row in run_json(servers, "key", "expiring") if row["account_id"] == int(account)]
    assert [row["id"] for row in expiring] == [new["id"]]
    assert new["id"] not in {row["id"] for row in run_json(servers, "key", "expiring", "--within", "1m")}
    table = run_gateway("key", "list", account, database_url=servers.database_url).stdout
    assert "billing, production" in table
    assert new["key"] not in table


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1.5h", "1w", "3651d", "9999999999d", "١d", "1d\n"])
def test_a_lifetime_that_is_no_duration_is_refused(text: str) -> None:
    refused = run_gateway("key", "create", "1", "--expires", text, environment={"COLUMNS": "200"})
    assert refused.returncode == 2
    assert "such as 90d, 24h or 30m" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("key", "rotate", "999999999"),
            "there is no usable key 999999999: it does not exist, is revoked or has expired",
        ),
        (("key", "create", "999999999"), "there is no account 999999999"),
        (("account", "suspend", "999999999"), "there is no account 999999999"),
        (("key", "list", "999999999"), "there is no account 999999999"),
        (("list", "list", "999999999"), "there is no account 999999999"),
        (("key", "revoke", "999999999"), "there is no key 999999999"),
        (("list", "deactivate", "999999999"), "there is no list 999999999"),
        *(
            (
                ("list", action, "+18005551000"),
                "this command takes the id of a list, not its number: `list list ACCOUNT` shows both",
            )
            for action in ("deactivate", "activate")
        ),
        (("account", "create", " "), "an account needs a name"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(servers: Servers, arguments: tuple[str, ...], says: str) -> None:
    completed = run_gateway(*arguments, database_url=servers.database_url)
    assert completed.returncode == 2
    assert completed.stderr == f"error: {says}\n"


def test_a_number_sends_for_one_account_at_a_time(servers: Servers) -> None:
    one, other = (str(run_json(servers, "account", "create", name)["id"]) for name in ("one", "other"))
    number = new_number()
    kept = run_json(servers, "list", "add", one, number)
    taken = run_gateway("list", "add", other, number, database_url=servers.database_url)
    assert taken.returncode == 2
    assert "that number is a list already" in taken.stderr
    nobody = run_gateway("list", "add", "999999999", number, database_url=servers.database_url)
    assert nobody.stderr == "error: there is no account 999999999\n"
    run_json(servers, "list", "deactivate", str(kept["id"]))
    assert run_json(servers, "list", "add", other, number)["status"] == "active"
    back = run_gateway("list", "activate", str(kept["id"]), database_url=servers.database_url)
    assert back.returncode == 2
    bad = run_gateway("list", "add", one, "12345", database_url=servers.database_url)
    assert "that is not an E.164 number" in bad.stderr


def test_migrating_says_how_many_were_applied_and_twice_changes_nothing(servers: Servers) -> None:
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make an empty database in")
    url, known = servers.postgres.create_database("migrated"), len(known_versions())
    for applied in (known, 0):
        done = run_gateway("migrate", database_url=url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Applied: ") == applied
        assert done.stdout.splitlines()[-1] == f"migrations applied now: {applied}, pending: 0"
    servers.postgres.drop_database("migrated")


def test_migrations_go_on_if_their_lines_cannot_be_printed(servers: Servers) -> None:
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make an empty database in")
    url = servers.postgres.create_database("unprinted")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "migrate"],
            env=os.environ | {"GATEWAY_DATABASE_URL": url},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the command was carried out, but its result cannot be printed: ")
    assert done.stderr.count("\n") == 1
    assert run_gateway("account", "list", "--json", database_url=url).stdout == "[]\n"
    servers.postgres.drop_database("unprinted")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "GATEWAY_DATABASE_URL is not set"),
        ("mysql://x/y", "GATEWAY_DATABASE_URL is not a postgres URL"),
        ("postgres://u@127.0.0.1:1/x", "cannot reach the database of GATEWAY_DATABASE_URL"),
    ],
)
def test_a_wrong_database_url_is_one_clear_line(url: str, says: str) -> None:
    completed = run_gateway("account", "list", database_url=url)
    assert completed.returncode == 2
    assert completed.stderr.startswith(f"error: {says}")
    assert completed.stderr.count("\n") == 1


def test_a_database_without_tables_says_what_to_do(servers: Servers) -> None:
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make an empty database in")
    url = servers.postgres.create_database("empty")
    completed = run_gateway("account", "list", database_url=url)
    assert "run `python -m gateway migrate`" in completed.stderr


def test_the_version_is_told() -> None:
    assert run_gateway("--version", database_url="").stdout == f"{__version__}\n"


def test_serve_refuses_a_bad_setting_by_its_name() -> None:
    completed = run_gateway("serve", database_url="")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr.startswith("error: GATEWAY_DATABASE_URL is not set")


def test_the_environment_of_the_process_is_the_default() -> None:
    program = "from gateway import config; print(config.load().api_port, config.unknown_variables())"
    settings = {"GATEWAY_DATABASE_URL": "postgres://u@h/x", "GATEWAY_AMQP_URL": "amqp://h/", "GATEWAY_TYPO": "1"}
    completed = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program],
        env=os.environ | settings | {"GATEWAY_API_PORT": "8123"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.stdout == "8123 ['GATEWAY_TYPO']\n", completed.stderr


def test_a_result_that_cannot_be_printed_is_one_line(servers: Servers) -> None:
    """The key exists by then: the operator must know, and can revoke it."""
    account = run_json(servers, "account", "create", "Full")
    create = ["key", "create", str(account["id"])]
    for command in (create, [*create, "--json"], ["declare"], ["status"], ["status", "--json"]):
        with open("/dev/full", "w") as full:
            completed = subprocess.run(  # noqa: S603
                [sys.executable, "-m", "gateway", *command],
                env=os.environ | process_environment(servers),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert completed.returncode == 2
        assert completed.stderr == (
            "error: the command was carried out, but its result cannot be printed: [Errno 28] No space left on device\n"
        )
    assert len(run_json(servers, "key", "list", str(account["id"]))) == 2


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_result_is_printed_although_the_terminal_has_not_all_its_characters(
    servers: Servers, options: list[str]
) -> None:
    """The key exists by then."""
    account = str(run_json(servers, "account", "create", "Acme")["id"])
    environment = process_environment(servers, PYTHONIOENCODING="ascii", GATEWAY_AMQP_URL="amqp://u:p@127.0.0.1:1/")
    created = run_gateway("key", "create", account, "--name", "Söhne, 東京", *options, environment=environment)
    assert re.search("trk_[0-9A-Za-z]{32}", created.stdout), created.stderr
    assert ("Söhne, 東京" if options else r"S\xf6hne, \u6771\u4eac") in created.stdout
    shown = run_gateway("status", *options, environment=environment)
    assert shown.returncode == 1
    assert "problems" in shown.stdout
    assert shown.stderr == ""


def test_without_standard_output_no_key_is_created(servers: Servers) -> None:
    account = run_json(servers, "account", "create", "Closed")
    for options in ([], ["--json"]):
        completed = subprocess.run(  # noqa: S603
            [
                *("/bin/sh", "-c", 'exec "$@" >&-', "sh"),
                *(sys.executable, "-m", "gateway", "key", "create", str(account["id"]), *options),
            ],
            env=os.environ | {"GATEWAY_DATABASE_URL": servers.database_url},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert completed.returncode == 2
        assert completed.stderr == "error: refused: standard output is closed, so the result could not be printed\n"
    assert run_json(servers, "key", "list", str(account["id"])) == []


@pytest.mark.parametrize("after_s", [0.0, 0.3])
@pytest.mark.parametrize("arguments", [["status"], ["account", "list"]])
def test_ctrl_c_ends_a_command_without_a_traceback(servers: Servers, arguments: list[str], after_s: float) -> None:
    """Its imports, which have begun when the first library is loaded, take most of its time."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "gateway", *arguments],
        env=os.environ | servers.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        while "msgspec" not in Path(f"/proc/{command.pid}/maps").read_text():
            time.sleep(0.01)
        time.sleep(after_s)
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=30)
    assert errors == ""
