"""The README's demo on a bare Debian: it installs what it needs, and leaves no service, process or file of a run.

Debootstrap makes each Debian with python3 and systemd, in a folder. The commands run there in a chroot, with the
network of this machine. The test takes three minutes and 2 GB of disk, so it runs only if TEST_BARE=1. It needs root
and Debian's package debootstrap.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(os.environ.get("TEST_BARE") != "1", reason="takes minutes: set TEST_BARE=1 to run it"),
    pytest.mark.timeout(1800),
]

ROOT = Path(__file__).parents[2]
PACKAGES = "--include=python3,ca-certificates,systemd,git"
# What this machine needs to reach a package index.
INDEX_SETTINGS = [Path(path) for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf", "/etc/resolv.conf")]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Services of the packages that scripts/setup installs.
UNITS = ("rabbitmq-server.service", "epmd.service", "epmd.socket")


def run(*command: str | Path) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield the folder of a bare Debian, with a clone of this repository in /src."""
    folder = tmp_path / "debian"
    try:
        run("debootstrap", "--variant=minbase", PACKAGES, request.param, folder)
        for path in INDEX_SETTINGS:
            if path.exists():
                shutil.copyfile(path, folder / path.relative_to("/"))
        run("git", "clone", "--quiet", ROOT, folder / "src")
        run("mount", "-t", "proc", "proc", folder / "proc")
        run("mount", "--bind", "/dev", folder / "dev")
        yield folder
    finally:
        for mounted in ("proc", "dev"):
            subprocess.run(["umount", folder / mounted], capture_output=True, check=False)  # noqa: S603, S607
        # A mount that is still there must not be emptied.
        if not os.path.ismount(folder / "dev"):
            shutil.rmtree(folder, ignore_errors=True)


def inside(folder: Path, command: str) -> str:
    """Run a shell command in the Debian of a folder, and return what it printed."""
    certificates = "PIP_CERT=/etc/ssl/certs/ca-certificates.crt"
    return run("chroot", folder, "env", "-i", f"PATH={PATH}", "HOME=/root", certificates, "sh", "-c", command)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of the processes that run in the Debian of a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "root").readlink() == folder.resolve():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return found


def test_the_demo_runs_and_leaves_only_packages(debian: Path) -> None:
    printed = inside(debian, "cd /src && scripts/demo --once")
    assert "exactly the 959 that the gateway counted" in printed
    assert processes_of(debian) == []
    assert list((debian / "tmp").iterdir()) == []
    assert not (debian / "usr/sbin/policy-rc.d").exists()
    states = inside(debian, f"systemctl is-enabled {' '.join(UNITS)} || true").split()
    assert states == ["disabled"] * len(UNITS)
    # Only what the demo needs: neither HAProxy nor the tools of developers.
    assert not (debian / "usr/sbin/haproxy").exists()
    assert list(debian.glob("src/.venv/lib/*/site-packages/aiohttp"))
    assert list(debian.glob("src/.venv/lib/*/site-packages/mypy")) == []
    assert inside(debian, "cd /src && git status --porcelain") == ""
