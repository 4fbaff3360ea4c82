"""The machine, the commit and the versions that figures were measured with."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("aiohttp", "uvloop", "msgspec", "asyncpg", "aio-pika", "fastapi", "pydantic", "uvicorn")


class Machine(msgspec.Struct):
    """The part that every JSON file and every report begins with."""

    date: str
    commit: str
    processor: str
    cores: int
    memory_gb: float
    kernel: str
    versions: dict[str, str]
    load_average: float  # of the minute before the run

    @property
    def summary(self) -> str:
        """One line: date, commit, processor, versions."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.date} · commit {self.commit} · {self.cores} × {self.processor} · {versions}"


def describe() -> Machine:
    """Return this machine and this checkout as they are now."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit_of(REPOSITORY),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        kernel=platform.release(),
        versions=versions,
        load_average=os.getloadavg()[0],
    )


def commit_of(folder: Path) -> str:
    """Return the short commit id of a checkout, with a + when files differ from it, or `unknown`."""
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", *arguments],  # noqa: S607
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
