"""Another commit of this repository, checked out in a temporary folder."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.drivers.workers import REPOSITORY


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit. Raises LookupError if there is no such commit.

    If the commit needs other packages than this one, its own scripts/setup installs them into its `.venv`.
    """
    with tempfile.TemporaryDirectory(prefix="sms-gateway-commit-") as parent:
        folder = Path(parent, "checkout")
        added = _git("worktree", "add", "--detach", str(folder), commit)
        if added.returncode:
            raise LookupError(f"{commit} cannot be checked out: {added.stderr.strip()}")
        try:
            if needs_other_packages(folder):
                environment = os.environ | {"VENV": str(folder / ".venv")}
                subprocess.run([folder / "scripts" / "setup"], env=environment, check=True)  # noqa: S603
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def needs_other_packages(folder: Path) -> bool:
    """Return True if the commit in a folder has other requirements than this one."""
    name = "requirements.txt"
    return (folder / name).read_bytes() != (REPOSITORY / name).read_bytes()


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
