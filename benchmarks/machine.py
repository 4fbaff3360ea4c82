"""Where and of what figures were made: without it they say nothing."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from benchmarks.workers import REPOSITORY

PACKAGES = ("aiohttp", "uvloop", "msgspec", "asyncpg", "aio-pika", "fastapi", "pydantic", "uvicorn")


class Machine(msgspec.Struct):
    """Stands in every JSON file and report."""

    date: str
    commit: str
    processor: str
    cores: int
    memory_gb: float
    kernel: str
    versions: dict[str, str]
    load_average: float  # of the minute before: what else the machine was doing


def describe() -> Machine:
    """This machine, now."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        kernel=platform.release(),
        versions=versions,
        load_average=os.getloadavg()[0],
    )


def _commit() -> str:
    """The commit's first characters; with a + when files differ from it."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", *arguments],  # noqa: S607
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
