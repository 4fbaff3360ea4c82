"""The command line: serve, migrate, declare, status, and the administration of accounts, keys and lists."""

import asyncio
import io
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from yarl import URL

# Commands that need aiohttp or the broker's libraries import them when they run: the others then start 0.3 s faster.
from gateway import __version__, config, tls
from gateway.cli import migrations
from gateway.cli.admin import Admin, AdminError, Row, open_admin
from gateway.postgres.queries import EXPIRES_SOON_DAYS
from gateway.telemetry import log

DAY = timedelta(days=1)
MOST_DAYS = 3_650
MAX_ID = 2**63 - 1  # of a bigint
_UNITS = {"d": DAY, "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}


def duration(text: str | timedelta) -> timedelta:
    """Return a duration such as 90d, 24h, 30m or 10s. Raises BadParameter."""
    if isinstance(text, timedelta):  # a default
        return text
    found = re.fullmatch(r"([0-9]{1,9})([dhms])", text)
    if found is None or not timedelta() < (wanted := int(found[1]) * _UNITS[found[2]]) <= MOST_DAYS * DAY:
        raise typer.BadParameter(f"{text!r} is not a duration such as 90d, 24h or 30m, of at most {MOST_DAYS} days")
    return wanted


def list_id(text: str) -> int:
    """Return the id of a list. Raises AdminError for a phone number, and BadParameter for other text."""
    if text.startswith("+"):
        raise AdminError("this command takes the id of a list, not its number: `list list ACCOUNT` shows both")
    if re.fullmatch(r"[0-9]{1,19}", text) is None or not 1 <= int(text) <= MAX_ID:
        raise typer.BadParameter(f"{text!r} is not a whole number from 1 to {MAX_ID}")
    return int(text)


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
account_app = typer.Typer(help="Accounts, which own keys and lists.", no_args_is_help=True)
key_app = typer.Typer(help="API keys, which authenticate an account.", no_args_is_help=True)
list_app = typer.Typer(help="Sending lists, the numbers from which an account sends.", no_args_is_help=True)
app.add_typer(account_app, name="account")
app.add_typer(key_app, name="key")
app.add_typer(list_app, name="list")

WIDEST = 100_000  # columns of a table: rich would cut the values of a wider one, even a new key

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AccountId = Annotated[int, typer.Argument(min=1, max=MAX_ID, help="The account's id, from `account list`.")]
KeyId = Annotated[int, typer.Argument(min=1, max=MAX_ID, help="The key's id, from `key list`.")]
Gateways = Annotated[
    list[str] | None,
    typer.Option("--gateway", metavar="URL", help="An operations listener. May be repeated. Default: this machine's."),
]
ListId = Annotated[int, typer.Argument(parser=list_id, help="The list's id, from `list list`.")]


@app.callback(invoke_without_command=True)
def main(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Bulk-SMS ingestion gateway."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def serve(
    *,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Number of processes. All share the API port.")] = 1,
) -> None:
    """Serve the API and the operations listener until SIGTERM, then drain."""
    from gateway.server import process

    process.run(config.load(), workers=workers)


@app.command(hidden=True)
def work(ops_socket: str, port: str) -> None:
    """Run one worker of `serve --workers`."""
    from gateway.server import process

    process.run_worker(config.load(), process.WorkerSockets.parse(ops_socket, port))


@app.command()
def migrate(
    *,
    grant_to: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="Then give this database role exactly the rights to serve."),
    ] = None,
) -> None:
    """Apply all pending migrations with dbmate. Create the database if it is missing."""
    if grant_to == "":  # an unset variable of a script
        raise AdminError("--grant-to needs the name of a database role")
    failures: list[OSError] = []

    def show(line: str) -> None:
        try:
            typer.echo(line, nl=False)
        except OSError as error:  # migrations go on
            failures.append(error)

    applied = migrations.apply(config.load_database_url(), show, statement_cache_size=config.load_statement_cache())
    show(f"migrations applied now: {applied}, pending: 0\n")
    if grant_to:
        _administer(lambda admin: admin.grant_service(grant_to), as_json=False)
    with _printing():
        if failures:
            raise failures[0]


@app.command()
def declare() -> None:
    """Declare exchanges and queues at the broker, and name them, for gateways with GATEWAY_AMQP_TOPOLOGY=check."""
    from gateway.amqp.topology import describe_topology

    log.configure("CRITICAL")  # the error says it all; the libraries would log it as well
    settings = msgspec.structs.replace(config.load(), amqp_topology="declare")
    tls.check(settings)
    node = _declare_at_a_node(settings)
    with _printing():
        typer.echo(f"These exist now at the broker at {node}:")
        for line in describe_topology(settings):
            typer.echo(f"  {line}")


def _declare_at_a_node(settings: config.Settings) -> str:
    """Declare at the first node that accepts it, and return its address. Raises AdminError if none does."""
    from gateway.amqp.connection import declare_topology
    from gateway.amqp.transport import address

    failures = []
    for url in settings.amqp_nodes():
        node = address(URL(url))
        try:
            asyncio.run(declare_topology(msgspec.structs.replace(settings, amqp_url=url)))
        except OSError as error:
            failures.append(f"{node}: {error}")
        else:
            return node
    raise AdminError(f"cannot declare at the broker: {'; '.join(failures)}")


@app.command("status")
def show_status(
    *,
    gateway: Gateways = None,
    max_backlog: Annotated[
        int | None,
        typer.Option(min=0, help="Messages in an outbound queue above which they are a problem. Default: 510,000 SMS."),
    ] = None,
    max_dead_letters: Annotated[int, typer.Option(min=0, help="Dead letters above which they are a problem.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the state of gateways, broker and database. Exit status 1 if there is a problem."""
    from gateway.cli import status

    log.configure("CRITICAL")  # the output names each problem; the libraries would log it as well
    settings = config.load()
    tls.check(settings)
    urls = _operations_listeners(gateway, settings)
    limits = status.Limits(max_backlog, max_dead_letters)
    known = migrations.known_versions()
    found = asyncio.run(status.collect(settings, urls, known, must_run=gateway is not None, limits=limits))
    with _printing():
        typer.echo(msgspec.json.encode(found) if as_json else status.as_text(found))
    if not found.ok:
        raise typer.Exit(1)


def _operations_listeners(given: list[str] | None, settings: config.Settings) -> list[URL]:
    """Return the URLs of the operations listeners. Raises AdminError for text that is not a URL."""
    if not given:
        # A listener on all addresses also listens on loopback.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.ops_host, settings.ops_host)  # noqa: S104
        return [URL.build(scheme="http", host=host, port=settings.ops_port)]
    return [_operations_listener(text if "://" in text else f"http://{text}") for text in given]


def _operations_listener(text: str) -> URL:
    with suppress(ValueError):
        url = URL(text)
        if url.scheme == "http" and url.host:
            return url
    raise AdminError(f"{text} is not the URL of an operations listener, such as http://127.0.0.1:9090")


@account_app.command("create")
def account_create(name: str, *, as_json: AsJson = False) -> None:
    """Create an active account."""
    _administer(lambda admin: admin.create_account(name), as_json=as_json)


@account_app.command("suspend")
def account_suspend(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """Refuse the account's requests, from the next one on."""
    _administer(lambda admin: admin.set_account_status(account_id, "suspended"), as_json=as_json)


@account_app.command("activate")
def account_activate(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """Lift a suspension."""
    _administer(lambda admin: admin.set_account_status(account_id, "active"), as_json=as_json)


@account_app.command("list")
def account_list(*, as_json: AsJson = False) -> None:
    """List all accounts, with the numbers of their usable keys and active lists."""
    _administer(Admin.list_accounts, as_json=as_json)


@key_app.command("create")
def key_create(
    account_id: AccountId,
    *,
    name: Annotated[str, typer.Option(help='What it is for, such as "billing, production".')] = "",
    expires: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="90d", help="Its lifetime. Default: without end."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key and print it. The key is stored nowhere and cannot be shown again."""
    _administer(lambda admin: admin.create_key(account_id, name, expires), as_json=as_json)


@key_app.command("rotate")
def key_rotate(
    key_id: KeyId,
    *,
    overlap: Annotated[
        timedelta,
        typer.Option(
            parser=duration, metavar="24h", show_default="24h", help="How long the old key is accepted beside it."
        ),
    ] = DAY,
    as_json: AsJson = False,
) -> None:
    """Create a key with the same account, name and lifetime, and let the old one expire after the overlap.

    A key that has been replaced already is refused.
    """
    _administer(lambda admin: admin.rotate_key(key_id, overlap), as_json=as_json)


@key_app.command("expiring")
def key_expiring(
    *,
    within: Annotated[
        timedelta,
        typer.Option(
            parser=duration, metavar="14d", show_default=f"{EXPIRES_SOON_DAYS}d", help="Time until they expire."
        ),
    ] = (EXPIRES_SOON_DAYS * DAY),
    as_json: AsJson = False,
) -> None:
    """List the keys of all accounts that expire soon and have no successor."""
    _administer(lambda admin: admin.list_expiring_keys(within), as_json=as_json)


@key_app.command("revoke")
def key_revoke(key_id: KeyId, *, as_json: AsJson = False) -> None:
    """Refuse the key, from the next request on."""
    _administer(lambda admin: admin.revoke_key(key_id), as_json=as_json)


@key_app.command("list")
def key_list(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """List the account's keys, by their first characters."""
    _administer(lambda admin: admin.list_keys(account_id), as_json=as_json)


@list_app.command("add")
def list_add(
    account_id: AccountId,
    number: Annotated[str, typer.Argument(help="An E.164 number such as +18005551000.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Add a number from which the account may send."""
    _administer(lambda admin: admin.add_list(account_id, number), as_json=as_json)


@list_app.command("deactivate")
def list_deactivate(list_id: ListId, *, as_json: AsJson = False) -> None:
    """Refuse messages from the list, from the next request on."""
    _administer(lambda admin: admin.set_list_status(list_id, "inactive"), as_json=as_json)


@list_app.command("activate")
def list_activate(list_id: ListId, *, as_json: AsJson = False) -> None:
    """Accept messages from the list again."""
    _administer(lambda admin: admin.set_list_status(list_id, "active"), as_json=as_json)


@list_app.command("list")
def list_list(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """List the account's lists."""
    _administer(lambda admin: admin.list_lists(account_id), as_json=as_json)


def _administer(task: Callable[[Admin], Awaitable[Row | list[Row]]], *, as_json: bool) -> None:
    if sys.stdout is None:  # it was closed at the start; the only copy of a new key would be lost
        raise AdminError("refused: standard output is closed, so the result could not be printed")

    async def run() -> Row | list[Row]:
        url, statement_cache = config.load_database_url(), config.load_statement_cache()
        async with open_admin(url, statement_cache_size=statement_cache) as admin:
            return await task(admin)

    result = asyncio.run(run())
    with _printing():
        if as_json:
            typer.echo(msgspec.json.encode(result))
        else:
            _print_table(result if isinstance(result, list) else [result])


@contextmanager
def _printing() -> Iterator[None]:
    """Print a result within this context, at once. Raises AdminError if it cannot be printed."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Some versions of Python, such as 3.11.2 and 3.13, write what is left once more at their end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise AdminError(f"the command was carried out, but its result cannot be printed: {error}") from None


def _print_table(rows: list[Row]) -> None:
    """Print a table; in a terminal that is too narrow for it, a line for each value. No value is cut or wrapped."""
    if not rows:
        typer.echo("none")
        return
    names = [name.replace("_", " ") for name in rows[0]]
    cells = [[log.printable(_cell(value)) for value in row.values()] for row in rows]
    table = Table(*names)
    for row in cells:
        table.add_row(*map(Text, row))  # rich would interpret the markup of a plain string
    console = Console(width=WIDEST)
    if not sys.stdout.isatty() or Measurement.get(console, console.options, table).maximum <= Console().width:
        console.print(table)
        return
    longest = max(map(len, names))
    records = [[f"{name:{longest}}  {cell}" for name, cell in zip(names, row, strict=True)] for row in cells]
    typer.echo("\n\n".join(map("\n".join, records)))


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return "" if value is None else str(value)


def run() -> None:
    """Run the command line. An expected error is one line on standard error, with exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding lacks must not cost a new key
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_encoding(sys.argv[1:])
        app()
    except (config.ConfigurationError, AdminError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _check_encoding(arguments: list[str]) -> None:
    """Raise AdminError for an argument that is not UTF-8: neither the database nor JSON accepts such a text."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise AdminError(f"the argument {argument!a} is not UTF-8") from None
