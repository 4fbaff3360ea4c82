"""`compare --against`: another commit is checked out, and its folder removed again."""

import subprocess
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.drivers import checkouts
from benchmarks.drivers.checkouts import checked_out
from benchmarks.drivers.workers import REPOSITORY


def worktrees() -> str:
    command = ["git", "-C", str(REPOSITORY), "worktree", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603


def test_a_commit_is_checked_out_and_removed() -> None:
    before = worktrees()
    with checked_out("HEAD") as folder:
        assert (folder / "gateway" / "__main__.py").exists()
        assert str(folder) in worktrees()
    assert not folder.exists()
    assert worktrees() == before


def test_packages_of_another_commit_are_installed_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkouts, "needs_other_packages", lambda folder: True)
    installed: list[tuple[Any, Any]] = []
    run = subprocess.run

    def recorded(command: list[Any], **options: Any) -> Any:
        if command[0] == "git":
            return run(command, **options)
        return installed.append((command, options["env"]))

    with monkeypatch.context() as patched:
        patched.setattr(checkouts.subprocess, "run", recorded)  # type: ignore[attr-defined]
        with checked_out("HEAD") as folder:
            ((command, environment),) = installed
            assert command == [folder / "scripts" / "setup"]
            assert environment["VENV"] == str(folder / ".venv")


@pytest.mark.parametrize("options", [["--against", "no-such-commit"], ["--against", "HEAD", "--baseline", "."]])
def test_what_cannot_be_compared_is_refused(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["compare", *options])
    assert done.exit_code == 2
    assert "--against" in done.output
