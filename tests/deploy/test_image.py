"""The container image, built from the Dockerfile and run as its user, without Docker and without an image registry.

A Debian made by debootstrap replaces the base image, so Python is Debian's. The test takes two minutes and 2 GB of
disk, so it runs only if TEST_IMAGE=1. It needs root, and Debian's packages buildah and debootstrap.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from testbed import Gateway, Servers

pytestmark = [
    pytest.mark.skipif(os.environ.get("TEST_IMAGE") != "1", reason="takes two minutes: set TEST_IMAGE=1 to run it"),
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "localhost/debian-python", "localhost/sms-gateway"
ISOLATION = ["--isolation=chroot", "--network=host"]
PACKAGES = "--include=python3,python3-venv,python3-pip"
# What this machine needs to reach a package index. Mounted while the image is built, and not part of it.
INDEX_SETTINGS = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
DRAIN_WITHIN_S = 35.0  # the grace period of compose.yaml and of the manifests

Buildah = Callable[..., list[str]]


def run(command: list[str]) -> str:
    """Run a command to its end and return its standard output."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Buildah's command line, on a storage of its own that holds the built image."""
    folder = tmp_path_factory.mktemp("image")

    def command(*arguments: str) -> list[str]:
        storage = ["--storage-driver=vfs", f"--root={folder}/images", f"--runroot={folder}/run"]
        return ["buildah", *storage, *arguments]

    try:
        run(["debootstrap", "--variant=minbase", PACKAGES, "stable", f"{folder}/debian"])
        (folder / "debian/usr/bin/python").symlink_to("python3")
        base = run(command("from", "scratch"))
        run(command("add", "--quiet", base, f"{folder}/debian", "/"))
        run(command("commit", "--quiet", "--rm", base, BASE))
        options = [*ISOLATION, "--format=docker", *(f"--volume={path}:{path}:ro" for path in INDEX_SETTINGS)]
        run(command("bud", *options, f"--build-arg=PYTHON_IMAGE={BASE}", f"--tag={IMAGE}", "."))
        yield command
    finally:
        shutil.rmtree(folder)


class Container(Gateway):
    """A container of the image, as the image's user and without a capability."""

    def __init__(self, buildah: Buildah, settings: dict[str, str]) -> None:
        super().__init__(settings)
        self._buildah = buildah
        self._id = run(buildah("from", "--pull-never", IMAGE))
        self.image: dict[str, Any] = json.loads(run(buildah("inspect", "--type=image", IMAGE)))["Docker"]["config"]

    def _in_container(self, *command: str) -> list[str]:
        settings = {name: value for name, value in self._environment().items() if name.startswith("GATEWAY_")}
        variables = [f"--env={name}={value}" for name, value in settings.items()]
        return self._buildah("run", *ISOLATION, "--cap-drop=all", *variables, self._id, "--", *command)

    def _command(self) -> list[str]:
        return self._in_container(*self.image["Entrypoint"], *self.image["Cmd"])

    def administer(self, *arguments: str) -> str:
        """Run a command of the gateway in the container and return its standard output."""
        return run(self._in_container(*self.image["Entrypoint"], *arguments))

    def check_health(self) -> None:
        """Run the image's own health check in the container."""
        run(self._in_container(*self.image["Healthcheck"]["Test"][1:]))

    def user_ids(self) -> set[int]:
        """Return the user ids of the gateway's process: real, effective and saved."""
        return set(self._process().uids())

    def terminate(self) -> int:
        """Send SIGTERM to the gateway and return the exit status. `buildah run` does not forward the signal."""
        assert self._supervisor is not None
        self._process().terminate()
        return self._supervisor.wait(DRAIN_WITHIN_S)

    def files_written(self) -> list[str]:
        """Return the files in the container that belong to the image's user."""
        user = self.image["User"].partition(":")[0]
        return run(["find", run(self._buildah("mount", self._id)), "-uid", user]).splitlines()

    def _process(self) -> psutil.Process:
        return psutil.Process(self.processes[-1])


async def test_the_image_migrates_serves_and_drains_as_its_user(buildah: Buildah, servers: Servers) -> None:
    settings = servers.environment() | {"GATEWAY_OPS_HOST": "127.0.0.1"}  # the image listens to the network
    if servers.postgres is not None:
        settings["GATEWAY_DATABASE_URL"] = servers.postgres.create_database("image")
    container = Container(buildah, settings)
    try:
        container.administer("migrate")
        account = str(json.loads(container.administer("account", "create", "Acme", "--json"))["id"])
        key = json.loads(container.administer("key", "create", account, "--json"))["key"]
        number = "+18005551000"
        container.administer("list", "add", account, number)

        await asyncio.to_thread(container.start)
        container.check_health()
        assert container.user_ids() == {10001}
        messages = [{"to": "+14155551234", "list_number": number, "body": "Hello"}] * 10
        async with (
            aiohttp.ClientSession(headers={"X-Api-Key": key}) as session,
            session.post(f"{container.url}/api/v2/send/bulk", json={"messages": messages}) as response,
        ):
            assert await response.json() == {"queued_count": 10, "error_count": 0, "errors": []}
        assert await asyncio.to_thread(container.terminate) == 0
        assert container.files_written() == []
    finally:
        await asyncio.to_thread(container.close)
